"""Experts trained together, as one mapped network, against the same experts trained one by one."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from limbeck import networks
from limbeck.blocks.diffaug import DiffAug
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.tasks.experts import ExpertTraining

ALLOWED = 0.4  # 2.5 times as fast
EXPERTS = 8
STEPS = 16
BATCH = 16
"""Small enough that a step costs calls as well as arithmetic: what mapping saves are calls."""


def data(n: int) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    return TensorData(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 10, (n,), generator=generator))


def network() -> nn.Module:
    return networks.build("convnet-w16-d2", in_shape=(1, 8, 8), num_classes=10)


def seconds(real: TensorData, count: int, batch_size: int) -> float:
    """For an epoch of ``count`` experts together, through the engine, snapshots included."""
    kept: list[torch.Tensor] = []
    made = ExpertTraining(network, experts=count, epochs=1, batch_size=batch_size, augment=DiffAug("crop"))
    stage = made.stage(real, lambda epoch, theta: kept.append(theta.detach().clone()))
    engine = Engine(None, EngineConfig(progress=False))
    began = time.perf_counter()
    engine.run(made, [stage])
    return time.perf_counter() - began


def measure(rounds: int = 5, batch_size: int = BATCH) -> dict[str, float]:
    """The median over rounds of together / one by one, both in every round, in turn first.

    The ratio depends on the batch, since mapping saves calls and no arithmetic: on one core it was about 0.25 for batches of 8, 0.35
    for 16 and 0.5 for 64.
    """
    real = data(STEPS * batch_size)
    ratios = []
    for number in range(rounds + 1):
        ways = [("together", 1, EXPERTS), ("alone", EXPERTS, 1)]
        spent = {
            name: sum(seconds(real, count, batch_size) for _ in range(times))
            for name, times, count in ways[:: 1 if number % 2 else -1]
        }
        if number:  # the first round warms up
            ratios.append(spent["together"] / spent["alone"])
    return {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": ALLOWED}
