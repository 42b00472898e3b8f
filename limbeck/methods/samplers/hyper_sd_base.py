"""Trajectory-segmented consistency distillation, the core of Hyper-SD: stages of fewer and fewer segments, and an adversary."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.blocks.diffusion_discriminators import LevelDiscriminator, PairDiscriminator
from limbeck.blocks.ema import EMA
from limbeck.core.batch import Batch, Losses
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.stage import Stage, Stepper
from limbeck.diffusion.conditions import drop
from limbeck.diffusion.consistency import SegmentSampler
from limbeck.diffusion.denoisers import Denoiser, params_frozen
from limbeck.diffusion.extra_time import TargetTime, embedding_width
from limbeck.diffusion.schedules import expand
from limbeck.diffusion.solvers import ddim_step
from limbeck.losses.adversarial import (
    hinge_discriminator,
    hinge_generator,
    softplus_discriminator,
    softplus_generator,
)
from limbeck.methods.samplers.consistency_base import ConsistencyBase, inner_network


@dataclass(frozen=True)
class Jump:
    """One batch of jumps along trajectories.

    Attributes:
        x_t: (B, ...) where they start.
        t: (B,) start; before: the next point of the grid towards the data; end: where they lead.
        last: (B,) whether ``before`` is the end, so that the teacher's step alone is the target.
        cond: conditions, or None.
    """

    x_t: Tensor
    t: Tensor
    before: Tensor
    end: Tensor
    last: Tensor
    cond: Any


class SegmentedConsistency(ConsistencyBase):
    """Stages of trajectory-segmented consistency; see :class:`~limbeck.methods.samplers.hyper_sd.HyperSD`.

    Attributes:
        discriminator: the adversary, or None.
        kept: the averaged weights at the end of each stage, by its number of segments.
    """

    class Config(ConsistencyBase.Config):
        steps: int = Field(
            1200, ge=1, description="updates of all segmented stages together, divided evenly among them"
        )
        points: int = Field(64, ge=2, description="N, steps of the teacher's grid")
        segments: tuple[int, ...] = Field(
            (8, 4, 2, 1), min_length=1, description="segments of the trajectory in each stage"
        )
        ends: Literal["any", "boundary", "zero"] = Field(
            "any",
            description="end of a jump: any point of the segment, its border (phased consistency), or 0 (needs one segment)",
        )
        solver_teacher: Literal["original", "previous-stage"] = Field(
            "original", description="whose ODE is followed after the first stage"
        )
        mse_weights: tuple[float, ...] = Field(
            (1.0, 1.0, 0.5, 0.25), description="weight of the squared error by stage; the last goes on"
        )
        adversary: Literal["none", "pair", "levels"] = Field(
            "pair",
            description="discriminator: on pairs of points with a trained trunk, on levels of the frozen teacher, or none",
        )
        adversarial: float = Field(0.01, ge=0, description="weight of the adversarial loss, times that of the stage")
        adversarial_weights: tuple[float, ...] = Field(
            (0.0, 0.1, 0.5, 1.0), description="its weight by stage; the last goes on"
        )
        discriminator_layers: tuple[str, ...] = Field(
            (), description="layers of the trunk that it looks at; none: the usual ones"
        )
        lr_discriminator: float = Field(2e-4, gt=0, description="learning rate of the discriminator")
        input_noise_std: float = Field(0.0, ge=0, description="noise added to what the student's network sees")
        s_embedding: bool = Field(False, description="tell the student where each jump ends")
        time_layer: str | None = Field(
            None, description="layer that embeds the time, for s_embedding; none: by its usual names"
        )
        guidance_mode: Literal["baked", "preserved"] = Field(
            "baked",
            description="baked: the student imitates guidance; preserved: it is learned without, and applied when sampling",
        )
        cond_dropout: float = Field(
            0.1, ge=0, le=1, description="share of conditions left out in training where guidance is preserved"
        )
        keep_stages: bool = Field(
            True, description="keep the averaged weights of every stage, for sampling in as many steps"
        )

        @model_validator(mode="after")
        def _fits(self) -> Any:
            if list(self.segments) != sorted(set(self.segments), reverse=True) or self.segments[-1] < 1:
                raise ValueError(f"segments must fall and be at least 1 (got {self.segments})")
            if self.segments[0] > self.points:
                raise ValueError(f"{self.segments[0]} segments need at least as many points (got {self.points})")
            if self.ends == "zero" and self.segments != (1,):
                raise ValueError("ends='zero' jumps across segments: it needs segments=(1,)")
            if not self.mse_weights or not self.adversarial_weights:
                raise ValueError("weights by stage need at least one value")
            if min(*self.mse_weights, *self.adversarial_weights) < 0:
                raise ValueError("weights by stage must be 0 or more")
            if self.solver_teacher == "previous-stage" and not self.keep_stages:
                raise ValueError("the ODE of the previous stage needs keep_stages")
            return self

    grid: Tensor

    def __init__(
        self, teacher: Any, conditions: Any = None, student: Denoiser | None = None, config: Any = None, **more: Any
    ) -> None:
        super().__init__(teacher, conditions, student, config, **more)
        settings, schedule = self.config, self.teacher.schedule
        self.register_buffer("grid", schedule.times(settings.points).flip(0).float(), persistent=False)
        self.kept = nn.ModuleDict()
        if settings.keep_stages:
            self.kept.update({str(k): EMA(self.student.module, 0.0) for k in settings.segments})
        self.discriminator: nn.Module | None = None
        if settings.adversary != "none" and settings.adversarial * max(settings.adversarial_weights) > 0:
            layers = settings.discriminator_layers or None
            kind = PairDiscriminator if settings.adversary == "pair" else LevelDiscriminator
            self.discriminator = kind(self.teacher, self.sample_call(), layers)
        self.at_stage = 0

    def dress_student(self) -> None:
        if not self.config.s_embedding:
            return
        x, t, cond = self.sample_call()
        call = (x, self.student.schedule.to_model_time(t), cond)
        width = embedding_width(self.student.module, call, self.config.time_layer)
        told = TargetTime(self.student.module, self.student.schedule, width, self.config.time_layer)
        self.student = self.student.with_module(told.to(self.device))

    # ---- jumps -----------------------------------------------------------------------------------------------------------

    @property
    def segments(self) -> SegmentSampler:
        """The segments of the current stage."""
        return SegmentSampler(self.config.points, self.config.segments[self.at_stage], self.config.ends)

    @property
    def teacher_guidance(self) -> float:
        """w of the teacher in training."""
        return float(self.config.guidance) if self.config.guidance_mode == "baked" else 1.0

    def draw(self, x0: Tensor, cond: Any) -> Jump:
        """A batch of jumps from clean samples (B, ...) that are noised; draws are from torch's random state."""
        n, e = (index.to(x0.device) for index in self.segments.draw(len(x0)))
        if cond is not None and self.config.guidance_mode == "preserved":
            cond = drop(cond, self.teacher.null_cond, self.config.cond_dropout)
        t = self.grid[n]
        x_t = self.teacher.schedule.add_noise(x0, torch.randn_like(x0), t)
        return Jump(x_t, t, self.grid[n - 1], self.grid[e], e == n - 1, cond)

    @torch.no_grad()
    def aim(self, jump: Jump) -> Tensor:
        """Targets (B, ...) at the jumps' ends: the teacher's step, and the slow average's jump from there on."""
        weight = 1.0 if jump.cond is None else self.teacher_guidance
        ahead = self.followed_step(jump, weight)
        with self.told(self.target.module, jump.end):
            x0 = self.slow.predict(ahead, jump.before, jump.cond)
        there = ddim_step(ahead, x0, jump.before, jump.end, self.teacher.schedule)
        return torch.where(expand(jump.last, ahead), ahead, there)

    def followed_step(self, jump: Jump, guidance: float) -> Tensor:
        """One step of the ODE that this stage follows."""
        if self.config.solver_teacher == "previous-stage" and self.at_stage > 0:
            previous = self.kept[str(self.config.segments[self.at_stage - 1])]
            assert isinstance(previous, EMA)
            # Guidance is in the previous stage's weights already.
            with self.told(previous.module, jump.before):
                return self.teacher_step(
                    self.student.with_module(previous.module), jump.x_t, jump.t, jump.before, jump.cond
                )
        return self.teacher_step(self.teacher, jump.x_t, jump.t, jump.before, jump.cond, guidance)

    def leap(self, jump: Jump) -> Tensor:
        """The student's jumps (B, ...), with gradient. Noise on the input reaches the network alone: the jump starts from x_t itself."""
        seen = jump.x_t
        if self.config.input_noise_std:
            seen = seen + self.config.input_noise_std * torch.randn_like(seen)
        with self.told(self.student.module, jump.end):
            x0 = self.student.predict(seen, jump.t, jump.cond)
        return ddim_step(jump.x_t, x0, jump.t, jump.end, self.teacher.schedule)

    @staticmethod
    def told(module: nn.Module, end: Tensor) -> AbstractContextManager[None]:
        """Inside, a network that takes it is told where jumps end."""
        network = inner_network(module)
        return network.told(network.share(end)) if isinstance(network, TargetTime) else nullcontext()

    # ---- losses ----------------------------------------------------------------------------------------------------------

    def stage_weight(self, values: tuple[float, ...]) -> float:
        """The current stage's entry of a list; the last one goes on."""
        return float(values[min(self.at_stage, len(values) - 1)])

    @property
    def adversarial_weight(self) -> float:
        """Of the current stage; 0 without a discriminator."""
        if self.discriminator is None:
            return 0.0
        return float(self.config.adversarial) * self.stage_weight(self.config.adversarial_weights)

    def losses(self, batch: Batch) -> Losses:
        """The student's loss at the current stage (``at_stage``)."""
        x0, cond = self.unpack(batch)
        assert x0 is not None
        jump = self.draw(x0, cond)
        return self.jump_losses(jump, self.leap(jump), self.aim(jump))

    def jump_losses(self, jump: Jump, made: Tensor, wanted: Tensor, *, adversarial: bool = True) -> Losses:
        """Squared error, mean over dimensions, and what the discriminator says."""
        losses = Losses(mse=(self.stage_weight(self.config.mse_weights), (made - wanted).float().square().mean()))
        if adversarial and self.adversarial_weight > 0:
            assert self.discriminator is not None
            with params_frozen(self.discriminator):
                if self.config.adversary == "pair":
                    fooled = softplus_generator(self.discriminator(made, jump.end, jump.cond, jump.x_t, jump.t))
                else:
                    _, fake, later = self.noised_further(jump, wanted, made)
                    fooled = hinge_generator(self.discriminator(fake, later, jump.cond))
            losses.add("adversarial", fooled, self.adversarial_weight)
        return losses

    def discriminator_losses(self, jump: Jump, made: Tensor, wanted: Tensor) -> Losses:
        """The adversary's loss; targets are real, the student's points are fake."""
        assert self.discriminator is not None
        made = made.detach()
        if self.config.adversary == "pair":
            real = self.discriminator(wanted, jump.end, jump.cond, jump.x_t, jump.t)
            fake = self.discriminator(made, jump.end, jump.cond, jump.x_t, jump.t)
            return Losses(discriminator=softplus_discriminator(real, fake)).observe(
                discriminator_right=((real > 0).float().mean() + (fake <= 0).float().mean()) / 2
            )
        noisy_real, noisy_fake, later = self.noised_further(jump, wanted, made)
        real, fake = self.discriminator(noisy_real, later, jump.cond), self.discriminator(noisy_fake, later, jump.cond)
        return Losses(discriminator=hinge_discriminator(real, fake))

    def noised_further(self, jump: Jump, wanted: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Target and student's point, both noised from the jump's end to one random time within a segment's length beyond it.

        :math:`x_{t'} = \frac{\alpha'}{\alpha} x + \sqrt{\sigma'^2 - (\alpha'\sigma/\alpha)^2}\;\epsilon` with the same noise for both, so that they
        differ by what the student did and by nothing else.
        """
        schedule = self.teacher.schedule
        reach = self.grid[-1] / self.segments.segments
        later = (jump.end + reach * torch.rand_like(jump.end)).clamp(max=float(self.grid[-1]))
        ratio = schedule.alpha(later) / schedule.alpha(jump.end)
        added = torch.sqrt((schedule.sigma(later) ** 2 - (ratio * schedule.sigma(jump.end)) ** 2).clamp_min(0))
        noise = expand(added, made) * torch.randn_like(made)
        scale = expand(ratio, made)
        return scale * wanted + noise, scale * made + noise, later

    # ---- stages ----------------------------------------------------------------------------------------------------------

    def segment_stages(self, stream: Any, kept: Mapping[str, Any]) -> list[Stage]:
        """One stage for each number of segments."""
        count = len(self.config.segments)
        if self.config.steps < count:
            raise InputError(f"{count} stages need at least as many steps (got {self.config.steps})")
        lengths = [self.config.steps // count] * count
        lengths[-1] += self.config.steps - sum(lengths)
        return [
            Stage(
                f"segments-{k}",
                lengths[number],
                stream,
                update=self.segment_update,
                optimisers=lambda n=number: self.segment_optimisers(lengths[n]),  # type: ignore[misc]
                prepare=lambda n=number: self.enter(n),  # type: ignore[misc]
                begin=self.restart_averages,
                after_step=self.follow,
                end=lambda n=k: self.keep(n),  # type: ignore[misc]
                state=kept,
            )
            for number, k in enumerate(self.config.segments)
        ]

    def enter(self, number: int) -> None:
        self.at_stage = number

    def keep(self, segments: int) -> None:
        """Note the averaged weights as those of the stage."""
        if str(segments) in self.kept:
            held = self.kept[str(segments)]
            assert isinstance(held, EMA)
            held.update(self.ema.module)

    def segment_optimisers(self, steps: int) -> Mapping[str, Optimised]:
        made = dict(self.optimised(steps))
        if self.discriminator is not None:
            # Without momentum, as is usual where two networks chase each other.
            settings = self.config.replace(betas=(0.0, self.config.betas[1]))
            made["discriminator"] = make_optimised(
                self.discriminator.parameters(), settings, steps, lr=self.config.lr_discriminator
            )
        return made

    def segment_update(self, batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
        """One step of the student, and one of the adversary. With ``levels`` they take turns: the adversary learns at even steps, its
        opinion counts for the student at odd ones; the squared error counts at all (there the published code leaves the student alone)."""
        assert batch is not None
        x0, cond = self.unpack(batch)
        assert x0 is not None
        jump = self.draw(x0, cond)
        wanted, made = self.aim(jump), self.leap(jump)
        alternate = self.config.adversary == "levels" and self.adversarial_weight > 0
        learns = self.adversarial_weight > 0 and not (alternate and stepper.step % 2)
        losses = self.jump_losses(jump, made, wanted, adversarial=not (alternate and learns))
        logged = losses.logged()
        stepper.minimise(losses, "student")
        if learns:
            found = self.discriminator_losses(jump, made, wanted)
            stepper.minimise(found, "discriminator")
            if not alternate:
                logged = {**logged, **{k: v for k, v in found.logged().items() if k != "loss"}}
        return logged
