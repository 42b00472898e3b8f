"""Empty space and damaged fields: which cells of a box hold anything, and whether a field's values are numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import InputError


class OccupancyGrid(nn.Module):
    """Which cells of a box hold anything, so that empty ones are never asked.

    Each cell keeps m <- max(0.95 m, sigma at jittered points in it); it counts as occupied where m exceeds min(threshold, mean m), or where
    a neighbour's does (``grow``), since points in a cell may miss a thin part of it. Skipped samples then have a density below the
    threshold, so that a ray of length L differs from the dense one by at most 1 - exp(-threshold L) in every colour.

    Args:
        aabb: (2, 3). resolution: cells per side. threshold: density. warmup: steps during which nothing is skipped and
            every cell is updated. every: steps between updates. grow: count neighbours of occupied cells too.

    Source: "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", appendix.
    """

    aabb: Tensor
    values: Tensor
    occupied: Tensor

    def __init__(
        self,
        aabb: Tensor,
        resolution: int = 64,
        threshold: float = 0.01,
        warmup: int = 256,
        every: int = 16,
        decay: float = 0.95,
        grow: bool = True,
    ) -> None:
        super().__init__()
        if resolution < 1 or threshold < 0 or not 0 <= decay <= 1 or every < 1:
            raise InputError("an occupancy grid needs resolution and every >= 1, threshold >= 0 and decay in [0, 1]")
        self.resolution, self.threshold, self.decay = resolution, threshold, decay
        self.warmup, self.every, self.grow = warmup, every, grow
        self.register_buffer("aabb", aabb.detach().clone().float())
        self.register_buffer("values", torch.zeros((resolution,) * 3))
        self.register_buffer("occupied", torch.ones((resolution,) * 3, dtype=torch.bool))

    @torch.no_grad()
    def update(self, field: nn.Module, step: int, generator: torch.Generator | None = None) -> bool:
        """Refresh if it is time (``step`` a multiple of ``every``); returns whether it was."""
        if step % self.every:
            return False
        self.refresh(field, generator=generator)
        if step < self.warmup:
            self.occupied.fill_(True)
        return True

    @torch.no_grad()
    def refresh(self, field: nn.Module, points: int = 1, generator: torch.Generator | None = None) -> None:
        """Ask ``field.density`` at ``points`` jittered places of every cell, and decide anew what is occupied."""
        n, device = self.resolution, self.values.device
        axis = torch.arange(n, device=device)
        cells = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
        seen = torch.zeros(n**3, device=device)
        for _ in range(points):
            inside = (cells + torch.rand(cells.shape, generator=generator).to(device)) / n
            x = self.aabb[0] + inside * (self.aabb[1] - self.aabb[0])
            found = torch.cat([finite(field, field.density(part)["sigma"]) for part in x.split(2**18)])  # type: ignore[operator]
            seen = torch.maximum(seen, found.float())
        self.values = torch.maximum(self.values * self.decay, seen.view(n, n, n))
        full = self.values > min(self.threshold, float(self.values.mean()))
        self.occupied = F.max_pool3d(full[None].float(), 3, 1, 1)[0] > 0 if self.grow else full

    def forward(self, x: Tensor) -> Tensor:
        """Whether points (..., 3) lie in occupied cells; outside the box nothing does."""
        unit = (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0])
        i, j, k = (unit * self.resolution).long().clamp(0, self.resolution - 1).unbind(-1)
        return self.occupied[i, j, k] & ((unit >= 0) & (unit <= 1)).all(-1)


def finite(field: nn.Module, values: Tensor) -> Tensor:
    """The values, which must be finite.

    Raises:
        InputError: they are not; it names the field.
    """
    bad = ~values.isfinite()
    if bool(bad.any()):
        raise InputError(
            f"{type(field).__name__} gives NaN or infinity at {int(bad.sum())} of {bad.numel()} values: "
            "its weights are damaged; load an earlier checkpoint or lower the learning rate"
        )
    return values
