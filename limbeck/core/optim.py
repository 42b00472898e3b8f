"""Optimisers and learning-rate schedules, by the names people know."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from limbeck.core.config import Config

Schedule = Literal["constant", "cosine", "linear", "poly", "step"]
POLY_POWER = 0.9


class OptimiserConfig(Config):
    """An update rule and the course of its learning rate."""

    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="update rule")
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay (decoupled for adamw)")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd; Nesterov when above 0")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of adam's and adamw's two running means")
    adam_eps: float = Field(1e-8, gt=0, description="added to the denominator of adam's and adamw's steps")
    schedule: Schedule = Field("cosine", description="course of the learning rate after warm-up")
    milestones: tuple[float, ...] = Field(
        (0.625, 0.75, 0.875), description="fractions of training where 'step' divides the rate by 10"
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of training with a linearly rising rate")
    clip_grad: float | None = Field(None, gt=0, description="largest gradient norm; none: no clipping")


class TrainingConfig(OptimiserConfig):
    """How a gradient-trained stage is optimised. The same names for every method, so that budgets can be compared."""

    epochs: float = Field(60, gt=0, description="passes over the training data")
    steps: int | None = Field(None, ge=1, description="number of updates; overrides epochs")
    batch_size: int = Field(64, ge=1, description="samples per update, over all processes together")
    accumulate: int = Field(1, ge=1, description="micro-batches per update; same result, less memory")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps if self.steps is not None else max(1, round(self.epochs * steps_per_epoch))


@dataclass
class Optimised:
    """An optimiser with its schedule and clipping: what a stage updates parameters with."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    clip: float | None = None

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """A module's parameters that are not frozen."""
    return [p for p in module.parameters() if p.requires_grad]


def make_optimised(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    config: OptimiserConfig,
    steps: int,
    *,
    lr: float | None = None,
) -> Optimised:
    """The optimiser and schedule that ``config`` describes, for a stage of ``steps`` updates.

    Args:
        parameters: or parameter groups, whose own ``lr`` and ``weight_decay`` win; the schedule scales every group's rate.
        lr: peak rate; the config's if None.
    """
    listed: list[Any] = list(parameters)
    rate = config.lr if lr is None else lr
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            listed,
            lr=rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        optimizer = kind(listed, lr=rate, betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay)
    factor = lr_factor(config.schedule, steps, config.warmup, config.milestones)
    return Optimised(optimizer, LambdaLR(optimizer, factor), config.clip_grad)


class lr_factor:
    """Multiplier of the peak rate at a step: linear warm-up, then the schedule."""

    def __init__(self, schedule: Schedule, steps: int, warmup: float, milestones: tuple[float, ...] = ()) -> None:
        self.schedule, self.steps, self.milestones = schedule, steps, milestones
        self.warmup_steps = round(warmup * steps)

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "linear":
            return 1 - done
        if self.schedule == "poly":  # usual where pixels are classified
            return (1 - done) ** POLY_POWER
        if self.schedule == "step":
            return 0.1 ** sum(step / self.steps >= m for m in self.milestones)
        return 1.0
