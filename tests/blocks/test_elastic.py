"""Elastic layers: slices against layers built by hand, plain copies, sizes and work, layers that cannot be cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.blocks.attention import SelfAttention
from limbeck.blocks.elastic import active_parts, active_work, cut, make_elastic, why_not
from limbeck.blocks.squeeze_excite import SqueezeExcite
from limbeck.core.errors import InputError
from limbeck.metrics.cost import count_flops


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_full_size_is_the_plain_layer() -> None:
    for layer, x in [
        (nn.Linear(6, 4), torch.randn(3, 6)),
        (nn.Conv2d(4, 6, 5, 2, 2), torch.randn(2, 4, 9, 9)),
        (nn.Conv2d(4, 4, 3, 1, 1, groups=4), torch.randn(2, 4, 5, 5)),
        (nn.BatchNorm2d(4), torch.randn(2, 4, 5, 5)),
        (nn.BatchNorm1d(4), torch.randn(5, 4)),
        (nn.LayerNorm(4), torch.randn(5, 4)),
        (SqueezeExcite(8), torch.randn(2, 8, 3, 3)),
        (SelfAttention(8, 2, 3), torch.randn(2, 5, 8)),
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.randn(3, 6)),
    ]:
        names, expected = list(layer.state_dict()), layer(x)
        make_elastic(layer, ("",) if isinstance(layer, nn.Sequential) else ())
        assert list(layer.state_dict()) == names
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_linear_takes_the_first_channels() -> None:
    layer = make_elastic(nn.Linear(6, 8))
    x = torch.randn(3, 4)
    layer.width = 5
    torch.testing.assert_close(layer(x), x @ layer.weight[:5, :4].T + layer.bias[:5])


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolution_takes_the_centre_of_its_kernel(kernel: int) -> None:
    layer = make_elastic(nn.Conv2d(4, 6, 7, padding=3))
    layer.width, layer.kernel = 3, kernel
    x = torch.randn(2, 2, 9, 9)
    edge = (7 - kernel) // 2
    weight = layer.weight[:3, :2, edge : 7 - edge, edge : 7 - edge]
    assert weight.shape[-1] == kernel
    torch.testing.assert_close(layer(x), F.conv2d(x, weight, layer.bias[:3], padding=kernel // 2))


def test_depthwise_convolution_follows_its_input() -> None:
    layer = make_elastic(nn.Conv2d(6, 6, 5, stride=2, padding=2, groups=6, bias=False))
    layer.kernel = 3
    x = torch.randn(2, 4, 8, 8)
    expected = F.conv2d(x, layer.weight[:4, :, 1:4, 1:4], None, 2, 1, groups=4)
    torch.testing.assert_close(layer(x), expected)


def test_batch_norm_keeps_statistics_of_the_first_channels_only() -> None:
    plain, elastic = nn.BatchNorm1d(4), make_elastic(nn.BatchNorm1d(6))
    x = torch.randn(32, 4) * 3 + 1
    torch.testing.assert_close(elastic(x), plain(x))
    torch.testing.assert_close(elastic.running_mean[:4], plain.running_mean)
    assert torch.equal(elastic.running_mean[4:], torch.zeros(2)) and torch.equal(elastic.running_var[4:], torch.ones(2))


def test_layer_norm_normalises_what_there_is() -> None:
    layer = make_elastic(nn.LayerNorm(6))
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), F.layer_norm(x, (4,)))


def test_squeeze_excite_follows_its_channels() -> None:
    layer = make_elastic(SqueezeExcite(32))
    x = torch.randn(2, 16, 3, 3)
    fresh = SqueezeExcite(16)
    with torch.no_grad():
        fresh.reduce.weight.copy_(layer.reduce.weight[:4, :16])
        fresh.reduce.bias.copy_(layer.reduce.bias[:4])
        fresh.expand.weight.copy_(layer.expand.weight[:16, :4])
        fresh.expand.bias.copy_(layer.expand.bias[:16])
    torch.testing.assert_close(layer(x), fresh(x))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(3)]),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )


def test_cut_gives_plain_modules_with_the_same_outputs_sizes_and_flops() -> None:
    net = make_elastic(network(), ("3",))
    net[0].width, net[0].kernel, net[3].depth = 8, 3, 2
    net[3][0][0].width = 8
    x = torch.randn(5, 1, 4, 4)
    net.train()
    net(x)
    net.eval()
    expected = net(x)
    plain = cut(net)
    assert {type(m).__module__.split(".")[0] for m in plain.modules()} == {"torch"}
    assert torch.equal(plain(x), expected)
    assert len(plain[3]) == 2 and plain[0].kernel_size == (3, 3) and len(net[3]) == 3
    parameters = dict(net.named_parameters())
    used = sum(parameters[name][index].numel() for name, index in active_parts(net).items())
    assert used == sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in net.parameters())
    assert active_work(net) == count_flops(plain, x)
    plain[0].weight.data.zero_()
    assert torch.equal(net(x), expected)  # it shares nothing


def test_gradients_reach_what_is_active_and_nothing_else() -> None:
    net = make_elastic(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))
    net[0].width = 2
    net(torch.randn(7, 4)).square().sum().backward()
    assert net[0].weight.grad[:2].abs().min() > 0 and not net[0].weight.grad[2:].any()
    assert net[1].weight.grad[:, :2].abs().min() > 0 and not net[1].weight.grad[:, 2:].any()


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), "4 channels are in 2 groups"),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), "'reflect'"),
        (nn.LayerNorm((3, 4)), "2 axes"),
        (nn.LSTM(4, 4), "no elastic form of it; there is of Linear, Conv2d"),
        (nn.GroupNorm(2, 4), "no elastic form"),
    ],
)
def test_what_cannot_be_cut_is_said_why(layer: nn.Module, says: str) -> None:
    reason = why_not(layer)
    assert reason is not None and says in reason and "\n" not in reason


def test_depth_needs_a_sequential_and_cutting_a_forward_pass() -> None:
    with pytest.raises(InputError, match=r"stage '0' \(ModuleList\) cannot be cut"):
        make_elastic(nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)])]), ("0",))
    with pytest.raises(InputError, match="layer '0' cannot be cut: the network's forward pass does not use it"):
        cut(make_elastic(nn.Sequential(nn.Linear(2, 2))))
