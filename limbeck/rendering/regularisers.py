r"""Penalties on what volume rendering gives and on what it reads: all are means, so they do not depend on the number of rays."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
