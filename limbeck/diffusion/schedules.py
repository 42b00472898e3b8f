r"""Noise schedules: how much is left of the sample, and how much noise there is, at a time.

Every schedule gives :math:`x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon` with :math:`t = 0` exactly clean and :math:`t` growing
towards noise. Schedules are small immutable objects without tensors of parameters, so that they copy and hash cheaply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from limbeck.core.errors import InputError, UnknownNameError

Spacing = Literal["uniform", "karras", "nsr"]


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient (B,) or () as (B, 1, ...), to be multiplied with ``like`` (B, ...)."""
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def precise(t: Tensor) -> Tensor:
    """``t`` in single precision or better: coefficients are never computed in 16 bits."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


class Schedule:
    r"""Base of all schedules.

    Attributes:
        name: by which :func:`make_schedule` knows it.
        t_min: smallest time at which a network is asked (0 itself is clean).
        t_max: where sampling starts.
        prior_std: standard deviation of what sampling starts from.
    """

    name: ClassVar[str] = ""
    t_min: float
    t_max: float
    prior_std: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the sample; ``t`` of any shape."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise."""
        raise NotImplementedError

    def dalpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha."""
        raise NotImplementedError

    def dsigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma."""
        raise NotImplementedError

    def t_from_nsr(self, nsr: Tensor) -> Tensor:
        """The time at which noise to signal is ``nsr`` (>= 0); times beyond ``t_max`` may come out where the schedule has them."""
        raise NotImplementedError

    def to_model_time(self, t: Tensor) -> Tensor:
        """What a network is told for time ``t``."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Plain values from which :func:`make_schedule` makes the same schedule again."""
        return {"name": self.name}

    # ---- what follows from these ---------------------------------------------------------------------------------------

    def nsr(self, t: Tensor) -> Tensor:
        """Noise to signal, sigma / alpha (infinite where alpha is 0)."""
        return self.sigma(t) / self.alpha(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """Half of the logarithm of the signal-to-noise ratio, log(alpha / sigma)."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    @property
    def variance_preserving(self) -> bool:
        """Whether alpha^2 + sigma^2 = 1, which the prediction ``v`` needs."""
        return False

    def prior_sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """What sampling starts from, at ``t_max``. Drawn on the generator's device, then moved."""
        where = device if generator is None else generator.device
        return (torch.randn(tuple(shape), generator=generator, device=where) * self.prior_std).to(
            device or where or "cpu"
        )

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """``alpha(t) x0 + sigma(t) eps``, with x0 and eps (B, ...) and t (B,) or ()."""
        alpha, sigma = expand(self.alpha(t), x0), expand(self.sigma(t), x0)
        return (alpha * x0 + sigma * eps).to(x0.dtype)

    def times(self, steps: int, spacing: Spacing = "uniform", *, t_start: float | None = None) -> Tensor:
        """A grid for sampling: (steps + 1,) float64, falling from ``t_start`` (None: ``t_max``) to 0.

        Args:
            steps: intervals, at least 1.
            spacing: ``uniform`` in time; ``karras``: even in nsr^(1/7) between both ends, then 0; ``nsr``: even in log nsr, then 0.

        Raises:
            InputError: fewer than one step, an unknown spacing, a start outside (0, t_max].
        """
        start = self._start(steps, t_start)
        if spacing == "uniform":
            return torch.linspace(start, 0, steps + 1, dtype=torch.float64)
        if spacing not in ("karras", "nsr"):
            raise UnknownNameError("spacing", spacing, ("uniform", "karras", "nsr"))
        ends = self._spaced_ends(start)
        high, low = (float(self.nsr(torch.tensor(e, dtype=torch.float64))) for e in ends)
        part = torch.linspace(0, 1, steps, dtype=torch.float64)
        if spacing == "karras":
            nsr = (high ** (1 / 7) + part * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        else:
            nsr = torch.exp(math.log(high) + part * (math.log(low) - math.log(high)))
        grid = self.t_from_nsr(nsr)
        grid[0] = start
        return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])

    def _start(self, steps: int, t_start: float | None) -> float:
        start = self.t_max if t_start is None else float(t_start)
        if steps < 1:
            raise InputError(f"a grid needs at least one step (got {steps})")
        if not 0 < start <= self.t_max * (1 + 1e-9):
            raise InputError(f"sampling with '{self.name}' starts in (0, {self.t_max:g}], not at {start:g}")
        return start

    def _spaced_ends(self, start: float) -> tuple[float, float]:
        """Where a grid in nsr begins and ends: both must be finite and above 0."""
        return min(start, self.t_max * (1 - 1e-4)), min(self.t_min, start / 2)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(repr(self.describe()))

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.describe().items() if k != "name" and not isinstance(v, list))
        return f"{type(self).__name__}({inside})"


class Flow(Schedule):
    """The straight path of rectified flows: alpha = 1 - t, sigma = t, t in [0, 1].

    Args:
        shift: s > 0; moves uniform grids towards noise, ``t' = s t / (1 + (s - 1) t)`` (Stable Diffusion 3 has 3). It does not
            change alpha and sigma.
        time_scale: networks are told ``time_scale * t``.

    Source: "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow" (2022).
    """

    name = "flow"
    t_min, t_max = 1e-5, 1.0

    def __init__(self, shift: float = 1.0, time_scale: float = 1000.0) -> None:
        if not shift > 0:
            raise InputError(f"the shift of a flow must be above 0 (got {shift})")
        self.shift, self.time_scale = float(shift), float(time_scale)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - precise(t)

    def sigma(self, t: Tensor) -> Tensor:
        return precise(t)

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(precise(t))

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(precise(t))

    def t_from_nsr(self, nsr: Tensor) -> Tensor:
        nsr = precise(nsr)
        return torch.where(torch.isinf(nsr), torch.ones_like(nsr), nsr / (1 + nsr))

    def to_model_time(self, t: Tensor) -> Tensor:
        return self.time_scale * precise(t)

    def times(self, steps: int, spacing: Spacing = "uniform", *, t_start: float | None = None) -> Tensor:
        if spacing != "uniform":
            return super().times(steps, spacing, t_start=t_start)
        start = self._start(steps, t_start)
        even = super().times(steps, spacing, t_start=start / (self.shift - (self.shift - 1) * start))
        return self.shift * even / (1 + (self.shift - 1) * even)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "shift": self.shift, "time_scale": self.time_scale}


class _Angular(Schedule):
    """Variance-preserving schedules: alpha = cos(theta), sigma = sin(theta) with an angle that grows from 0."""

    @property
    def variance_preserving(self) -> bool:
        return True

    def angle(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def dangle(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def t_from_angle(self, angle: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self.angle(precise(t))).clamp_min(0)  # pi/2 in single precision is a little more than pi/2

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self.angle(precise(t)))

    def dalpha(self, t: Tensor) -> Tensor:
        t = precise(t)
        return -torch.sin(self.angle(t)) * self.dangle(t)

    def dsigma(self, t: Tensor) -> Tensor:
        t = precise(t)
        return torch.cos(self.angle(t)) * self.dangle(t)

    def t_from_nsr(self, nsr: Tensor) -> Tensor:
        return self.t_from_angle(torch.arctan(precise(nsr)))


class Trig(_Angular):
    """alpha = cos t, sigma = sin t, t in [0, pi/2] (TrigFlow).

    Source: "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models" (2024).
    """

    name = "trig"
    t_min, t_max = 1e-4, math.pi / 2

    def angle(self, t: Tensor) -> Tensor:
        return t

    def dangle(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def t_from_angle(self, angle: Tensor) -> Tensor:
        return angle

    def to_model_time(self, t: Tensor) -> Tensor:
        return precise(t) * (2000 / math.pi)


class VPCosine(_Angular):
    r"""alpha = cos(pi t / 2), t in [0, 1].

    Args:
        offset: s >= 0; above 0 the form of improved DDPM, :math:`\alpha = \cos(\frac{t+s}{1+s}\frac{\pi}{2}) / \cos(\frac{s}{1+s}\frac{\pi}{2})`
            (published s = 0.008).

    Source: "Improved Denoising Diffusion Probabilistic Models" (2021); without offset "Progressive Distillation for Fast Sampling of
    Diffusion Models" (2022).
    """

    name = "vp-cosine"
    t_min, t_max = 1e-4, 1.0

    def __init__(self, offset: float = 0.0) -> None:
        if offset < 0:
            raise InputError(f"the offset of a cosine schedule must be 0 or more (got {offset})")
        self.offset = float(offset)
        self._offset_angle = offset / (1 + offset) * math.pi / 2
        self._first = math.cos(self._offset_angle)

    def angle(self, t: Tensor) -> Tensor:
        if self.offset == 0:
            return t * (math.pi / 2)
        # 1 - cos(angle) = (cos a - cos b)/cos a = 2 sin((a + b)/2) sin((b - a)/2)/cos a, without the cancellation at small t
        half = t.double() * (math.pi / 4 / (1 + self.offset))
        lost = 2 * torch.sin(self._offset_angle + half) * torch.sin(half) / self._first
        return (2 * torch.arcsin((lost / 2).clamp(0, 1).sqrt())).to(t.dtype)

    def dangle(self, t: Tensor) -> Tensor:
        if self.offset == 0:
            return torch.full_like(t, math.pi / 2)
        inner = self._offset_angle + t.double() * (math.pi / 2 / (1 + self.offset))
        slope = torch.sin(inner) / self._first * (math.pi / 2) / (1 + self.offset)
        return (slope / torch.sin(self.angle(t.double())).clamp_min(1e-6)).to(t.dtype)  # infinite at 0 itself

    def t_from_angle(self, angle: Tensor) -> Tensor:
        if self.offset == 0:
            return angle * (2 / math.pi)
        inner = torch.arccos((torch.cos(angle.double()) * self._first).clamp(-1, 1))
        return (inner * (2 / math.pi) * (1 + self.offset) - self.offset).to(angle.dtype)

    def to_model_time(self, t: Tensor) -> Tensor:
        return 1000 * precise(t)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "offset": self.offset}


class VPDiscrete(_Angular):
    r"""The schedule of DDPM with N noise levels, made continuous: :math:`t = (k + 1)/N` is index k, and t = 0 is clean.

    At :math:`t = (k+1)/N`: :math:`\alpha^2 = \bar\alpha_k = \prod_{i \le k} (1 - \beta_i)`. Between indices the angle
    :math:`\arctan(\sigma/\alpha)` is interpolated linearly, which also covers schedules that end in pure noise. Networks are told
    the index, :math:`N t - 1`.

    Args:
        beta: ``linear`` (1e-4 to 0.02 for N = 1000; DDPM, DiT, PixArt) or ``scaled_linear`` (square of an even grid; Stable Diffusion).
        steps: N.
        alphas_cumprod: N values in [0, 1), falling: a schedule of your own, in place of ``beta``.
        beta_start, beta_end: ends of the betas; None: the published ones.
        zero_terminal_snr: rescale so that the last index is pure noise.

    Source: "Denoising Diffusion Probabilistic Models" (2020); the rescaling from "Common Diffusion Noise Schedules and Sample Steps are
    Flawed" (2023).
    """

    name = "vp-discrete"
    t_max = 1.0
    _ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (8.5e-4, 1.2e-2)}

    def __init__(
        self,
        beta: str = "linear",
        steps: int = 1000,
        alphas_cumprod: Sequence[float] | Tensor | None = None,
        *,
        beta_start: float | None = None,
        beta_end: float | None = None,
        zero_terminal_snr: bool = False,
    ) -> None:
        self._given = None
        if alphas_cumprod is not None:
            bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu().flatten()
            self._given = bar.tolist()
        else:
            if beta not in self._ENDS:
                raise UnknownNameError("beta schedule", beta, self._ENDS)
            if steps < 2:
                raise InputError(f"a discrete schedule needs at least two noise levels (got {steps})")
            first, last = self._ENDS[beta]
            first, last = beta_start or first, beta_end or last
            if beta == "linear":
                betas = torch.linspace(first, last, steps, dtype=torch.float64)
            else:
                betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
            bar = torch.cumprod(1 - betas, 0)
        if zero_terminal_snr:
            root = bar.sqrt()
            bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        falling = bool((bar[1:] < bar[:-1]).all())
        if (
            len(bar) < 2
            or not falling
            or not bool(torch.isfinite(bar).all())
            or float(bar[0]) >= 1
            or float(bar[-1]) < 0
        ):
            raise InputError("alphas_cumprod must be two or more values that fall, from below 1 to 0 or more")
        self.beta, self.steps, self.zero_terminal_snr = beta, len(bar), zero_terminal_snr
        self.beta_start, self.beta_end = beta_start, beta_end
        self.alphas_cumprod: tuple[float, ...] = tuple(bar.tolist())
        self.t_min = 1 / self.steps

    @cached_property
    def _table(self) -> Tensor:
        """(N + 1,) float64 angles at t = 0, 1/N, …, 1."""
        bar = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.arctan2((1 - bar).sqrt(), bar.sqrt())])

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = self._table.to(t.device)
        place = t.double() * self.steps
        cell = place.floor().clamp(0, self.steps - 1).long()
        return table[cell], table[cell + 1], place - cell

    def angle(self, t: Tensor) -> Tensor:
        low, high, part = self._cell(t)
        return (low + (high - low) * part).to(t.dtype)

    def dangle(self, t: Tensor) -> Tensor:
        low, high, _ = self._cell(t)
        return ((high - low) * self.steps).to(t.dtype)

    def t_from_angle(self, angle: Tensor) -> Tensor:
        table = self._table.to(angle.device)
        wanted = angle.double()
        cell = (torch.searchsorted(table, wanted.contiguous(), right=True) - 1).clamp(0, self.steps - 1)
        part = (wanted - table[cell]) / (table[cell + 1] - table[cell])
        return ((cell + part) / self.steps).to(angle.dtype)

    def to_model_time(self, t: Tensor) -> Tensor:
        return (precise(t) * self.steps - 1).clamp_min(0)

    def time_of(self, index: Tensor | int) -> Tensor:
        """The time of a noise level's index k in 0 … N - 1, float64."""
        return (torch.as_tensor(index, dtype=torch.float64) + 1) / self.steps

    def describe(self) -> dict[str, Any]:
        if self._given is not None:
            return {"name": self.name, "alphas_cumprod": self._given, "zero_terminal_snr": self.zero_terminal_snr}
        return {
            "name": self.name,
            "beta": self.beta,
            "steps": self.steps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "zero_terminal_snr": self.zero_terminal_snr,
        }


class EDM(Schedule):
    """Variance exploding with time equal to the noise: alpha = 1, sigma = t, t in [sigma_min, sigma_max].

    Networks are told ln(sigma) / 4.

    Args:
        sigma_min, sigma_max: the least and the largest noise of sampling; 0.002 and 80 suit data in [-1, 1].
        rho: bends the grid ``karras``.

    Source: "Elucidating the Design Space of Diffusion-Based Generative Models" (2022).
    """

    name = "edm"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise InputError(f"sigma_min and sigma_max must be above 0 and rise (got {sigma_min} and {sigma_max})")
        self.t_min, self.t_max, self.rho = float(sigma_min), float(sigma_max), float(rho)
        self.prior_std = self.t_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(precise(t))

    def sigma(self, t: Tensor) -> Tensor:
        return precise(t)

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(precise(t))

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(precise(t))

    def t_from_nsr(self, nsr: Tensor) -> Tensor:
        return precise(nsr)

    def to_model_time(self, t: Tensor) -> Tensor:
        return precise(t).clamp_min(1e-20).log() / 4

    def times(self, steps: int, spacing: Spacing = "karras", *, t_start: float | None = None) -> Tensor:
        """As for every schedule, but spaced as published (``karras``) unless said otherwise."""
        if spacing != "karras":
            return super().times(steps, spacing, t_start=t_start)
        start, last = self._spaced_ends(self._start(steps, t_start))
        part = torch.linspace(0, 1, steps, dtype=torch.float64)
        bend = 1 / self.rho
        grid = (start**bend + part * (last**bend - start**bend)) ** self.rho
        return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])

    def _spaced_ends(self, start: float) -> tuple[float, float]:
        return start, min(self.t_min, start / 2)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "sigma_min": self.t_min, "sigma_max": self.t_max, "rho": self.rho}


SCHEDULES: dict[str, type[Schedule]] = {c.name: c for c in (Flow, VPDiscrete, VPCosine, EDM, Trig)}


def make_schedule(name: str, **options: Any) -> Schedule:
    """A schedule by name (``flow``, ``vp-discrete``, ``vp-cosine``, ``edm``, ``trig``), with its class's options.

    Raises:
        UnknownNameError: no such schedule.
        InputError: options that it does not take, or out of range.
    """
    if name not in SCHEDULES:
        raise UnknownNameError("schedule", name, SCHEDULES)
    try:
        return SCHEDULES[name](**options)
    except TypeError as error:
        raise InputError(f"schedule '{name}' does not take these options: {error}") from None
