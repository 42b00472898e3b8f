"""Calibration of batch normalisation: plain averages over batches, nothing else changes."""

from __future__ import annotations

import torch
from torch import nn

from limbeck.blocks.bn_calibration import recalibrate


def test_statistics_are_the_mean_over_batches_and_modes_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)).eval()
    net[0].running_mean.fill_(7)
    weight = net[2].weight.clone()
    batches = [torch.randn(16, 3, generator=generator) * k + k for k in (1, 2, 3)]
    random = torch.get_rng_state()
    assert recalibrate(net, batches) is net
    torch.testing.assert_close(net[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(net[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert not net[0].training and not net.training and net[0].momentum == 0.1
    assert torch.equal(net[2].weight, weight)
    assert torch.equal(torch.get_rng_state(), random)  # dropout was off


def test_a_network_without_it_reads_no_batches() -> None:
    batches = iter([None])
    recalibrate(nn.Linear(2, 2), batches)
    assert next(batches, "read") is None
