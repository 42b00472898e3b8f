"""Graph networks: each layer against a dense computation, readouts, and the fact that trees say what nodes say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.blocks.computation_trees import computation_trees
from limbeck.core.batch import call_model
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.graphs import Graph, GraphBatch, GraphData
from limbeck.networks import build, rebuild, spec_of
from limbeck.networks.graphs import GATConvolution, GCNConvolution, GINConvolution, GraphNetwork, SAGEConvolution

KINDS = ("gcn", "gin", "gat", "sage")


def graphs(seed: int = 0, count: int = 3, edge_labels: bool = False) -> GraphData:
    generator = np.random.default_rng(seed)
    made = []
    for y in range(count):
        n = 6 + y
        pairs = np.array([(i, int(generator.integers(i))) for i in range(1, n)] + [(0, n - 1), (1, n - 2)])
        pairs = np.unique(np.sort(pairs, 1), axis=0)
        kinds = generator.integers(0, 3, len(pairs))
        edges = np.concatenate([pairs, pairs[:, ::-1]]).T
        labels = np.stack([generator.integers(0, 4, n), generator.integers(0, 2, n)], 1)
        made.append(Graph(labels, edges.copy(), y % 2, np.concatenate([kinds, kinds]) if edge_labels else None))
    return GraphData.of(made, label_counts=(4, 2), **({"edge_label_count": 3} if edge_labels else {}))


def network(kind: str, **options: object) -> GraphNetwork:
    torch.manual_seed(0)
    return GraphNetwork((4, 2), 2, kind=kind, width=8, **options).double()


def dense(batch: GraphBatch) -> Tensor:
    """A[v, u] = 1 if u sends to v."""
    adjacency = torch.zeros(len(batch.node_labels), len(batch.node_labels), dtype=torch.float64)
    adjacency[batch.edge_index[1], batch.edge_index[0]] = 1
    return adjacency


def test_layers_equal_dense_algebra():
    batch = graphs().whole()
    a, h = dense(batch), torch.randn(len(batch.node_labels), 8, dtype=torch.float64)
    torch.manual_seed(1)
    gcn, gin, sage = (c(8, 0).double() for c in (GCNConvolution, GINConvolution, SAGEConvolution))
    loops = a + torch.eye(len(a), dtype=torch.float64)
    scale = torch.diag(loops.sum(1) ** -0.5)
    torch.testing.assert_close(gcn(h, batch), gcn.linear(scale @ loops @ scale @ h))
    with torch.no_grad():
        gin.eps.fill_(0.3)
    torch.testing.assert_close(gin(h, batch), gin.mlp(1.3 * h + a @ h))
    torch.testing.assert_close(sage(h, batch), sage.own(h) + sage.arriving(a @ h / a.sum(1, keepdim=True)))
    gat = GATConvolution(8, 0, heads=2).double()
    sent = gat.linear(h).view(-1, 2, 4)
    scores = torch.nn.functional.leaky_relu(
        (sent * gat.source).sum(-1)[None] + (sent * gat.target).sum(-1)[:, None], 0.2
    )
    weights = torch.softmax(scores.masked_fill(loops[..., None] == 0, -torch.inf), 1)
    expected = torch.einsum("vuh,uhd->vhd", weights, sent).flatten(1) + gat.bias
    torch.testing.assert_close(gat(h, batch), expected)


def test_edge_labels_change_what_is_carried():
    batch = graphs(edge_labels=True).whole()
    h = torch.randn(len(batch.node_labels), 8, dtype=torch.float64)
    source, target = batch.edge_index
    gin, sage = GINConvolution(8, 3).double(), SAGEConvolution(8, 3).double()
    sums = {True: torch.zeros_like(h), False: torch.zeros_like(h)}
    for layer, relu in ((gin, True), (sage, False)):
        for e in range(len(source)):
            carried = h[source[e]] + layer.edges.weight[batch.edge_labels[e]]
            sums[relu][target[e]] += carried.clamp(min=0) if relu else carried
    torch.testing.assert_close(gin(h, batch), gin.mlp(h + sums[True]))
    counts = torch.bincount(target)[:, None]
    torch.testing.assert_close(sage(h, batch), sage.own(h) + sage.arriving(sums[False] / counts))
    with pytest.raises(InputError, match="no edge labels"):
        gin(h, batch._replace(edge_labels=None))


@pytest.mark.parametrize("edge_labels", [False, True])
@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_root_of_a_computation_tree_says_what_the_node_says(kind, hops, edge_labels):
    data = graphs(seed=hops, edge_labels=edge_labels)
    batch = data.whole()
    degrees = torch.bincount(batch.edge_index[1])
    # With the degrees as a label, leaves of the trees keep theirs: GCN needs it.
    labels = torch.cat([batch.node_labels, degrees[:, None]], 1).numpy()
    kinds = None if batch.edge_labels is None else batch.edge_labels.numpy()
    trees = computation_trees(labels, batch.edge_index.numpy(), hops, kinds)
    forest = trees.forest(trees.of_node)
    grown = torch.from_numpy(forest.labels)
    tree = GraphBatch(
        torch.tensor([len(grown)]),
        grown[:, :2],
        torch.from_numpy(forest.edges),
        torch.from_numpy(forest.edge_labels) if edge_labels else None,
        degrees=grown[:, 2],
    )
    net = network(kind, depth=hops, edge_values=3 if edge_labels else 0)
    expected = net.embed_nodes(batch)
    found = net.embed_nodes(tree)[torch.from_numpy(forest.is_root)]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    bare = net.embed_nodes(tree._replace(degrees=None))[torch.from_numpy(forest.is_root)]
    assert torch.allclose(bare, expected) == (kind != "gcn")


@pytest.mark.parametrize("kind", KINDS)
def test_readouts_and_what_they_go_over(kind):
    data = graphs()
    batch = data.whole()
    mean, total = network(kind), network(kind, readout="sum")
    states = mean.embed_nodes(batch)
    for g in range(len(data)):
        here = states[batch.graph == g]
        torch.testing.assert_close(mean.embed(batch)[g], here.mean(0))
        torch.testing.assert_close(total.embed(batch)[g], here.sum(0))
    mask = torch.arange(len(states)) % 3 == 0
    weights = torch.rand(len(states))
    marked = batch._replace(root_mask=mask, node_weights=weights)
    w = (weights * mask).double()[:, None]
    for g in range(len(data)):
        at = batch.graph == g
        torch.testing.assert_close(total.embed(marked)[g], (states * w)[at].sum(0))
        torch.testing.assert_close(mean.embed(marked)[g], (states * w)[at].sum(0) / w[at].sum())
    assert mean.embed(batch._replace(root_mask=torch.zeros_like(mask))).abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_says_the_same_alone_and_in_a_batch_and_under_any_order_of_its_nodes(kind):
    data = graphs()
    net = network(kind)
    together = net(data.whole())
    for g in range(len(data)):
        torch.testing.assert_close(net(data.fetch(torch.tensor([g]), None).inputs), together[g : g + 1])
    graph = data.graph(1)
    order = torch.randperm(len(graph.node_labels), generator=torch.Generator().manual_seed(0))
    labels = torch.empty_like(graph.node_labels)
    labels[order] = graph.node_labels
    moved = GraphData.of([Graph(labels, order[graph.edge_index], 0)], label_counts=(4, 2))
    torch.testing.assert_close(net(moved.whole()), together[1:2])


def test_names_reach_the_network_and_come_back():
    net = build("gat-w12-l3-e5-h3-sum", in_shape=(4, 2), num_classes=3)
    assert (net.kind, net.feature_dim, len(net.layers), net.readout) == ("gat", 12, 3, "sum")
    assert net.layers[0].edges.num_embeddings == 5 and net.layers[0].heads == 3
    again = rebuild(spec_of(net))
    again.load_state_dict(net.state_dict())
    batch = graphs(edge_labels=True).whole()
    torch.testing.assert_close(again(batch), net(batch))
    torch.testing.assert_close(call_model(net, batch), net(batch))
    assert net(batch).shape == (3, 3) and build("gin", in_shape=(2,), num_classes=2).readout == "mean"
    with pytest.raises(InputError, match="5 attention heads do not divide"):
        build("gat-w12-h5", in_shape=(4,), num_classes=2)
    with pytest.raises(UnknownNameError, match="The form is sage"):
        build("sage-h2", in_shape=(4,), num_classes=2)


def test_what_a_network_cannot_read_is_refused():
    net = build("gin-w8-l2", in_shape=(4,), num_classes=2)
    with pytest.raises(InputError, match="built for 1 columns of node labels, these graphs have 2"):
        net(graphs().whole())
    continuous = GraphData.of([Graph(None, [], 0, features=torch.rand(3, 2))]).whole()
    with pytest.raises(InputError, match="quantise"):
        net(continuous)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind):
    data = graphs(edge_labels=True)
    net = network(kind, edge_values=3)
    net(data.whole()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
