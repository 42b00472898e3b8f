from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.errors import InputError
from limbeck.core.node_graphs import NodeGraph
from limbeck.networks import link_networks
from limbeck.networks.feature_linear import thinned
from limbeck.networks.link_networks import HadamardPredictor, LinkPredictor, link_predictor, pair_logits

torch.set_num_threads(1)


@pytest.mark.parametrize("layers", [1, 3])
def test_scores_with_all_nodes_are_those_of_the_pairs(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_networks, "_ENTRIES", 100)  # a few rows at a time
    predictor, h = HadamardPredictor(6, 8, layers), torch.randn(10, 6)
    found = predictor.with_all(h[:7], h)
    for u in range(7):
        torch.testing.assert_close(found[u], predictor(h[u].expand(10, 6), h))
    torch.testing.assert_close(found, pair_logits(predictor, h[:7], h))
    torch.testing.assert_close(found[:7, :7], found[:7, :7].T)


def test_nodes_without_features_have_an_embedding_that_learns() -> None:
    adjacency = NodeGraph.of(torch.ones(5, 1), torch.tensor([[0, 1], [1, 2]])).adjacency()
    model = link_predictor("gcn", 4, hidden=6, embedded=5)
    model(None, adjacency, torch.tensor([[0, 1]])).sum().backward()
    assert model.embedding is not None and model.embedding.grad is not None
    assert any(p is model.embedding for p in model.encoder_parameters())
    reached = model.embedding.grad.abs().sum(1) > 0
    assert reached.tolist() == [True, True, True, False, False]


def test_wrong_encoders_are_named() -> None:
    adjacency = NodeGraph.of(torch.ones(5, 1), torch.tensor([[0, 1], [1, 2]])).adjacency()
    with pytest.raises(InputError, match="no features: give them, or an embedding"):
        link_predictor("sage", 4).states(None, adjacency)

    class Sums(nn.Module):
        def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
            return x.sum(0)

    with pytest.raises(InputError, match=r"an encoder gives states \(5, d\), not \(4,\)"):
        LinkPredictor(Sums(), HadamardPredictor(4)).states(torch.ones(5, 4), adjacency)
    with pytest.raises(InputError, match="1 layer or more"):
        HadamardPredictor(4, layers=0)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_sparse_features_give_the_same_states_and_gradients(kind: str) -> None:
    x = torch.rand(400, 300) * (torch.rand(400, 300) < 0.03)
    held = thinned(x)
    assert held.layout == torch.sparse_csr
    adjacency = NodeGraph.of(torch.ones(400, 1), torch.randint(400, (2, 900))).adjacency()
    model = link_predictor(kind, 300, hidden=8)
    found = []
    for features in (x, held):
        model.zero_grad()
        h = model.states(features, adjacency)
        h.square().sum().backward()
        found.append((h.detach(), [p.grad.clone() for p in model.encoder.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
