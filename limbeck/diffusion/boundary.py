r"""Consistency functions: a denoiser whose prediction is the sample itself at the smallest time, by construction."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.predictions import convert
from limbeck.diffusion.schedules import expand, precise

Boundary = Literal["edm", "lcm"]
BOUNDARIES: tuple[Boundary, ...] = ("edm", "lcm")
LCM_TIMES = 1000
"""Latent consistency models count times as indices of this many."""


class ConsistencyDenoiser(Denoiser):
    r"""A denoiser made a consistency function: :math:`f(x_t, t) = c(t)\,x_t + d(t)\,\hat x_0(x_t, t)` with :math:`f(x, t_{min}) = x/\alpha`.

    ``edm`` (consistency models), with :math:`\tau = \sigma/\alpha`, :math:`\varepsilon = \tau(t_{min})`, the network's F and all in the scale
    :math:`x_t/\alpha`:

    .. math:: f = \frac{\sigma_d^2}{(\tau-\varepsilon)^2+\sigma_d^2}\,\frac{x_t}{\alpha}
              + \frac{\sigma_d(\tau-\varepsilon)}{\sqrt{\tau^2+\sigma_d^2}}\,F

    F is what an EDM network would have to give for the same :math:`\hat x_0`, so the form holds for every prediction and schedule; with
    :math:`\varepsilon = 0` it is the EDM denoiser.

    ``lcm`` (latent consistency models): :math:`f = \frac{\sigma_d^2}{u^2+\sigma_d^2} x_t + \frac{u}{\sqrt{u^2+\sigma_d^2}} \hat x_0`
    with :math:`u = 1000\,s\,(t - t_{min})/(t_{max} - t_{min})` and the factor s = ``timestep_scaling``; but for the first time it is
    :math:`\hat x_0`.

    What it predicts is x0 (other targets follow from it); ``with_module`` keeps the form.

    Args:
        inner: the denoiser; its network, schedule and conventions are taken over, not copied.
        boundary: ``edm`` or ``lcm``.
        sigma_data: :math:`\sigma_d`; None: the denoiser's.
        timestep_scaling: of ``lcm``.

    Sources: "Consistency Models" (2023); "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference" (2023). The
    form for any schedule is ours.
    """

    def __init__(
        self,
        inner: Denoiser,
        boundary: str = "edm",
        *,
        sigma_data: float | None = None,
        timestep_scaling: float = 10.0,
    ) -> None:
        if boundary not in BOUNDARIES:
            raise UnknownNameError("boundary condition", boundary, BOUNDARIES)
        if isinstance(inner, ConsistencyDenoiser):
            raise InputError("the denoiser is a consistency function already: give the one inside")
        if not timestep_scaling > 0:
            raise InputError(f"timestep_scaling must be above 0 (got {timestep_scaling})")
        super().__init__(
            inner.module,
            inner.schedule,
            "x0",
            precond="edm" if inner.precond == "edm" else None,
            sigma_data=inner.sigma_data,
            null_cond=inner.null_cond,
            split_guidance=inner.split_guidance,
        )
        self.network_prediction, self.boundary = inner.prediction, boundary
        self.spread = float(inner.sigma_data if sigma_data is None else sigma_data)
        if not self.spread > 0:
            raise InputError(f"sigma_data must be above 0 (got {self.spread})")
        self.timestep_scaling = float(timestep_scaling)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c and d, of the shape of t; times below ``t_min`` count as ``t_min``."""
        schedule, data = self.schedule, self.spread
        t = precise(t).clamp_min(schedule.t_min)
        if self.boundary == "lcm":
            u = self.timestep_scaling * LCM_TIMES * (t - schedule.t_min) / (schedule.t_max - schedule.t_min)
            return data**2 / (u**2 + data**2), u / torch.sqrt(u**2 + data**2)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        first = torch.full((), schedule.t_min, dtype=t.dtype, device=t.device)
        least = schedule.nsr(first)
        # Multiplied through by alpha, which may be 0 at t_max.
        own = data**2 * alpha / ((sigma - least * alpha) ** 2 + data**2 * alpha**2)
        of_edm = data**2 * alpha / (sigma**2 + data**2 * alpha**2)
        share = 1 - least * alpha / sigma
        return own - share * of_edm, share

    def raw(self, x_t: Tensor, t: Tensor, cond: Condition = None, *, samples: int | None = None) -> Tensor:
        """f(x_t, t) itself."""
        found = super().raw(x_t, t, cond, samples=samples)
        x0 = convert(found, self.network_prediction, "x0", x_t, t, self.schedule)
        own, share = self.coefficients(t)
        return (expand(own, x_t) * x_t + expand(share, x_t) * x0).to(x_t.dtype)

    def plain(self, module: nn.Module | None = None) -> Denoiser:
        """The denoiser without the boundary condition, around the same network or another one."""
        prediction = {} if self.precond == "edm" else {"prediction": self.network_prediction}
        return super().with_module(self.module if module is None else module, **prediction)

    def with_module(self, module: nn.Module, **changes: Any) -> ConsistencyDenoiser:
        own = {k: changes.pop(k) for k in ("boundary", "timestep_scaling") if k in changes}
        settings = {"boundary": self.boundary, "timestep_scaling": self.timestep_scaling, **own}
        inner = self.plain(module)
        return ConsistencyDenoiser(
            inner.with_module(module, **changes) if changes else inner, sigma_data=self.spread, **settings
        )

    def describe(self) -> dict[str, Any]:
        known = {**super().describe(), "prediction": self.network_prediction}
        form = {"form": self.boundary, "sigma_data": self.spread, "timestep_scaling": self.timestep_scaling}
        return {**known, "boundary": form}
