"""Sets of computation trees as graphs that a network can train on: each set a forest with a mask of its roots.

Source: "Mirage: Model-Agnostic Graph Distillation for Graph Classification" (2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.blocks.computation_trees import ComputationTrees
from limbeck.core.graphs import INT_BYTES, GraphData

Ints = NDArray[np.int64]
Sets = Sequence[tuple[int, ...]]


def tree_items(
    trees: ComputationTrees,
    sets: Sets,
    y: Sequence[int],
    label_counts: Sequence[int],
    *,
    edge_label_count: int | None = None,
    degrees: bool = False,
    weights: Tensor | None = None,
    centroids: Tensor | None = None,
) -> GraphData:
    """The disjoint union of each set's trees, edges from child to parent, as one graph each.

    Args:
        trees: what the numbers in ``sets`` mean.
        sets: (N,) of tree numbers.
        y: (N,) classes.
        label_counts: how many values each label column has.
        edge_label_count: how many edge labels there are; None: edges have no labels.
        degrees: the last label column is the node's degree in its graph, and becomes ``degrees``.
        weights: weights of the roots in a readout, set by set in the order of their trees; None: none.
        centroids: see :class:`limbeck.core.graphs.GraphData`.
    """
    owner = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    forest = trees.forest(np.array([t for s in sets for t in s], dtype=np.int64))
    item = owner[forest.tree]
    order = np.argsort(item, kind="stable")  # nodes of an item together
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    sizes = np.bincount(item, minlength=len(sets))
    starts = np.cumsum(sizes) - sizes
    edge_item = item[forest.edges[0]]
    edge_order = np.argsort(edge_item, kind="stable")
    edges = (place[forest.edges] - starts[edge_item])[:, edge_order]
    labels = torch.from_numpy(forest.labels[order])
    root_mask = torch.from_numpy(forest.is_root[order])
    by_node = None
    if weights is not None:
        by_node = torch.zeros(len(order))
        by_node[torch.from_numpy(place[forest.is_root])] = weights.float()
    return GraphData(
        torch.tensor(list(y), dtype=torch.int64),
        labels[:, :-1] if degrees else labels,
        _ptr(sizes),
        torch.from_numpy(edges),
        _ptr(np.bincount(edge_item, minlength=len(sets))),
        None if edge_label_count is None else torch.from_numpy(forest.edge_labels[edge_order]),
        label_counts=label_counts,
        edge_label_count=edge_label_count,
        root_mask=root_mask,
        node_weights=by_node,
        degrees=labels[:, -1] if degrees else None,
        centroids=centroids,
    )


def item_bytes(trees: ComputationTrees, sets: Sets, *, edge_labels: bool, per_root: int = 0) -> Ints:
    """(N,) bytes that the forests of :func:`tree_items` take (:meth:`GraphData.bytes_each`), without growing them.

    Args:
        trees, sets: see :func:`tree_items`.
        edge_labels: whether edges have labels.
        per_root: further numbers for each root.
    """
    sizes = trees.sizes()
    nodes = np.array([sizes[list(s)].sum() for s in sets], dtype=np.int64)
    roots = np.array([len(s) for s in sets], dtype=np.int64)
    numbers: Ints = 3 + trees.labels.shape[1] * nodes + (2 + edge_labels) * (nodes - roots) + per_root * roots
    return INT_BYTES * numbers


def mean_counts(of_node: Ints, graph: Ints, members: NDArray[np.bool_], sets: Sets) -> NDArray[np.float64]:
    """How often each tree of a set occurs on average in the graphs that hold the whole set; sets in a row, trees in order.

    Args:
        of_node: (V,) each node's tree.
        graph: (V,) each node's graph.
        members: (G,) which graphs count.
        sets: tree numbers; each set lies in at least one of these graphs.
    """
    used, column = np.unique(np.array([t for s in sets for t in s], dtype=np.int64), return_inverse=True)
    here = np.isin(of_node, used)
    counts = np.zeros((len(members), len(used)), dtype=np.int64)
    np.add.at(counts, (graph[here], np.searchsorted(used, of_node[here])), 1)
    counts = counts[members]
    found, at = [], 0
    for chosen in sets:
        table = counts[:, column[at : at + len(chosen)]]
        found.append(table[(table > 0).all(1)].mean(0))
        at += len(chosen)
    return np.concatenate(found) if found else np.zeros(0)


def _ptr(sizes: Ints) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
