r"""Jumps along a teacher's trajectory, and which jump a step of training looks at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.solvers import ddim_step


def jump(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Condition = None,
    *,
    guidance: float | Tensor = 1.0,
) -> Tensor:
    r"""The jump of DDIM from t to s, with gradient: :math:`\Psi(x_t, t \to s) = \alpha_s \hat x_0 + \sigma_s \hat\epsilon`.

    At s = t it is x_t, at s = 0 the predicted sample.

    Args:
        x_t: (B, ...). t, s: (B,) with s <= t.
    """
    return ddim_step(x_t, denoiser.predict(x_t, t, cond, "x0", guidance), t, s, denoiser.schedule)


@dataclass(frozen=True)
class SegmentSampler:
    r"""Pairs of points on a grid of N + 1 times for trajectory-segmented consistency.

    The grid 0 … N is cut into k segments of m = floor(N / k) points (the last also holds the rest). A draw is a start n in 1 … N and an end
    e in b … n - 1 within the segment of n - 1, which begins at :math:`b = \lfloor (n-1)/m \rfloor m`, capped for the rest.

    Args:
        points: N.
        segments: k, 1 <= k <= N.
        ends: ``any``: e uniform in b … n - 1; ``boundary``: always b (phased consistency); ``zero``: always 0 (needs k = 1 to be
            consistent: latent consistency models).

    Source: "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis" (2024).
    """

    points: int
    segments: int
    ends: str = "any"

    def __post_init__(self) -> None:
        if not 1 <= self.segments <= self.points:
            raise InputError(
                f"segments must lie between 1 and the {self.points} points of the grid (got {self.segments})"
            )
        if self.ends not in ("any", "boundary", "zero"):
            raise InputError(f"ends must be any, boundary or zero (got {self.ends!r})")
        if self.ends == "zero" and self.segments != 1:
            raise InputError("ends='zero' jumps across segments: it needs segments=1")

    @property
    def length(self) -> int:
        """m."""
        return self.points // self.segments

    def lower(self, n: Tensor) -> Tensor:
        """The lower border b of the segment that the jump from n goes into."""
        return (torch.div(n - 1, self.length, rounding_mode="floor")).clamp(max=self.segments - 1) * self.length

    def borders(self) -> Tensor:
        """(k + 1,) indices of the borders, falling from N to 0: the grid for sampling in k steps."""
        inner = torch.arange(self.segments - 1, -1, -1) * self.length
        return torch.cat([torch.tensor([self.points]), inner])

    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Starts n and ends e, (count,) int64 each."""
        n = torch.randint(1, self.points + 1, (count,), generator=generator)
        low = self.lower(n)
        if self.ends != "any":
            return n, low if self.ends == "boundary" else torch.zeros_like(n)
        part = torch.rand(count, generator=generator, dtype=torch.float64)
        return n, torch.minimum(low + (part * (n - low)).floor().long(), n - 1)
