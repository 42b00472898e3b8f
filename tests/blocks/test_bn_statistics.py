"""Distances of batch statistics: hand computation, zero at equality, groups, no side effects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.blocks.bn_statistics import Moments, StatisticsDistance, record_moments
from limbeck.core.errors import InputError, UnknownNameError

torch.set_num_threads(1)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 2),
    )
    for m in (net[1], net[5]):
        m.running_mean.normal_()
        m.running_var.uniform_(0.5, 2)
    return net.double().eval()


def images(n: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equals_the_equation_on_the_inputs_of_the_layers():
    net, x = network(), images()
    statistics = StatisticsDistance(net)
    with statistics, torch.no_grad():
        net(x)
    first = net[0](x).detach().numpy()
    second = net[:5](x).detach().numpy()

    def distance(values: np.ndarray, module: nn.Module, axes: tuple[int, ...]) -> float:
        m, s = values.mean(axes), values.var(axes)
        return float(np.linalg.norm(m - module.running_mean.numpy()) + np.linalg.norm(s - module.running_var.numpy()))

    a, b = distance(first, net[1], (0, 2, 3)), distance(second, net[5], (0,))
    assert statistics.layers == ("1", "5")
    np.testing.assert_allclose(statistics.per_layer().numpy(), [[a], [b]], atol=1e-5)
    assert statistics.distance().item() == pytest.approx(10 * a + b, abs=1e-4)
    weighted = StatisticsDistance(net, weights=(0.5, 2))
    with weighted, torch.no_grad():
        net(x)
    assert weighted.distance().item() == pytest.approx(0.5 * a + 2 * b, abs=1e-4)


def test_zero_with_zero_gradient_where_the_statistics_are_the_running_ones():
    bn = nn.BatchNorm2d(2).double().eval()
    x = images().requires_grad_()
    bn.running_mean.copy_(x.detach().mean((0, 2, 3)))
    bn.running_var.copy_(x.detach().var((0, 2, 3), correction=0))
    statistics = StatisticsDistance(bn)
    with statistics:
        bn(x)
    loss = statistics.distance()
    loss.backward()
    assert loss.item() < 1e-12
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() < 1e-6
    with statistics, torch.no_grad():
        bn(x + 1)
    assert statistics.distance().item() == pytest.approx(10 * 2**0.5, abs=1e-4)


def test_gradient_reaches_the_images_and_nothing_else_changes():
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for p in net.parameters():
        p.requires_grad_(False)
    x = images().requires_grad_()
    statistics = StatisticsDistance(net)
    with statistics:
        net(x)
    assert torch.autograd.gradcheck(lambda v: _through(net, statistics, v), (x,), atol=1e-4)
    statistics_after = net.state_dict()
    assert all(torch.equal(v, statistics_after[k]) for k, v in before.items())
    assert not any(m._forward_pre_hooks for m in net.modules())


def _through(net: nn.Module, statistics: StatisticsDistance, x: torch.Tensor) -> torch.Tensor:
    with statistics:
        net(x)
    return statistics.distance()


def test_groups_are_separate_class_batches():
    net, a, b = network(), images(4, 1), images(4, 2)
    single = StatisticsDistance(net)
    both = StatisticsDistance(net, groups=2)
    with torch.no_grad():
        alone = [_through(net, single, v) for v in (a, b)]
        with both:
            net(torch.cat([a, b]))
    torch.testing.assert_close(both.distances(), torch.stack(alone))
    torch.testing.assert_close(both.distance(), torch.stack(alone).mean())
    with both, torch.no_grad(), pytest.raises(InputError, match="3 samples, which are not 2 class batches"):
        net(images(3))


def test_layers_that_see_one_value_per_channel_do_not_count():
    net = network()
    statistics = StatisticsDistance(net)
    with statistics, torch.no_grad():
        net(images(1))
    rows = statistics.per_layer()
    assert rows[0] > 0 and rows[1] == 0


def test_recorded_moments_stand_for_layers_without_memory():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).train()
    data = torch.randn(40, 5, 4)
    moments = record_moments(net, [data[:10], data[10:]])
    assert net.training and list(moments) == ["1"]
    tokens = net[0](data).detach().flatten(0, 1)
    torch.testing.assert_close(moments["1"].mean, tokens.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moments["1"].variance, tokens.var(0, correction=0), atol=1e-5, rtol=1e-4)
    statistics = StatisticsDistance(net.eval(), recorded=moments)
    with torch.no_grad():
        assert _through(net, statistics, data).item() < 1e-4
        assert _through(net, statistics, data + 1).item() > 1


def test_layer_norm_over_maps_keeps_one_moment_for_each_channel():
    net = nn.Sequential(nn.LayerNorm([3, 4, 4]))
    x = torch.randn(7, 3, 4, 4)
    found = record_moments(net, [x])["0"]
    torch.testing.assert_close(found.mean, x.mean((0, 2, 3)), atol=1e-6, rtol=1e-5)


def test_what_is_wrong_is_said():
    with pytest.raises(InputError, match="no BatchNorm layer"):
        StatisticsDistance(nn.Linear(2, 2))
    with pytest.raises(UnknownNameError, match="layer 'x'"):
        StatisticsDistance(network(), layers=["x"])
    with pytest.raises(InputError, match="3 weights for 2 layers"):
        StatisticsDistance(network(), weights=(1, 1, 1))
    with pytest.raises(InputError, match="keeps no running statistics"):
        StatisticsDistance(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)))
    broken = network()
    broken[1].running_var[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        StatisticsDistance(broken)
    training = StatisticsDistance(network().train())
    with pytest.raises(InputError, match="training mode"), training:
        pass
    fresh = StatisticsDistance(network())
    with pytest.raises(InputError, match="no layer has seen a batch"):
        fresh.distance()
    with pytest.raises(InputError, match="no LayerNorm or GroupNorm"):
        record_moments(nn.Linear(2, 2), [])
    with pytest.raises(InputError, match="at least one batch"):
        record_moments(nn.Sequential(nn.LayerNorm(2)), [])
    assert Moments(torch.zeros(1), torch.ones(1)).variance.item() == 1
