"""Flat gradients against formulas worked out one network at a time in numpy, on losses with known derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.blocks.sharpness import gsam_gradient, sharpness
from limbeck.core.errors import InputError

CURVATURE = torch.tensor([[1.0, 10.0, 0.1], [3.0, 0.5, 2.0]]).double()
THETA = torch.tensor([[1.0, -0.5, 2.0], [0.3, 2.0, -1.0]]).double()


def quadratic(theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum(c theta^2 / 2 + theta) of each network."""
    return (CURVATURE * theta**2 / 2 + theta).sum(1), CURVATURE * theta + 1


def reference(c: np.ndarray, t: np.ndarray, rho: float, alpha: float, adaptive: bool) -> tuple[np.ndarray, float]:
    g = c * t + 1
    e = rho * t**2 * g / np.sqrt(np.sum((np.abs(t) * g) ** 2)) if adaptive else rho * g / np.sqrt(np.sum(g**2))
    p = c * (t + e) + 1
    unit = p / np.sqrt(np.sum(p**2))
    loss = lambda x: np.sum(c * x**2 / 2 + x)  # noqa: E731
    return p - alpha * (g - np.dot(g, unit) * unit), loss(t + e) - loss(t)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize(("rho", "alpha"), [(0.5, 0.3), (0.01, 1.0), (0.5, 0.0)])
def test_each_network_gets_its_own_published_step(adaptive, rho, alpha):
    found = gsam_gradient(quadratic, THETA, rho=rho, alpha=alpha, adaptive=adaptive)
    for k in range(2):
        gradient, gap = reference(CURVATURE[k].numpy(), THETA[k].numpy(), rho, alpha, adaptive)
        np.testing.assert_allclose(found.gradient[k].numpy(), gradient, rtol=1e-10)
        np.testing.assert_allclose(float(found.gap[k]), gap, rtol=1e-10)
    torch.testing.assert_close(found.losses, quadratic(THETA)[0])


def test_without_a_radius_it_is_the_plain_gradient_from_one_evaluation():
    calls = []

    def counted(theta):
        calls.append(theta)
        return quadratic(theta)

    found = gsam_gradient(counted, THETA, rho=0.0, alpha=0.7)
    assert torch.equal(found.gradient, quadratic(THETA)[1]) and len(calls) == 1
    assert not found.gap.any()
    near = gsam_gradient(quadratic, THETA, rho=1e-9, alpha=0.7)
    torch.testing.assert_close(near.gradient, found.gradient, rtol=1e-7, atol=1e-7)


def test_the_gap_term_is_perpendicular_to_the_perturbed_gradient():
    with_gap = gsam_gradient(quadratic, THETA, rho=0.5, alpha=1.0)
    without = gsam_gradient(quadratic, THETA, rho=0.5, alpha=0.0)
    difference = without.gradient - with_gap.gradient
    assert (difference.norm(dim=1) > 1e-3).all()
    torch.testing.assert_close((difference * without.gradient).sum(1), torch.zeros(2).double(), atol=1e-10, rtol=0)


def test_a_flat_point_stays_where_it_is():
    flat = gsam_gradient(lambda t: (torch.zeros(2), torch.zeros_like(t)), torch.ones(2, 3), rho=0.5, alpha=0.3)
    assert torch.equal(flat.gradient, torch.zeros(2, 3))


def test_sharpness_of_a_quadratic():
    g = quadratic(THETA)[1]
    unit = g / g.norm(dim=1, keepdim=True)
    expected = 0.2 * g.norm(dim=1) + 0.02 * (CURVATURE * unit**2).sum(1)
    torch.testing.assert_close(sharpness(quadratic, THETA, rho=0.2), expected)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="cannot be negative"):
        gsam_gradient(quadratic, THETA, rho=-1.0, alpha=0.0)
    with pytest.raises(InputError, match="radius must be above 0"):
        sharpness(quadratic, THETA, rho=0.0)
