from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.blocks.discriminators import LogitDiscriminator
from limbeck.core.errors import InputError
from limbeck.losses.adversarial import discriminator_bce


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(
    ("classes", "widths"), [(2, [8, 4, 2]), (10, [8, 4, 2]), (100, [12, 4, 2]), (1000, [125, 15, 2])]
)
def test_widths_follow_the_number_of_classes_and_never_reach_zero(classes: int, widths: list[int]) -> None:
    model = LogitDiscriminator(classes)
    assert [m.out_features for m in linears(model)] == widths
    assert model(torch.randn(5, classes)).shape == (5, 2)


@pytest.mark.parametrize("final_relu", [False, True])
def test_it_is_three_1x1_convolutions(final_relu: bool) -> None:
    torch.manual_seed(0)
    model = LogitDiscriminator(20, final_relu).double()
    x = torch.randn(7, 20, dtype=torch.float64)
    map_ = x[:, :, None, None]
    for number, layer in enumerate(linears(model)):
        map_ = F.conv2d(map_, layer.weight[:, :, None, None], layer.bias)
        if number < 2 or final_relu:
            map_ = map_.relu()
    assert torch.allclose(model(x), map_.flatten(1), atol=1e-12)


def test_the_final_relu_bounds_the_loss_from_below() -> None:
    """With scores that cannot be negative, "no" is never said more firmly than sigmoid(0) = 1/2."""
    torch.manual_seed(0)
    model = LogitDiscriminator(10, final_relu=True)
    scores = model(torch.randn(64, 10) * 100)
    assert (scores >= 0).all()
    perfect = torch.tensor([[50.0, 0.0]])
    assert discriminator_bce(perfect, perfect.flip(1)).item() == pytest.approx(math.log(2) / 2)
    assert discriminator_bce(scores[:32], scores[32:]).item() >= math.log(2) / 2


def test_it_learns_to_tell_two_sources_apart() -> None:
    torch.manual_seed(0)
    model = LogitDiscriminator(10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    student, teacher = torch.randn(64, 10), torch.randn(64, 10) * 4 + 2
    for _ in range(150):
        optimizer.zero_grad()
        discriminator_bce(model(student), model(teacher)).backward()
        optimizer.step()
    assert model.accuracy(model(student), model(teacher)) > 0.9


def test_accuracy_counts_rows_of_both_kinds() -> None:
    model = LogitDiscriminator(10)
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # right, wrong
    teacher = torch.tensor([[0.0, 2.0], [1.0, 3.0]])  # right, right
    assert model.accuracy(student, teacher).item() == 0.75
    assert model.accuracy(teacher, student).item() == 0.25


def test_inputs_of_another_precision_are_cast() -> None:
    assert LogitDiscriminator(10)(torch.randn(3, 10, dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(4, 9), (10,), (4, 10, 1)])
def test_a_wrong_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(B, 10\)"):
        LogitDiscriminator(10)(torch.zeros(shape))


def test_no_classes() -> None:
    with pytest.raises(InputError, match="at least one class"):
        LogitDiscriminator(0)
