"""A step of DataDAM against a step of distribution matching, and against one of trajectory matching."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from limbeck import networks
from limbeck.blocks.flat import draw_flat
from limbeck.blocks.trajectory_matching import match_trajectory
from limbeck.core.batch import Batch
from limbeck.methods.datasets.datadam import DataDAM
from limbeck.methods.datasets.dm import DM

ALLOWED_DM, ALLOWED_TRAJECTORY = 1.5, 0.1
CLASSES, IPC, REAL, INNER = 10, 10, 10, 20
"""As many real as synthetic images of each class, so that both kinds of step see batches of the same size."""


def network() -> nn.Module:
    return networks.build("convnet-w32-d3", in_shape=(1, 16, 16), num_classes=CLASSES)


def steps() -> dict[str, Callable[[], None]]:
    """A gradient of the images by each way."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(CLASSES).repeat_interleave(REAL)
    x = torch.randn(len(y), 1, 16, 16, generator=generator)
    made = {"dm": DM((x, y), network, ipc=IPC), "datadam": DataDAM((x, y), network, ipc=IPC)}
    flat, theta = draw_flat(network, 2)
    beta = torch.tensor(0.02)
    everything = [torch.arange(len(y))] * INNER

    def matching(name: str) -> Callable[[], None]:
        def step() -> None:
            made[name].zero_grad()
            made[name](Batch(x, y)).backward()

        return step

    def trajectory() -> None:
        match_trajectory(flat, x, y, beta, theta[0], theta[1], everything)

    return {"dm": matching("dm"), "datadam": matching("datadam"), "trajectory": trajectory}


def measure(rival: str, allowed: float, rounds: int = 5, repeats: int = 10) -> dict[str, float]:
    """The median over rounds of datadam / rival, both in every round, in turn first."""
    ways = steps()
    ratios = []
    for number in range(rounds + 1):
        spent = {}
        for name in ("datadam", rival)[:: 1 if number % 2 else -1]:
            times = repeats if name != "trajectory" else 1
            began = time.perf_counter()
            for _ in range(times):
                ways[name]()
            spent[name] = (time.perf_counter() - began) / times
        if number:  # the first round warms up
            ratios.append(spent["datadam"] / spent[rival])
    return {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": allowed}
