"""InstaFlow: straighten the teacher's paths with reflow, then distil them into one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.stage import Stage
from limbeck.diffusion.conditions import drop
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.losses import flow_matching_loss, squared_errors
from limbeck.diffusion.pairs import PairData, PairStore
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import Flow
from limbeck.diffusion.transforms import InSchedule
from limbeck.losses.perceptual import FeatureDistance
from limbeck.methods.samplers.base import SamplerDistiller


class InstaFlow(SamplerDistiller):
    r"""InstaFlow: reflow, then distillation, each on pairs of its own.

    Time t is 1 at noise and 0 at data, :math:`u = dx/dt` (the paper runs time the other way, with velocity :math:`-u`).

    1. *Pairs* :math:`(z, x, c)`: x is where the teacher's ODE with guidance ``guidance`` ends when it starts from noise z.
    2. *Reflow*, from the teacher's weights:

       .. math:: L = E_{(z,x,c),\,t \sim U[0,1]} \| u_\theta(x_t, t, c) - (z - x) \|^2, \qquad x_t = (1 - t)\,x + t\,z

       Paths of the result are straighter, and no transport cost is larger, up to the error of the fit. With ``rounds`` above 1 pairs are made
       anew from the average of the flow's weights, and it is straightened again.
    3. *Pairs* anew, from fresh noise, by ``flow_nfe`` Euler steps of the averaged flow, guided by ``flow_guidance``.
    4. *Distillation*, from the flow's weights: :math:`L = E\,D(x', z - u_{\theta'}(z, 1, c))`, with D the squared error first (``distil_steps``), then
       in addition a distance of features (``perceptual_steps``; needs ``features``, or a task with a classifier). With ``distil_k`` = k > 1, t is
       drawn from {1, 1 - 1/k, …, 1/k} on the straight line from z to x', with the same target z - x'.

    Squared errors are means over dimensions and the batch. The result is one evaluation, :math:`x = z - u(z, 1, c)`, without guidance; with k > 1, k
    Euler steps.

    Args:
        features: mean distance of two batches of pictures; see :class:`limbeck.losses.perceptual.FeatureDistance`. None: the task's own.

    Decisions of ours where the paper is silent: ``init="adapter"`` starts the flow as exactly the teacher's velocity, through the scale-time transform,
    whatever the teacher predicts; ``init="raw"`` reads its output as a velocity, as the paper does with Stable Diffusion. Conditions are dropped with probability ``cond_dropout`` in reflow, so that the flow can be guided.

    Pairs are made before they are learned from; for pairs made during training (the paper's option) give this object's loss batches of
    :class:`limbeck.diffusion.couplings.Online`. How straight a flow is says :func:`limbeck.diffusion.pairs.straightness`.

    The stacked network of the paper is :class:`Stacked`. ``direct=True`` skips the reflow and distils the teacher's own pairs: the paper's baseline,
    given the updates of both stages.

    Source: "InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation" (2024), with the training of "Flow
    Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow" (2022). The published numbers of updates and learning rates at the
    scale of Stable Diffusion are from secondary sources (unverified).
    """

    name = "instaflow"

    class Config(SamplerDistiller.Config):
        steps: int = Field(1500, ge=1, description="updates of each reflow")
        lr: float = Field(1e-3, gt=0, description="peak learning rate of the student, in both stages")
        ema: float = Field(0.998, ge=0, le=1, description="decay of the average of the student's weights")
        rounds: int = Field(1, ge=1, description="how often paths are straightened")
        pairs: int = Field(8000, ge=1, description="pairs of noise and sample for each stage")
        init: Literal["adapter", "raw"] = Field(
            "adapter",
            description="the flow starts as the teacher's velocity (adapter), or its output is read as one (raw)",
        )
        cond_dropout: float = Field(0.1, ge=0, lt=1, description="share of conditions dropped in reflow")
        flow_nfe: int = Field(25, ge=1, description="Euler steps of the flow for the second pairs")
        flow_guidance: float = Field(
            1.0, ge=0, description="guidance of the flow for the second pairs (1.5 in the paper)"
        )
        distil_steps: int = Field(800, ge=1, description="updates with the squared error")
        perceptual_steps: int = Field(0, ge=0, description="updates with squared error and feature distance after that")
        distil_k: int = Field(1, ge=1, description="steps of the distilled sampler")
        direct: bool = Field(
            False, description="no reflow: distil the teacher's own pairs with the updates of both stages (baseline)"
        )

        presets = {
            "paper": {
                "steps": 95_000,
                "batch_size": 1024,
                "optimizer": "adamw",
                "lr": 1e-6,
                "schedule": "constant",
                "clip_grad": 1.0,
                "ema": 0.9999,
                "pairs": 1_600_000,
                "guidance": 5.0,
                "teacher_nfe": 25,
                "teacher_solver": "dpm2m",
                "flow_guidance": 1.5,
                "distil_steps": 21_500,
                "perceptual_steps": 18_000,
                "init": "raw",
            }
        }

    def __init__(
        self,
        teacher: Any,
        conditions: Any = None,
        student: Denoiser | None = None,
        config: Any = None,
        *,
        features: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(teacher, conditions, student, config, **options)
        if student is None:
            self.student = as_flow(self.student, self.config.init)
        elif student.schedule.name != "flow":
            raise InputError(
                f"the student of {self.name} is a rectified flow: give one with the schedule 'flow', not '{student.schedule.name}'"
            )
        if self.config.flow_guidance != 1 and not self.student.conditional:
            raise InputError("flow_guidance needs a null condition, which the student has not: leave it at 1")
        self.features: FeatureDistance | None = features

    # ---- losses ----------------------------------------------------------------------------------------------------------

    def reflow_losses(self, batch: Batch) -> Losses:
        """Flow matching on stored pairs, ``{"z", "x0", "cond"}``."""
        z, x0, cond = self.pair(batch)
        if self.student.conditional:
            cond = drop(cond, self.student.null_cond, self.config.cond_dropout)
        t = torch.rand(len(x0), device=x0.device)
        return Losses(reflow=flow_matching_loss(self.student, x0, z, t, cond))

    def distil_losses(self, batch: Batch, perceptual: bool = False) -> Losses:
        """Regression of one step (or of one of k) on stored pairs."""
        z, x0, cond = self.pair(batch)
        k = self.config.distil_k
        t = torch.ones(len(z), device=z.device) if k == 1 else (1 + torch.randint(k, (len(z),), device=z.device)) / k
        x_t = self.student.schedule.add_noise(x0, z, t)
        velocity = self.student.predict(x_t, t, cond, "flow")
        losses = Losses(l2=squared_errors(velocity, z - x0).mean())
        if perceptual:
            assert self.features is not None
            losses.add("features", self.features(self.pictured(z - velocity), self.pictured(x0)))
        return losses

    def losses(self, batch: Batch) -> Losses:
        """In a loop of one's own: reflow on pairs."""
        return self.reflow_losses(batch)

    @staticmethod
    def pair(batch: Batch) -> tuple[Tensor, Tensor, Any]:
        """Noise, sample and condition of a batch of pairs.

        Raises:
            InputError: the batch holds no pairs.
        """
        inputs = batch.inputs
        if not isinstance(inputs, dict) or "z" not in inputs or "x0" not in inputs:
            raise InputError("InstaFlow learns from pairs: batches are {'z': noise, 'x0': sample, 'cond': condition}")
        return inputs["z"], inputs["x0"], inputs.get("cond")

    # ---- samplers --------------------------------------------------------------------------------------------------------

    def flow_sampler(self, steps: int, guidance: float = 1.0) -> Sampler:
        """The averaged flow by Euler steps."""
        return Sampler.ode(self.averaged, steps, "euler", guidance)

    def sampler(self) -> Sampler:
        k = self.config.distil_k
        return Sampler.one_step(self.averaged) if k == 1 else self.flow_sampler(k)

    # ---- stages ----------------------------------------------------------------------------------------------------------

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """Pairs and reflow for every round, then pairs and distillation."""
        config = self.config
        source: Callable[[], Sampler] = self.teacher_sampler
        found: list[Stage] = []
        rounds = 0 if config.direct else config.rounds
        for number in range(rounds):
            label = "" if rounds == 1 else f"-{number + 1}"
            store = self.make_store(f"pairs{label}")
            found += [
                self.pair_stage(f"pairs{label}", store, source, mix_seed(seed, number, 29)),
                self._training(f"reflow{label}", config.steps, store, self.reflow_losses, seed + 2 * number),
            ]
            source = self._second_source
        store = self.make_store("pairs-distil")
        l2 = config.distil_steps + (config.rounds * config.steps if config.direct else 0)
        found += [
            self.pair_stage("pairs-distil", store, source, mix_seed(seed, 31)),
            self._training("distil", l2, store, self.distil_losses, seed + 101),
        ]
        if config.perceptual_steps:
            self._find_features()
            found.append(
                self._training(
                    "distil-features", config.perceptual_steps, store, lambda b: self.distil_losses(b, True), seed + 103
                )
            )
        return found

    def _second_source(self) -> Sampler:
        return self.flow_sampler(self.config.flow_nfe, self.config.flow_guidance)

    def _find_features(self) -> None:
        if self.features is None:
            found = None if self.on is None else self.on.perceptual(progress=self.show_progress)
            if found is None:
                raise InputError(
                    "perceptual_steps need features=… (a FeatureDistance), or a task on images with classes"
                )
            self.features = found

    def _training(self, name: str, steps: int, store: PairStore, losses: Any, seed: int) -> Stage:
        """Training on the pairs of a store; it begins with the averaged weights of the stage before, and starts a new average."""
        return Stage(
            name,
            steps,
            Stream(PairData(store), self.config.batch_size, seed=mix_seed(seed, 37)),
            losses=losses,
            optimisers=lambda: self.optimised(steps),
            begin=self._carry_over,
            after_step=self.follow,
            state={"pairs": store},
        )

    def _carry_over(self) -> None:
        self.student.module.load_state_dict(self.ema.module.state_dict())
        self.ema.updates = 0


def as_flow(denoiser: Denoiser, init: str = "adapter") -> Denoiser:
    """A trainable rectified flow from any denoiser.

    Args:
        denoiser: whose network it keeps.
        init: ``adapter``: through the scale-time transform, so that the velocity is exactly the teacher's at first; ``raw``: the network's output is
            read as the velocity u = eps - x0, to which eps is near at high noise. (The networks that the authors released answer with -u.)
    """
    if denoiser.schedule.name == "flow" and denoiser.prediction == "flow":
        return denoiser
    if init == "adapter":
        return InSchedule(denoiser, Flow())
    return Denoiser(denoiser.module, Flow(), "flow", null_cond=denoiser.null_cond)


class Stacked(nn.Module):
    """Two networks one after the other, as one network of a flow: the second refines what the first makes of the noise.

    Asked for the velocity at t, the first gives x' = x - t u1(x, t); the second sees x' and gives a velocity u2, and the stack answers with the
    velocity to x' - t u2. At first the second may be a copy of the first.

    Args:
        first, second: networks called ``(x, time, cond)`` that give velocities.
        time_scale: of the flow.

    Source: "InstaFlow" (2024), which leaves out some blocks found by ablation; that is not done here.
    """

    def __init__(self, first: nn.Module, second: nn.Module, time_scale: float = 1000.0) -> None:
        super().__init__()
        self.first, self.second, self.time_scale = first, second, time_scale

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        t = (time / self.time_scale).reshape(-1, *(1,) * (x.ndim - 1))
        once = self.first(x, time, cond)
        found: Tensor = once + self.second((x - t * once).to(x.dtype), time, cond)
        return found
