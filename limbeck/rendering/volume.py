r"""Volume rendering: densities and colours along rays become pixels, empty space is skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.nerfacc_backend import nerfacc_weights, use_nerfacc
from limbeck.rendering.occupancy import OccupancyGrid, finite
from limbeck.rendering.rays import Rays, Spacing, bin_edges, edges_of, hierarchical, intersect_box, stratified
from limbeck.rendering.regularisers import (
    alpha_entropy,
    distortion,
    opaqueness,
    orientation,
    sparsity,
    total_variation,
)

Background = Tensor | Sequence[float] | float | Callable[[Tensor], Tensor]
Occupied = Callable[[Tensor], Tensor]
Features = bool | str | Callable[[Tensor, Tensor], Tensor]
PICTURES = ("rgb", "opacity", "depth", "z_variance", "normal", "features")


def weights_of(sigma: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    r"""How much of each sample is seen.

    .. math:: \alpha_i = 1 - e^{-\sigma_i \delta_i},\quad T_i = \prod_{j<i} (1 - \alpha_j + 10^{-10}),\quad w_i = T_i \alpha_i

    Args:
        sigma: (R, S) densities per unit length. delta: (R, S) lengths.

    Returns:
        weights (R, S) and what is left at the end of the ray (R,); together they sum to 1.

    Source: "NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis", section 4.
    """
    clear = torch.exp(-sigma * delta)
    through = torch.cumprod(clear + 1e-10, -1)
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], -1)
    return before * (1 - clear), through[:, -1]


def packed_weights(sigma: Tensor, delta: Tensor, ray_indices: Tensor) -> Tensor:
    """The same weights in nerfacc's layout: the samples (M,) of all rays in a row, sorted by ``ray_indices`` (M,) and then by distance."""
    if not len(sigma):
        return sigma * delta
    depth = (sigma * delta).double()  # the sum runs over all rays, so single precision would lose the last ones
    before = depth.cumsum(0) - depth
    starts = torch.ones_like(ray_indices, dtype=torch.bool)
    starts[1:] = ray_indices[1:] != ray_indices[:-1]
    offset = before[starts][starts.long().cumsum(0) - 1]
    return (torch.exp(offset - before) * -torch.expm1(-depth)).to(sigma.dtype)


def background_colours(background: Background, directions: Tensor) -> Tensor:
    """(R, 3) colours behind rays: one number, one colour (3,), one per ray (R, 3), or a network of the directions."""
    if callable(background) and not isinstance(background, Tensor):
        return background(directions)
    colour = torch.as_tensor(background, dtype=directions.dtype, device=directions.device)
    if colour.shape not in ((), (3,), directions.shape):
        raise InputError(f"a background is a number, (3,), one colour per ray or a callable, not {tuple(colour.shape)}")
    return colour.expand_as(directions)


def composite(
    sigma: Tensor,
    rgb: Tensor,
    t: Tensor,
    delta: Tensor,
    background: Tensor,
    normals: Tensor | None = None,
    features: Tensor | None = None,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""Pixels from samples: C = sum w c + (1 - O) bg, opacity O = sum w, accumulated depth D = sum w t, N = sum w n, and the z-variance
    sum (w/O)(t - D/O)^2, 0 where O <= 0.5.

    Args:
        sigma, t, delta: (R, S). rgb: (R, S, 3). background: (R, 3). normals: (R, S, 3) or None. features: (R, S, F) further channels,
            blended over zeros, or None. weights: (R, S) if they are known already.

    Returns:
        rgb (R, 3), opacity, depth, z_variance, transmittance (R,), weights (R, S), normal (R, 3) if there are normals, and features
        (R, F) if there are features. The expected depth is depth / max(opacity, 1e-5).
    """
    if weights is None:
        weights, left = weights_of(sigma, delta)
    else:
        left = torch.exp(-(sigma * delta).sum(-1))
    opacity, depth = weights.sum(-1), (weights * t).sum(-1)
    mass = opacity.clamp(min=1e-5)
    variance = (weights / mass[:, None] * (t - (depth / mass)[:, None]) ** 2).sum(-1)
    found = {
        "rgb": (weights[..., None] * rgb).sum(-2) + (1 - opacity)[:, None] * background,
        "opacity": opacity,
        "depth": depth,
        "z_variance": torch.where(opacity > 0.5, variance, torch.zeros_like(variance)),
        "weights": weights,
        "transmittance": left,
    }
    if normals is not None:
        found["normal"] = (weights[..., None] * normals).sum(-2)
    if features is not None:
        found["features"] = (weights[..., None] * features).sum(-2)
    return found


def normals_of(field: nn.Module, x: Tensor, eps: float | None = None) -> Tensor:
    """-grad sigma / |grad sigma| at points (M, 3), by autograd, or by central differences of width ``eps`` (1e-2 is usual)."""
    if eps is None:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            sigma = field.density(x)["sigma"]  # type: ignore[operator]
            (slope,) = torch.autograd.grad(sigma.sum(), x, create_graph=field.training)
    else:
        shifts = eps * torch.cat([torch.eye(3), -torch.eye(3)]).to(x)
        sigma = field.density((x[:, None] + shifts).view(-1, 3))["sigma"].view(-1, 2, 3)  # type: ignore[operator]
        slope = (sigma[:, 0] - sigma[:, 1]) / (2 * eps)
    return -F.normalize(slope, dim=-1, eps=1e-8)


def render_rays(
    field: nn.Module,
    rays: Rays,
    *,
    near: float = 0.05,
    far: float = 1000.0,
    samples: int = 64,
    fine: int = 0,
    occupancy: Occupied | None = None,
    background: Background = 1.0,
    perturb: bool = False,
    normals: bool | float = False,
    features: Features = False,
    spacing: Spacing = "linear",
    backend: Literal["auto", "torch", "nerfacc"] = "auto",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Render R rays through a field's box.

    Args:
        field: ``field(x, d)`` gives sigma (N,) and rgb (N, 3); ``field.aabb`` (2, 3). rays: R of them. near, far: in world units.
        samples: S per ray, stratified. fine: as many more where the first ones weigh most.
        occupancy: says which points (R, S, 3) are worth asking, an :class:`OccupancyGrid` for one; the others count as empty.
        background: see :func:`background_colours`. perturb: jitter the samples.
        normals: True for autograd, a number for differences of that width.
        features: further channels to blend with the same weights: True for the field's ``feature``, the name of something else that the
            field gives (N, F), or a function of points and directions (N, 3) that gives (N, F).
        spacing: of the samples, see :func:`~limbeck.rendering.rays.stratified`; ``disparity`` suits unbounded scenes.
        backend: how weights are accumulated. ``nerfacc`` packs the samples that are asked and uses its kernels; ``auto`` does so where it
            is installed and the rays are on a GPU; ``torch`` never does. They agree to rounding.
        generator: of the jitter.

    Returns:
        what :func:`composite` gives, and t, delta, sigma (R, S), points, sample_rgb (R, S, 3), and evaluated (), the number of samples
        asked. Rays that miss the box get no sample and the background's colour.

    Raises:
        InputError: a field that gives NaN; features that it does not give; nerfacc asked for where it cannot run.
    """
    packed = use_nerfacc(backend, rays.origins.device)
    box: Tensor = field.aabb  # type: ignore[assignment]
    entry, leave, hit = intersect_box(rays, box, near, far)
    t, delta = stratified(entry, leave, samples, perturb, generator, spacing)
    if fine:
        with torch.no_grad():
            x = rays.origins[:, None] + t[..., None] * rays.directions[:, None]
            asked = _asked(x, hit, occupancy)
            sigma = torch.zeros_like(t)
            sigma[asked] = finite(field, field.density(x[asked])["sigma"]).to(t)  # type: ignore[operator]
            edges = bin_edges(entry, leave, samples, spacing)
            more = hierarchical(edges, weights_of(sigma, delta)[0], fine, perturb, generator)
        t = torch.cat([t, more], -1).sort(-1).values
        delta = edges_of(t, entry, leave).diff(dim=-1)
    x = rays.origins[:, None] + t[..., None] * rays.directions[:, None]
    asked = _asked(x, hit, occupancy)
    points, directions = x[asked], rays.directions[:, None].expand_as(x)[asked]
    found = field(points, directions)
    sigma = torch.zeros_like(t).masked_scatter(asked, finite(field, found["sigma"]).to(t))
    three = asked[..., None].expand_as(x)
    rgb = torch.zeros_like(x).masked_scatter(three, finite(field, found["rgb"]).to(x))
    slopes = channels = weights = None
    if normals is not False:
        slopes = torch.zeros_like(x).masked_scatter(
            three, normals_of(field, points, None if normals is True else float(normals)).to(x)
        )
    if features is not False:
        extra = finite(field, _channels(field, found, features, points, directions)).to(x)
        shape = (*asked.shape, extra.shape[-1])
        channels = extra.new_zeros(shape).masked_scatter(asked[..., None].expand(shape), extra)
    if packed:
        weights = nerfacc_weights(sigma, delta, asked)
    result = composite(sigma, rgb, t, delta, background_colours(background, rays.directions), slopes, channels, weights)
    more_of_it = {"t": t, "delta": delta, "sigma": sigma, "points": x, "sample_rgb": rgb, "evaluated": asked.sum()}
    return {**result, **more_of_it}


def _asked(x: Tensor, hit: Tensor, occupancy: Occupied | None) -> Tensor:
    inside = hit[:, None].expand(x.shape[:-1])
    return inside if occupancy is None else inside & occupancy(x)


def _channels(
    field: nn.Module, found: dict[str, Tensor | None], features: Features, points: Tensor, directions: Tensor
) -> Tensor:
    """The further channels (N, F) at the points asked."""
    if callable(features):
        extra: Tensor | None = features(points, directions)
        name = "the features"
    else:
        name = "feature" if features is True else str(features)
        extra = found.get(name)
        if extra is None:
            known = ", ".join(k for k, v in found.items() if v is not None)
            raise InputError(f"{type(field).__name__} gives no '{name}' to render: it gives {known}")
        extra = extra[:, None] if extra.ndim == 1 else extra
    if extra is None or extra.ndim != 2 or len(extra) != len(points):
        shape = None if extra is None else tuple(extra.shape)
        raise InputError(f"{name} of {len(points)} points must be ({len(points)}, F), not {shape}")
    return extra


def render_image(
    field: nn.Module,
    cameras: Cameras,
    ids: Sequence[int] | None = None,
    *,
    chunk: int = 8192,
    background: Background = 1.0,
    **options: object,
) -> dict[str, Tensor]:
    """Whole pictures: rgb and normal (B, H, W, 3), opacity, depth and z_variance (B, H, W), features (B, H, W, F).

    Args:
        field, background, options: of :func:`render_rays`. cameras: with their near and far. ids: which, all by default. chunk: rays at once.

    Raises:
        InputError: the box lies within a camera's near plane or beyond its far one; a field that gives NaN.
    """
    which = list(range(len(cameras))) if ids is None else list(ids)
    cameras[which].check_sees(field.aabb)  # type: ignore[arg-type]
    each = [cameras.rays(i) for i in which]
    origins, directions = torch.cat([r.origins for r in each]), torch.cat([r.directions for r in each])
    kept: dict[str, list[Tensor]] = {}
    for o, d in zip(origins.split(chunk), directions.split(chunk), strict=True):
        part = render_rays(
            field, Rays(o, d), near=cameras.near, far=cameras.far, background=background, **options  # type: ignore[arg-type]
        )  # fmt: skip
        for name in PICTURES:
            if name in part:
                kept.setdefault(name, []).append(part[name])
    shape = (len(which), cameras.height, cameras.width)
    return {name: torch.cat(parts).view(*shape, *parts[0].shape[1:]) for name, parts in kept.items()}


__all__ = [
    "Background",
    "Features",
    "OccupancyGrid",
    "alpha_entropy",
    "background_colours",
    "composite",
    "distortion",
    "finite",
    "normals_of",
    "opaqueness",
    "orientation",
    "packed_weights",
    "render_image",
    "render_rays",
    "sparsity",
    "total_variation",
    "weights_of",
]
