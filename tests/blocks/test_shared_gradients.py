"""Sums and means of gradients over sub-networks, against masks written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.blocks.elastic import make_elastic
from limbeck.blocks.shared_gradients import SharedGradients


@pytest.mark.parametrize(("aggregation", "power"), [("sum", 0.0), ("avg", 1.0), ("avg_sqrt", 0.5)])
def test_gradients_equal_masked_sums(aggregation: str, power: float) -> None:
    torch.manual_seed(0)
    net = make_elastic(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x = torch.randn(5, 3)
    weights, widths = [1.0, 0.5, 2.0], [4, 1, 2]
    sums = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    counts = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for weight, width in zip(weights, widths, strict=True):
        net[0].width = width
        net.zero_grad()
        net(x).square().mean().backward()
        for name, p in net.named_parameters():
            sums[name] += weight * p.grad
        for name, index in {"0.weight": slice(width), "0.bias": slice(width), "2.bias": slice(None)}.items():
            counts[name][index] += weight
        counts["2.weight"][:, :width] += weight
    net.zero_grad()
    shared = SharedGradients(net, aggregation)
    shared.clear()
    total = 0
    for weight, width in zip(weights, widths, strict=True):
        net[0].width = width
        total = total + weight * net(x).square().mean()
        shared.add(weight)
    total.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, sums[name] / counts[name] ** power)


def test_without_a_count_gradients_are_left_alone() -> None:
    net = make_elastic(nn.Sequential(nn.Linear(3, 2)))
    shared = SharedGradients(net, "avg")
    net(torch.ones(1, 3)).sum().backward()
    assert torch.equal(net[0].weight.grad, torch.ones(2, 3))
    shared.add(3.0)
    shared.clear()
    assert shared.touched == {}
