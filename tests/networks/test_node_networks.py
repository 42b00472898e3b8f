from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck import networks
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.hypergraphs import Hypergraph
from limbeck.core.node_graphs import NodeGraph
from limbeck.networks.feature_linear import FeatureLinear, thinned
from limbeck.networks.node_mlp import NodeMLP
from limbeck.networks.node_networks import GCN, NODE_NETWORKS, adjacency_of, gather, hypergraph_of, node_network
from limbeck.tasks.node_generators import hypergraph_sbm, sbm

torch.set_num_threads(1)
OVER_HYPERGRAPHS = ("hgnn", "hgnn+", "hnhn", "unigcn")


def graph() -> NodeGraph:
    torch.manual_seed(0)
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 4, 4]])
    return NodeGraph.of(torch.randn(6, 3), edges)  # node 5 is isolated


def hypergraph() -> Hypergraph:
    return Hypergraph.of([[0, 1, 2], [2, 3], [1, 3, 4], [0, 4]], 6)  # so is vertex 5


def built(kind: str) -> Any:
    torch.manual_seed(1)
    return node_network(kind, 3, 2, hidden=4).eval()


def incidence(held: Hypergraph) -> Tensor:
    h = torch.zeros(held.num_nodes, held.num_edges)
    h[held.members, held.edge_of] = 1
    return h


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def dense_layer(kind: str, layer: Any, x: Tensor, h: Tensor) -> Tensor:
    """One convolution over a hypergraph with the dense incidence."""
    d_v, d_e = h.sum(1), h.sum(0)
    to_edges, to_vertices = h.T / d_e[:, None], h / d_v[:, None]
    if kind == "hgnn":
        return d_v.rsqrt()[:, None] * h @ (to_edges @ (d_v.rsqrt()[:, None] * linear(layer, x)))
    if kind == "hgnn+":
        return to_vertices @ to_edges @ linear(layer, x)
    if kind == "hnhn":
        return to_vertices @ linear(layer.to_vertices, (to_edges @ linear(layer.to_edges, x)).relu())
    degree = to_edges @ d_v
    return d_v.rsqrt()[:, None] * (h @ (degree.rsqrt()[:, None] * (to_edges @ linear(layer, x))))


@pytest.mark.parametrize("kind", OVER_HYPERGRAPHS)
def test_networks_over_hypergraphs_are_their_formulas(kind: str) -> None:
    network, x = built(kind), graph().features
    h = incidence(hypergraph().with_singletons())
    hidden = dense_layer(kind, network.layers[0], x, h).relu()
    torch.testing.assert_close(network.embed(x, hypergraph()), hidden)
    torch.testing.assert_close(network(x, hypergraph()), dense_layer(kind, network.layers[1], hidden, h))


def test_networks_over_graphs_are_their_formulas() -> None:
    held = graph()
    x = held.features
    a = held.adjacency("none", self_loops=False).to_dense()
    looped = a + torch.eye(6)
    root = looped.sum(1).rsqrt()
    gcn = built("gcn")
    hidden = (root[:, None] * looped * root @ (x @ gcn.layers[0].linear.weight.T) + gcn.layers[0].bias).relu()
    torch.testing.assert_close(gcn.embed(x, held), hidden)
    sage = built("sage").layers[0]
    mean = a @ x / a.sum(1).clamp_min(1)[:, None]
    expected = linear(sage.own, x) + mean @ sage.arriving.weight.T
    torch.testing.assert_close(sage(x, held.adjacency("row", self_loops=False)), expected)
    gat = built("gat").layers[0]
    sent = (x @ gat.linear.weight.T).view(6, 4, -1)
    score = torch.nn.functional.leaky_relu(
        (sent * gat.source).sum(-1)[None] + (sent * gat.target).sum(-1)[:, None], 0.2
    )
    weight = score.masked_fill(looped[..., None] == 0, -torch.inf).softmax(1)
    expected = torch.einsum("vuh,uhd->vhd", weight, sent).mean(1) + gat.bias
    torch.testing.assert_close(gat(x, held.adjacency("none")), expected)


def test_edge_weights_weigh_in_sage() -> None:
    held = NodeGraph(torch.eye(3), torch.tensor([[1, 2], [0, 0]]), edge_weight=torch.tensor([1.0, 3.0]))
    layer = built("sage").layers[0]
    found = layer(held.features, adjacency_of(held, "row", self_loops=False)) - linear(layer.own, held.features)
    expected = 0.25 * layer.arriving.weight.T[1] + 0.75 * layer.arriving.weight.T[2]
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("kind", NODE_NETWORKS)
def test_every_network_sees_both_structures(kind: str) -> None:
    network = built(kind)
    for structure in (graph(), hypergraph()):
        said = network(graph().features, structure)
        assert said.shape == (6, 2) and bool(torch.isfinite(said).all())
        network.train()
        network(graph().features, structure).sum().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.parameters())


@pytest.mark.parametrize("kind", NODE_NETWORKS)
def test_what_is_gathered_for_a_request_is_enough(kind: str) -> None:
    asked = torch.tensor([13, 2, 77])
    network = node_network(kind, 5, 3, hidden=4, depth=2).eval()
    plain, _ = sbm(400, num_features=5)
    structure, x, _ = hypergraph_sbm(400, num_features=5)
    for held, features in ((plain, plain.features), (structure, x)):
        part, nodes, at = gather(network, held, asked)
        assert torch.equal(nodes[at], asked)
        torch.testing.assert_close(network(features[nodes], part)[at], network(features, held)[asked])
    near = gather(built("gcn"), plain, asked)[1]
    assert len(near) < 400


def test_how_far_other_networks_reach_is_unknown() -> None:
    with pytest.raises(InputError, match="how far Linear reaches is unknown"):
        gather(torch.nn.Linear(1, 1), graph(), torch.tensor([0]))
    with pytest.raises(InputError, match="not a matrix"):
        built("hgnn")(graph().features, graph().adjacency())
    with pytest.raises(UnknownNameError, match="did you mean hgnn"):
        node_network("hgn", 1, 2)


def test_structures_are_prepared_once() -> None:
    held, edges = graph(), hypergraph()
    assert adjacency_of(held, "sym", self_loops=True) is adjacency_of(held, "sym", self_loops=True)
    assert adjacency_of(held, "row", self_loops=True) is not adjacency_of(held, "sym", self_loops=True)
    assert hypergraph_of(edges) is hypergraph_of(edges) and int(hypergraph_of(edges).degrees.min()) == 1
    matrix = held.adjacency()
    torch.testing.assert_close(built("gcn")(held.features, matrix), built("gcn")(held.features, held))


@pytest.mark.parametrize("kind", NODE_NETWORKS)
def test_sparse_features_say_the_same(kind: str) -> None:
    x = torch.zeros(6, 30)
    x[torch.arange(6), torch.arange(6) * 4] = torch.randn(6)
    torch.manual_seed(2)
    network = node_network(kind, 30, 2, hidden=4).eval()
    rows = thinned(x)
    assert rows.layout == torch.sparse_csr
    torch.testing.assert_close(network(rows, graph()), network(x, graph()))
    network(rows, graph()).square().sum().backward()
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    network(x, graph()).square().sum().backward()
    torch.testing.assert_close(gradients, [p.grad for p in network.parameters()])


def test_only_sparse_rows_are_thinned() -> None:
    assert thinned(torch.ones(3, 3)).layout == torch.strided
    layer, x = FeatureLinear(20, 2, bias=False), torch.zeros(4, 20)
    x[0, 3] = 2
    torch.testing.assert_close(layer(thinned(x)), layer(x))
    assert thinned(thinned(x)).layout == torch.sparse_csr


def test_the_perceptron_by_name() -> None:
    network: Any = networks.build("nodemlp-64-32-p30", in_shape=(12,), num_classes=3)
    assert isinstance(network, NodeMLP)
    kinds = [type(part).__name__ for part in network.get_submodule("layers.1").children()]
    assert kinds == ["FeatureLinear", "ReLU", "BatchNorm1d", "Dropout"]
    linear, *_, dropout = network.get_submodule("layers.0").children()
    assert linear.out_features == 64 and dropout.p == 0.3
    assert network.embed(torch.randn(5, 12)).shape == (5, 32) and network(torch.randn(5, 12)).shape == (5, 3)
    plain: Any = networks.build("nodemlp-8-none", in_shape=(2, 3), num_classes=2)
    assert [type(part).__name__ for part in plain.layers[0]] == ["FeatureLinear", "ReLU", "Dropout"]
    assert plain(torch.randn(4, 2, 3)).shape == (4, 2) and plain.layers[0][2].p == 0
    again = networks.rebuild(networks.spec_of(network) or {})
    assert again.load_state_dict(network.state_dict()).missing_keys == []
    x = thinned(torch.eye(12)[:3].repeat(1, 1))
    network.eval()
    torch.testing.assert_close(network(x), network(torch.eye(12)[:3]))
    with pytest.raises(InputError, match="leaves nothing"):
        networks.build("nodemlp-8-p100", in_shape=(2,), num_classes=2)


def test_depth_one_has_no_hidden_layer() -> None:
    network = GCN(3, 2, depth=1)
    x = graph().features
    assert len(network.layers) == 1 and network.embed(x, graph()) is x
    assert network(graph().features, graph()).shape == (6, 2)
