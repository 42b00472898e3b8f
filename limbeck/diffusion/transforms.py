r"""A frozen teacher in another schedule: the scale-time transform.

Marginals of two schedules are the same up to scale where noise to signal is the same. Given :math:`(x_t, t)` in schedule A,
:math:`t_B = nsr_B^{-1}(nsr_A(t))` and :math:`x_B = x_t\,\alpha_B(t_B)/\alpha_A(t)`; predictions of x0 are equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.predictions import LEAST, convert
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import Schedule, expand, precise


def transform(x_t: Tensor, t: Tensor, source: Schedule, target: Schedule) -> tuple[Tensor, Tensor]:
    """The same point in another schedule: (x, t) in ``source`` to (x, t) in ``target``.

    Both scales are computed from the angle arctan(nsr), so that pure noise (alpha = 0) needs no special case where the target has
    it; where the target ends earlier, times are clamped to its ``t_max``.
    """
    alpha, sigma = source.alpha(t), source.sigma(t)
    nsr = sigma / alpha.clamp_min(torch.finfo(alpha.dtype).tiny)
    other = target.t_from_nsr(nsr).clamp(0, target.t_max)
    alpha_b, sigma_b = target.alpha(other), target.sigma(other)
    # alpha_B / alpha_A = norm_B / norm_A at equal angles, without a division by a small alpha
    ratio = torch.sqrt(alpha_b**2 + sigma_b**2) / torch.sqrt(alpha**2 + sigma**2)
    return (expand(ratio, x_t) * precise(x_t)).to(x_t.dtype), other


class InSchedule(Denoiser):
    """A denoiser seen through another schedule: asked at (x_t, t) of ``schedule``, it asks the one inside at the transformed point.

    Args:
        inner: the denoiser; it is a sub-module, so gradients and devices go with it.
        schedule: in which it will be asked.
        prediction: what training a copy of it would regress: the form of :meth:`raw`.
    """

    def __init__(self, inner: Denoiser, schedule: Schedule, prediction: str = "flow") -> None:
        super().__init__(
            inner.module, schedule, prediction, null_cond=inner.null_cond, split_guidance=inner.split_guidance
        )
        self.inner = inner

    def raw(self, x_t: Tensor, t: Tensor, cond: Condition = None, *, samples: int | None = None) -> Tensor:
        self.evaluations += 1 if samples is None else len(x_t) // samples
        x, other = transform(x_t, t, self.schedule, self.inner.schedule)
        other = other.clamp_min(min(LEAST, self.inner.schedule.t_min))
        x0 = self.inner.converted(self.inner.raw(x, other, cond, samples=samples), "x0", x, other)
        return convert(x0, "x0", self.prediction, x_t, t, self.schedule)

    def with_module(self, module: Any, **changes: Any) -> Denoiser:
        return InSchedule(self.inner.with_module(module), changes.get("schedule", self.schedule), self.prediction)


def native(sampler: Sampler) -> Sampler:
    """A sampler whose network is seen through another schedule, as one of the network's own: the same samples from the same noise, up to
    rounding and the share of signal that pure noise has there. Other samplers are returned as they are.

    Steps of Euler and DDIM become steps of DDIM at the transformed times; other solvers keep their name, and their steps differ.
    """
    seen = sampler.denoiser
    if not isinstance(seen, InSchedule):
        return sampler
    own = seen.inner.schedule
    nsr = seen.schedule.nsr(torch.as_tensor(sampler.times, dtype=torch.float64))
    times = own.t_from_nsr(nsr).clamp(0, own.t_max)
    inner = seen.inner.with_module(seen.module)
    solver = "ddim" if sampler.solver in ("euler", "ddim") else sampler.solver
    return sampler.replace(denoiser=inner, times=times, solver=solver)
