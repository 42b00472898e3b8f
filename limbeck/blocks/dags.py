"""Directed acyclic graphs as weight matrices: entry (i, j) is the edge i → j, 0 where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.blocks.acyclicity import FloatArray, IntArray, walks
from limbeck.core.errors import InputError

if TYPE_CHECKING:
    import networkx


def topological_order(weights: FloatArray, generator: np.random.Generator | None = None) -> IntArray:
    """An order in which every edge points forwards.

    Args:
        weights: (d, d).
        generator: draws among the nodes that may come next; None takes the one with the smallest number.

    Raises:
        InputError: no square matrix, or the graph has a cycle.
    """
    found = _sorted_part(weights, generator)
    if len(found) < len(weights):
        left = sorted(set(range(len(weights))) - set(found.tolist()))
        raise InputError(f"the graph has a cycle (through some of the nodes {_few(left)}): give a DAG")
    return found


def is_dag(weights: FloatArray) -> bool:
    """Whether there is no cycle; an edge from a node to itself is one."""
    return len(_sorted_part(weights, None)) == len(weights)


def thresholded(weights: FloatArray, threshold: float) -> FloatArray:
    """The weights above ``threshold`` in absolute value; where cycles are left, further edges go, the weakest first, until none is.

    Returns:
        (d, d), a DAG.
    """
    kept = np.where(np.abs(weights) > threshold, weights, 0.0)
    np.fill_diagonal(kept, 0.0)
    if is_dag(kept):
        return kept
    strengths = np.unique(np.abs(kept[kept != 0]))
    low, high = (
        0,
        len(strengths) - 1,
    )  # fewer edges keep a DAG a DAG: the lowest cut that leaves one is found by bisection
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_dag(np.where(np.abs(kept) > strengths[middle], kept, 0)) else (middle + 1, high)
    return np.where(np.abs(kept) > strengths[low], kept, 0.0)


def order_of(
    start: Any, size: int, names: Sequence[str] | None = None, generator: np.random.Generator | None = None
) -> IntArray:
    """An order (d,) out of what people have: an order, a DAG's matrix or data frame, a networkx graph; None: a random one.

    Args:
        start: an order holds each variable once, by number or by name; a matrix is (d, d); a graph's nodes are numbers or names, and variables that it
            lacks count as isolated.
        size: the number d of variables.
        names: the variables' names.
        generator: draws the order, or what a graph leaves open.

    Raises:
        InputError: anything else, a cycle, unknown names.
    """
    generator = np.random.default_rng() if generator is None else generator
    if start is None:
        return generator.permutation(size).astype(np.int64)
    number = {name: i for i, name in enumerate(names or [])} | {i: i for i in range(size)}
    if hasattr(start, "edges") and hasattr(start, "nodes"):
        strange = [node for node in start.nodes if node not in number]
        if strange:
            raise InputError(f"order_init has a node {strange[0]!r} that is no column: name nodes by column or number")
        weights = np.zeros((size, size))
        for tail, head in start.edges():
            weights[number[tail], number[head]] = 1.0
        return topological_order(weights, generator)
    given = np.asarray(start)
    if given.ndim == 2:
        if given.shape != (size, size):
            raise InputError(
                f"order_init is a matrix {given.shape}, but the data has {size} columns: give {(size, size)}"
            )
        if not np.isfinite(given.astype(np.float64)).all():
            raise InputError("order_init holds NaN or infinity: give the weights of a DAG")
        return topological_order(given.astype(np.float64), generator)
    items = given.tolist() if given.ndim == 1 else []
    found = [number.get(int(v) if isinstance(v, float) and v.is_integer() else v) for v in items]
    if None in found or sorted(n for n in found if n is not None) != list(range(size)):
        raise InputError(f"order_init must hold each of the {size} columns once: an order, a DAG's matrix or a graph")
    return np.array(found, dtype=np.int64)


def to_networkx(weights: FloatArray, names: Sequence[Any] | None = None) -> networkx.DiGraph:
    """The graph with one node per variable (its name, or its number) and the attribute ``weight`` of each edge."""
    import networkx

    labels = list(range(len(weights))) if names is None else list(names)
    graph = networkx.DiGraph()
    graph.add_nodes_from(labels)
    tails, heads = np.nonzero(weights)
    graph.add_weighted_edges_from(
        (labels[i], labels[j], float(weights[i, j])) for i, j in zip(tails.tolist(), heads.tolist(), strict=True)
    )
    return graph


def kkt_violation(weights: FloatArray, gradient: FloatArray) -> float:
    r"""The largest :math:`|[\nabla Q]_{ij}|` over the pairs with :math:`[\nabla h]_{ij} = 0`: those whose edge could be changed or added without closing a cycle.

    The weights of a DAG satisfy the conditions of Karush, Kuhn and Tucker for :math:`\min Q` subject to :math:`h = 0` exactly where it is 0.

    Args:
        weights: (d, d) of a DAG.
        gradient: (d, d) of Q there; with a penalty, the subgradient of least norm.

    Raises:
        InputError: the weights have a cycle.
    """
    order = topological_order(weights)
    slope = np.empty_like(gradient)
    slope[np.ix_(order, order)] = walks(np.abs(weights), order).T
    free = (slope == 0) & ~np.eye(len(weights), dtype=bool)
    return float(np.abs(gradient)[free].max(initial=0.0))


def _sorted_part(weights: FloatArray, generator: np.random.Generator | None) -> IntArray:
    """Nodes in topological order, as far as there is one (Kahn's algorithm)."""
    if np.ndim(weights) != 2 or len(weights) != np.shape(weights)[1]:
        raise InputError(f"a graph's weights are a square matrix, not {np.shape(weights)}")
    edges = np.asarray(weights) != 0
    waiting = edges.sum(0)
    placed = np.zeros(len(edges), dtype=bool)
    found: list[int] = []
    while True:
        free = np.flatnonzero((waiting == 0) & ~placed)
        if not len(free):
            return np.array(found, dtype=np.int64)
        node = int(free[0] if generator is None else generator.choice(free))
        found.append(node)
        placed[node] = True
        waiting = waiting - edges[node]


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (", …" if len(numbers) > 6 else "")
