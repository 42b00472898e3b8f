r"""Volume rendering: densities and colours along rays become pixels, empty space is skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.rays import Rays, edges_of, hierarchical, intersect_box, stratified

Background = Tensor | Sequence[float] | float | Callable[[Tensor], Tensor]


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
    sigma: Tensor, rgb: Tensor, t: Tensor, delta: Tensor, background: Tensor, normals: Tensor | None = None
) -> dict[str, Tensor]:
    r"""Pixels from samples: C = sum w c + (1 - O) bg, opacity O = sum w, accumulated depth D = sum w t, N = sum w n, and the z-variance
    sum (w/O)(t - D/O)^2, 0 where O <= 0.5.

    Args:
        sigma, t, delta: (R, S). rgb: (R, S, 3). background: (R, 3). normals: (R, S, 3) or None.

    Returns:
        rgb (R, 3), opacity, depth, z_variance (R,), weights (R, S), and normal (R, 3) if there are normals. The expected depth is
        depth / max(opacity, 1e-5).
    """
    weights, left = weights_of(sigma, delta)
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
    return found


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
    occupancy: OccupancyGrid | None = None,
    background: Background = 1.0,
    perturb: bool = False,
    normals: bool | float = False,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Render R rays through a field's box.

    Args:
        field: ``field(x, d)`` gives sigma (N,) and rgb (N, 3); ``field.aabb`` (2, 3). rays: R of them. near, far: in world units.
        samples: S per ray, stratified. fine: as many more where the first ones weigh most. occupancy: empty cells are not asked.
        background: see :func:`background_colours`. perturb: jitter the samples. normals: True for autograd, a number for differences of
            that width. generator: of the jitter.

    Returns:
        what :func:`composite` gives, and t, sigma (R, S), points, sample_rgb (R, S, 3), and evaluated (), the number of samples asked.
        Rays that miss the box get no sample and the background's colour.

    Raises:
        InputError: a field that gives NaN.
    """
    box: Tensor = field.aabb  # type: ignore[assignment]
    entry, leave, hit = intersect_box(rays, box, near, far)
    t, delta = stratified(entry, leave, samples, perturb, generator)
    if fine:
        with torch.no_grad():
            x = rays.origins[:, None] + t[..., None] * rays.directions[:, None]
            asked = _asked(x, hit, occupancy)
            sigma = torch.zeros_like(t)
            sigma[asked] = finite(field, field.density(x[asked])["sigma"]).to(t)  # type: ignore[operator]
            edges = entry[:, None] + (leave - entry)[:, None] * torch.linspace(0, 1, samples + 1).to(t)
            more = hierarchical(edges, weights_of(sigma, delta)[0], fine, perturb, generator)
        t = torch.cat([t, more], -1).sort(-1).values
        delta = edges_of(t, entry, leave).diff(dim=-1)
    x = rays.origins[:, None] + t[..., None] * rays.directions[:, None]
    asked = _asked(x, hit, occupancy)
    points = x[asked]
    found = field(points, rays.directions[:, None].expand_as(x)[asked])
    sigma = torch.zeros_like(t).masked_scatter(asked, finite(field, found["sigma"]).to(t))
    three = asked[..., None].expand_as(x)
    rgb = torch.zeros_like(x).masked_scatter(three, finite(field, found["rgb"]).to(x))
    slopes = None
    if normals is not False:
        slopes = torch.zeros_like(x).masked_scatter(
            three, normals_of(field, points, None if normals is True else float(normals)).to(x)
        )
    result = composite(sigma, rgb, t, delta, background_colours(background, rays.directions), slopes)
    return {**result, "t": t, "sigma": sigma, "points": x, "sample_rgb": rgb, "evaluated": asked.sum()}


def _asked(x: Tensor, hit: Tensor, occupancy: OccupancyGrid | None) -> Tensor:
    inside = hit[:, None].expand(x.shape[:-1])
    return inside if occupancy is None else inside & occupancy(x)


def render_image(
    field: nn.Module,
    cameras: Cameras,
    ids: Sequence[int] | None = None,
    *,
    chunk: int = 8192,
    background: Background = 1.0,
    **options: object,
) -> dict[str, Tensor]:
    """Whole pictures: rgb and normal (B, H, W, 3), opacity, depth and z_variance (B, H, W).

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
        for name in ("rgb", "opacity", "depth", "z_variance", "normal"):
            if name in part:
                kept.setdefault(name, []).append(part[name])
    shape = (len(which), cameras.height, cameras.width)
    return {name: torch.cat(parts).view(*shape, *parts[0].shape[1:]) for name, parts in kept.items()}


def sparsity(opacity: Tensor) -> Tensor:
    """mean sqrt(O^2 + 0.01): prefers empty pixels."""
    return (opacity**2 + 0.01).sqrt().mean()


def opaqueness(opacity: Tensor) -> Tensor:
    """Mean binary cross-entropy of clamp(O, 1e-3, 1 - 1e-3) with itself: prefers pixels that are empty or full. In nats."""
    o = opacity.clamp(1e-3, 1 - 1e-3)
    return F.binary_cross_entropy(o, o)


def alpha_entropy(weights: Tensor) -> Tensor:
    """Mean binary entropy of clamp(w, 1e-5, 1 - 1e-5), in bits."""
    w = weights.clamp(1e-5, 1 - 1e-5)
    return -(w * w.log2() + (1 - w) * (1 - w).log2()).mean()


def orientation(weights: Tensor, normals: Tensor, directions: Tensor, hits: int | None = None) -> Tensor:
    """sum stopgrad(w) max(0, n.d)^2 / hits: surfaces that are seen should face the viewer. (R, S), (R, S, 3), (R, 3)."""
    away = (normals * directions[:, None]).sum(-1).clamp(min=0)
    return (weights.detach() * away**2).sum() / max(1, len(weights) if hits is None else hits)


def total_variation(grid: Tensor, axes: int = 3) -> Tensor:
    """Mean squared difference of neighbours over the last ``axes`` axes, summed over the axes."""
    return torch.stack([grid.diff(dim=-1 - k).square().mean() for k in range(axes)]).sum()


def distortion(weights: Tensor, edges: Tensor) -> Tensor:
    r"""Mean over rays of :math:`\sum_{ij} w_i w_j |m_i - m_j| + \frac13 \sum_i w_i^2 \delta_i`, with m the middles of the bins (R, S + 1).

    In linear time, since the middles are sorted. Source: "Mip-NeRF 360: Unbounded Anti-Aliased Neural Radiance Fields", equation 15.
    """
    middles, widths = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=-1)
    before = weights.cumsum(-1) - weights
    moments = (weights * middles).cumsum(-1) - weights * middles
    pairs = 2 * (weights * (middles * before - moments)).sum(-1)
    return (pairs + (weights**2 * widths).sum(-1) / 3).mean()
