from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.blocks.dino_head import DINOHead
from limbeck.core.errors import InputError


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_it_is_the_equation():
    head = DINOHead(5, 7, hidden=6, bottleneck=4, activation="relu").double()
    with torch.no_grad():
        for layer in (head.mlp[0], head.mlp[2], head.mlp[4]):
            layer.bias.normal_()
        head.prototypes.mul_(torch.rand(7, 1).double() + 0.5)  # lengths must not matter
    x = torch.randn(3, 5, dtype=torch.float64)
    h = x.numpy()
    for position in (0, 2, 4):
        layer = head.mlp[position]
        h = h @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        h = np.maximum(h, 0) if position < 4 else h
    v = head.prototypes.detach().numpy()
    expected = (h / np.linalg.norm(h, axis=1, keepdims=True)) @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T
    np.testing.assert_allclose(head(x).detach().numpy(), expected, rtol=1e-12)


def test_logits_are_cosines_and_have_no_scale():
    head = DINOHead(5, 50, hidden=8, bottleneck=4)
    z = head(10 * torch.randn(100, 5))
    assert z.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        before = head(torch.ones(1, 5))
        head.prototypes.mul_(3)
        torch.testing.assert_close(head(torch.ones(1, 5)), before)
    assert head.bottleneck(torch.randn(6, 5)).norm(dim=1).tolist() == pytest.approx([1] * 6)


def test_initial_weights():
    head = DINOHead(2048, 16, bottleneck=256)
    first, last = head.mlp[0].weight, head.mlp[4].weight
    # cut off at two deviations, a normal distribution keeps 0.88 of its deviation
    assert first.std().item() == pytest.approx(0.02 * 0.88, rel=0.02) and last.abs().max() <= 0.04
    assert all(float(m.bias.detach().abs().max()) == 0 for m in head.mlp if isinstance(m, nn.Linear))
    narrow = DINOHead(128, 16, hidden=128, bottleneck=32)
    assert narrow.mlp[2].weight.std().item() == pytest.approx(0.08 * 0.88, rel=0.05)
    fixed = DINOHead(128, 16, hidden=128, bottleneck=32, init_std=0.02)
    assert fixed.mlp[2].weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.05)
    assert head.prototypes.norm(dim=1).tolist() == pytest.approx([1] * 16)


def test_simpler_heads():
    linear = DINOHead(5, 7, bottleneck=4, layers=1, normalise=False)
    assert [type(m) for m in linear.mlp] == [nn.Linear]
    x = torch.randn(3, 5)
    torch.testing.assert_close(linear(x), linear.mlp[0](x) @ linear.prototypes.T)


@pytest.mark.parametrize("name", ["in_features", "out_features", "hidden", "bottleneck", "layers", "init_std"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(InputError, match=name):
        DINOHead(**{"in_features": 4, "out_features": 4, "hidden": 4, "bottleneck": 4, name: 0})
