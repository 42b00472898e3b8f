"""Where to begin when a scene comes without a point cloud: points of a lattice whose colours agree in the pictures that see them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras

CANDIDATES = 8
"""Points of the lattice for each one that is kept."""


@torch.no_grad()
def consistent_points(
    images: Tensor, cameras: Cameras, aabb: Tensor, count: int, background: float | None = None, least: int = 2
) -> Tensor:
    """The points of a regular lattice in the box whose projections look most alike over the pictures.

    A point of a surface shows one colour wherever it is not hidden, empty space shows what is behind it. So the lattice has about
    eight times as many points as wanted, and those are kept whose colours have the smallest variance over the pictures that they
    project into. Where a picture shows the plain background, a point is empty.

    Args:
        images: (N, H, W, 3) in [0, 1]. cameras: N of them. aabb: (2, 3). count: about how many points are wanted.
        background: grey value behind the scene, if pictures show it (within 1/64). least: pictures that must see a point.

    Returns:
        (M, 3), at most ``count``.

    Raises:
        InputError: nothing in the box is seen by so many pictures.
    """
    if count < 1:
        raise InputError(f"at least 1 point is wanted (got {count})")
    low, high = aabb.to(cameras.c2w)
    side = float(((high - low).prod() / (CANDIDATES * count)) ** (1 / 3))
    axes = [torch.arange(float(a) + side / 2, float(b), side) for a, b in zip(low, high, strict=True)]
    points = torch.cartesian_prod(*axes).view(-1, 3).to(low)
    seen, first, second = torch.zeros(len(points)), torch.zeros(len(points), 3), torch.zeros(len(points), 3)
    empty = torch.zeros(len(points), dtype=torch.bool)
    for number in range(len(cameras)):
        place, depth = cameras[number].project(points)
        unit = place[0] / place.new_tensor([cameras.width, cameras.height])
        inside = (depth[0] > cameras.near) & ((unit > 0) & (unit < 1)).all(1)
        grid = (2 * unit[inside] - 1).view(1, 1, -1, 2).to(images)
        picture = images[number].movedim(2, 0)[None]
        colour = F.grid_sample(picture, grid, padding_mode="border", align_corners=False)[0, :, 0].T.cpu()
        where = inside.nonzero()[:, 0].cpu()
        seen[where] += 1
        first[where] += colour
        second[where] += colour.square()
        if background is not None:
            empty[where] |= ((colour - background).abs() < 1 / 64).all(1)
    known = (seen >= least) & ~empty
    if not bool(known.any()):
        raise InputError("no point of the box is seen by two pictures: check the box and the cameras' axes")
    mean = first / seen.clamp_min(1)[:, None]
    variance = (second / seen.clamp_min(1)[:, None] - mean.square()).sum(1)
    # a variance over few pictures is small by chance
    variance = variance * seen / (seen - 1).clamp_min(1)
    order = torch.where(known, variance, torch.inf).argsort()[: min(count, int(known.sum()))]
    return points[order.sort().values.to(points.device)]
