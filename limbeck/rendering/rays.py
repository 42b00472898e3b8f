r"""Rays: from pixels through a lens into a box, and where along them to sample."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from limbeck.core.errors import InputError

Spacing = Literal["linear", "disparity"]
FLAT = 1e-9  # a direction's component smaller than this counts as this, so that a slab's entry stays finite


class Rays(NamedTuple):
    """R rays: ``origins`` (R, 3) in world units and ``directions`` (R, 3) of unit length."""

    origins: Tensor
    directions: Tensor


def pixel_grid(width: int, height: int, device: torch.device | str | None = None) -> Tensor:
    """All pixels (H*W, 2) as (column, row), row by row from the top: reshaping to (H, W) gives the picture back."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([columns, rows], -1).reshape(-1, 2)


def distort(points: Tensor, coefficients: Tensor) -> Tensor:
    r"""OpenCV's lens: where the ideal image point (x, y) (y down, focal length 1) lands.

    .. math:: x_d = x (1 + k_1 r^2 + k_2 r^4 + k_3 r^6) + 2 p_1 x y + p_2 (r^2 + 2 x^2),\quad
              y_d = y (1 + k_1 r^2 + k_2 r^4 + k_3 r^6) + p_1 (r^2 + 2 y^2) + 2 p_2 x y

    Args:
        points: (..., 2). coefficients: (..., 5) as k1, k2, k3, p1, p2.
    """
    (x, y), (k1, k2, k3, p1, p2) = points.unbind(-1), coefficients.unbind(-1)
    r2 = x**2 + y**2
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    return torch.stack(
        [x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2), y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y], -1
    )


def undistort(points: Tensor, coefficients: Tensor, steps: int = 10) -> Tensor:
    """The inverse of :func:`distort` by Newton's method with the exact 2 x 2 Jacobian, started at the distorted point.

    Args:
        points: (..., 2) distorted. coefficients: (..., 5) as k1, k2, k3, p1, p2. steps: iterations; 5 to 10 reach float precision.
    """
    k1, k2, k3, p1, p2 = coefficients.unbind(-1)
    found = points
    for _ in range(steps):
        x, y = found.unbind(-1)
        r2 = x**2 + y**2
        radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
        slope = 2 * (k1 + r2 * (2 * k2 + r2 * 3 * k3))  # d radial / d x = slope * x
        xx = radial + slope * x**2 + 2 * p1 * y + 6 * p2 * x
        yy = radial + slope * y**2 + 6 * p1 * y + 2 * p2 * x
        xy = slope * x * y + 2 * p1 * x + 2 * p2 * y  # the Jacobian is symmetric
        ex, ey = (distort(found, coefficients) - points).unbind(-1)
        determinant = xx * yy - xy**2
        # beyond the lens's fold the Jacobian is singular: a point there stays where it is
        scale = torch.where(determinant.abs() > 1e-6, 1 / determinant, torch.zeros_like(determinant))
        found = found - torch.stack([(yy * ex - xy * ey) * scale, (xx * ey - xy * ex) * scale], -1)
    return found


def camera_directions(
    pixels: Tensor, fx: Tensor, fy: Tensor, cx: Tensor, cy: Tensor, distortion: Tensor | None = None
) -> Tensor:
    """Directions (R, 3) of pixels (R, 2) in the camera's OpenGL axes, with z = -1 (not normalised).

    Args:
        pixels: (column, row); whole numbers mean the pixel, whose centre is half a pixel further.
        fx, fy, cx, cy: (R,) in pixels. distortion: (R, 5) as k1, k2, k3, p1, p2, or None.
    """
    centre = pixels.to(fx.dtype) + 0.5
    ideal = torch.stack([(centre[..., 0] - cx) / fx, (centre[..., 1] - cy) / fy], -1)
    if distortion is not None:
        ideal = undistort(ideal, distortion)
    x, y = ideal.unbind(-1)
    return torch.stack([x, -y, -torch.ones_like(x)], -1)


def intersect_box(
    rays: Rays, aabb: Tensor, near: float = 0.0, far: float = float("inf")
) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays enter and leave a box: slab test, clipped to [near, far].

    Args:
        rays: R of them. aabb: (2, 3), lower and upper corner. near, far: distances from the origin that count.

    Returns:
        entry (R,), exit (R,), hit (R,) bool. Where a ray misses, entry = exit = near.

    Raises:
        InputError: a box that is not (2, 3) with lower < upper.
    """
    if aabb.shape != (2, 3) or not bool((aabb[0] < aabb[1]).all()):
        raise InputError(f"a box is (2, 3) with its lower corner below its upper one (got {aabb.tolist()})")
    d = rays.directions
    safe = torch.where(d.abs() < FLAT, torch.where(d < 0, -FLAT, FLAT).to(d.dtype), d)
    box = aabb.to(d)
    first, second = (box[0] - rays.origins) / safe, (box[1] - rays.origins) / safe
    entry = torch.minimum(first, second).amax(-1).clamp(min=near)
    leave = torch.maximum(first, second).amin(-1).clamp(max=far)
    hit = leave > entry
    nothing = torch.full_like(entry, near)
    return torch.where(hit, entry, nothing), torch.where(hit, leave, nothing), hit


def stratified(
    entry: Tensor,
    leave: Tensor,
    samples: int,
    perturb: bool = False,
    generator: torch.Generator | None = None,
    spacing: Spacing = "linear",
) -> tuple[Tensor, Tensor]:
    r"""One sample per bin: :math:`t_i = near + (far - near)(i + u_i)/S`, u uniform in [0, 1), or 0.5 without ``perturb``.

    With ``spacing="disparity"`` the bins are equal in 1/t instead, short near the camera and long far away:
    :math:`1/t_i = (1 - s_i)/near + s_i/far` with :math:`s_i = (i + u_i)/S`.

    Args:
        entry, leave: (R,), above 0 for disparity. samples: S >= 1. perturb: jitter, for training. generator: of the jitter.

    Returns:
        t (R, S) and delta (R, S), the widths of the bins.
    """
    if samples < 1:
        raise InputError(f"a ray needs 1 sample or more (got {samples})")
    shape = (len(entry), samples)
    if perturb:
        u = torch.rand(shape, generator=generator, dtype=entry.dtype, device=entry.device)
    else:
        u = torch.full(shape, 0.5, dtype=entry.dtype, device=entry.device)
    steps = torch.arange(samples, dtype=entry.dtype, device=entry.device)
    if spacing != "linear":
        edges = bin_edges(entry, leave, samples, spacing)
        return _by_disparity((steps + u) / samples, entry, leave), edges.diff()
    width = ((leave - entry) / samples)[:, None]
    return entry[:, None] + width * (steps + u), width.expand(shape)


def bin_edges(entry: Tensor, leave: Tensor, samples: int, spacing: Spacing = "linear") -> Tensor:
    """Ends (R, S + 1) of the bins that :func:`stratified` draws from.

    Raises:
        InputError: another spacing; disparities of a ray that begins at 0.
    """
    share = torch.linspace(0, 1, samples + 1, dtype=entry.dtype, device=entry.device)
    if spacing == "linear":
        return entry[:, None] + (leave - entry)[:, None] * share
    if spacing != "disparity":
        raise InputError(f"samples are spaced linear or by disparity, not '{spacing}'")
    if not bool((entry > 0).all()):
        raise InputError("samples spaced by disparity begin at a distance above 0: raise near")
    return _by_disparity(share.expand(len(entry), -1), entry, leave)


def _by_disparity(share: Tensor, entry: Tensor, leave: Tensor) -> Tensor:
    return 1 / ((1 - share) / entry[:, None] + share / leave[:, None])


def hierarchical(
    edges: Tensor,
    weights: Tensor,
    samples: int,
    perturb: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw distances where weights are high: inverse transform of the piecewise constant density proportional to w + 1e-5.

    No gradient flows through the positions.

    Args:
        edges: (R, S + 1) increasing ends of the bins. weights: (R, S) >= 0. samples: how many per ray.
        perturb: random quantiles; else the middles of ``samples`` equal parts. generator: of the quantiles.

    Returns:
        t (R, samples), sorted.

    Source: "NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis", section 5.2.
    """
    if edges.shape[-1] != weights.shape[-1] + 1:
        raise InputError(f"{weights.shape[-1]} bins have {weights.shape[-1] + 1} edges, not {edges.shape[-1]}")
    with torch.no_grad():
        share = weights.detach() + 1e-5
        share = share / share.sum(-1, keepdim=True)
        cdf = torch.cat([torch.zeros_like(share[:, :1]), share.cumsum(-1)], -1)
        cdf[:, -1] = 1.0  # rounding would let the last quantile fall off the end
        shape = (len(edges), samples)
        if perturb:
            u = torch.rand(shape, generator=generator, dtype=edges.dtype, device=edges.device)
        else:
            u = torch.full(shape, 0.5, dtype=edges.dtype, device=edges.device)
        quantile = ((torch.arange(samples, dtype=edges.dtype, device=edges.device) + u) / samples).contiguous()
        bin_ = (torch.searchsorted(cdf, quantile, right=True) - 1).clamp(0, weights.shape[-1] - 1)
        low, high = edges.detach().gather(-1, bin_), edges.detach().gather(-1, bin_ + 1)
        inside = (quantile - cdf.gather(-1, bin_)) / share.gather(-1, bin_)
        return low + (high - low) * inside.clamp(0, 1)


def edges_of(t: Tensor, entry: Tensor, leave: Tensor) -> Tensor:
    """Ends (R, S + 1) of the bins around sorted samples t (R, S): middles between neighbours, and the ray's own ends."""
    middles = (t[:, 1:] + t[:, :-1]) / 2
    return torch.cat([entry[:, None], middles, leave[:, None]], -1)
