"""Sorting channels: importance by hand, an unchanged function, optimiser buffers that move along."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from limbeck.blocks.channel_sorting import channel_importance, sort_channels
from limbeck.blocks.squeeze_excite import SqueezeExcite
from limbeck.core.errors import InputError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_importance_is_the_l1_norm_of_what_reads_a_channel() -> None:
    linear = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -2, 0, 3], [1, 2, -5, 0]]))
    assert channel_importance(linear).tolist() == [2, 4, 5, 3]
    assert channel_importance(linear, group=2).tolist() == [6, 8]
    conv = nn.Conv2d(3, 5, 3)
    expected = [conv.weight[:, c].abs().sum().item() for c in range(3)]
    assert channel_importance(conv).tolist() == pytest.approx(expected)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.depthwise, self.gate = nn.Conv2d(8, 8, 3, padding=1, groups=8), SqueezeExcite(8)
        self.project = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.gate(relu(self.depthwise(self.norm(self.expand(x))))))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_function_stays_and_training_goes_on_as_if_nothing_had_happened(kind: str) -> None:
    x, y = torch.randn(6, 3, 5, 5), torch.randn(6, 2, 5, 5)
    nets = [Bottleneck(), Bottleneck()]
    nets[1].load_state_dict(nets[0].state_dict())

    def optimizer(net: nn.Module) -> torch.optim.Optimizer:
        if kind == "adam":
            return torch.optim.Adam(net.parameters(), lr=1e-2)
        return torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)

    made = [optimizer(net) for net in nets]

    def train(steps: int) -> None:
        for net, opt in zip(nets, made, strict=True):
            for _ in range(steps):
                opt.zero_grad()
                (net(x) - y).square().mean().backward()
                opt.step()

    train(3)
    net = nets[0]
    net.eval()
    before = net(x)
    order = sort_channels([net.expand], net.project, [net.norm, net.depthwise, net.gate], optimizers=made[:1])
    torch.testing.assert_close(net(x), before)
    net.train()
    found = channel_importance(net.project)
    assert torch.equal(found, found.sort(descending=True).values)
    assert sorted(order.tolist()) == list(range(8)) and order.tolist() != list(range(8))
    train(4)  # with momenta in the wrong places the two would drift apart
    torch.testing.assert_close(net.expand.weight, nets[1].expand.weight[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.depthwise.weight, nets[1].depthwise.weight[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.norm.running_var, nets[1].norm.running_var[order], rtol=1e-4, atol=1e-5)


def test_groups_move_as_a_whole() -> None:
    first, second = nn.Linear(3, 6), nn.Linear(6, 2)
    order = sort_channels([first], second, group=3)
    assert order.tolist() in ([0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2])


def test_layers_that_do_not_share_channels_are_named() -> None:
    with pytest.raises(InputError, match="BatchNorm1d with 5 channels lies between layers that share 6"):
        sort_channels([nn.Linear(3, 6)], nn.Linear(6, 2), [nn.BatchNorm1d(5)])
