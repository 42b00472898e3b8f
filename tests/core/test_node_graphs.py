from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.core.node_graphs import NodeGraph, hash_tensors, places, sparse

torch.set_num_threads(1)


def square() -> NodeGraph:
    """0 - 1 - 2 - 3 - 0, with 4 on its own."""
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    return NodeGraph.of(torch.arange(10.0).view(5, 2), edges, torch.tensor([0, 1, 0, 1, 0]))


def dense(graph: NodeGraph) -> torch.Tensor:
    a = torch.zeros(graph.num_nodes, graph.num_nodes)
    source, target = graph.edge_index
    a[target, source] = 1.0 if graph.edge_weight is None else graph.edge_weight
    return a


def test_both_directions_once_and_no_loops() -> None:
    graph = NodeGraph.of(torch.zeros(3, 1), torch.tensor([[0, 1, 0, 2], [1, 0, 1, 2]]))
    assert graph.edge_index.tolist() == [[0, 1], [1, 0]]
    directed = NodeGraph.of(torch.zeros(3, 1), torch.tensor([[0, 2], [1, 2]]), undirected=False)
    assert directed.edge_index.tolist() == [[0], [1]]
    assert directed.degrees.tolist() == [0, 1, 0]


def test_adjacencies_are_those_of_the_formulas() -> None:
    graph = square()
    a = dense(graph)
    torch.testing.assert_close(graph.adjacency("none", self_loops=False).to_dense(), a)
    looped = a + torch.eye(5)
    degree = looped.sum(1)
    torch.testing.assert_close(graph.adjacency("sym").to_dense(), degree.rsqrt()[:, None] * looped * degree.rsqrt())
    row = graph.adjacency("row", self_loops=False).to_dense()
    torch.testing.assert_close(row.sum(1), torch.tensor([1.0, 1, 1, 1, 0]))  # an isolated node has nothing to average
    with pytest.raises(InputError, match="sym, row or none"):
        graph.adjacency("column")  # type: ignore[arg-type]


def test_messages_go_from_source_to_destination() -> None:
    graph = NodeGraph(torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([[0, 0], [1, 2]]))
    taken = graph.adjacency("none", self_loops=False) @ graph.features
    assert taken[:, 0].tolist() == [0, 1, 1]


def test_weights_count_in_every_norm() -> None:
    graph = NodeGraph(torch.zeros(3, 1), torch.tensor([[1, 2], [0, 0]]), edge_weight=torch.tensor([1.0, 3.0]))
    assert graph.adjacency("row", self_loops=False).to_dense()[0].tolist() == [0, 0.25, 0.75]
    looped = dense(graph) + torch.eye(3)
    degree = looped.sum(1)
    torch.testing.assert_close(graph.adjacency("sym").to_dense(), degree.rsqrt()[:, None] * looped * degree.rsqrt())


def test_the_induced_graph_keeps_what_lies_inside() -> None:
    graph = square()
    part = graph.induced(torch.tensor([3, 0, 4]))
    assert sorted(map(tuple, part.edge_index.T.tolist())) == [(0, 1), (1, 0)]
    assert part.features.tolist() == graph.features[[3, 0, 4]].tolist()
    assert part.labels is not None and part.labels.tolist() == [1, 0, 0]
    with pytest.raises(InputError, match="twice"):
        graph.induced(torch.tensor([0, 0]))
    with pytest.raises(InputError, match="some of 0 to 4"):
        graph.induced(torch.tensor([5]))


def test_a_graph_without_edges_and_a_complete_one() -> None:
    empty = NodeGraph(torch.randn(4, 3), torch.zeros(2, 0, dtype=torch.long))
    assert empty.num_edges == 0
    torch.testing.assert_close(empty.adjacency("sym").to_dense(), torch.eye(4))
    u, v = torch.triu_indices(4, 4, 1)
    full = NodeGraph.of(torch.randn(4, 3), torch.stack([u, v]))
    torch.testing.assert_close(full.adjacency("sym").to_dense(), torch.full((4, 4), 0.25))


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        (torch.tensor([[0, 9], [1, 1]]), "edge 1 joins 9 and 1, but nodes are numbered 0 to 2"),
        (torch.tensor([[-1], [1]]), "edge 0 joins -1 and 1"),
        (torch.tensor([[0.0], [1.0]]), "whole numbers"),
        (torch.tensor([0, 1]), r"edges are \(2, E\)"),
        (torch.tensor([[1], [1]]), "self loops"),
    ],
)
def test_wrong_edges_are_named(edges: torch.Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        NodeGraph(torch.zeros(3, 1), edges)
    assert "\n" not in str(caught.value)


def test_wrong_features_labels_and_weights_are_named() -> None:
    none = torch.zeros(2, 0, dtype=torch.long)
    features = torch.zeros(3, 2)
    features[1, 0] = torch.nan
    with pytest.raises(InputError, match="node 1 has NaN"):
        NodeGraph(features, none)
    with pytest.raises(InputError, match="floating-point"):
        NodeGraph(torch.zeros(3, 2, dtype=torch.long), none)
    with pytest.raises(InputError, match=r"\(N, F\)"):
        NodeGraph(torch.zeros(0, 2), none)
    with pytest.raises(InputError, match="as many labels"):
        NodeGraph(torch.zeros(3, 2), none, torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match="one weight above 0"):
        NodeGraph(torch.zeros(3, 2), torch.tensor([[0], [1]]), edge_weight=torch.tensor([0.0]))


def test_the_fingerprint_is_that_of_the_content() -> None:
    assert square().fingerprint() == square().fingerprint()
    other = NodeGraph.of(square().features + 1, square().edge_index, square().labels)
    assert other.fingerprint() != square().fingerprint()
    assert hash_tensors(torch.zeros(2), None) != hash_tensors(None, torch.zeros(2))


def test_equal_places_of_a_sparse_matrix_add_up() -> None:
    made = sparse(torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2]), torch.tensor([1.0, 2.0, 3.0]), (2, 3))
    assert made.to_dense().tolist() == [[2, 0, 0], [0, 0, 4]]
    assert places(torch.tensor([2, 0]), 4).tolist() == [1, -1, 0, -1]
