"""Itemsets as forests: what a network sees at the roots, bytes before growing, mean counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.blocks.computation_trees import canonical_code, computation_trees
from limbeck.blocks.tree_items import item_bytes, mean_counts, tree_items
from limbeck.core.graphs import GraphData
from limbeck.networks.graphs import GraphNetwork
from limbeck.tasks.graphs import molecules

DATA = molecules(40, seed=1)


def trees(hops: int = 2):
    whole = DATA.whole()
    return computation_trees(whole.node_labels.numpy(), whole.edge_index.numpy(), hops)


def made(sets, **options) -> GraphData:
    return tree_items(trees(), sets, [i % 2 for i in range(len(sets))], (4,), **options)


def test_every_item_is_the_forest_of_its_trees():
    found = trees()
    counts = np.bincount(found.of_node)
    common = np.argsort(-counts)[:5].tolist()
    sets = [(common[0],), (common[1], common[3]), (common[4], common[0], common[2])]
    items = made(sets)
    assert items.y.tolist() == [0, 1, 0] and len(items) == 3
    whole = DATA.whole()
    for number, chosen in enumerate(sets):
        graph = items.graph(number)
        roots = graph.root_mask.nonzero().flatten().tolist()
        source, target = (set(side.tolist()) for side in graph.edge_index)
        assert sorted(target - source) == roots and len(roots) == len(chosen)
        codes = [canonical_code(graph.node_labels.numpy(), graph.edge_index.numpy(), r, 2) for r in roots]
        expected = [
            canonical_code(whole.node_labels.numpy(), whole.edge_index.numpy(), int((found.of_node == t).argmax()), 2)
            for t in chosen
        ]
        assert codes == expected


@pytest.mark.parametrize("kind", ["gin", "gat", "sage"])
def test_the_readout_over_roots_is_the_mean_of_the_real_nodes_states(kind):
    torch.manual_seed(0)
    net = GraphNetwork((4,), 2, kind=kind, width=8).double()
    found, whole = trees(), DATA.whole()
    states = net.embed_nodes(whole)
    sets = [tuple(dict.fromkeys(found.of_node[[3, 50, 70]].tolist())), (int(found.of_node[100]),)]
    expected = [torch.stack([states[int((found.of_node == t).argmax())] for t in chosen]).mean(0) for chosen in sets]
    torch.testing.assert_close(net.embed(made(sets).whole()), torch.stack(expected), atol=1e-8, rtol=1e-8)


def test_bytes_are_known_before_the_trees_are_grown():
    sets = [(0,), (1, 2), (3, 4, 5), (7, 0)]
    weights = torch.rand(8)
    plain, labelled = made(sets), made(sets, edge_label_count=1)
    assert item_bytes(trees(), sets, edge_labels=False).tolist() == plain.bytes_each().tolist()
    assert item_bytes(trees(), sets, edge_labels=True).tolist() == labelled.bytes_each().tolist()
    extra = item_bytes(trees(), sets, edge_labels=False, per_root=1) - item_bytes(trees(), sets, edge_labels=False)
    assert extra.tolist() == [4, 8, 12, 8]
    weighed = made(sets, weights=weights)
    assert weighed.node_weights[weighed.root_mask].tolist() == weights.tolist()
    assert weighed.node_weights[~weighed.root_mask].abs().max() == 0


def test_degrees_come_back_out_of_the_labels():
    whole = DATA.whole()
    degrees = torch.bincount(whole.edge_index[1])
    labels = torch.cat([whole.node_labels, degrees[:, None]], 1)
    found = computation_trees(labels.numpy(), whole.edge_index.numpy(), 1)
    items = tree_items(found, [(int(found.of_node[0]),), (int(found.of_node[9]),)], [0, 1], (4,), degrees=True)
    assert items.node_labels.shape[1] == 1
    inner = items.whole().edge_index[1].unique()
    assert torch.equal(items.degrees[inner], torch.bincount(items.whole().edge_index[1])[inner])
    assert bool((items.degrees >= 1).all())


def test_mean_counts_by_hand():
    graph = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    of_node = np.array([5, 5, 7, 5, 7, 7, 5, 5])
    members = np.array([True, True, True])
    assert mean_counts(of_node, graph, members, [(5,), (5, 7)]).tolist() == [5 / 3, 1.5, 1.5]
    assert mean_counts(of_node, graph, np.array([True, False, True]), [(5,), (5, 7)]).tolist() == [2, 2, 1]
