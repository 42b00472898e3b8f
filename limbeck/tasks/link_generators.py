"""Generated graphs whose links close triangles, seeded, of any size. Links come in the order in which the graph grows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.errors import InputError

CLOSURE_NODES, GROWING_NODES = 1500, 600
_EACH = 50  # nodes of a community
_ROUNDS = 60
_TRIES = 4


def closure_communities(
    num_nodes: int = CLOSURE_NODES,
    *,
    links_per_node: float = 4.0,
    communities: int | None = None,
    inside: float = 0.9,
    closing: tuple[float, float] = (0.0, 0.95),
    strength: float = 1.0,
    num_features: int = 32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Communities that differ in how often a new link closes a triangle.

    A link lies inside a community with probability ``inside``; there it joins the ends of a path of two links with a probability that rises from
    ``closing[0]`` in the first community to ``closing[1]`` in the last. Features are :math:`x_v = s\,\mu_{c(v)} + N(0, I)`, :math:`\mu_c \sim N(0, I)`.

    Args:
        num_nodes: N. links_per_node: links, divided by N. communities: of (nearly) equal size; None: of 50 nodes each. strength: s. num_features: F.
        inside, closing: see above.
        seed: of everything.

    Returns:
        links (2, E) in the order of their making, features (N, F), communities (N,).

    Raises:
        InputError: communities of fewer than 4 nodes, or more links than they can take.
    """
    rng = np.random.default_rng([seed, 41])
    count = max(2, num_nodes // _EACH) if communities is None else communities
    block = _blocks(rng, num_nodes, count)
    rates = np.linspace(*closing, count)
    links = _grown(rng, block, [(round(links_per_node * num_nodes), inside)], rates)
    means = rng.standard_normal((count, num_features))
    x = strength * means[block] + rng.standard_normal((num_nodes, num_features))
    return torch.from_numpy(links), torch.from_numpy(x.astype(np.float32)), torch.from_numpy(block)


def growing(
    num_nodes: int = GROWING_NODES,
    *,
    early: int | None = None,
    late: int | None = None,
    communities: int | None = None,
    inside: tuple[float, float] = (0.95, 0.35),
    closing: float = 0.7,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A graph whose late links leave the communities that the early ones made.

    Args:
        num_nodes: N.
        early, late: how many links; None: 4 and 7/6 for each node.
        communities: of (nearly) equal size; None: of 50 nodes each.
        inside: probability that a link lies inside a community, early and late.
        closing: probability that such a link joins the ends of a path of two links.
        seed: of everything.

    Returns:
        links (2, E), the early ones first, and communities (N,).

    Raises:
        InputError: communities of fewer than 4 nodes, or more links than they can take.
    """
    rng = np.random.default_rng([seed, 43])
    blocks = max(2, num_nodes // _EACH) if communities is None else communities
    block = _blocks(rng, num_nodes, blocks)
    counts = (4 * num_nodes if early is None else early, round(7 * num_nodes / 6) if late is None else late)
    links = _grown(rng, block, list(zip(counts, inside, strict=True)), np.full(blocks, closing))
    return torch.from_numpy(links), torch.from_numpy(block)


# ---- parts -------------------------------------------------------------------------------------------------------------


def _blocks(rng: np.random.Generator, num_nodes: int, communities: int) -> NDArray[np.int64]:
    if communities < 2 or num_nodes < 4 * communities:
        raise InputError(f"{communities} communities: take 2 or more, of 4 of the {num_nodes} nodes or more each")
    block: NDArray[np.int64] = rng.permutation(np.arange(num_nodes) * communities // num_nodes)
    return block


def _grown(
    rng: np.random.Generator,
    block: NDArray[np.int64],
    phases: Sequence[tuple[int, float]],
    closing: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Links (2, E): so many with so large a share inside communities, phase after phase, many at a time."""
    size = len(block)
    keys = np.zeros(0, np.int64)
    for count, inside in phases:
        goal, idle = len(keys) + count, 0
        while len(keys) < goal:
            tried = min(max(16, count // _ROUNDS), goal - len(keys))
            u, v = _proposed(rng, block, keys, tried, inside, closing)
            low, high = np.minimum(u, v), np.maximum(u, v)
            made = (low * size + high)[low != high]
            made = made[np.sort(np.unique(made, return_index=True)[1])]
            made = made[~np.isin(made, keys)]
            keys = np.concatenate([keys, made])
            idle = 0 if len(made) else idle + 1
            if idle > 50:
                raise InputError(
                    f"{goal} links do not fit into communities of {size // len(closing)} nodes: ask for fewer"
                )
    return np.stack([keys // size, keys % size])


def _proposed(
    rng: np.random.Generator,
    block: NDArray[np.int64],
    keys: NDArray[np.int64],
    count: int,
    inside: float,
    closing: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ends of proposed links, given those that are there; some may be there already."""
    size = len(block)
    order = np.argsort(block, kind="stable")
    counts = np.bincount(block, minlength=len(closing))
    starts = np.cumsum(counts) - counts
    u = rng.integers(0, size, count)
    home = rng.random(count) < inside
    near = order[starts[block[u]] + (rng.random(count) * counts[block[u]]).astype(np.int64)]
    # A number below N less the community's size, moved past the community in the order, is a node of another one.
    other = (rng.random(count) * (size - counts[block[u]])).astype(np.int64)
    far = order[other + counts[block[u]] * (other >= starts[block[u]])]
    v = np.where(home, near, far)
    closes = home & (rng.random(count) < closing[block[u]])
    if not len(keys):
        return u, v
    source = np.concatenate([keys // size, keys % size])
    target = np.concatenate([keys % size, keys // size])
    target = target[np.argsort(source, kind="stable")]
    degree = np.bincount(source, minlength=size)
    first = np.cumsum(degree) - degree
    for _ in range(_TRIES):
        wanted = np.flatnonzero(closes & (degree[u] > 0))
        a = u[wanted]
        middle = target[first[a] + (rng.random(len(a)) * degree[a]).astype(np.int64)]
        end = target[first[middle] + (rng.random(len(a)) * degree[middle]).astype(np.int64)]
        there = np.isin(np.minimum(a, end) * size + np.maximum(a, end), keys)
        good = (end != a) & (block[end] == block[a]) & ~there
        v[wanted[good]] = end[good]
        closes[wanted[good]] = False
    return u, v
