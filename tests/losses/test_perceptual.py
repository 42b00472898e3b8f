from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.blocks.taps import Taps
from limbeck.core.errors import InputError
from limbeck.losses.perceptual import FeatureDistance, feature_distance

torch.set_num_threads(1)


def test_by_hand() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    b = torch.tensor([[6.0, 8.0], [0.0, 2.0]])
    torch.testing.assert_close(feature_distance(a, b), torch.tensor([0.0, 2.0]))  # the same direction; a right angle
    # a map of one channel column and two positions: one equal, one opposite (4), the mean is 2
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 2, 2, 1)
    y = torch.tensor([5.0, -1.0, 0.0, 0.0]).view(1, 2, 2, 1)
    torch.testing.assert_close(feature_distance(x, y), torch.tensor([2.0]))
    torch.testing.assert_close(feature_distance([a, a], [b, b], [1.0, 0.5]), torch.tensor([0.0, 3.0]))
    torch.testing.assert_close(feature_distance({"l": a}, {"l": b}), feature_distance(a, b))


def test_token_maps_have_their_channels_last() -> None:
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    unit = [v / v.norm(dim=2, keepdim=True) for v in (x, y)]
    torch.testing.assert_close(feature_distance(x, y), (unit[0] - unit[1]).square().sum(2).mean(1))


def test_scale_of_features_does_not_count_and_zero_features_give_no_nan() -> None:
    x = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(feature_distance(x, 7 * x), torch.zeros(3), atol=1e-6, rtol=0)
    zero = torch.zeros(1, 4, requires_grad=True)
    feature_distance(zero, torch.ones(1, 4)).sum().backward()
    assert zero.grad is not None and torch.isfinite(zero.grad).all()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu())


def test_gradients_go_to_the_first_images_only() -> None:
    torch.manual_seed(0)
    net = Classifier()
    taps = Taps(net, ["conv", "fc"])

    def features(x: Tensor) -> dict[str, Tensor]:
        with taps as found:
            net(x)
        return dict(found)

    distance = FeatureDistance(net, features, name="conv and fc of a test classifier").train()
    assert not net.training and "conv and fc" in repr(distance)
    a, b = torch.randn(2, 1, 8, 8, requires_grad=True), torch.randn(2, 1, 8, 8, requires_grad=True)
    loss = distance(a, b)
    with taps as of_a:
        net(a)
    with taps as of_b:
        net(b)
    torch.testing.assert_close(loss, feature_distance(list(of_a.values()), list(of_b.values())).mean())
    loss.backward()
    assert a.grad is not None and a.grad.abs().sum() > 0 and b.grad is None
    assert all(p.grad is None for p in net.parameters())
    assert not distance(a.detach(), b).requires_grad
    assert float(distance(b, b).detach()) == 0


def test_wrong_features_are_named() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(InputError, match="same layers .got a and b"):
        feature_distance({"a": x}, {"b": x})
    with pytest.raises(InputError, match="same shapes"):
        feature_distance([x], [x, x])
    with pytest.raises(InputError, match="1 layers but 2 weights"):
        feature_distance(x, x, [1.0, 2.0])
