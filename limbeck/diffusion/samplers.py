"""A sampler: a network, the times it is asked at, and the rule between them. What is judged, shown, saved and exported."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.onestep import scaled_noise, start_of
from limbeck.diffusion.schedules import expand
from limbeck.diffusion.solvers import SOLVERS, Solution, check_times, ddim_step, ode_solve

Kind = Literal["ode", "renoise", "tcd", "one-step"]
KINDS: tuple[Kind, ...] = ("ode", "renoise", "tcd", "one-step")


@dataclass(frozen=True)
class Sampler:
    """How samples are made from unit noise.

    Attributes:
        denoiser: the network with its conventions.
        times: (N + 1,) falling from the start to 0; ``one-step`` has two.
        kind: ``ode``: the solver on the grid; ``renoise``: predict x0, add noise of the next time, again (consistency models);
            ``tcd``: trajectory consistency sampling with ``gamma``; ``one-step``: x0 predicted once, from noise alone.
        solver: of ``ode``.
        guidance: w of every evaluation.
        gamma: in [0, 1]; 0 makes ``tcd`` the steps of DDIM, 1 those of ``renoise``.
        noise: of ``renoise``: ``fresh`` in every step, or the ``initial`` noise again.
    """

    denoiser: Denoiser
    times: Tensor
    kind: str = "ode"
    solver: str = "ddim"
    guidance: float = 1.0
    gamma: float = 0.0
    noise: str = "fresh"
    _checked: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownNameError("kind of sampler", self.kind, KINDS)
        if self.solver not in SOLVERS:
            raise UnknownNameError("solver", self.solver, SOLVERS)
        if not 0 <= self.gamma <= 1:
            raise InputError(f"gamma must lie in [0, 1] (got {self.gamma})")
        if self.noise not in ("fresh", "initial"):
            raise UnknownNameError("noise of a sampler", self.noise, ("fresh", "initial"))
        grid = check_times(self.times, self.denoiser.schedule)
        if self.kind != "ode" and float(grid[-1]) != 0:
            raise InputError(f"the times of a sampler of kind '{self.kind}' must end in 0")
        if self.kind == "one-step" and len(grid) != 2:
            raise InputError(f"a one-step sampler has two times, its start and 0 (got {len(grid)})")
        object.__setattr__(self, "_checked", grid)

    @classmethod
    def one_step(cls, denoiser: Denoiser, t_init: float | None = None) -> Sampler:
        """x0 predicted once, from noise."""
        return cls(denoiser, torch.tensor([start_of(denoiser, t_init), 0.0], dtype=torch.float64), "one-step")

    @classmethod
    def ode(cls, denoiser: Denoiser, steps: int, solver: str = "ddim", guidance: float = 1.0, **grid: Any) -> Sampler:
        """The ODE in so many steps on the schedule's own grid."""
        return cls(denoiser, denoiser.schedule.times(steps, **grid), "ode", solver, guidance)

    @property
    def steps(self) -> int:
        return len(self._checked) - 1

    @property
    def nfe(self) -> int:
        """Network evaluations per sample; 0 where it is only known after sampling (rk45)."""
        if self.kind == "ode" and self.solver == "rk45":
            return 0
        each = 1 if self.guidance == 1 or self.denoiser.null_cond is None else self.evaluations_with_guidance
        heun = self.kind == "ode" and self.solver == "heun"
        evaluated = self.steps if not heun else 2 * self.steps - int(float(self._checked[-1]) == 0)
        return each * evaluated

    @property
    def evaluations_with_guidance(self) -> int:
        """Evaluations that one guided prediction takes: two, unless the network has guidance built in."""
        return int(getattr(self.denoiser, "guided_evaluations", 2))

    def start(self, z: Tensor) -> Tensor:
        """Unit noise as the input at the first time."""
        if self.kind == "one-step":
            return scaled_noise(self.denoiser, z, float(self._checked[0]))
        first = float(self._checked[0])
        schedule = self.denoiser.schedule
        return z * (first if schedule.name == "edm" else schedule.prior_std)

    @torch.no_grad()
    def sample(
        self, z: Tensor, cond: Condition = None, generator: torch.Generator | None = None, *, record: bool = False
    ) -> Solution:
        """Samples from unit noise.

        Args:
            z: (B, ...) from N(0, I).
            cond: (B, ...) conditions.
            generator: of noise added on the way; torch's own if None.
            record: keep the states (``ode`` only).
        """
        x = self.start(z)
        grid, denoiser = self._checked, self.denoiser
        guidance = 1.0 if cond is None else self.guidance
        if self.kind == "ode":
            return ode_solve(denoiser, x, grid, solver=self.solver, cond=cond, guidance=guidance, record=record)
        before = denoiser.evaluations
        for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            x0 = denoiser.predict(x, t, cond, "x0", guidance)
            if s == 0:
                x = x0
            elif self.kind == "renoise":
                fresh = z if self.noise == "initial" else self._noise(z, generator)
                x = denoiser.schedule.add_noise(x0, fresh, torch.tensor(s, dtype=torch.float32, device=z.device))
            else:
                x = tcd_step(x, x0, t, s, denoiser, self.gamma, self._noise(z, generator) if self.gamma > 0 else None)
        return Solution(x, denoiser.evaluations - before, grid)

    @staticmethod
    def _noise(z: Tensor, generator: torch.Generator | None) -> Tensor:
        where = z.device if generator is None else generator.device
        return torch.randn(z.shape, generator=generator, device=where, dtype=z.dtype).to(z.device)

    def replace(self, **changes: Any) -> Sampler:
        """A copy with some attributes changed."""
        known = {k: getattr(self, k) for k in ("denoiser", "times", "kind", "solver", "guidance", "gamma", "noise")}
        return (
            Sampler(**{**known, **changes}) if "denoiser" in changes or "times" in changes else replace(self, **changes)
        )

    def describe(self) -> dict[str, Any]:
        """Everything but the network, as plain values."""
        return {
            "kind": self.kind,
            "times": self._checked.tolist(),
            "solver": self.solver,
            "guidance": self.guidance,
            "gamma": self.gamma,
            "noise": self.noise,
            "nfe": self.nfe,
        }


def tcd_step(
    x_t: Tensor, x0: Tensor, t: float, s: float, denoiser: Denoiser, gamma: float, noise: Tensor | None
) -> Tensor:
    """From t to s by way of s' = (1 - gamma) s: deterministically down to s', then noise is added up to s.

    With gamma 0 the step of DDIM, with gamma 1 "predict x0 and add noise".

    Source: "Trajectory Consistency Distillation" (2024).
    """
    schedule = denoiser.schedule
    if gamma == 0:
        return ddim_step(x_t, x0, t, s, schedule)
    middle = (1 - gamma) * s
    x = ddim_step(x_t, x0, t, middle, schedule)
    if noise is None:
        raise InputError("a step with gamma above 0 needs noise")
    ends = torch.tensor([middle, s], dtype=torch.float64, device=x_t.device)
    alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
    ratio = alpha[1] / alpha[0]
    added = torch.sqrt((sigma[1] ** 2 - (ratio * sigma[0]) ** 2).clamp_min(0))
    return (expand(ratio, x) * x + expand(added, x) * noise).to(x_t.dtype)
