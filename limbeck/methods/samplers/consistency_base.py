"""What consistency methods share: one step of the teacher's ODE, a slowly following target, networks that are told one more number."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.ema import EMA
from limbeck.blocks.lora import LoRA
from limbeck.core.batch import map_tensors
from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.extra_time import TargetTime
from limbeck.diffusion.schedules import expand
from limbeck.diffusion.solvers import ddim_step
from limbeck.methods.samplers.base import SamplerDistiller


class ConsistencyBase(SamplerDistiller):
    """Base: the student's prediction at one point of a teacher's trajectory is that of its own slow average at the next point.

    Attributes:
        target: the slow average whose predictions are the targets. Unlike ``ema``, it is no result.
    """

    needs_images = True

    class Config(SamplerDistiller.Config):
        target_ema: float = Field(0.95, ge=0, le=1, description="decay of the network that gives the targets")
        solver: Literal["auto", "ddim", "heun"] = Field(
            "auto", description="rule of the teacher's step along its ODE; auto: heun for cm, else ddim"
        )
        lora_rank: int = Field(0, ge=0, description="train low-rank adapters of this rank; 0: all weights")
        lora_alpha: float | None = Field(None, gt=0, description="numerator of the adapters' scale; none: the rank")

    def __init__(
        self, teacher: Any, conditions: Any = None, student: Denoiser | None = None, config: Any = None, **more: Any
    ) -> None:
        super().__init__(teacher, conditions, student, config, **more)
        self.dress_student()
        if self.config.lora_rank:
            network = self.student.module.requires_grad_(False)
            self.student = self.student.with_module(LoRA(network, self.config.lora_rank, self.config.lora_alpha))
        self.ema = EMA(self.student.module, self.config.ema, warmup=True)
        self.target = EMA(self.student.module, self.config.target_ema)

    def dress_student(self) -> None:
        """What a method wraps around the student before it has adapters and averages."""

    # ---- networks --------------------------------------------------------------------------------------------------------

    @property
    def slow(self) -> Denoiser:
        """The student with the weights of ``target``."""
        return self.student.with_module(self.target.module)

    def restart_averages(self) -> None:
        """Both averages start again from the student."""
        self.target.update(self.student.module, decay=0.0)
        self.ema.update(self.student.module, decay=0.0)
        self.ema.updates = 0

    def follow(self, step: int) -> None:
        super().follow(step)
        self.target.update(self.student.module)

    def sample_call(self, count: int = 2) -> tuple[Tensor, Tensor, Any]:
        """(x, t, cond) of a small batch, for what must see shapes once."""
        cond = map_tensors(self.conditions.rows(torch.zeros(count, dtype=torch.long)), lambda v: v.to(self.device))
        if isinstance(cond, Tensor) and not self.teacher.conditional:
            cond = None
        t = torch.full((count,), 0.5 * self.teacher.schedule.t_max, device=self.device)
        return torch.zeros((count, *self.shape), device=self.device), t, cond

    # ---- the teacher's ODE -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def teacher_step(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Condition, guidance: float | Tensor = 1.0
    ) -> Tensor:
        """One step of the ODE from t to s, (B,) each, by the configured rule; no gradient."""
        if self.solver_rule == "ddim":
            return ddim_step(x, denoiser.predict(x, t, cond, "x0", guidance), t, s, denoiser.schedule)
        slope = denoiser.predict(x, t, cond, "flow", guidance)
        length = expand(s - t, x)
        ahead = x + length * slope
        there = s.clamp_min(denoiser.schedule.t_min)  # the velocity at clean data need not exist
        second = denoiser.predict(ahead, there, cond, "flow", guidance)
        return x + length * 0.5 * (slope + second)

    @property
    def solver_rule(self) -> str:
        """``ddim`` or ``heun``."""
        return "ddim" if self.config.solver == "auto" else str(self.config.solver)


def inner_network(module: nn.Module) -> nn.Module:
    """The network below adapters."""
    return module.base if isinstance(module, LoRA) else module


def plain_network(module: nn.Module) -> nn.Module:
    """The network with its adapters in its weights: itself where it has none, else a copy."""
    return module.merged() if isinstance(module, LoRA) else module


class Aimed(nn.Module):
    """A network with a :class:`TargetTime` somewhere inside, that aims at the next of some falling times."""

    def __init__(self, network: nn.Module, inner: TargetTime, times: Tensor) -> None:
        super().__init__()
        self.network, self._aims = network, [inner.on_grid(times)]
        self._inner = [inner]

    def forward(self, x: Tensor, model_time: Tensor, cond: Any = None) -> Tensor:
        with self._inner[0].told(self._aims[0].default(model_time)):
            found: Tensor = self.network(x, model_time, cond)
        return found


def on_grid(network: nn.Module, times: Tensor) -> nn.Module:
    """The network for sampling at falling times: one that is told where jumps end aims at the next of them; others as they are."""
    inner = inner_network(network)
    if not isinstance(inner, TargetTime):
        return network
    return network.on_grid(times) if isinstance(network, TargetTime) else Aimed(network, inner, times)


def adapted_copy(denoiser: Denoiser, rank: int, alpha: float | None = None) -> Denoiser:
    """A trainable copy of a denoiser; only adapters are trained where the rank is above 0."""
    made = deepcopy(denoiser).train()
    if not rank:
        made.requires_grad_(True)
        return made
    return made.with_module(LoRA(made.module.requires_grad_(False), rank, alpha))
