"""Zero-cost proxies against their definitions, computed another way."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.errors import UnknownNameError
from limbeck.core.method import fingerprint
from limbeck.metrics.zero_cost import PROXIES, zero_cost
from limbeck.networks import build


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()


X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def test_proxies_of_a_perceptron_by_hand():
    network = small()
    found = zero_cost(
        network, X, Y, "parameters", "flops", "naswot", "synflow", "snip", "gradient-norm", "fisher", "grasp"
    )
    assert found["parameters"] == 5 * 7 + 7 + 7 * 3 + 3
    assert found["flops"] == 2 * (5 * 7 + 7 * 3)

    on = network[0](X) > 0
    kernel = torch.tensor([[float((a == b).sum()) for b in on] for a in on], dtype=torch.float64)
    expected = math.log(abs(float(torch.det(kernel)))) if torch.det(kernel) != 0 else -math.inf
    assert found["naswot"] == pytest.approx(expected, abs=1e-6)

    weights = [network[0].weight, network[2].weight]
    loss = F.cross_entropy(network(X), Y)
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    assert found["gradient-norm"] == pytest.approx(sum(float(g.detach().norm()) for g in slopes))
    products = [float((w * g).detach().abs().sum()) for w, g in zip(weights, slopes, strict=True)]
    assert found["snip"] == pytest.approx(sum(products))

    w1, b1, w2, _ = (p.detach().abs() for p in network.parameters())
    ones = torch.ones(5, dtype=torch.float64)
    first, second = w2.sum(0) @ (w1 @ ones), w2.sum(0) @ (w1 @ ones + b1)
    assert found["synflow"] == pytest.approx(math.log(float(first + second)))

    flat = torch.cat([w.flatten() for w in weights]).detach()

    def of(theta):
        a, b = theta[:35].view(7, 5), theta[35:].view(3, 7)
        return F.cross_entropy(F.linear(torch.relu(F.linear(X, a, network[0].bias)), b, network[2].bias), Y)

    gradient = torch.autograd.functional.jacobian(of, flat)
    hessian = torch.autograd.functional.hessian(of, flat)
    assert found["grasp"] == pytest.approx(-float(flat @ hessian @ gradient), rel=1e-6)

    hidden = network[0](X).detach().requires_grad_()
    out = network[2](torch.relu(hidden))
    F.cross_entropy(out, Y).backward(inputs=[hidden])
    top = (torch.softmax(out.detach(), 1) - F.one_hot(Y, 3)) / 6
    saliency = [hidden.detach() * hidden.grad, out.detach() * top]
    assert found["fisher"] == pytest.approx(sum(float(0.5 * s.square().mean(0).sum()) for s in saliency))


def test_rectifiers_count_once_as_modules_or_functions():
    class Functional(nn.Module):
        def __init__(self, base: nn.Sequential) -> None:
            super().__init__()
            self.one, self.two = base[0], base[2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.relu(self.one(x)))

    assert zero_cost(Functional(small()), X, Y, "naswot") == zero_cost(small(), X, Y, "naswot")


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10


def test_networks_stay_as_they_are(images):
    network = build("cell-442442-w4", in_shape=(1, 8, 8), num_classes=10)
    before, state = fingerprint(network), torch.get_rng_state()
    found = zero_cost(network, *images)
    assert set(found) == set(PROXIES) and all(math.isfinite(v) for v in found.values())
    assert fingerprint(network) == before and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_larger_networks_score_higher_where_they_must(images):
    little, large = (build(n, in_shape=(1, 8, 8), num_classes=10) for n in ("cell-333333-w4", "cell-444444-w16"))
    for name in ("parameters", "flops", "synflow", "zen", "naswot"):
        assert zero_cost(large, *images, name)[name] > zero_cost(little, *images, name)[name]


def test_a_network_without_a_way_through_scores_least(images):
    dead = build("cell-111111-w4", in_shape=(1, 8, 8), num_classes=10)
    found = zero_cost(dead, *images)
    assert found["zen"] == -math.inf and found["synflow"] == -math.inf
    assert found["snip"] == 0 and found["grasp"] == 0


def test_unknown_proxies_are_named(images):
    with pytest.raises(UnknownNameError, match="proxy 'synflo'"):
        zero_cost(small(), X, Y, "synflo")
