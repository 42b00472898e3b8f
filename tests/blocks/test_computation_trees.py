"""Computation trees: colour refinement against canonical strings, forests against a walk by hand, invariance, skew."""

from __future__ import annotations

import numpy as np
import pytest

from limbeck.blocks.computation_trees import MOST_NODES, canonical_code, computation_trees, coverage
from limbeck.core.errors import InputError


def random_graph(seed: int, nodes: int = 14, edges: int = 18, labels: int = 2, kinds: int = 2):
    generator = np.random.default_rng(seed)
    pairs = generator.integers(0, nodes, (edges, 2))
    pairs = np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], 1), axis=0)
    kind = generator.integers(0, kinds, len(pairs))
    edge_index = np.concatenate([pairs, pairs[:, ::-1]]).T
    return generator.integers(0, labels, (nodes, 1)), edge_index, np.concatenate([kind, kind])


@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("kinds", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_numbers_tell_apart_what_canonical_strings_tell_apart(seed, kinds, hops):
    labels, edges, kind = random_graph(seed, kinds=kinds)
    found = computation_trees(labels, edges, hops, kind).of_node
    codes = [canonical_code(labels, edges, v, hops, kind) for v in range(len(labels))]
    assert len(set(codes)) > 3
    for a in range(len(labels)):
        for b in range(len(labels)):
            assert (found[a] == found[b]) == (codes[a] == codes[b])


def test_relabelled_graphs_have_the_same_trees():
    labels, edges, kind = random_graph(9, nodes=30, edges=40)
    order = np.random.default_rng(1).permutation(30)
    other = np.empty_like(labels)
    other[order] = labels
    shuffled = np.random.default_rng(2).permutation(len(kind))
    both = (
        np.concatenate([labels, other]),
        np.concatenate([edges, order[edges][:, shuffled] + 30], 1),
        3,
        np.concatenate([kind, kind[shuffled]]),
    )
    found = computation_trees(*both).of_node
    assert np.array_equal(found[:30], found[30:][order])
    # and apart from each other they get the same numbers, since these follow the sorted rows
    alone, again = (
        computation_trees(labels, edges, 3, kind),
        computation_trees(other, both[1][:, len(kind) :] - 30, 3, both[3][len(kind) :]),
    )
    assert sorted(alone.of_node.tolist()) == sorted(again.of_node.tolist())
    assert np.array_equal(alone.levels[-1].child, again.levels[-1].child)


def test_a_forest_is_the_walk_by_hand():
    # a triangle 0-1-2 with a tail 3 at node 2; labels are the nodes' own numbers
    labels = np.arange(4)[:, None]
    edges = np.array([[0, 1, 1, 2, 0, 2, 2, 3], [1, 0, 2, 1, 2, 0, 3, 2]])
    trees = computation_trees(labels, edges, 2, np.array([5, 5, 6, 6, 7, 7, 8, 8]))
    forest = trees.forest(trees.of_node[[3, 0]])
    assert forest.is_root.tolist() == [True, True] + [False] * 11
    assert forest.labels[:2, 0].tolist() == [3, 0]
    children = {}
    for (child, parent), label in zip(forest.edges.T.tolist(), forest.edge_labels.tolist(), strict=True):
        children.setdefault(parent, []).append((label, int(forest.labels[child, 0])))
    # under the tail: node 2, and under it all its neighbours, the tail included
    assert sorted(children[0]) == [(8, 2)]
    (below,) = [c for c, p in forest.edges.T.tolist() if p == 0]
    assert sorted(children[below]) == [(6, 1), (7, 0), (8, 3)]
    assert sorted(children[1]) == [(5, 1), (7, 2)]
    assert forest.depth.tolist() == [0] * 2 + [1] * 3 + [2] * 8
    assert sorted(np.bincount(forest.tree).tolist()) == [5, 8]
    sources, targets = set(forest.edges[0].tolist()), set(forest.edges[1].tolist())
    assert targets - sources == {0, 1}  # the roots are destinations and never sources
    assert sources | targets == set(range(len(forest.labels)))


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_sizes_and_codes_of_grown_trees_are_those_of_the_graph(hops):
    labels, edges, kind = random_graph(3)
    trees = computation_trees(labels, edges, hops, kind)
    sizes = trees.sizes()
    for node in range(len(labels)):
        number = trees.of_node[node]
        forest = trees.forest(np.array([number]))
        assert len(forest.labels) == sizes[number]
        # a tree's own code of the same depth, read along its edges only, is the code of the graph's node
        assert canonical_code(forest.labels, forest.edges, 0, hops, forest.edge_labels) == canonical_code(
            labels, edges, node, hops, kind
        )


def test_isolated_nodes_are_trees_without_edges():
    trees = computation_trees(np.array([[0], [0], [1]]), np.array([[0, 1], [1, 0]]), 2)
    assert trees.single()[trees.of_node].tolist() == [False, False, True]
    assert trees.sizes()[trees.of_node].tolist() == [3, 3, 1]
    forest = trees.forest(trees.of_node[[2]])
    assert forest.edges.shape == (2, 0) and forest.labels.tolist() == [[1]]
    none = computation_trees(np.zeros((3, 1), dtype=int), np.zeros((2, 0), dtype=int), 1)
    assert len(none) == 1 and none.single().all()


def test_edge_labels_and_label_tuples_are_never_merged():
    edges = np.array([[0, 1, 2, 3], [1, 0, 3, 2]])
    labels = np.zeros((4, 1), dtype=int)
    assert len(computation_trees(labels, edges, 1)) == 1
    assert len(computation_trees(labels, edges, 1, np.array([0, 0, 1, 1]))) == 2
    assert len(computation_trees(np.array([[0, 1], [0, 1], [1, 0], [1, 0]]), edges, 1)) == 2


def test_a_huge_tree_has_a_bounded_size():
    n = 2000
    star = np.stack([np.zeros(n, dtype=int), np.arange(1, n + 1)])
    trees = computation_trees(np.zeros((n + 1, 1), dtype=int), np.concatenate([star, star[::-1]], 1), 12)
    assert trees.sizes().max() == MOST_NODES and trees.sizes().min() > 0


def test_coverage_of_the_most_frequent_trees():
    assert coverage(np.array([0] * 91 + list(range(1, 10)))) == pytest.approx(0.91)
    assert coverage(np.arange(20)) == pytest.approx(0.1)
    assert coverage(np.array([7, 7, 7])) == 1.0
    with pytest.raises(InputError, match="at least one hop"):
        computation_trees(np.zeros((1, 1), dtype=int), np.zeros((2, 0), dtype=int), 0)
