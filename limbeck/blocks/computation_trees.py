"""Computation trees of graph nodes: what a message-passing network of L layers can see of a node, told apart exactly.

The tree of depth L of a node has the node as root, and under every tree node all the neighbours that send it messages (the
one it was reached from included: walks, not paths). Two nodes with isomorphic trees get the same state from every such
network of L layers.

Trees are told apart by colour refinement instead of by their strings: the number of a tree of depth k stands for (label of
the root, sorted multiset of (edge label, number of a tree of depth k - 1) over the children). The numbers are those of sorted
distinct rows, so they depend on the graphs and not on the order of their nodes. A tree is grown from its number when it is
wanted (:meth:`ComputationTrees.forest`).

Source: "Mirage: Model-Agnostic Graph Distillation for Graph Classification" (2024); colour refinement by Weisfeiler and Leman
(1968), with edge labels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from limbeck.core.errors import InputError

Ints = NDArray[np.int64]
MOST_NODES = 2**40
"""Trees beyond this many nodes all count as having so many."""


@dataclass(frozen=True)
class Level:
    """The distinct trees of one depth k >= 1.

    Attributes:
        root: (n,) number of the root's label.
        ptr: (n + 1,) where each tree's children are.
        edge: (m,) labels of the edges to the children.
        child: (m,) numbers of the children's trees, of depth k - 1.
    """

    root: Ints
    ptr: Ints
    edge: Ints
    child: Ints


@dataclass(frozen=True)
class Forest:
    """Rooted trees side by side, the nodes level by level: all roots, then all their children, …

    Attributes:
        labels: (n, F) node labels.
        edges: (2, m) child and parent of each edge.
        edge_labels: (m,).
        is_root: (n,) bool; the first nodes are the roots, in the order in which the trees were asked for.
        tree: (n,) which of the trees a node belongs to.
        depth: (n,) steps from the root.
    """

    labels: Ints
    edges: Ints
    edge_labels: Ints
    is_root: NDArray[np.bool_]
    tree: Ints
    depth: Ints


@dataclass(frozen=True)
class ComputationTrees:
    """All distinct computation trees of some graphs.

    Attributes:
        labels: (n, F) the distinct rows of node labels.
        levels: the trees of depth 1, 2, … L.
        of_node: (V,) number of each node's tree of depth L.
    """

    labels: Ints
    levels: tuple[Level, ...]
    of_node: Ints

    @property
    def hops(self) -> int:
        """The depth L."""
        return len(self.levels)

    def __len__(self) -> int:
        """How many distinct trees of depth L there are."""
        return len(self.levels[-1].root)

    def sizes(self) -> Ints:
        """(n,) number of nodes of each tree of depth L (at most ``MOST_NODES``)."""
        return self._sizes

    @functools.cached_property
    def _sizes(self) -> Ints:
        sizes = np.ones(len(self.labels), dtype=np.int64)
        for level in self.levels:
            sums = np.zeros(len(level.root), dtype=np.int64)
            np.add.at(sums, np.repeat(np.arange(len(sums)), np.diff(level.ptr)), sizes[level.child])
            sizes = np.minimum(1 + sums, MOST_NODES)
        return sizes

    def single(self) -> NDArray[np.bool_]:
        """(n,) True for the trees without an edge: those of isolated nodes."""
        return np.diff(self.levels[-1].ptr) == 0

    def forest(self, trees: Ints) -> Forest:
        """The trees of depth L with the given numbers (T,), grown."""
        numbers = np.asarray(trees, dtype=np.int64)
        tree = np.arange(len(numbers))
        place = np.arange(len(numbers))
        labels, owners, depths = [], [tree], [np.zeros(len(tree), dtype=np.int64)]
        edges, edge_labels = [], []
        total = len(numbers)
        for depth, level in enumerate(reversed(self.levels)):
            labels.append(level.root[numbers])
            counts = np.diff(level.ptr)[numbers]
            at = _ranges(level.ptr[numbers], counts)
            parent = np.repeat(place, counts)
            numbers, tree = level.child[at], np.repeat(tree, counts)
            place = total + np.arange(len(numbers))
            total += len(numbers)
            edges.append(np.stack([place, parent]))
            edge_labels.append(level.edge[at])
            owners.append(tree)
            depths.append(np.full(len(tree), depth + 1))
        labels.append(numbers)
        depth_of = np.concatenate(depths)
        return Forest(
            self.labels[np.concatenate(labels)],
            np.concatenate(edges, 1),
            np.concatenate(edge_labels),
            depth_of == 0,
            np.concatenate(owners),
            depth_of,
        )


def computation_trees(
    node_labels: Ints, edge_index: Ints, hops: int, edge_labels: Ints | None = None
) -> ComputationTrees:
    """The computation trees of depth ``hops`` of all nodes.

    Args:
        node_labels: (V, F) integers.
        edge_index: (2, E) source and destination of each edge; several graphs are numbered one after the other.
        hops: L, at least 1.
        edge_labels: (E,) integers from 0; None: all alike.

    Raises:
        InputError: fewer than one hop.
    """
    if hops < 1:
        raise InputError(f"computation trees need at least one hop (got {hops})")
    source, target = np.asarray(edge_index, dtype=np.int64)
    edges = np.zeros(len(source), dtype=np.int64) if edge_labels is None else np.asarray(edge_labels, dtype=np.int64)
    labels, root = _distinct_rows(np.asarray(node_labels, dtype=np.int64))
    degrees = np.bincount(target, minlength=len(root))
    numbers, levels = root, []
    for _ in range(hops):
        arriving = numbers[source]
        order = np.lexsort((arriving, edges, target))  # children of a node together, sorted by edge label, then by tree
        level, numbers = _intern(root, degrees, edges[order], arriving[order])
        levels.append(level)
    return ComputationTrees(labels, tuple(levels), numbers)


def _intern(root: Ints, degrees: Ints, edge: Ints, child: Ints) -> tuple[Level, Ints]:
    """Distinct (root, children) of all nodes, numbered; nodes of one degree at a time, so that rows have one length."""
    starts = np.cumsum(degrees) - degrees
    numbers = np.empty(len(root), dtype=np.int64)
    roots, sizes, edges, children = [], [], [], []
    count = 0
    for degree in np.unique(degrees):
        nodes = (degrees == degree).nonzero()[0]
        at = starts[nodes, None] + np.arange(degree)
        rows, found = _distinct_rows(np.concatenate([root[nodes, None], edge[at], child[at]], 1))
        numbers[nodes] = count + found
        count += len(rows)
        roots.append(rows[:, 0])
        sizes.append(np.full(len(rows), degree))
        edges.append(rows[:, 1 : 1 + degree].ravel())
        children.append(rows[:, 1 + degree :].ravel())
    ptr = np.concatenate([[0], np.concatenate(sizes).cumsum()])
    return Level(np.concatenate(roots), ptr, np.concatenate(edges), np.concatenate(children)), numbers


def _distinct_rows(rows: Ints) -> tuple[Ints, Ints]:
    """The sorted distinct rows of (N, K), and the number (N,) of each row among them."""
    order = np.lexsort(rows.T[::-1])
    ranked = rows[order]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (ranked[1:] != ranked[:-1]).any(1)
    numbers = np.empty(len(rows), dtype=np.int64)
    numbers[order] = np.cumsum(new) - 1
    return ranked[new], numbers


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """``starts[0], starts[0] + 1, …`` (``counts[0]`` numbers), then the same for the next."""
    shift = starts - (np.cumsum(counts) - counts)
    found: Ints = np.repeat(shift, counts) + np.arange(counts.sum())
    return found


def coverage(of_node: Ints, share: float = 0.1) -> float:
    """Which part of the nodes the most frequent ``share`` of the distinct trees cover: how skewed the trees are. 1 is all.

    A share of less than one tree counts as one.
    """
    counts = np.sort(np.unique(of_node, return_counts=True)[1])[::-1]
    return float(counts[: max(1, round(share * len(counts)))].sum() / counts.sum())


def canonical_code(node_labels: Ints, edge_index: Ints, node: int, hops: int, edge_labels: Ints | None = None) -> str:
    """The canonical string of one node's computation tree, by recursion: equal strings mean isomorphic trees.

    ``code(u) = label(u) + sorted over children c of [edge_label(u, c) + code(c)] + "$"``. It grows with the size of the tree; it is
    there to check :func:`computation_trees` against.
    """
    labels = np.asarray(node_labels).reshape(len(node_labels), -1)
    source, target = np.asarray(edge_index)
    edges = np.zeros(len(source), dtype=np.int64) if edge_labels is None else np.asarray(edge_labels)

    def code(at: int, left: int) -> str:
        own = ",".join(map(str, labels[at].tolist()))
        inside = (target == at).nonzero()[0] if left else ()
        return own + "".join(sorted(f"-{edges[e]}-{code(int(source[e]), left - 1)}" for e in inside)) + "$"

    return code(node, hops)
