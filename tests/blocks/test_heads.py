"""Gaussian copies, and where classifiers end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limbeck.blocks.gaussian_init import gaussian_, gaussian_copy
from limbeck.blocks.heads import HeadPaths, answer
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.method import fingerprint
from limbeck.networks import build

DIGITS = {"in_shape": (1, 8, 8), "num_classes": 10}


def test_copies_are_gaussian_and_the_network_stays():
    torch.manual_seed(0)
    network = build("stageresnet-1-1-1", **DIGITS)
    network(torch.randn(8, 1, 8, 8))
    before = fingerprint(network)
    drawn = gaussian_copy(network, 5)
    assert fingerprint(network) == before
    assert fingerprint(drawn) == fingerprint(gaussian_copy(network, 5)) != fingerprint(gaussian_copy(network, 6))
    weights = torch.cat([m.weight.detach().flatten() for m in drawn.modules() if isinstance(m, nn.Conv2d | nn.Linear)])
    assert abs(float(weights.mean())) < 0.01 and abs(float(weights.std()) - 1) < 0.01
    for module in drawn.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and bool((module.bias == 0).all())
            assert bool((module.running_mean == 0).all()) and int(module.num_batches_tracked) == 0
    assert bool((drawn.head.bias == 0).all())


def test_attention_and_own_parameters_are_drawn_too():
    network = nn.TransformerEncoderLayer(8, 2, 16)
    network.scale = nn.Parameter(torch.full((8,), 0.3))
    state = torch.get_rng_state()
    gaussian_(network, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(float(network.self_attn.in_proj_weight.detach().std()) - 1) < 0.2
    assert bool((network.self_attn.in_proj_bias == 0).all()) and bool((network.norm1.weight == 1).all())
    assert bool((network.scale == 0.3).all())


class Functional(nn.Module):
    """Pools in its forward, and its classifier does not come last in the order of definition."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 10)
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU())
        self.gate = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = self.body(x).mean((2, 3))
        return {"logits": self.fc(pooled * self.gate(pooled).sigmoid())}


def test_the_last_map_and_the_classifier_are_found():
    x = torch.randn(4, 1, 8, 8)
    network = Functional()
    found = answer(network, x)
    assert found.classifier is network.fc
    assert torch.equal(found.features, network.body(x))
    pooled = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    found = answer(pooled, x)
    assert found.features.shape == (4, 6, 6, 6) and found.classifier is pooled[4]
    assert not any(m._forward_hooks for m in pooled.modules())
    for name, shape in (("resnet8", (4, 64, 2, 2)), ("cell-444444-w8", (4, 32, 2, 2)), ("mlp-16-12", (4, 12))):
        assert answer(build(name, **DIGITS), x).features.shape == shape
    assert answer(build("mixer-d24-l2-p4", **DIGITS), x).features.shape == (4, 4, 24)


def test_layers_may_be_named():
    network, x = build("resnet8", **DIGITS), torch.randn(4, 1, 8, 8)
    assert answer(network, x, HeadPaths("layer2")).features.shape == (4, 32, 4, 4)
    with pytest.raises(UnknownNameError, match="layer 'layer9'"):
        answer(network, x, HeadPaths("layer9"))
    with pytest.raises(InputError, match="did not call a linear layer 'layer2'"):
        answer(network, x, HeadPaths(classifier="layer2"))
    with pytest.raises(InputError, match="gave no tensor before"):
        answer(network, x, HeadPaths("head"))
    with pytest.raises(InputError, match="no linear layer"):
        answer(nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()), x)
    copy.deepcopy(network)  # nothing of the hooks stays behind
