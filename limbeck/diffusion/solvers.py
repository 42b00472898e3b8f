r"""Solvers of the probability-flow ODE :math:`dx/dt = u(x, t)`, from noise to data.

Every solver takes a grid of falling times and counts network evaluations. The step of DDIM,
:math:`x_s = \frac{\sigma_s}{\sigma_t} x_t + (\alpha_s - \alpha_t\frac{\sigma_s}{\sigma_t})\,\hat x_0`, holds in every schedule and is exact
for a constant prediction; in ``flow`` and ``edm`` it is the step of Euler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.predictions import LEAST
from limbeck.diffusion.schedules import Schedule, expand, precise

Solver = Literal["ddim", "euler", "heun", "dpm2m", "rk45"]
SOLVERS: tuple[Solver, ...] = ("ddim", "euler", "heun", "dpm2m", "rk45")


@dataclass(frozen=True)
class Solution:
    """What a sampler gives.

    Attributes:
        x: (B, ...) at the last time.
        nfe: network evaluations per sample (guided ones count two).
        times: (N + 1,) the grid that was gone through.
        states: (N + 1, B, ...) if recorded.
        slopes: (N, B, ...) dx/dt at the first N states, if recorded (not by rk45).
    """

    x: Tensor
    nfe: int
    times: Tensor
    states: Tensor | None = None
    slopes: Tensor | None = None


def ddim_step(
    x_t: Tensor,
    x0: Tensor,
    t: Tensor | float,
    s: Tensor | float,
    schedule: Schedule,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """From t to s with a predicted clean sample: alpha_s x0 + sigma_s eps, eps being what x_t and x0 imply.

    Args:
        x_t, x0: (B, ...).
        t, s: numbers, () or (B,); s <= t.
        eta: 0 deterministic; 1 as noisy as DDPM's ancestral step. Above 0 needs ``noise`` (B, ...).

    Source: "Denoising Diffusion Implicit Models" (2020).
    """
    dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    t = torch.as_tensor(t, device=x_t.device, dtype=dtype)
    s = torch.as_tensor(s, device=x_t.device, dtype=dtype)
    alpha_t, sigma_t = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)
    alpha_s, sigma_s = expand(schedule.alpha(s), x_t), expand(schedule.sigma(s), x_t)
    eps = (precise(x_t) - alpha_t * precise(x0)) / sigma_t.clamp_min(LEAST)
    if eta == 0:
        return (alpha_s * x0 + sigma_s * eps).to(x_t.dtype)
    if noise is None:
        raise InputError("a DDIM step with eta above 0 needs noise")
    ratio = alpha_t * sigma_s / (sigma_t * alpha_s.clamp_min(LEAST))
    fresh = eta * sigma_s * torch.sqrt((1 - ratio**2).clamp_min(0))
    kept = torch.sqrt((sigma_s**2 - fresh**2).clamp_min(0))
    return (alpha_s * x0 + kept * eps + fresh * noise).to(x_t.dtype)


def check_times(times: Tensor, schedule: Schedule) -> Tensor:
    """A grid of times, on the CPU in double precision.

    Raises:
        InputError: fewer than two times, not falling, outside [0, t_max].
    """
    made = torch.as_tensor(times, dtype=torch.float64).cpu().flatten()
    if len(made) < 2 or not bool((made[1:] < made[:-1]).all()):
        raise InputError("times must be two or more that fall (from noise to data)")
    if float(made[0]) > schedule.t_max * (1 + 1e-6) or float(made[-1]) < 0:
        raise InputError(
            f"times must lie in [0, {schedule.t_max:g}] for '{schedule.name}' (got {made[0]:g} to {made[-1]:g})"
        )
    return made


@torch.no_grad()
def ode_solve(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    solver: str = "ddim",
    cond: Condition = None,
    guidance: float | Tensor = 1.0,
    record: bool = False,
    tolerance: float = 1e-5,
) -> Solution:
    """Solve the probability-flow ODE; no gradients.

    Args:
        denoiser: gives the velocity.
        x: (B, ...) at ``times[0]``.
        times: (N + 1,) falling; the last may be 0.
        solver: ``ddim``; ``euler`` in time; ``heun`` (second order, 2N - 1 evaluations where it ends at 0); ``dpm2m`` (DPM-Solver++ of second
            order, N evaluations); ``rk45`` (adaptive, between the first and the last time; the grid's other points are only recorded).
        cond, guidance: see :class:`~limbeck.diffusion.denoisers.Denoiser`.
        record: keep states and slopes.
        tolerance: relative and absolute, of ``rk45``.

    Raises:
        UnknownNameError: no such solver.
        InputError: times that do not fall or leave the schedule.

    Sources: "Denoising Diffusion Implicit Models" (2020); "Elucidating the Design Space of Diffusion-Based Generative Models" (2022) for Heun;
    "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models" (2022).
    """
    if solver not in SOLVERS:
        raise UnknownNameError("solver", solver, SOLVERS)
    grid = check_times(times, denoiser.schedule)
    if solver == "rk45":
        return _rk45(denoiser, x, grid, cond, guidance, record, tolerance)
    before = denoiser.evaluations
    states, slopes = [x], []
    previous: tuple[Tensor, Tensor] | None = None  # x0 and log SNR of the step before, for dpm2m
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        if solver == "euler" or solver == "heun":
            slope = denoiser.predict(x, t, cond, "flow", guidance)
            ahead = x + (s - t) * slope
            if solver == "heun" and s > 0:
                ahead = x + (s - t) * 0.5 * (slope + denoiser.predict(ahead, s, cond, "flow", guidance))
            moved = ahead
        else:
            x0 = denoiser.predict(x, t, cond, "x0", guidance)
            slope = denoiser.converted_from_x0(x0, "flow", x, t) if record else x0
            if solver == "dpm2m":
                moved, previous = _multistep(denoiser.schedule, x, x0, t, s, previous)
            else:
                moved = ddim_step(x, x0, t, s, denoiser.schedule)
        x = moved
        if record:
            states.append(x)
            slopes.append(slope)
    nfe = denoiser.evaluations - before
    return Solution(x, nfe, grid, torch.stack(states) if record else None, torch.stack(slopes) if record else None)


def _multistep(
    schedule: Schedule, x: Tensor, x0: Tensor, t: float, s: float, previous: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One step of DPM-Solver++(2M): x0 is extrapolated linearly in log SNR; the first and the last step are of first order."""
    now = schedule.log_snr(torch.tensor(t, dtype=torch.float64))
    kept = (x0, now)
    if previous is None or s <= 0 or not bool(torch.isfinite(previous[1])):
        return ddim_step(x, x0, t, s, schedule), kept
    ahead = schedule.log_snr(torch.tensor(s, dtype=torch.float64))
    ratio = float((now - previous[1]) / (ahead - now))
    mixed = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * previous[0]
    return ddim_step(x, mixed, t, s, schedule), kept


def _rk45(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor,
    cond: Condition,
    guidance: float | Tensor,
    record: bool,
    tolerance: float,
) -> Solution:
    from scipy.integrate import solve_ivp

    before = denoiser.evaluations
    last = max(float(grid[-1]), denoiser.schedule.t_min)

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat).to(x.device, x.dtype).reshape(x.shape)
        return denoiser.predict(state, t, cond, "flow", guidance).double().cpu().numpy().reshape(-1)

    first = float(grid[0])
    if not np.isfinite(slope(first, x.double().cpu().numpy().reshape(-1))).all():
        raise InputError(f"the velocity at t = {first:g} is not finite: start rk45 below t_max")
    wanted = [first, *[float(t) for t in grid[1:-1] if float(t) > last], last]
    found = solve_ivp(
        slope, (first, last), x.double().cpu().numpy().reshape(-1), "RK45", wanted, rtol=tolerance, atol=tolerance
    )
    if not found.success:
        raise InputError(f"rk45 stopped before t = {last:g}: {found.message}")
    path = torch.from_numpy(found.y.T.copy()).to(x.device, x.dtype).reshape(-1, *x.shape)
    end = path[-1]
    if float(grid[-1]) < last:  # the last bit to clean data, where the velocity need not exist
        end = ddim_step(
            end, denoiser.predict(end, last, cond, "x0", guidance), last, float(grid[-1]), denoiser.schedule
        )
        path[-1] = end
    return Solution(end, denoiser.evaluations - before, grid, path if record else None)
