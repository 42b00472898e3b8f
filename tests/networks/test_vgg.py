from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.core.errors import InputError
from limbeck.networks import build, rebuild, spec_of


def convolutions(net: nn.Module) -> list[nn.Conv2d]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d)]


def test_small_ones_double_their_width_and_halve_the_map():
    torch.manual_seed(0)
    net = build("vgg-w32-s4", in_shape=(3, 16, 16), num_classes=10)
    assert [c.out_channels for c in convolutions(net)] == [32, 64, 64, 128, 128, 256, 256]
    assert [c.stride[0] for c in convolutions(net)] == [1, 2, 1, 2, 1, 2, 1]
    assert not any(isinstance(m, nn.BatchNorm2d | nn.GroupNorm | nn.Dropout) for m in net.modules())
    x = torch.randn(4, 3, 16, 16)
    assert net(x).shape == (4, 10) and net.embed(x).shape == (4, 256) == (4, net.feature_dim)
    assert torch.equal(net.train()(x), net.eval()(x))
    sizes = [s.shape[2:] for s in (net.stages[: i + 1](x) for i in range(4))]
    assert sizes == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_initial_weights_keep_the_scale():
    torch.manual_seed(0)
    net = build("vgg-w32-s4", in_shape=(3, 16, 16), num_classes=10)
    for layer in convolutions(net)[1:]:
        fan = layer.in_channels * 9
        assert layer.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)
        assert float(layer.bias.detach().abs().max()) == 0


def test_the_published_depths():
    net = build("vgg11", in_shape=(3, 32, 32), num_classes=10)
    assert [c.out_channels for c in convolutions(net)] == [64, 128, 256, 256, 512, 512, 512, 512]
    assert sum(isinstance(m, nn.MaxPool2d) for m in net.modules()) == 5
    assert sum(p.numel() for p in net.parameters()) == 9_225_610
    assert len(convolutions(build("vgg16", in_shape=(3, 32, 32), num_classes=10))) == 13
    assert build("vgg-b1-s2-w8", in_shape=(1, 8, 8), num_classes=3).feature_dim == 16
    assert type(rebuild(spec_of(net))) is type(net)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("vgg12", "depth 11, 13, 16, 19, got 12"),
        ("vgg11-13", "got 11, 13"),
        ("vgg11-w8", "leave out -w"),
        ("vgg11", "halves a 8x8 image 5 times, which has room for 3"),
        ("vgg-s6", "halves a 8x8 image 5 times"),
    ],
)
def test_sizes_that_do_not_fit(name, line):
    with pytest.raises(InputError, match=line):
        build(name, in_shape=(1, 8, 8), num_classes=10)
