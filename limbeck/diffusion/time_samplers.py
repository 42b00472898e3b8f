"""Where in time training looks: ``sampler(n, generator, device) -> (n,)`` times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.diffusion.schedules import EDM, Schedule, VPDiscrete


class TimeSampler(Protocol):
    """Draws times."""

    def __call__(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor: ...


def _rand(n: int, generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
    where = device if generator is None else generator.device
    return torch.rand(n, generator=generator, device=where).to(device or where or "cpu")


def _randn(n: int, generator: torch.Generator | None, device: torch.device | str | None) -> Tensor:
    where = device if generator is None else generator.device
    return torch.randn(n, generator=generator, device=where).to(device or where or "cpu")


@dataclass(frozen=True)
class Uniform:
    """Evenly in [low, high]."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise InputError(f"times are drawn between two that rise (got {self.low} and {self.high})")

    def __call__(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        return self.low + (self.high - self.low) * _rand(n, generator, device)

    @classmethod
    def over(cls, schedule: Schedule, low: float = 0.0, high: float = 1.0) -> Uniform:
        """Between two fractions of the schedule's times, within [t_min, t_max]."""
        span = schedule.t_max - schedule.t_min
        return cls(schedule.t_min + low * span, schedule.t_min + high * span)


@dataclass(frozen=True)
class Discrete:
    """Evenly among the times (k + 1)/N * t_max with low * N <= k < high * N, as indices of a discrete schedule are drawn."""

    low: float
    high: float
    steps: int = 1000
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1 or round(self.low * self.steps) >= round(self.high * self.steps):
            raise InputError(
                f"fractions of a discrete schedule must rise within [0, 1] (got {self.low} and {self.high})"
            )

    def __call__(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        first, last = round(self.low * self.steps), round(self.high * self.steps)
        index = first + (_rand(n, generator, device).double() * (last - first)).floor().clamp(max=last - first - 1)
        return ((index + 1) / self.steps * self.t_max).float()


@dataclass(frozen=True)
class LogNormal:
    """ln t normal, clamped: the noise levels of EDM training (mean -1.2, std 1.2)."""

    mean: float = -1.2
    std: float = 1.2
    low: float = 0.0
    high: float = math.inf

    def __call__(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.exp(self.mean + self.std * _randn(n, generator, device)).clamp(self.low, self.high)


@dataclass(frozen=True)
class LogitNormal:
    """The logistic function of a normal variable, in (0, 1) (Stable Diffusion 3)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.sigmoid(self.mean + self.std * _randn(n, generator, device))


@dataclass(frozen=True)
class UShaped:
    """Density proportional to exp(a t) + exp(a (1 - t)) on [0, 1]: more at both ends; 0 is uniform.

    Source: "Improving the Training of Rectified Flows" (2024), a = 4, written there without the mirror that makes it symmetric.
    """

    a: float = 4.0

    def __call__(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        if self.a == 0:
            return _rand(n, generator, device)
        # cosh(a (t - 1/2)) up to a factor, whose distribution function is (sinh(a (t - 1/2)) / sinh(a/2) + 1) / 2
        u = 2 * _rand(n, generator, device) - 1
        return 0.5 + torch.asinh(u * math.sinh(self.a / 2)) / self.a


@dataclass(frozen=True)
class Karras:
    """sigma = (smax^(1/rho) + (1 - u)(smin^(1/rho) - smax^(1/rho)))^rho with u even in [0, tmax_frac]; below 1 the largest noise is left out."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    tmax_frac: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise InputError(
                f"sigma_min and sigma_max must be above 0 and rise (got {self.sigma_min} and {self.sigma_max})"
            )
        if not 0 < self.tmax_frac <= 1:
            raise InputError(f"tmax_frac must lie in (0, 1] (got {self.tmax_frac})")

    def __call__(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        u = self.tmax_frac * _rand(n, generator, device)
        return (high + (1 - u) * (low - high)) ** self.rho


@dataclass(frozen=True)
class Grid:
    """Evenly among given times."""

    times: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.times):
            raise InputError("a grid of times must not be empty")

    def __call__(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        index = (_rand(n, generator, device) * len(self.times)).long().clamp(max=len(self.times) - 1)
        return torch.tensor(list(self.times), dtype=torch.float32, device=index.device)[index]


@dataclass(frozen=True)
class Fixed:
    """Always the same time."""

    t: float

    def __call__(
        self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.full((n,), self.t, device=device)


def spread_times(schedule: Schedule, low: float = 0.0, high: float = 1.0) -> TimeSampler:
    """Times between two fractions of a schedule: evenly among a discrete schedule's indices, evenly in time, or for ``edm`` evenly on Karras' grid (rho 7)."""
    if isinstance(schedule, VPDiscrete):
        return Discrete(low, high, schedule.steps)
    if isinstance(schedule, EDM):
        least, most = schedule.t_min ** (1 / schedule.rho), schedule.t_max ** (1 / schedule.rho)
        ends = [(least + share * (most - least)) ** schedule.rho for share in (low, high)]
        return Karras(ends[0], ends[1], schedule.rho)
    return Uniform.over(schedule, low, high)
