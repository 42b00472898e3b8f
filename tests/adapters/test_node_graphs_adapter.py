from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from limbeck.adapters.node_graphs import (
    as_hypergraph,
    from_pyg_hypergraph,
    from_pyg_node,
    to_pyg_hypergraph,
    to_pyg_node,
)
from limbeck.core.errors import InputError, MissingDependencyError
from limbeck.core.hypergraphs import Hypergraph
from limbeck.core.node_graphs import NodeGraph
from limbeck.tasks.node_classification import NodeTask

torch.set_num_threads(1)
EDGES = [[0, 1, 2], [2, 3]]


def data(**attributes: Any) -> Any:
    held = {"x": torch.randn(4, 2), "edge_index": torch.tensor([[0, 1, 1, 2, 3], [1, 0, 2, 1, 3]]), **attributes}
    return SimpleNamespace(**held)


def sets(graph: Hypergraph) -> list[set[int]]:
    return [set(graph.members[a:b].tolist()) for a, b in zip(graph.pointer[:-1], graph.pointer[1:], strict=True)]


def test_a_graph_goes_there_and_back() -> None:
    pytest.importorskip("torch_geometric")
    graph = from_pyg_node(data(y=torch.tensor([[0], [1], [0], [1]])))
    assert graph.num_edges == 4 and graph.labels is not None and graph.labels.tolist() == [0, 1, 0, 1]
    made = to_pyg_node(graph)
    assert type(made).__name__ == "Data" and made.num_nodes == 4 and made.validate()
    again = from_pyg_node(made)
    assert again.fingerprint() == graph.fingerprint()
    weighted = NodeGraph(graph.features, graph.edge_index, edge_weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert from_pyg_node(to_pyg_node(weighted)).fingerprint() == weighted.fingerprint()


def test_our_gcn_reads_edges_as_torch_geometric_does() -> None:
    conv = pytest.importorskip("torch_geometric.nn").GCNConv(2, 3)
    graph = from_pyg_node(data())
    ours = graph.adjacency("sym") @ (graph.features @ conv.lin.weight.T) + conv.bias
    torch.testing.assert_close(ours, conv(graph.features, graph.edge_index))


def test_our_smoothing_relates_to_torch_geometrics_hypergraph_convolution() -> None:
    conv = pytest.importorskip("torch_geometric.nn").HypergraphConv(2, 3)
    graph, x = Hypergraph.of(EDGES, 4), torch.randn(4, 2)
    made = to_pyg_hypergraph(graph, x)
    # HypergraphConv divides by the vertices' degrees, HGNN by their root on both sides.
    root = graph.degrees.float().sqrt()[:, None]
    ours = graph.smooth(root * (x @ conv.lin.weight.T)) / root + conv.bias
    torch.testing.assert_close(ours, conv(x, made.hyperedge_index))


def test_weights_follow_their_edges() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0])
    graph = from_pyg_node(data(edge_attr=weights[:, None]))
    assert graph.edge_weight is not None
    held = dict(zip(map(tuple, graph.edge_index.T.tolist()), graph.edge_weight.tolist(), strict=True))
    assert held == {(0, 1): 1, (1, 0): 2, (1, 2): 3, (2, 1): 4}
    twice = torch.tensor([[0, 0, 1], [1, 1, 2]])
    both = from_pyg_node(data(edge_index=twice, edge_weight=torch.tensor([5.0, 6.0, 7.0])), undirected=True)
    assert both.edge_weight is not None
    held = dict(zip(map(tuple, both.edge_index.T.tolist()), both.edge_weight.tolist(), strict=True))
    assert held == {(0, 1): 5, (1, 0): 5, (1, 2): 7, (2, 1): 7}
    with pytest.raises(InputError, match="5 edges need as many weights"):
        from_pyg_node(data(edge_weight=torch.ones(2)))


@pytest.mark.parametrize(
    "form",
    [
        EDGES,
        torch.tensor([[2, 0, 1, 3, 2], [0, 0, 0, 1, 1]]),
        np.array([[0, 1, 2, 2, 3], [0, 0, 0, 1, 1]]),
        scipy.sparse.csr_matrix(np.array([[1.0, 0], [1, 0], [1, 1], [0, 2]])),
        torch.tensor([[1.0, 0], [1, 0], [1, 1], [0, 1]]),
        torch.tensor([[1.0, 0], [1, 0], [1, 1], [0, 1]]).to_sparse_csr(),
        SimpleNamespace(hyperedge_index=torch.tensor([[0, 1, 2, 2, 3], [0, 0, 0, 1, 1]]), num_nodes=4),
        {"hyperedge_index": torch.tensor([[0, 1, 2, 2, 3], [0, 0, 0, 1, 1]])},
        SimpleNamespace(num_v=4, e=([(0, 1, 2), (2, 3)], [1.0, 1.0])),
        Hypergraph.of(EDGES, 4),
    ],
)
def test_a_hypergraph_in_any_form(form: Any) -> None:
    found = as_hypergraph(form)
    assert found.num_nodes == 4 and sets(found) == [{0, 1, 2}, {2, 3}]


def test_hypergraphs_go_there_and_back() -> None:
    pytest.importorskip("torch_geometric")
    graph = Hypergraph(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 2]), 5, torch.tensor([0.5, 2.0]))
    x, y = torch.randn(5, 2), torch.arange(5) % 2
    found, features, labels = from_pyg_hypergraph(to_pyg_hypergraph(graph, x, y))
    assert found.fingerprint() == graph.fingerprint() and torch.equal(features, x)
    assert labels is not None and torch.equal(labels, y)


def test_a_task_comes_from_masks() -> None:
    masks = {
        f"{part}_mask": torch.tensor([i == k for i in range(4)]) for k, part in enumerate(("train", "val", "test"))
    }
    task = NodeTask.from_pyg(data(y=torch.tensor([0, 1, 1, 0]), **masks))
    assert (task.train.tolist(), task.val.tolist(), task.test.tolist()) == ([0], [1], [2])
    index = torch.tensor([[0, 1, 2], [0, 0, 1]])
    other = NodeTask.from_pyg(data(y=torch.tensor([0, 1, 1, 0]), hyperedge_index=index, **masks))
    assert isinstance(other.structure, Hypergraph)
    with pytest.raises(InputError, match="no train_mask or val_mask"):
        NodeTask.from_pyg(data())
    with pytest.raises(InputError, match="no labels: set y"):
        NodeTask.from_pyg(data(**masks))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: from_pyg_node(SimpleNamespace(x=torch.zeros(2, 1))), "needs x"),
        (lambda: from_pyg_node(data(y=torch.zeros(4))), "4 class numbers"),
        (lambda: from_pyg_node(data(edge_index=torch.tensor([[0], [7]]))), "edge 0 joins 0 and 7"),
        (lambda: from_pyg_hypergraph(data()), "needs x and hyperedge_index"),
        (lambda: as_hypergraph([]), "no hyperedge"),
        (lambda: as_hypergraph([[0], []], 2), "hyperedge 1 is empty"),
        (lambda: as_hypergraph([[0, 5]], 2), "names vertex 5"),
        (lambda: as_hypergraph(torch.tensor([[0, 1], [0, 2]])), "hyperedge 1 is empty"),
        (lambda: as_hypergraph(torch.zeros(3, 2)), "no hyperedge"),
        (lambda: as_hypergraph("graph"), "lists of vertices, not str"),
        (lambda: as_hypergraph(3), "lists of vertices, not int"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_reading_needs_no_graph_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    graph = from_pyg_node(data())
    with pytest.raises(MissingDependencyError, match=r"limbeck\[graphs\]"):
        to_pyg_node(graph)
