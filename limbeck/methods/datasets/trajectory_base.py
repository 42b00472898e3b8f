"""What methods share that match the training trajectories of experts: segments, inner loop, updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.flat import FlatNetwork
from limbeck.blocks.trajectories import RangeSchedule, Segment, TrajectoryBuffer
from limbeck.blocks.trajectory_matching import (
    Match,
    Mode,
    Present,
    draw_batches,
    follow,
    match_trajectory,
)
from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised
from limbeck.core.seeding import preserved_random_state
from limbeck.core.stage import Stage, Stepper
from limbeck.methods.datasets.base import ImageDistiller
from limbeck.tasks.base import Task
from limbeck.tasks.experts import ExpertConfig, build_experts

_LEAST = 1e-3  # of its initial value: the step size must stay above 0


class TrajectoryMatching(ImageDistiller):
    r"""Base: training on the synthetic images should go where training on the real ones went.

    Every step takes a segment of an expert, from epoch s to s + M, trains a network from its start for T steps of gradient descent
    on the synthetic images, and measures how far from the segment's end it ends, relative to the segment's length (see
    :mod:`limbeck.blocks.trajectory_matching`). Images, their labels if they are soft, and the step size of the inner loop learn
    from the gradient of that distance. The learnt step size is part of the product: networks are trained on it with this rate.

    Args:
        data, network, config: see :class:`~limbeck.methods.datasets.base.DatasetDistiller`. The network must keep no running
            statistics that matter (batch normalisation uses the batch's own).
        experts: trajectories of networks of this architecture, or the folder that holds them; None: they are trained before the run
            (:meth:`prepare_run`) and kept in the cache.

    Attributes:
        step_size: (), the inner loop's step size.
        experts: the trajectories, once there are any.
        schedule: where segments start.

    Without the engine::

        method = MTT((x, y), lambda: ConvNet(...), ipc=10)
        method.prepare_run(method.real, None)
        optimizers = [o.optimizer for o in method.optimisers(300).values()]
        for step in range(300):
            loss = method.losses_at(step).total
            for o in optimizers: o.zero_grad()
            loss.backward()
            for o in optimizers: o.step()
        method.distilled()
    """

    class Config(ImageDistiller.Config):
        steps: int = Field(150, ge=1, description="updates of the images")
        lr_images: float = Field(3.0, gt=0, description="learning rate of the images (SGD)")
        lr_step: float = Field(
            1e-4, ge=0, description="learning rate of the inner loop's step size (SGD, momentum 0.5)"
        )
        step_size: float = Field(0.05, gt=0, description="step size of the inner loop to begin with")
        inner_steps: int = Field(10, ge=1, description="steps T on synthetic images that must cover a segment")
        segment: int = Field(2, ge=1, description="epochs M of a segment")
        min_start: int = Field(0, ge=0, description="first epoch at which a segment may start")
        max_start: int | None = Field(10, ge=1, description="segments start before this epoch; none: wherever they fit")
        batch_synthetic: int = Field(100, ge=1, description="stored synthetic images per inner step")
        gradient: Mode = Field(
            "adjoint", description="adjoint (exact, memory-flat), unroll (exact), tesla (approximate, memory-flat)"
        )
        checkpointing: bool = Field(False, description="keep only every sqrt(T)-th state of the inner loop")
        expert_count: int = Field(6, ge=1, description="number of experts")
        expert_epochs: int = Field(20, ge=1, description="epochs of each expert; one snapshot each")
        expert_batch_size: int = Field(64, ge=1, description="real samples per update of an expert")
        expert_lr: float = Field(0.05, gt=0, description="learning rate of experts (SGD)")
        expert_momentum: float = Field(0.0, ge=0, lt=1, description="momentum of experts")
        expert_weight_decay: float = Field(0.0, ge=0, description="weight decay of experts")
        expert_seed: int = Field(
            0, ge=0, description="seed of the experts; the same one gives the same experts to every run"
        )
        rho: float = Field(0.0, ge=0, description="radius of the flat regions that experts look for; 0: plain SGD")
        alpha: float = Field(0.3, ge=0, description="weight of the gap between the loss and its maximum in the radius")
        adaptive: bool = Field(True, description="the radius is relative to each parameter's size")
        expert_half: bool = Field(False, description="keep the experts' snapshots in 16 bits")

    def __init__(
        self,
        data: Any,
        network: Any,
        config: Any = None,
        *,
        experts: TrajectoryBuffer | str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data, network, config, **options)
        if self.factory is None:
            raise InputError(f"{self.name} needs network=… (a module, or a function that builds one)")
        with preserved_random_state():
            self.student = FlatNetwork(self.factory())
        self.step_size = nn.Parameter(torch.tensor(float(self.config.step_size)))
        self.experts: TrajectoryBuffer | None = None
        if experts is not None:
            self.use_experts(experts if isinstance(experts, TrajectoryBuffer) else TrajectoryBuffer.load(experts))
        else:
            self.schedule = self.make_schedule(self.config.expert_epochs)

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        made = super().on_task(task, setup, config, seed=seed, progress=progress)
        made.show_progress = progress
        return made

    # ---- experts -----------------------------------------------------------------------------------------------------

    def use_experts(self, experts: TrajectoryBuffer) -> None:
        """Match these trajectories.

        Raises:
            InputError: they are of another architecture, or too short.
        """
        if experts.size != self.student.size:
            raise InputError(
                f"the experts have {experts.size} parameters and the network {self.student.size}: they must be of one architecture"
            )
        self.schedule = self.make_schedule(experts.epochs)
        self.experts = experts

    def make_schedule(self, epochs: int) -> RangeSchedule:
        """Where segments of experts with so many epochs start.

        Raises:
            InputError: they would leave the trajectory.
        """
        config = self.config
        most = config.max_start
        if most is None:
            most = max(epochs - config.segment + 1, config.min_start + 1)
        schedule = RangeSchedule(config.min_start, most)
        schedule.check(epochs, config.segment)
        return schedule

    def expert_config(self) -> ExpertConfig:
        """How this method's experts are trained."""
        own = self.config
        return ExpertConfig(
            experts=own.expert_count,
            epochs=own.expert_epochs,
            batch_size=own.expert_batch_size,
            lr=own.expert_lr,
            momentum=own.expert_momentum,
            weight_decay=own.expert_weight_decay,
            rho=own.rho,
            alpha=own.alpha if own.rho else 0.0,  # without a radius it changes nothing: the same experts for all
            adaptive=own.adaptive if own.rho else True,
            half=own.expert_half,
        )

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        """Train the experts, or read them from the cache."""
        if self.experts is not None:
            return
        assert self.factory is not None
        self.use_experts(
            build_experts(
                self.real,
                self.factory,
                self.expert_config(),
                seed=self.config.expert_seed,
                augment=self.augment if self.augment.operations else None,
                progress=self.show_progress,
            )
        )

    def trajectories(self) -> TrajectoryBuffer:
        """The experts.

        Raises:
            InputError: there are none yet.
        """
        if self.experts is None:
            raise InputError(
                f"{self.name} has no experts yet: call prepare_run(data, None), which trains them, or give experts=…"
            )
        return self.experts

    # ---- one step ----------------------------------------------------------------------------------------------------

    def segment_at(self, step: int) -> Segment:
        """The segment that step ``step`` matches; a function of the method's seed and the step."""
        generator = self._generator(step, 61)
        experts = self.trajectories()
        expert = int(torch.randint(experts.experts, (1,), generator=generator))
        return experts.segment(expert, self.schedule.draw(step, generator), self.config.segment)

    def label_parameter(self) -> Tensor:
        """What the inner loop takes as labels: class indices (N,), or a trained tensor (N, ...)."""
        return self.labels

    def shown_labels(self, labels: Tensor) -> Tensor:
        """Labels of a batch, as :meth:`label_parameter` has them, in the form that the loss takes them."""
        return labels

    def presenter(self, *numbers: int) -> Present:
        """What the network sees of a batch of stored images: multi-formation, plug-ins, augmentation, in this order.

        The augmentation of inner step i is drawn once, from ``numbers`` and i, and replayed when the step comes again.
        """
        drawn: dict[int, Tensor] = {}

        def present(images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
            x, y = self.formation(*self.decode(images, self.shown_labels(labels)))
            if self.augment.operations:
                if step not in drawn:
                    # one operation for the batch, with parameters of each image's own, as published
                    drawn[step] = self.augment.draw(len(x), self._generator(*numbers, step, 67), shared="op")
                x = self.augment.apply(x, drawn[step])
            return x, y

        return present

    def match(self, step: int) -> Match:
        """The distance at step ``step`` and its gradients."""
        segment = self.segment_at(step)
        count = len(self.images)
        batches = draw_batches(
            count, min(self.config.batch_synthetic, count), self.config.inner_steps, self._generator(step, 71)
        )
        return match_trajectory(
            self.student,
            self.images,
            self.label_parameter(),
            self.step_size,
            segment.start.to(self.device),
            segment.target.to(self.device),
            batches,
            mode=self.config.gradient,
            present=self.presenter(step),
            checkpointing=self.config.checkpointing,
        )

    def losses_at(self, step: int) -> Losses:
        """The distance at step ``step`` as a loss to call ``backward()`` on; its graph is a shortcut to the gradients."""
        return self.as_losses(self.match(step))

    def as_losses(self, match: Match) -> Losses:
        """A scalar with the value and the gradients of a match."""
        parts: list[tuple[Tensor, Tensor]] = [(self.images, match.images), (self.step_size, match.step_size)]
        if match.labels is not None:
            parts.append((self.label_parameter(), match.labels))
        slope = torch.stack([((p - p.detach()) * g).sum() for p, g in parts if p.requires_grad]).sum()
        return Losses(distance=match.loss + slope).observe(step_size=self.step_size.detach().clone())

    def losses(self, batch: Batch) -> Losses:
        """Real batches play no part: see :meth:`losses_at`.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{self.name} matches the experts, not batches of real data: call losses_at(step) instead of the method itself"
        )

    def update(self, batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
        """One step of images and step size."""
        losses = self.losses_at(stepper.step)
        stepper.minimise(losses)
        self.keep_step_size()
        return losses.logged()

    @torch.no_grad()
    def keep_step_size(self) -> None:
        """Above 0, where a gradient step may have left it."""
        self.step_size.clamp_(min=_LEAST * self.config.step_size)

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def accumulated_errors(self, experts: TrajectoryBuffer, segments: Sequence[int] = (1, 2, 4)) -> Tensor:
        r"""(K, len(segments)) how far training on the result leaves the path of experts when segments are chained.

        From an expert's initial weights, k segments of T inner steps are taken without going back to it in between:
        :math:`A_k = \lVert\hat\theta_{kT} - \theta^*_{kM}\rVert^2 / \lVert\theta^*_0 - \theta^*_{kM}\rVert^2`. Use experts that
        were not matched.

        Args:
            experts: K trajectories of networks of this architecture.
            segments: numbers k, ascending.

        Raises:
            InputError: the trajectories are shorter than the longest chain.
        """
        config = self.config
        stored = self.product()[0]
        labels = self.label_parameter().detach()
        found = torch.zeros(experts.experts, len(segments))
        for number in range(experts.experts):
            path = experts.segment(number, 0, max(segments) * config.segment).points.to(self.device)
            theta = path[0]
            for k in range(max(segments)):
                generator = self._generator(number, k, 83)
                size = min(config.batch_synthetic, len(stored))
                theta = follow(
                    self.student,
                    stored,
                    labels,
                    self.step_size.detach(),
                    theta,
                    draw_batches(len(stored), size, config.inner_steps, generator),
                    present=self.presenter(number, k, 89),
                )
                if k + 1 in segments:
                    target = path[(k + 1) * config.segment]
                    error = (theta - target).square().sum() / (path[0] - target).square().sum()
                    found[number, segments.index(k + 1)] = error.cpu()
        return found

    # ---- running -----------------------------------------------------------------------------------------------------

    def optimisers(self, steps: int) -> Mapping[str, Optimised]:
        """SGD with momentum over the images, and over the step size."""
        step_size = torch.optim.SGD([self.step_size], lr=self.config.lr_step, momentum=0.5)
        return {**super().optimisers(steps), "step_size": Optimised(step_size)}

    def check(self, batch: Batch) -> None:
        """Nothing can be computed before there are experts; the schedule was checked at construction."""

    def prepare_stage(self) -> None:
        self.trajectories()  # none: say so now
        self.student.skeleton.to(self.device)

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One stage. Segments, batches and augmentation depend on the method's own seed and the step alone."""
        steps = self.config.steps
        return [
            Stage(
                "matching",
                steps,
                update=self.update,
                prepare=self.prepare_stage,
                optimisers=lambda: self.optimisers(steps),
            )
        ]

    def recipe(self) -> dict[str, Any]:
        return {"lr": float(self.step_size.detach())}

    def _generator(self, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(mix_seed(self.seed, *numbers))
