"""Builds experts in a process of its own, for a test that kills it. ``python -m tests.tasks.experts_run FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from limbeck.blocks.trajectories import TrajectoryBuffer
from limbeck.core.data import TensorData
from limbeck.tasks.augment import ShiftFlip
from limbeck.tasks.experts import ExpertConfig, build_experts

LONG = 40


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


def data(n: int = 60) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    return TensorData(torch.randn(n, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1), labels)


def run(folder: Path, epochs: int = 40) -> TrajectoryBuffer:
    torch.set_num_threads(1)
    config = ExpertConfig(experts=3, epochs=epochs, batch_size=20, rho=0.1, momentum=0.5, lr_decay=0.5)
    return build_experts(data(), network, config, seed=1, augment=ShiftFlip(1), folder=folder, progress=False)


if __name__ == "__main__":
    run(Path(sys.argv[1]), LONG)
