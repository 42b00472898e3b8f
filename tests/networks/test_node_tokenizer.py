from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.blocks.vector_quantizer import VectorQuantizer
from limbeck.core.errors import InputError
from limbeck.core.node_graphs import NodeGraph
from limbeck.networks.node_networks import gather
from limbeck.networks.node_tokenizer import NodeTokenizer

torch.set_num_threads(1)


def graph(n: int = 30) -> NodeGraph:
    generator = torch.Generator().manual_seed(0)
    return NodeGraph.of(torch.randn(n, 5, generator=generator), torch.randint(n, (2, 2 * n), generator=generator))


def make(**more: Any) -> NodeTokenizer:
    torch.manual_seed(1)
    return NodeTokenizer(5, 3, VectorQuantizer(4, 8), hidden=6, dropout=0.0, **more)


def test_the_second_layer_sees_decoded_codes() -> None:
    g, net = graph(), make().eval()
    a = g.adjacency("sym").to_dense()
    told = net.tokens(g.features, g)
    first, second = net.first.layers[0], net.second.layers[0]  # type: ignore[union-attr,index]
    h = F.relu(a @ g.features @ first.linear.weight.T + first.bias)
    q = net.quantizer.codebook[(F.normalize(h, dim=1) @ net.quantizer.codebook.T).argmax(1)]
    edge_side = q @ net.to_edges.weight.T + net.to_edges.bias
    hidden = F.relu(a @ edge_side @ second.linear.weight.T + second.bias)
    torch.testing.assert_close(told.hidden, h)
    torch.testing.assert_close(told.edge_side, edge_side)
    torch.testing.assert_close(told.node_side, q @ net.to_nodes.weight.T + net.to_nodes.bias)
    torch.testing.assert_close(told.logits, hidden @ net.head.weight.T + net.head.bias)
    assert torch.equal(net(g.features, g), told.logits)


def test_answers_depend_on_codes_alone() -> None:
    g, net = graph(), make().eval()
    before = net(g.features, g)
    net.quantizer.codebook[:] = F.normalize(torch.randn(1, 4), dim=1)  # all codes alike
    after = net(g.features, g)
    assert not torch.allclose(before, after)
    assert torch.equal(after, net(torch.randn_like(g.features), g))


def test_the_first_layer_learns_through_the_codes() -> None:
    g, net = graph(), make()
    F.cross_entropy(net(g.features, g), torch.arange(30) % 3).backward()
    learning = {n for n, p in net.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {
        "first.layers.0.linear.weight",
        "to_edges.weight",
        "second.layers.0.linear.weight",
        "head.weight",
    } <= learning
    assert not any(n.startswith("to_nodes") for n in learning)


@pytest.mark.parametrize("kind", ["gcn", "sage", "gat"])
def test_a_node_is_answered_from_its_neighbourhood(kind: str) -> None:
    g, net = graph(), make(kind=kind).eval()
    part, held, at = gather(net, g, torch.tensor([7]))
    torch.testing.assert_close(net(g.features[held], part)[at], net(g.features, g)[7:8])


def test_layers_of_ones_own() -> None:
    class Layer(nn.Module):
        def __init__(self, before: int, after: int) -> None:
            super().__init__()
            self.linear = nn.Linear(before, after)

        def forward(self, x: torch.Tensor, structure: NodeGraph) -> torch.Tensor:
            found: torch.Tensor = self.linear(x)
            return found

    net, g = make(first=Layer(5, 4), second=Layer(4, 6)), graph()
    assert net(g.features, g).shape == (30, 3) and not net.takes_sparse
    with pytest.raises(InputError, match="unknown"):
        net.seen(g)
    with pytest.raises(InputError, match="both layers"):
        make(first=Layer(5, 4))
