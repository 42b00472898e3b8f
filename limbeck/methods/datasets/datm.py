"""Difficulty-aligned trajectory matching: segments that suit the size of the synthetic set, and trained soft labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.ensembles import ensemble_logits
from limbeck.blocks.trajectories import RangeSchedule
from limbeck.core.batch import Batch
from limbeck.core.data import Data, mix_seed
from limbeck.core.distilled import DistilledDataset
from limbeck.core.optim import Optimised
from limbeck.core.stage import Stage, Stepper
from limbeck.methods.datasets.base import tiled
from limbeck.methods.datasets.trajectory_base import TrajectoryMatching

_HARD = 10.0  # logit of the class where labels are one-hot before the experts are asked
_DIVERGED = 1e6  # the largest loss that goes into the log of a step that changes nothing
_CHUNK = 2000  # real images per forward pass


class DATM(TrajectoryMatching):
    r"""Difficulty-aligned trajectory matching, for synthetic sets of any size.

    Early segments of an expert's trajectory teach easy patterns, late ones hard patterns. A small set should match early segments
    only; a large one late segments, and not the early ones, which would make it worse than as many random real images. The loss is
    that of :class:`~limbeck.methods.datasets.mtt.MTT`, with three differences:

    * **Range.** Segments start at :math:`s \sim U\{min, \ldots, ub(it) - 1\}`, where the bound may grow during distillation
      (:class:`limbeck.blocks.trajectories.RangeSchedule`). Without ``max_start`` the range follows from the share of the real data that
      is kept, see :meth:`~limbeck.blocks.trajectories.RangeSchedule.auto`.
    * **Start.** Images are real ones that an expert classifies correctly, and the labels are soft:
      :math:`Y_0(x) = \sum_k \mathbb{1}[\arg\max z_k(x) = y]\, z_k(x) / \sum_k \mathbb{1}[\arg\max z_k(x) = y]`, over the final logits
      :math:`z_k` of all experts (over all of them alike, where none is right). Labels are kept as logits, trained, and enter the
      cross-entropy as :math:`\mathrm{softmax}(Y)`.
    * **Threshold.** A step whose loss exceeds ``threshold`` (or is no number) changes nothing, no momentum either: its segment
      diverged.

    Without the engine, call :meth:`start` once there are experts, and step only where ``losses_at(step).total`` is small enough.

    Attributes:
        label_logits: (N, C), Y.
        skipped: how many steps changed nothing.

    Source: "Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching" (2024). The values of ``paper`` are
    those for CIFAR-10 with 10 images per class, of ``large`` those with 500. Experts are the flat ones of FTD.
    """

    name = "datm"

    class Config(TrajectoryMatching.Config):
        max_start: int | None = Field(
            None, ge=1, description="segments start before this epoch; none: the range follows from the size of the set"
        )
        cur_max: int | None = Field(
            None, ge=1, description="segments start before this epoch in the beginning; none: max_start"
        )
        expand_end: int = Field(0, ge=0, description="step at which the bound has grown from cur_max to max_start")
        expert_epochs: int = Field(24, ge=1, description="epochs of each expert; one snapshot each")
        rho: float = Field(0.5, ge=0, description="radius of the flat regions that experts look for; 0: plain SGD")
        soft_labels: Literal["trained", "fixed", "none"] = Field(
            "trained", description="labels from the experts, trained or left as they are; none: classes"
        )
        lr_labels: float = Field(1.0, gt=0, description="learning rate of the labels' logits (SGD, momentum 0.9)")
        threshold: float = Field(1.0, gt=0, description="steps with a larger loss change nothing")
        correct_start: bool = Field(True, description="start from real images that an expert classifies correctly")

        presets = {
            "paper": {
                "ipc": 10,
                "steps": 10_000,
                "lr_images": 100.0,
                "lr_labels": 2.0,
                "lr_step": 1e-5,
                "step_size": 0.01,
                "inner_steps": 80,
                "segment": 2,
                "min_start": 0,
                "max_start": 20,
                "cur_max": 10,
                "expand_end": 1000,
                "batch_synthetic": 100,
                "expert_count": 100,
                "expert_epochs": 100,
                "expert_batch_size": 256,
                "expert_lr": 0.01,
                "rho": 0.01,
                "alpha": 0.3,
                "zca": True,
                "diffaug": "color_crop_cutout_flip_scale_rotate",
                "bits": 16,
                "judge_networks": ("convnet-w128-d3",),
                "judge_seeds": 5,
                "judge_steps": 1000,
                "judge_batch_size": 128,
            },
            "large": {
                "ipc": 500,
                "steps": 10_000,
                "lr_images": 50.0,
                "lr_labels": 10.0,
                "lr_step": 1e-5,
                "step_size": 0.01,
                "inner_steps": 40,
                "segment": 2,
                "min_start": 40,
                "max_start": 60,
                "batch_synthetic": 1000,
                "expert_count": 100,
                "expert_epochs": 100,
                "expert_batch_size": 256,
                "expert_lr": 0.01,
                "rho": 0.01,
                "alpha": 0.3,
                "zca": True,
                "diffaug": "color_crop_cutout_flip_scale_rotate",
                "bits": 16,
                "judge_networks": ("convnet-w128-d3",),
                "judge_seeds": 5,
                "judge_steps": 40_000,
                "judge_batch_size": 128,
            },
        }

    skipped: Tensor

    def __init__(self, data: Any, network: Any, config: Any = None, **options: Any) -> None:
        super().__init__(data, network, config, **options)
        hard = _HARD * torch.nn.functional.one_hot(self.labels, self.num_classes).float()
        self.label_logits = nn.Parameter(hard, requires_grad=self.config.soft_labels == "trained")
        self.register_buffer("skipped", torch.tensor(0))

    def make_schedule(self, epochs: int) -> RangeSchedule:
        config = self.config
        if config.max_start is None:
            share = config.ipc / (len(self.real) / self.num_classes)
            schedule = RangeSchedule.auto(share, epochs, config.segment, config.steps)
        else:
            schedule = RangeSchedule(config.min_start, config.max_start, config.cur_max, config.expand_end)
        schedule.check(epochs, config.segment)
        return schedule

    # ---- where it starts ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self) -> None:
        """Set images and labels as the experts say. The engine calls it at the beginning of a run."""
        if self.config.init != "real":
            return
        f = self.config.factor
        ids = self.correct_images(self.config.ipc * f * f) if self.config.correct_start else None
        if ids is None:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, 23))
            ids = self.classes.sample(self.config.ipc * f * f, generator)
        images, labels = self.real_samples(ids)
        logits = self.expert_labels(images, labels)
        self.images.copy_(images if f == 1 else tiled(images, f))
        self.label_logits.copy_(logits.unflatten(0, (-1, f * f)).mean(1))  # a stored image has one label

    def correct_images(self, per_class: int) -> Tensor:
        """(C, per_class) ids of real images, in a random order per class: those that the first expert of a random order classifies
        correctly, then those of the next, and where all of them are too few, the others."""
        experts = self.trajectories()
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 79))
        count, classes = len(self.real), self.classes
        order = torch.randperm(count, generator=generator)
        found_by = torch.full((count,), experts.experts)  # which expert of the order was the first to be right
        for turn, expert in enumerate(torch.randperm(experts.experts, generator=generator).tolist()):
            theta = experts.snapshot(expert, -1).to(self.device)
            wrong = (found_by == experts.experts).nonzero().flatten()
            said = [
                self.student(theta, self.real_samples(ids)[0].to(self.device)).argmax(1).cpu()
                for ids in wrong.split(_CHUNK)
            ]
            found_by[wrong[torch.cat(said) == classes.labels[wrong]]] = turn
            enough = torch.bincount(classes.labels[found_by <= turn], minlength=classes.num_classes) >= per_class
            if bool(enough.all()):
                break
        place = torch.empty(count, dtype=torch.long)
        place[order] = torch.arange(count)
        key = (classes.labels * (experts.experts + 1) + found_by) * count + place
        ranked = key.argsort()  # by class, then by expert, then in the order of the scan
        return ranked[classes.starts[:, None] + torch.arange(per_class)]

    def expert_labels(self, images: Tensor, labels: Tensor) -> Tensor:
        """(N, C) mean final logits of the experts that classify an image correctly; of all of them where none does."""
        theta = self.trajectories().stacked(-1)
        logits = ensemble_logits(self.student, theta.to(self.device), images.to(self.device), _CHUNK).cpu()
        right = (logits.argmax(-1) == labels).to(logits)  # (K, N)
        right = torch.where(right.sum(0) > 0, right, torch.ones_like(right))
        return (right[:, :, None] * logits).sum(0) / right.sum(0)[:, None]

    # ---- one step ----------------------------------------------------------------------------------------------------

    def label_parameter(self) -> Tensor:
        return self.labels if self.config.soft_labels == "none" else self.label_logits

    def shown_labels(self, labels: Tensor) -> Tensor:
        return labels if self.config.soft_labels == "none" else labels.softmax(-1)

    def update(self, batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
        """One step of images, labels and step size, unless its loss is too large."""
        match = self.match(stepper.step)
        taken = bool(match.loss <= self.config.threshold)  # False for a loss that is not a number, too
        values = {
            "distance": match.loss if taken else match.loss.nan_to_num(_DIVERGED, _DIVERGED).clamp(max=_DIVERGED),
            "step_size": self.step_size.detach().clone(),
            "bound": torch.tensor(float(self.schedule.upper(stepper.step))),
            "skipped": torch.tensor(float(not taken)),
        }
        if taken:
            stepper.minimise(self.as_losses(match))
            self.keep_step_size()
        else:
            self.skipped += 1
        return {"loss": values["distance"], **values}

    def optimisers(self, steps: int) -> Mapping[str, Optimised]:
        """SGD over images and step size, and over the labels if they are trained."""
        made = dict(super().optimisers(steps))
        if self.config.soft_labels == "trained":
            made["labels"] = Optimised(torch.optim.SGD([self.label_logits], lr=self.config.lr_labels, momentum=0.9))
        return made

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        (stage,) = super().stages(train, val, seed=seed)
        stage.begin = self.start
        return [stage]

    # ---- the result --------------------------------------------------------------------------------------------------

    def product(self) -> tuple[Tensor, Tensor]:
        if self.config.soft_labels == "none":
            return self.images.detach(), self.labels
        return self.images.detach(), self.label_logits.detach().softmax(-1)

    def contestants(self) -> dict[str, DistilledDataset]:
        """With soft labels there is a further one: random real images of the same number with the experts' labels."""
        found = super().contestants()
        first = next(iter(found.values()))
        if first.soft and self.experts is not None:
            found["random, experts' labels"] = self.random_with_expert_labels()
        return found

    def random_with_expert_labels(self, seed: int = 0) -> DistilledDataset:
        """Random real images, as many as synthetic ones, with the soft labels that the experts give them, untrained."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, seed, 31))
        ids = self.classes.sample(self.config.ipc, generator)
        images, labels = self.real_samples(ids)
        soft = self.expert_labels(images, labels).softmax(-1)
        return self.as_dataset(images, soft, index=ids.flatten()).stored()

    def evaluate(self, test: Data, class_names: Any = None) -> dict[str, Any]:
        return {**super().evaluate(test, class_names), "skipped_steps": int(self.skipped)}
