from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import InputError
from limbeck.losses.adversarial import (
    discriminator_bce,
    gradient_reversal,
    hinge_discriminator,
    hinge_generator,
    softplus_discriminator,
    softplus_generator,
)


def test_gradient_reversal_is_the_identity_forwards_and_turns_gradients_round():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = gradient_reversal(x, 0.5)
    assert torch.equal(y, x)
    (y * torch.tensor([3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [-1.5, -2.0]


def test_gradient_reversal_makes_a_game():
    """The discriminator's own gradient is untouched; what is before the reversal climbs."""
    w, x = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    (w * gradient_reversal(x)).backward()
    assert w.grad.item() == 3.0 and x.grad.item() == -2.0


def test_gradient_reversal_twice_differentiable():
    x = torch.tensor(3.0, requires_grad=True)
    (first,) = torch.autograd.grad(gradient_reversal(x) ** 3, x, create_graph=True)
    assert first.item() == -27.0
    (second,) = torch.autograd.grad(first, x)
    assert second.item() == 18.0  # the sign turns once in each pass


def test_discriminator_bce_against_bce_with_logits():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 2, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    targets = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 5, dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(torch.cat([student, teacher]), targets)
    assert torch.allclose(discriminator_bce(student, teacher), expected)
    assert torch.autograd.gradcheck(discriminator_bce, (student, teacher))


def test_discriminator_bce_at_its_landmarks():
    zero = torch.zeros(3, 2)
    assert discriminator_bce(zero, zero).item() == pytest.approx(math.log(2))
    sure = torch.tensor([[40.0, -40.0]])
    assert discriminator_bce(sure, -sure).item() == pytest.approx(0, abs=1e-6)
    assert discriminator_bce(-sure, sure).item() == pytest.approx(40)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (0, 2), (4, 2, 1)])
def test_discriminator_bce_names_the_bad_shape(shape: tuple[int, ...]):
    with pytest.raises(InputError, match="teacher must be"):
        discriminator_bce(torch.zeros(4, 2), torch.zeros(shape))


def test_softplus_game_against_binary_cross_entropy():
    g = torch.Generator().manual_seed(1)
    real, fake = (torch.randn(6, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(softplus_discriminator(real, fake), bce(real, ones) + bce(fake, zeros))
    torch.testing.assert_close(softplus_generator(fake), bce(fake, ones))
    assert softplus_discriminator(zeros, zeros).item() == pytest.approx(2 * math.log(2))
    (slope,) = torch.autograd.grad(softplus_generator(fake), fake)
    assert bool((slope < 0).all())  # a larger logit is always better for the generator


def test_hinge_game_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx((0 + 0.5) / 2 + (0 + 1) / 2)
    assert hinge_generator(fake).item() == pytest.approx(1.5)
    sure = torch.tensor([5.0], requires_grad=True)
    (slope,) = torch.autograd.grad(hinge_discriminator(sure, -sure.detach()), sure)
    assert slope.item() == 0  # beyond the margin nothing pulls
