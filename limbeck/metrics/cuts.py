"""How well answers for nodes follow the edges between them."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import InputError


def cut_consistency(probabilities: Tensor, edge_index: Tensor) -> float:
    r"""The normalised cut of soft answers Y (N, K): :math:`\mathrm{tr}(Y^T A Y) / \mathrm{tr}(Y^T D Y)`, in [0, 1]; NaN without edges.

    1: nodes that are joined get the same answers, each of full confidence within a connected part.

    Args:
        probabilities: (N, K), rows that sum to 1.
        edge_index: (2, E), both directions of each edge.

    Raises:
        InputError: no table of answers.

    Source: "Graph-less Neural Networks: Teaching Old MLPs New Tricks via Distillation" (2022).
    """
    if probabilities.ndim != 2:
        raise InputError(f"answers are (nodes, classes), not {tuple(probabilities.shape)}")
    source, target = edge_index
    if not len(source):
        return float("nan")
    y = probabilities.double()
    size = max(1, (1 << 22) // y.shape[1])
    along = sum(float((y[u] * y[v]).sum()) for u, v in zip(source.split(size), target.split(size), strict=True))
    degrees = torch.bincount(target, minlength=len(y))
    return along / float((degrees[:, None] * y.square()).sum())
