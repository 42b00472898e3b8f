import pytest
import torch

from limbeck.blocks.formation import MultiFormation, flip_union, identity
from limbeck.core.errors import InputError
from limbeck.methods.datasets.base import tiled


def test_flip_union_is_images_and_mirror_images():
    x, y = torch.randn(3, 1, 4, 5), torch.tensor([0, 1, 2])
    both, labels = flip_union(x, y)
    assert torch.equal(both[:3], x) and torch.equal(both[3:].flip(-1), x)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_gradients_of_both_halves_add_up():
    x = torch.randn(2, 1, 4, 4, requires_grad=True)
    weight = torch.randn(4, 1, 4, 4)
    (flip_union(x, torch.zeros(2))[0] * weight).sum().backward()
    assert torch.allclose(x.grad, weight[:2] + weight[2:].flip(-1))


def test_multi_formation_cuts_and_enlarges():
    small = torch.randn(8, 1, 2, 2)
    images = tiled(torch.nn.functional.interpolate(small, scale_factor=2, mode="nearest"), 2)
    assert images.shape == (2, 1, 4, 4)
    found, labels = MultiFormation(2)(images, torch.tensor([4, 5]))
    assert found.shape == (8, 1, 4, 4) and labels.tolist() == [4] * 4 + [5] * 4
    expected = torch.nn.functional.interpolate(small, size=(4, 4), mode="bilinear", align_corners=False)
    assert torch.allclose(found, expected, atol=1e-6)


def test_factor_one_and_identity_change_nothing():
    x, y = torch.randn(2, 1, 4, 4), torch.zeros(2)
    assert MultiFormation(1)(x, y)[0] is x and identity(x, y)[0] is x


def test_bad_factors():
    with pytest.raises(InputError, match="at least 1"):
        MultiFormation(0)
    with pytest.raises(InputError, match="cannot be cut into 3x3"):
        MultiFormation(3)(torch.zeros(1, 1, 4, 4), torch.zeros(1))
