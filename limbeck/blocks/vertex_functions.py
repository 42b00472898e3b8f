"""Functions on the points of a cloud or the nodes of a graph, to filter a complex by: densities, degree, heat, curvature."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.blocks.multifiltrations import undirected
from limbeck.core.errors import InputError, UnknownNameError

Floats = NDArray[np.float64]
Density = Literal["kde", "dtm"]
DENSE_NODES = 5000
"""The most nodes for which heat signatures are computed: they need all eigenvectors."""
GRAPH_FUNCTIONS = ("degree", "hks", "curvature")


def codensity(points: Any, bandwidth: float, kind: Density = "kde") -> Tensor:
    r"""How lonely each point is: low in dense regions.

    - ``kde``: :math:`c(x) = -\log \frac1N \sum_j e^{-|x - x_j|^2 / 2h^2}` with h = ``bandwidth``;
    - ``dtm``: the distance to the measure, :math:`c(x)^2 = \frac1k \sum_{j \le k} |x - x_{(j)}|^2` over the k nearest points (x itself is
      one), with k the share ``bandwidth`` of all points, rounded up.

    Args:
        points: (N, d); a tensor keeps its gradient.
        bandwidth: > 0.
        kind: ``kde`` or ``dtm``.

    Returns:
        (N,), in the type of the points (float64 for arrays).

    Raises:
        InputError: wrong shape or range.
        UnknownNameError: no such kind.
    """
    x = points if isinstance(points, Tensor) else torch.from_numpy(np.array(points, dtype=np.float64))
    if x.ndim != 2 or not len(x):
        raise InputError(f"points must be (number, dimensions), not {tuple(x.shape)}")
    if not bandwidth > 0:
        raise InputError(f"the codensity's bandwidth must be above 0 (got {bandwidth})")
    squares = (x[:, None] - x[None]).square().sum(-1)
    if kind == "kde":
        return -(torch.logsumexp(-squares / (2 * bandwidth**2), 1) - np.log(len(x)))
    if kind == "dtm":
        if bandwidth > 1:
            raise InputError(f"the share of points of a distance to the measure is at most 1 (got {bandwidth})")
        k = max(1, int(np.ceil(bandwidth * len(x))))
        mean = squares.topk(k, 1, largest=False).values.mean(1)
        return torch.where(mean > 0, torch.where(mean > 0, mean, 1.0).sqrt(), 0.0)
    raise UnknownNameError("codensity", str(kind), ("kde", "dtm"))


def graph_function(name: str, nodes: int, edge_index: Any) -> Floats:
    r"""A function on a graph's nodes, (V,), by name.

    - ``degree``: the number of neighbours;
    - ``hks``, or ``hks-T`` with a time T (1 if none): the heat kernel signature :math:`\sum_i e^{-T \lambda_i} \phi_i(v)^2` of the
      normalised Laplacian;
    - ``curvature``: the mean over a node's edges of the edge's Forman curvature :math:`4 - d_u - d_v + 3\,|\text{triangles at } uv|`; 0
      where there is no edge.

    Raises:
        UnknownNameError: no such function.
        InputError: a graph that is too large for heat signatures, or a wrong index.
    """
    kind, _, detail = name.partition("-")
    pairs = undirected(nodes, edge_index)
    degrees = np.bincount(pairs.ravel(), minlength=nodes).astype(np.float64)
    if kind == "degree" and not detail:
        return degrees
    if kind == "curvature" and not detail:
        return _curvature(nodes, pairs, degrees)
    if kind == "hks":
        try:
            time = float(detail) if detail else 1.0
        except ValueError:
            raise InputError(f"the time of '{name}' must be a number: hks-0.5, say") from None
        if not 0 < time < np.inf:
            raise InputError(f"the time of '{name}' must be above 0 and finite")
        return _heat(nodes, pairs, degrees, time)
    raise UnknownNameError(
        "function on nodes", name, GRAPH_FUNCTIONS, hint="Known: degree, hks, hks-T with a time T, curvature."
    )


def _heat(nodes: int, pairs: NDArray[np.int64], degrees: Floats, time: float) -> Floats:
    if nodes > DENSE_NODES:
        raise InputError(
            f"heat signatures need all eigenvectors of {nodes} nodes: give functions of your own above {DENSE_NODES}"
        )
    root = np.where(degrees > 0, 1 / np.sqrt(np.maximum(degrees, 1)), 0.0)
    laplacian = np.diag((degrees > 0).astype(np.float64))
    laplacian[pairs[:, 0], pairs[:, 1]] = laplacian[pairs[:, 1], pairs[:, 0]] = -root[pairs[:, 0]] * root[pairs[:, 1]]
    values, vectors = np.linalg.eigh(laplacian)
    found: Floats = np.square(vectors) @ np.exp(-time * values)
    return found


def _curvature(nodes: int, pairs: NDArray[np.int64], degrees: Floats) -> Floats:
    import scipy.sparse as sparse

    if not len(pairs):
        return np.zeros(nodes)
    ones = np.ones(len(pairs))
    adjacency = sparse.coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(nodes, nodes)).tocsr()
    adjacency = adjacency + adjacency.T
    triangles = np.asarray((adjacency @ adjacency)[pairs[:, 0], pairs[:, 1]]).ravel()
    forman = 4 - degrees[pairs[:, 0]] - degrees[pairs[:, 1]] + 3 * triangles
    total = sum(np.bincount(pairs[:, side], weights=forman, minlength=nodes) for side in (0, 1))
    found: Floats = np.asarray(total) / np.maximum(degrees, 1)
    return found
