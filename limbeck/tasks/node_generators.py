"""Generated graphs and hypergraphs whose classes are known, seeded, of any size: stochastic block models."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.hypergraphs import Hypergraph
from limbeck.core.node_graphs import NodeGraph

SBM_NODES, HYPERGRAPH_NODES = 1600, 1000


def sbm(
    num_nodes: int = SBM_NODES,
    *,
    classes: int = 4,
    communities: int = 5,
    near: float = 0.03,
    same: float = 0.006,
    other: float = 0.001,
    strength: float = 0.5,
    num_features: int = 40,
    seed: int = 0,
) -> tuple[NodeGraph, Tensor]:
    r"""A graph of classes that are made of hidden communities.

    Node v is in community c(v); an edge is there with probability ``near`` inside a community, ``same`` inside a class and ``other`` elsewhere;
    features are :math:`x_v = s\,\mu_{c(v)} + N(0, I)` with :math:`\mu_c \sim N(0, I)`.

    Args:
        num_nodes: N, in ``classes * communities`` communities of (nearly) equal size, numbered at random.
        classes, communities: classes, and communities in each.
        near, same, other: probabilities of an edge, for ``SBM_NODES`` nodes; they are scaled so that degrees are the same at any N.
        strength: s.
        num_features: F.
        seed: of everything.

    Returns:
        the graph with its labels, and the community of each node (N,).

    Raises:
        InputError: fewer nodes than two in each community.
    """
    blocks = classes * communities
    if num_nodes < 2 * blocks:
        raise InputError(f"{blocks} communities need {2 * blocks} nodes or more, not {num_nodes}")
    rng = np.random.default_rng([seed, 31])
    block = rng.permutation(np.arange(num_nodes) * blocks // num_nodes)
    order = np.argsort(block, kind="stable")
    sizes = np.bincount(block, minlength=blocks)
    starts = np.cumsum(sizes) - sizes
    scale = SBM_NODES / num_nodes
    found = []
    for a in range(blocks):
        for b in range(a, blocks):
            share = near if a == b else same if a // communities == b // communities else other
            pairs = sizes[a] * (sizes[a] - 1) // 2 if a == b else sizes[a] * sizes[b]
            chosen = _distinct(rng, int(pairs), int(rng.binomial(pairs, min(1.0, share * scale))))
            u, v = _triangle(chosen) if a == b else (chosen // sizes[b], chosen % sizes[b])
            found.append(np.stack([order[starts[a] + u], order[starts[b] + v]]))
    means = rng.standard_normal((blocks, num_features))
    x = strength * means[block] + rng.standard_normal((num_nodes, num_features))
    labels = torch.from_numpy(block // communities)
    edges = torch.from_numpy(np.concatenate(found, 1).astype(np.int64))
    return NodeGraph.of(torch.from_numpy(x.astype(np.float32)), edges, labels), torch.from_numpy(block)


def hypergraph_sbm(
    num_nodes: int = HYPERGRAPH_NODES,
    *,
    hyperedges: int | None = None,
    classes: int = 5,
    sizes: tuple[int, int] = (3, 7),
    purity: float = 0.85,
    strength: float = 0.35,
    num_features: int = 50,
    seed: int = 0,
) -> tuple[Hypergraph, Tensor, Tensor]:
    r"""A hypergraph whose hyperedges prefer one class each.

    A hyperedge has a uniform class and size; each of its members, all different, comes from that class with probability ``purity``, else from all
    vertices. Features are :math:`x_v = s\,\mu_{y(v)} + N(0, I)` with :math:`\mu_y \sim N(0, I)`.

    Args:
        num_nodes: N.
        hyperedges: M; None: 0.7 N.
        classes: K, of nearly equal size.
        sizes: smallest and largest hyperedge.
        purity: see above.
        strength: s.
        num_features: F.
        seed: of everything.

    Returns:
        the hypergraph (without singletons for isolated vertices), features (N, F) and labels (N,).

    Raises:
        InputError: hyperedges as large as a class.
    """
    if num_nodes < classes * (sizes[1] + 1):
        raise InputError(
            f"hyperedges of up to {sizes[1]} members of {classes} classes need {classes * (sizes[1] + 1)} vertices, not {num_nodes}"
        )
    rng = np.random.default_rng([seed, 37])
    labels = rng.permutation(np.arange(num_nodes) * classes // num_nodes)
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=classes)
    starts = np.cumsum(counts) - counts
    count = round(0.7 * num_nodes) if hyperedges is None else hyperedges
    size = rng.integers(sizes[0], sizes[1] + 1, count)
    owner = np.repeat(np.arange(count), size)
    kind = rng.integers(0, classes, count)[owner]

    def members(of: NDArray[np.int64]) -> NDArray[np.int64]:
        inside = order[starts[of] + (rng.random(len(of)) * counts[of]).astype(np.int64)]
        found: NDArray[np.int64] = np.where(rng.random(len(of)) < purity, inside, rng.integers(0, num_nodes, len(of)))
        return found

    held = members(kind)
    while True:  # whoever is in a hyperedge already is drawn again
        keys = owner * num_nodes + held
        twice = np.ones(len(keys), bool)
        twice[np.unique(keys, return_index=True)[1]] = False
        if not twice.any():
            break
        held[twice] = members(kind[twice])
    x = strength * rng.standard_normal((classes, num_features))[labels] + rng.standard_normal((num_nodes, num_features))
    pointer = torch.from_numpy(np.concatenate([[0], np.cumsum(size)]))
    made = Hypergraph(pointer, torch.from_numpy(held.astype(np.int64)), num_nodes)
    return made, torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))


def _distinct(rng: np.random.Generator, among: int, count: int) -> NDArray[np.int64]:
    """``count`` different numbers below ``among``, without a list of all."""
    if 2 * count >= among:
        return rng.permutation(among)[:count].astype(np.int64)
    found = np.zeros(0, np.int64)
    while len(found) < count:
        found = np.unique(np.concatenate([found, rng.integers(0, among, 2 * (count - len(found)))]))
    return rng.permutation(found)[:count]


def _triangle(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs v < u from their numbers u (u - 1) / 2 + v."""
    u = ((1 + np.sqrt(1 + 8 * numbers.astype(np.float64))) / 2).astype(np.int64)
    u -= u * (u - 1) // 2 > numbers  # where the root was rounded up
    u += u * (u + 1) // 2 <= numbers
    return u, numbers - u * (u - 1) // 2
