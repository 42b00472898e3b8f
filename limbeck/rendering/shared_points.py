"""Sample points that several fields are asked at together, and pixels from what they give there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.rendering.rays import Rays, Spacing, intersect_box, stratified
from limbeck.rendering.volume import Occupied, composite


class Points(NamedTuple):
    """Samples along R rays.

    Attributes:
        x, d: (M, 3) positions and unit directions where fields are asked.
        asked: (R, S) bool, which samples those are, in their order.
        t, delta: (R, S) distances along rays and lengths of their bins.
    """

    x: Tensor
    d: Tensor
    asked: Tensor
    t: Tensor
    delta: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """What a field gave, (M,) or (M, C), as (R, S) or (R, S, C), 0 where it was not asked."""
        if values.ndim == 1:
            return torch.zeros_like(self.t).masked_scatter(self.asked, values.to(self.t))
        shape = (*self.asked.shape, values.shape[1])
        return self.t.new_zeros(shape).masked_scatter(self.asked[..., None].expand(shape), values.to(self.t))

    def render(self, found: Mapping[str, Tensor | None], background: Tensor) -> dict[str, Tensor]:
        """What :func:`~limbeck.rendering.volume.composite` gives for a field's ``sigma`` and ``rgb`` at the points; background (R, 3)."""
        sigma, rgb = found["sigma"], found["rgb"]
        assert sigma is not None and rgb is not None
        return composite(self.spread(sigma), self.spread(rgb), self.t, self.delta, background)


def march(
    rays: Rays,
    aabb: Tensor,
    samples: int,
    *,
    near: float = 0.05,
    far: float = 1000.0,
    occupancy: Occupied | None = None,
    perturb: bool = True,
    spacing: Spacing = "linear",
) -> Points:
    """Samples of rays in a box, one per bin; those that lie in empty cells are not asked.

    Args:
        rays: R of them. aabb: (2, 3). samples: S on each ray. near, far: world units. occupancy: (R, S, 3) -> bool (R, S).
        perturb: jitter, from the global random state. spacing: of the bins.
    """
    entry, leave, hit = intersect_box(rays, aabb, near, far)
    t, delta = stratified(entry, leave, samples, perturb, spacing=spacing)
    x = rays.origins[:, None] + t[..., None] * rays.directions[:, None]
    asked = hit[:, None].expand(t.shape)
    if occupancy is not None:
        asked = asked & occupancy(x)
    return Points(x[asked], rays.directions[:, None].expand_as(x)[asked], asked, t, delta)
