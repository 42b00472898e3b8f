"""Graphs as flat tensors: joining, taking apart, counting bytes, refusing what does not fit."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.batch import Batch, call_model
from limbeck.core.data import Stream
from limbeck.core.errors import InputError
from limbeck.core.graphs import Graph, GraphBatch, GraphData, num_classes, undirected


def path(labels: list[int], y: int, edge_labels: bool = True) -> Graph:
    n = len(labels)
    one = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
    both = torch.cat([one, one.flip(0)], 1)
    return Graph(labels, both, y, torch.arange(n - 1).repeat(2) if edge_labels else None)


def some() -> GraphData:
    return GraphData.of([path([0, 1, 2], 0), path([3], 1), path([1, 1], 1), path([2, 0, 0, 1], 0)])


def test_a_batch_joins_graphs_in_the_order_that_is_asked_for():
    batch = some().fetch(torch.tensor([3, 0]), None)
    graphs = batch.inputs
    assert isinstance(graphs, GraphBatch) and len(batch) == 2
    assert graphs.sizes.tolist() == [4, 3] and graphs.graph.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert graphs.node_labels[:, 0].tolist() == [2, 0, 0, 1, 0, 1, 2]
    assert graphs.edge_index.tolist() == [[0, 1, 2, 1, 2, 3, 4, 5, 5, 6], [1, 2, 3, 0, 1, 2, 5, 6, 4, 5]]
    assert graphs.edge_labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1]
    assert batch.labels.tolist() == [0, 0]


def test_batches_move_through_the_engines_functions():
    batch = some().fetch(torch.tensor([1, 2]), None)
    moved = batch.to("cpu")
    assert isinstance(moved.inputs, GraphBatch) and moved.inputs.root_mask is None
    assert torch.equal(moved.inputs.edge_index, batch.inputs.edge_index)
    again = call_model(GraphBatch, batch.inputs)  # a named tuple is given field by field
    assert torch.equal(again.sizes, batch.inputs.sizes)
    assert Batch.of((batch.inputs, batch.labels)).inputs is batch.inputs
    assert len(Stream(some(), 3, seed=1).batch(5)) == 3


def test_every_graph_comes_back_as_it_went_in():
    given = [path([0, 1, 2], 0), path([3], 1), path([1, 1], 1)]
    data = GraphData.of(given)
    for number, graph in enumerate(given):
        found = data.graph(number)
        assert found.node_labels[:, 0].tolist() == graph.node_labels and found.y == graph.y
        assert torch.equal(found.edge_index, graph.edge_index)
    part = data.subset(torch.tensor([2, 2, 0]))
    assert part.y.tolist() == [1, 1, 0] and part.label_counts == (4,) and part.edge_label_count == 2
    assert torch.equal(part.whole().edge_index, data.fetch(torch.tensor([2, 2, 0]), None).inputs.edge_index)
    assert part.labels_tensor() is part.y and num_classes(data) == 2


def test_a_fingerprint_sees_every_field():
    first = some()
    assert first.fingerprint() == some().fingerprint()
    assert first.with_labels(1 - first.y).fingerprint() != first.fingerprint()
    other = GraphData.of([path([0, 1, 2], 0, edge_labels=False)])
    assert other.fingerprint() != GraphData.of([path([0, 1, 2], 0)]).fingerprint()


def test_bytes_count_an_undirected_edge_once():
    # 3 numbers for each graph, 1 label a node, 2 ends and a label for each edge, 4 bytes a number
    assert some().bytes_each().tolist() == [4 * (3 + 3 + 3 * 2), 4 * (3 + 1), 4 * (3 + 2 + 3), 4 * (3 + 4 + 3 * 3)]
    plain = GraphData.of(
        [
            Graph([0, 0], [[0, 1], [1, 0]], 0),  # one undirected edge
            Graph([0, 0], [[0], [1]], 0),  # one directed edge
            Graph([0, 0], [[0, 1, 0, 1], [1, 0, 1, 0]], 0),  # two undirected edges
            Graph([0, 0], [[0, 0, 1, 1], [0, 1, 0, 1]], 0),  # an edge and two loops
            Graph([0], [], 0),
        ]
    )
    assert plain.single_edges().tolist() == [1, 1, 2, 3, 0]
    labelled = GraphData.of([Graph([0, 0], [[0, 1], [1, 0]], 0, [0, 1])])
    assert labelled.single_edges().tolist() == [2]  # the directions differ, so both must be stored
    wide = GraphData.of([Graph(torch.zeros(2, 3, dtype=torch.long), [], 0, features=torch.zeros(2, 5))])
    assert wide.bytes_each().tolist() == [4 * (3 + 2 * 8)]


def test_undirected_adds_what_is_missing():
    graph = undirected(Graph([0, 1, 2], [[0, 1, 2, 2], [1, 0, 1, 2]], 0, [5, 5, 7, 1]))
    edges = {(*pair, label) for *pair, label in torch.cat([graph.edge_index, graph.edge_labels[None]]).T.tolist()}
    assert edges == {(0, 1, 5), (1, 0, 5), (1, 2, 7), (2, 1, 7), (2, 2, 1)}
    assert undirected(Graph([0, 1], [[0], [1]], 0)).edge_labels is None


@pytest.mark.parametrize(
    ("graphs", "line"),
    [
        ([], "the data set is empty"),
        ([Graph([0, 1], [[0], [1]])], "graph 0 has no class"),
        ([Graph([0, 1], [[0], [1]], 0), Graph([0], [[0], [3]], 1)], r"graph 1 has an edge \[0, 3\] but only 1 nodes"),
        ([Graph([0], [], 0), Graph([], [], 1)], "graph 1 has no nodes"),
        ([Graph([0.5], [], 0)], "graph 0 has node labels of type torch.float32.*features="),
        ([Graph(None, [], 0)], "neither node labels nor features"),
        ([Graph([-1], [], 0)], "node labels must be at least 0"),
        ([path([0, 1], 0), path([0, 1], 1, edge_labels=False)], "edge_labels is given for 1 of 2 graphs"),
        ([Graph([[0, 1]], [], 0), Graph([[0]], [], 0)], "another number of columns"),
        ([Graph([0], [], 0, features=[[float("nan")]])], "NaN"),
        (["graph"], "item 0 is a str"),
    ],
)
def test_wrong_graphs_are_named(graphs, line):
    with pytest.raises(InputError, match=line):
        GraphData.of(graphs)


def test_counts_that_are_too_small_are_refused():
    with pytest.raises(InputError, match="more than label_counts"):
        GraphData.of([path([0, 4], 0)], label_counts=(3,))
    with pytest.raises(InputError, match="edge_label_count is 1"):
        GraphData.of([path([0, 1, 2], 0)], edge_label_count=1)
