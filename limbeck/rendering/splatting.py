r"""Gaussian splatting in plain PyTorch: perspective projection of 3-D Gaussians and depth-ordered blending, tile by tile.

Every Gaussian is linearised at its centre (EWA splatting), widened by a low-pass filter and blended front to back:

.. math:: u = \pi(R_c\mu + t_c),\quad S = J R_c\Sigma R_c^T J^T + 0.3\,I,\quad
          \alpha_k(p) = \min\big(0.99,\ o_k e^{-\frac12 (p-u_k)^T S_k^{-1}(p-u_k)}\big),\quad
          C(p) = \sum_k c_k\,\alpha_k\prod_{l<k}(1-\alpha_l) + T_{end}\,b

An alpha below 1/255 counts as 0. Tiles only decide what need not be computed: a Gaussian is listed in all tiles in which its
alpha can reach 1/255, so that the image is that of the plain double loop over pixels and Gaussians.

Source: "3D Gaussian Splatting for Real-Time Radiance Field Rendering"; "EWA Splatting".
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.core.errors import InputError
from limbeck.rendering.gaussians import Gaussians, rotations
from limbeck.rendering.views import View, view_of

LOW_PASS = 0.3
"""Added to the variances on the image, in square pixels: nothing is thinner than about a pixel."""
MIN_ALPHA, MAX_ALPHA = 1 / 255, 0.99


@dataclass
class Splat:
    """What a camera sees, and what densification wants to know.

    Attributes:
        rgb: (H, W, 3), background included. alpha: 1 - T_end (H, W). depth: accumulated sum of w z (H, W), world units.
        features: further channels (H, W, F) blended with the same weights over zeros, or None.
        radii: (N,) half the longer side of each Gaussian's box in pixels, 0 where it is not drawn.
        means2d: (N, 2) centres in pixels, (1, N, 2) by gsplat; its ``.grad`` is kept when the image is differentiated.
    """

    rgb: Tensor
    alpha: Tensor
    depth: Tensor
    radii: Tensor
    means2d: Tensor
    features: Tensor | None = None

    @property
    def expected_depth(self) -> Tensor:
        """Depth where something is seen (H, W): depth / max(alpha, 1e-5)."""
        return self.depth / self.alpha.clamp_min(1e-5)


@dataclass
class Projected:
    """Gaussians on the image plane: centres (N, 2), depths (N,), inverse covariances (N, 3) as (xx, xy, yy), half sides (N, 2)
    of the box outside of which alpha is below 1/255, and which are drawn at all (N,)."""

    means2d: Tensor
    depths: Tensor
    conics: Tensor
    extents: Tensor
    visible: Tensor


def project(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, view: View, low_pass: float = LOW_PASS
) -> Projected:
    r"""EWA projection. J is taken at the centre, whose x/z and y/z are held within the image widened by 0.15 of its size on all
    sides: beyond it the linearisation explodes.

    Args:
        means: (N, 3). quats: (N, 4) (w, x, y, z). scales: (N, 3) standard deviations. opacities: (N,) in [0, 1].
        view: the camera. low_pass: added to the variances, square pixels.
    """
    world = view.viewmat.to(means)
    x, y, depth = (means @ world[:3, :3].T + world[:3, 3]).unbind(-1)
    inside = (depth > view.near) & (depth < view.far)
    z = torch.where(
        inside, depth, torch.ones_like(depth)
    )  # no division by 0 where nothing is drawn: its gradient is NaN
    tx, ty = x / z, y / z
    side_x, side_y = 0.15 * view.width / view.fx, 0.15 * view.height / view.fy
    held_x = tx.clamp(-view.cx / view.fx - side_x, (view.width - view.cx) / view.fx + side_x)
    held_y = ty.clamp(-view.cy / view.fy - side_y, (view.height - view.cy) / view.fy + side_y)
    factor = (world[:3, :3] @ rotations(quats)) * scales[:, None]  # a square root of the covariance in camera axes
    row_x = (view.fx / z)[:, None] * (factor[:, 0] - held_x[:, None] * factor[:, 2])
    row_y = (view.fy / z)[:, None] * (factor[:, 1] - held_y[:, None] * factor[:, 2])
    xx = (row_x * row_x).sum(1) + low_pass
    yy = (row_y * row_y).sum(1) + low_pass
    xy = (row_x * row_y).sum(1)
    det = xx * yy - xy * xy
    inside = inside & (det > 0) & (opacities >= MIN_ALPHA)
    safe = torch.where(inside, det, torch.ones_like(det))
    conics = torch.stack([yy, -xy, xx], -1) / safe[:, None]
    means2d = torch.stack([view.fx * tx + view.cx, view.fy * ty + view.cy], -1)
    with torch.no_grad():  # alpha = 1/255 is an ellipse whose box is known; a hair is added for rounding
        reach = (2 * (opacities.clamp_min(MIN_ALPHA) / MIN_ALPHA).log()).sqrt()
        extents = 1.001 * reach[:, None] * torch.stack([xx, yy], -1).sqrt() + 1e-3
        low, high = means2d - extents, means2d + extents
        size = means2d.new_tensor([view.width, view.height])
        visible = inside & (high > 0).all(1) & (low < size).all(1)
    return Projected(means2d, depth, conics, extents * visible[:, None], visible)


@dataclass
class TileLists:
    """For each tile that has any: its number (T,), and where its Gaussians stand in ``members`` (M,), nearest first."""

    tiles: Tensor
    starts: Tensor
    counts: Tensor
    members: Tensor


def list_tiles(found: Projected, view: View, tile: int) -> TileLists:
    """Which Gaussians each tile needs, in order of depth."""
    ids = found.visible.nonzero()[:, 0]
    ids = ids[torch.sort(found.depths.detach()[ids], stable=True).indices]
    across, down = math.ceil(view.width / tile), math.ceil(view.height / tile)
    centre, extent = found.means2d.detach()[ids], found.extents[ids]
    limits = torch.tensor([across - 1, down - 1], device=ids.device)
    # a pixel's colour is that of its centre, half a pixel inside: the box is tested against the centres
    low = ((centre - extent - 0.5).ceil().clamp_min(0) / tile).floor().long()
    high = torch.minimum(((centre + extent - 0.5).floor() / tile).floor().long(), limits)
    spans = (high - low + 1).clamp_min(0)
    pairs = spans.prod(1)
    owner = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), pairs)
    offset = torch.arange(len(owner), device=ids.device) - (pairs.cumsum(0) - pairs)[owner]
    wide = spans[owner, 0]
    column, row = low[owner, 0] + offset % wide, low[owner, 1] + offset // wide
    tile_ids, order = torch.sort(row * across + column, stable=True)  # stable: the order of depth survives
    tiles, counts = torch.unique_consecutive(tile_ids, return_counts=True)
    return TileLists(tiles, counts.cumsum(0) - counts, counts, ids[owner[order]])


def chunks(counts: list[int], pixels: int, budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of tiles, sorted by falling count, that fit the budget when padded to their longest and waste little of it."""
    begin = 0
    for end in range(1, len(counts) + 1):
        longest = counts[begin]
        full = end < len(counts) and (end + 1 - begin) * longest * pixels > budget
        if end == len(counts) or full or counts[end] < 0.75 * longest - 4:
            yield begin, end
            begin = end


class Blend(torch.autograd.Function):
    r"""Composite padded lists over their tiles; the backward pass computes the alphas again, so that nothing large is kept.

    With G_k = c_k . g the share of the output's gradient g that falls on Gaussian k at a pixel,
    dL/dalpha_k = T_k G_k - (sum_{l>k} w_l G_l + T_end dL/dT_end)/(1 - alpha_k), and the gradients of centre and conic are moments of
    alpha dL/dalpha in p - u.
    """

    @staticmethod
    def alphas(table: Tensor, filled: Tensor, corners: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        """Alphas (T, L, tile, tile) before the two limits, and p - u along x and y (T, L, tile)."""
        steps = torch.arange(tile, device=table.device, dtype=table.dtype) + 0.5
        dx = (corners[:, :1] + steps)[:, None] - table[..., :1]
        dy = (corners[:, 1:] + steps)[:, None] - table[..., 1:2]
        xx, xy, yy = table[..., 2:3], table[..., 3:4], table[..., 4:5]
        power = (-xy * dy)[..., None] * dx[..., None, :]
        power += (-0.5 * xx * dx * dx)[..., None, :]
        power += (-0.5 * yy * dy * dy)[..., None]
        opacity = table[..., 5] * filled  # e^-20 is far below what is drawn; smaller numbers would be denormal and slow
        return power.clamp_(-20, 0).exp_().mul_(opacity[..., None, None]), dx, dy

    @staticmethod
    def forward(ctx: Any, table: Tensor, filled: Tensor, corners: Tensor, tile: int) -> Tensor:
        """
        Args:
            table: (T, L, 6 + C): centre x, y, conic xx, xy, yy, opacity and C channels of the Gaussians of each tile.
            filled: (T, L), False where the list has ended. corners: (T, 2) of the tiles, in pixels. tile: their side.

        Returns:
            (T, tile^2, C + 1): the channels and T_end, row by row.
        """
        alpha, _, _ = Blend.alphas(table, filled, corners, tile)
        alpha = torch.where(alpha >= MIN_ALPHA, alpha.clamp_max_(MAX_ALPHA), 0).flatten(2)
        passed = (1 - alpha).cumprod(1)
        alpha[:, 1:] *= passed[:, :-1]  # now the weights
        ctx.save_for_backward(table, filled, corners)
        ctx.tile = tile
        return torch.cat([alpha.mT @ table[..., 6:], passed[:, -1, :, None]], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, filled, corners = ctx.saved_tensors
        raw, dx, dy = Blend.alphas(table, filled, corners, ctx.tile)
        square = raw.shape
        drawn = raw >= MIN_ALPHA
        alpha = torch.where(drawn, raw.clamp_max(MAX_ALPHA), 0).flatten(2)
        left = 1 - alpha
        passed = left.cumprod(1)
        before = torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], 1)
        weights = alpha * before
        share = table[..., 6:] @ grad[..., :-1].mT
        behind = (weights * share).cumsum(1)
        behind = behind[:, -1:] - behind + (passed[:, -1] * grad[..., -1])[:, None]
        slope = before.mul_(share).sub_(behind.div_(left)).view(square)
        slope *= raw
        slope *= drawn & (raw <= MAX_ALPHA)  # dL/dpower
        over_y, over_x = slope.sum(-2), slope.sum(-1)
        first_x, first_y = (over_y * dx).sum(-1), (over_x * dy).sum(-1)
        cross = ((slope @ dx[..., None])[..., 0] * dy).sum(-1)
        xx, xy, yy, opacity = table[..., 2:6].unbind(-1)
        found = [
            xx * first_x + xy * first_y,
            yy * first_y + xy * first_x,
            -0.5 * (over_y * dx * dx).sum(-1),
            -cross,
            -0.5 * (over_x * dy * dy).sum(-1),
            over_x.sum(-1) / opacity.clamp_min(MIN_ALPHA),
        ]
        return torch.cat([torch.stack(found, -1), weights @ grad[..., :-1]], -1), None, None, None


def rasterise(
    found: Projected, opacities: Tensor, channels: Tensor, view: View, *, tile: int = 8, budget: int = 4_000_000
) -> tuple[Tensor, Tensor]:
    """Blend projected Gaussians front to back.

    Args:
        found: from :func:`project`. opacities: (N,). channels: (N, C). view: the camera.
        tile: side of the tiles in pixels. budget: pairs of a pixel and a Gaussian held at a time (about ten numbers each).

    Returns:
        Channels over zeros (H, W, C), and what is left of the light behind, T_end (H, W).
    """
    across, down = math.ceil(view.width / tile), math.ceil(view.height / tile)
    lists = list_tiles(found, view, tile)
    table = torch.cat([found.means2d, found.conics, opacities[:, None], channels], 1)
    counts, order = torch.sort(lists.counts, descending=True, stable=True)
    tiles, starts = lists.tiles[order], lists.starts[order]
    lengths = counts.tolist()
    pieces = []
    for begin, end in chunks(lengths, tile * tile, budget):
        slots = torch.arange(lengths[begin], device=table.device)
        filled = slots < counts[begin:end, None]
        members = lists.members[torch.where(filled, starts[begin:end, None] + slots, starts[begin:end, None])]
        numbers = tiles[begin:end]
        corners = torch.stack([numbers % across, numbers // across], 1).to(table) * tile
        picked = table.index_select(0, members.flatten()).unflatten(0, members.shape)
        pieces.append(Blend.apply(picked, filled, corners, tile))
    empty = torch.cat([channels.new_zeros(channels.shape[1]), channels.new_ones(1)])
    image = empty.expand(across * down, tile * tile, len(empty))
    if pieces:
        image = image.index_copy(0, tiles, torch.cat(pieces))
    image = (
        image.view(down, across, tile, tile, len(empty)).transpose(1, 2).reshape(down * tile, across * tile, len(empty))
    )
    image = image[: view.height, : view.width]
    return image[..., :-1], image[..., -1]


def by_gsplat(
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, channels: Tensor, view: View
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same picture by ``gsplat.rasterization``: channels and accumulated depth (H, W, C + 1), alpha (H, W), radii (N,),
    centres (1, N, 2), whose gradient is kept."""
    try:
        from gsplat import rasterization
    except ImportError:
        raise InputError("backend='gsplat' needs gsplat: pip install gsplat, or use backend='torch'") from None
    lens = means.new_tensor([[view.fx, 0, view.cx], [0, view.fy, view.cy], [0, 0, 1]])
    image, alpha, meta = rasterization(
        means=means,
        quats=quats,
        scales=scales,
        opacities=opacities,
        colors=channels,
        viewmats=view.viewmat.to(means)[None],
        Ks=lens[None],
        width=view.width,
        height=view.height,
        near_plane=view.near,
        far_plane=view.far,
        eps2d=LOW_PASS,
        packed=False,
        render_mode="RGB+D",
    )
    centres = meta["means2d"]
    if centres.requires_grad:
        centres.retain_grad()
    radii = meta["radii"][0].to(means)
    return image[0], alpha[0, ..., 0], radii if radii.ndim == 1 else radii.amax(-1), centres


def splat_tensors(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    channels: Tensor,
    view: View,
    background: Tensor | float = 0.0,
    *,
    tile: int = 8,
    budget: int = 4_000_000,
    backend: str = "auto",
) -> Splat:
    """Draw Gaussians that are given by activated tensors, differentiable in all of them; none at all give the background.

    Args:
        means: (N, 3). quats: (N, 4) (w, x, y, z). scales: (N, 3) standard deviations. opacities: (N,) in [0, 1].
        channels: (N, 3 + F), a colour and what else to blend. view: the camera. background: grey value, or colour (3,).
        tile, budget: see :func:`rasterise`. backend: see :func:`splat`.

    Raises:
        InputError: tensors that are not finite or of other shapes, an unknown backend.
    """
    given = {"means": (means, 3), "quats": (quats, 4), "scales": (scales, 3), "opacities": (opacities, 0)}
    for name, (values, width) in {**given, "channels": (channels, max(3, channels.shape[-1]))}.items():
        expected = (len(means), width) if width else (len(means),)
        if values.shape != expected:
            raise InputError(f"{name} of {len(means)} Gaussians must be {expected}, not {tuple(values.shape)}")
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{name} of the Gaussians contain NaN or infinity: lower the learning rate or prune them")
    colour = torch.as_tensor(background, dtype=means.dtype, device=means.device)
    if colour.shape not in ((), (3,)):
        raise InputError(f"a background is a number or a colour (3,), not {tuple(colour.shape)}")
    if backend not in ("auto", "torch", "gsplat"):
        raise InputError(f"a backend of splatting is auto, torch or gsplat, not '{backend}'")
    if backend == "gsplat" or (backend == "auto" and means.is_cuda and importlib.util.find_spec("gsplat") is not None):
        image, alpha, radii, means2d = by_gsplat(means, quats, scales, opacities, channels, view)
    else:
        found = project(means, quats, scales, opacities, view)
        means2d = found.means2d
        if means2d.requires_grad:
            means2d.retain_grad()
        drawn = torch.cat([channels, found.depths[:, None]], 1)
        image, left = rasterise(found, opacities, drawn, view, tile=tile, budget=budget)
        alpha, radii = 1 - left, found.extents.amax(1)
    return Splat(
        rgb=image[..., :3] + (1 - alpha)[..., None] * colour,
        alpha=alpha,
        depth=image[..., -1],
        radii=radii,
        means2d=means2d,
        features=image[..., 3:-1] if channels.shape[1] > 3 else None,
    )


def splat(
    gaussians: Gaussians,
    camera: Any,
    background: Tensor | float = 0.0,
    *,
    index: int | None = None,
    sh_degree: int | None = None,
    features: Tensor | None = None,
    **options: Any,
) -> Splat:
    """Draw Gaussians as a camera sees them, differentiable in all their parameters.

    Args:
        gaussians: the scene. camera: a :class:`View`, or ``Cameras`` of which ``index`` chooses one.
        background: grey value, or colour (3,). sh_degree: highest degree of the harmonics to use, all by default.
        features: further channels (N, F) to blend.
        options: ``tile`` and ``budget`` of :func:`rasterise`; ``backend``: ``auto`` uses gsplat where it is installed and the Gaussians
            are on a GPU, ``torch`` never does.

    Raises:
        InputError: parameters that are not finite, another shape of background or features, an unfit camera.
    """
    view = view_of(camera, index)
    means = gaussians.means
    for name, values in gaussians.named_parameters():
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{name} of the Gaussians contain NaN or infinity: lower the learning rate or prune them")
    if features is not None and (features.ndim != 2 or len(features) != len(means)):
        raise InputError(f"features must be ({len(means)}, F) like the Gaussians, not {tuple(features.shape)}")
    channels = gaussians.colours(view.centre.to(means), sh_degree)
    if features is not None:
        channels = torch.cat([channels, features.to(channels)], 1)
    return splat_tensors(
        means, gaussians.quats, gaussians.scales, gaussians.opacities, channels, view, background, **options
    )


def splat_cameras(
    gaussians: Gaussians,
    cameras: Any,
    ids: Iterable[int] | None = None,
    background: Tensor | float = 0.0,
    **options: Any,
) -> dict[str, Tensor]:
    """Draw Gaussians from several cameras, one after the other.

    Args:
        gaussians, background, options: of :func:`splat`. cameras: ``Cameras``. ids: which of them, all by default.

    Returns:
        rgb (B, H, W, 3), opacity (B, H, W), accumulated depth (B, H, W), and features (B, H, W, F) where they are given.
    """
    which = range(len(cameras)) if ids is None else [int(i) for i in ids]
    return stacked([splat(gaussians, cameras, background, index=i, **options) for i in which])


def stacked(drawn: Sequence[Splat]) -> dict[str, Tensor]:
    """Several pictures of one size as rgb (B, H, W, 3), opacity and depth (B, H, W), and features (B, H, W, F) if all have them.

    Raises:
        InputError: no picture.
    """
    if not drawn:
        raise InputError("no camera was chosen: name one or more")
    found = {"rgb": "rgb", "opacity": "alpha", "depth": "depth", "features": "features"}
    return {
        name: torch.stack([getattr(one, part) for one in drawn])
        for name, part in found.items()
        if getattr(drawn[0], part) is not None
    }
