r"""A large scene in blocks: regular cells of the contracted space, which views belong to which, cutting out and putting together.

Space is contracted so that all of it fits the unit cube, with u = 2 (x - low)/(high - low) - 1 and r = max |u_i|:

.. math:: \mathrm{contract}(x) = \tfrac14 c + \tfrac12,\qquad c = u \text{ if } r \le 1,\quad c = (2 - 1/r)\,u/r \text{ otherwise}

so the box itself is the middle half of the cube.

Source: "CityGaussian: Real-time High-quality Large-Scale Scene Rendering with Gaussians"; "Mip-NeRF 360" (the contraction).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras

Draw = Callable[[Tensor, int], Tensor]
"""(which Gaussians or anchors are left (N,) bool, number of the camera) -> picture (H, W, 3) in [0, 1]."""


def contract(points: Tensor, aabb: Tensor) -> Tensor:
    """World points (N, 3) in the unit cube; the box (2, 3) becomes [1/4, 3/4]^3."""
    low, high = aabb.to(points)
    u = 2 * (points - low) / (high - low) - 1
    reach = u.abs().amax(-1, keepdim=True).clamp_min(1)
    return (2 - 1 / reach) * u / reach / 4 + 0.5


def border(planes: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where planes of the contracted cube stand in the world, along one axis; 0 and 1 are at infinity."""
    c = 4 * (planes - 0.5)
    outside = c.sign() / (2 - c.abs()).clamp_min(0)
    return low + (torch.where(c.abs() <= 1, c, outside) + 1) / 2 * (high - low)


@dataclass(frozen=True)
class Cells:
    """nx x ny x nz equal cells of the contracted cube.

    Attributes:
        aabb: (2, 3) the box of the scene's middle part. counts: (nx, ny, nz).
    """

    aabb: Tensor
    counts: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.aabb.shape != (2, 3) or not bool((self.aabb[0] < self.aabb[1]).all()):
            raise InputError(f"a box is (2, 3) with its lower corner below its upper one (got {self.aabb.tolist()})")
        if len(self.counts) != 3 or min(self.counts) < 1:
            raise InputError(f"a scene has 1 or more cells along each of three axes (got {self.counts})")

    def __len__(self) -> int:
        nx, ny, nz = self.counts
        return nx * ny * nz

    def of(self, points: Tensor) -> Tensor:
        """The cell (N,) of each world point (N, 3); every point has exactly one."""
        sizes = torch.tensor(self.counts, device=points.device)
        at = (contract(points, self.aabb) * sizes).floor().long()
        x, y, z = torch.minimum(at.clamp_min(0), sizes - 1).unbind(-1)
        return (x * self.counts[1] + y) * self.counts[2] + z

    def boxes(self, margin: float = 0.0) -> Tensor:
        """The cells in the world (B, 2, 3), widened by ``margin`` world units; the outermost reach to infinity.

        Borders outside the box are those of the axes, where the contraction bends nothing.
        """
        edges = []
        for axis, count in enumerate(self.counts):
            low, high = self.aabb[:, axis]
            edges.append(border(torch.linspace(0, 1, count + 1).to(self.aabb), low, high))
        lows = torch.cartesian_prod(*(e[:-1] for e in edges)).view(-1, 3)
        highs = torch.cartesian_prod(*(e[1:] for e in edges)).view(-1, 3)
        return torch.stack([lows - margin, highs + margin], 1)

    def near(self, points: Tensor, margin: float = 0.0) -> Tensor:
        """(N, B) whether a point is in a cell or within ``margin`` (world units, along each axis) of it."""
        boxes = self.boxes(margin).to(points)
        inside = ((points[:, None] >= boxes[:, 0]) & (points[:, None] <= boxes[:, 1])).all(-1)
        return inside | torch.nn.functional.one_hot(self.of(points), len(self)).bool()


def ground_points(cameras: Cameras, height: float = 0.0) -> Tensor:
    """Where optical axes meet the plane z = height (N, 3); of a camera that does not look at it, its own position."""
    place, forward = cameras.positions, -cameras.c2w[:, :3, 2]
    steep = torch.where(forward[:, 2].abs() > 1e-6, forward[:, 2], torch.ones_like(forward[:, 2]))
    t = torch.where(forward[:, 2].abs() > 1e-6, (height - place[:, 2]) / steep, torch.full_like(steep, -1))
    return torch.where(t[:, None] > 0, place + t[:, None] * forward, place)


@torch.no_grad()
def seen_blocks(
    draw: Draw, blocks: Tensor, count: int, views: int, dissimilarity: Callable[[Tensor, Tensor], Tensor], threshold: float = 0.05
) -> Tensor:  # fmt: skip
    """Which blocks a view needs: those without which its picture changes.

    Args:
        draw: pictures of a coarse model without some of its parts. blocks: (N,) the block of each part. count: B. views: V cameras.
        dissimilarity: of pictures (1, H, W, 3) to (1,), usually 1 - SSIM. threshold: a change above it counts.

    Returns:
        (V, B) bool.
    """
    found = torch.zeros(views, count, dtype=torch.bool)
    for view in range(views):
        whole = draw(torch.ones_like(blocks, dtype=torch.bool), view)[None]
        for block in range(count):
            without = draw(blocks != block, view)[None]
            found[view, block] = bool(dissimilarity(without, whole) > threshold)
    return found


def fill_empty(views: Tensor, distances: Tensor, least: int = 1) -> Tensor:
    """Give blocks that got fewer than ``least`` views the nearest ones as well.

    Args:
        views: (V, B) bool. distances: (V, B) how far each view is from each block.
    """
    found = views.clone()
    nearest = distances.argsort(0)[: min(least, len(views))]
    short = (views.sum(0) < least).nonzero()[:, 0]
    for block in short.tolist():
        found[nearest[:, block], block] = True
    return found
