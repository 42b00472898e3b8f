"""What else could tell how well a node's links are predicted: its degree, how dense its surroundings are, how far its neighbours-to-be."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.metrics.concentration import link_matrix, topological_concentration


def link_degrees(pairs: Tensor, num_nodes: int) -> Tensor:
    """(N,) different neighbours of each node in links (2, M), one direction or both."""
    return torch.from_numpy(np.diff(link_matrix(pairs, num_nodes).indptr).astype(np.float64))


def clustering(edges: Tensor, num_nodes: int) -> Tensor:
    """(N,) local clustering coefficients: of the pairs of a node's neighbours, how many are linked; 0 below two neighbours."""
    return topological_concentration(edges, num_nodes, hops=1).values


def ego_density(edges: Tensor, num_nodes: int) -> Tensor:
    """(N,) density of the subgraph of a node and its neighbours: its links, divided by all that it could have; 0 for isolated nodes."""
    degree = link_degrees(edges, num_nodes)
    triangles = clustering(edges, num_nodes) * degree * (degree - 1) / 2
    return 2 * (degree + triangles) / (degree * (degree + 1)).clamp_min(1)


def mean_distances(edges: Tensor, num_nodes: int, pairs: Tensor, *, limit: int = 4, block: int = 1024) -> Tensor:
    """(N,) mean length of the shortest paths, in the training graph, from a node to its neighbours in other links; NaN without any.

    Args:
        edges: (2, E) the training graph.
        num_nodes: N.
        pairs: (2, M) the other links.
        limit: longer paths, and pairs without one, count as this.
        block: nodes at a time.

    Raises:
        InputError: a limit below 1.
    """
    if limit < 1:
        raise InputError(f"distances are cut at 1 or more, not {limit}")
    graph, other = link_matrix(edges, num_nodes), link_matrix(pairs, num_nodes)
    owners = np.repeat(np.arange(num_nodes), np.diff(other.indptr))
    lengths = np.full(len(owners), float(limit))
    busy = np.unique(owners)
    for start in range(0, len(busy), block):
        nodes = busy[start : start + block]
        mine = np.flatnonzero((owners >= nodes[0]) & (owners <= nodes[-1]))
        row, step = np.searchsorted(nodes, owners[mine]), graph[nodes]
        for length in range(1, limit):
            met = np.asarray(step[row, other.indices[mine]]).ravel() > 0
            lengths[mine[met]] = np.minimum(lengths[mine[met]], length)
            if length + 1 < limit:
                step = (step @ graph).astype(bool).astype(np.float64)
    count = np.bincount(owners, minlength=num_nodes)
    total = np.bincount(owners, weights=lengths, minlength=num_nodes)
    return torch.from_numpy(np.divide(total, count, out=np.full(num_nodes, np.nan), where=count > 0))
