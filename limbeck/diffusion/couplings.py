r"""Which noise goes with which sample in training.

A coupling answers ``draw(ids, generator) -> (z, x0, cond)``. Independent pairs are ordinary training; pairs joined by a teacher's ODE are
reflow; real samples carried back to noise keep training on real data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from limbeck.core.data import Data
from limbeck.diffusion.conditions import Condition, Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.pairs import PairStore
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import expand
from limbeck.diffusion.solvers import check_times


class Coupling(Protocol):
    """Draws pairs."""

    def __len__(self) -> int: ...

    def draw(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Any]:
        """Noise z (B, ...), sample x0 (B, ...) and condition for the samples with these ids."""


class Independent:
    """Real samples with noise of their own; labels are the conditions."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def draw(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Any]:
        batch = self.data.fetch(ids, None)
        return torch.randn(batch.inputs.shape, generator=generator), batch.inputs, batch.labels


class Stored:
    """Pairs made beforehand."""

    def __init__(self, pairs: PairStore) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def draw(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Any]:
        return self.pairs.batch(ids)


class Online:
    """Pairs made when they are asked for: fresh noise, and where a sampler takes it."""

    def __init__(self, sampler: Sampler, conditions: Conditions, shape: tuple[int, ...]) -> None:
        self.sampler, self.conditions, self.shape = sampler, conditions, shape

    def __len__(self) -> int:
        return len(self.conditions)

    def draw(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Any]:
        z = torch.randn((len(ids), *self.shape), generator=generator)
        cond = self.conditions.rows(ids)
        return z, self.sampler.sample(z, cond, generator).x, cond


class Annealed:
    r"""Noise that slides from independent to coupled: :math:`z' = \sqrt{1-\beta^2}\,z + \beta\,\xi` with fresh :math:`\xi`.

    At :math:`\beta = 1` the noise is independent of the sample, at 0 it is the coupling's own. ``beta`` may change during training.

    Source: "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow" (2024).
    """

    def __init__(self, inner: Coupling, beta: Callable[[], float]) -> None:
        self.inner, self.beta = inner, beta

    def __len__(self) -> int:
        return len(self.inner)

    def draw(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Any]:
        z, x0, cond = self.inner.draw(ids, generator)
        beta = self.beta()
        return (1 - beta**2) ** 0.5 * z + beta * torch.randn(z.shape, generator=generator), x0, cond


@torch.no_grad()
def ode_invert(denoiser: Denoiser, x0: Tensor, times: Tensor, cond: Condition = None) -> Tensor:
    """The noise (B, ...) that the ODE takes to these samples, by steps of Heun against the grid's direction.

    The slope in time is finite at both ends of every schedule, so the first step may lead far away from the smallest time.

    Args:
        times: (N + 1,) falling, as for sampling; its last time is replaced by the schedule's ``t_min``.

    Returns:
        unit noise at ``times[0]``.
    """
    grid = check_times(times, denoiser.schedule).clone()
    schedule = denoiser.schedule
    grid[-1] = max(float(grid[-1]), min(schedule.t_min, float(grid[-2]) / 2))
    rising = grid.flip(0).tolist()
    first = torch.tensor(rising[0], dtype=torch.float64, device=x0.device)
    x = (expand(schedule.alpha(first), x0) * x0).to(x0.dtype)
    for s, t in itertools.pairwise(rising):
        slope = denoiser.predict(x, s, cond, "flow")
        x = x + (t - s) / 2 * (slope + denoiser.predict(x + (t - s) * slope, t, cond, "flow"))
    return x / (rising[-1] if schedule.name == "edm" else schedule.prior_std)


class Inverted:
    """Real samples with the noise that a teacher's ODE joins them to."""

    def __init__(self, data: Data, denoiser: Denoiser, times: Tensor) -> None:
        self.data, self.denoiser, self.times = data, denoiser, times

    def __len__(self) -> int:
        return len(self.data)

    def draw(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Any]:
        batch = self.data.fetch(ids, None)
        cond = batch.labels if self.denoiser.conditional else None
        return ode_invert(self.denoiser, batch.inputs, self.times, cond), batch.inputs, batch.labels
