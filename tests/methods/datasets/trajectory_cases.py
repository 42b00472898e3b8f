"""What the tests of the trajectory-matching methods share: tiny data, a network, made-up experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from limbeck.blocks.flat import FlatNetwork
from limbeck.blocks.trajectories import TrajectoryBuffer
from limbeck.core.optim import Optimised


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )


def real(n: int = 45, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of three classes that a small network can tell apart."""
    labels = torch.arange(n) % 3
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 * torch.randn(n, 1, 8, 8, generator=generator)
    for c in range(3):
        images[labels == c, :, 2 * c : 2 * c + 3] += 1.0
    return images, labels


def experts(count: int = 2, epochs: int = 8, step: float = 0.05, seed: int = 0) -> TrajectoryBuffer:
    """Random walks: enough where only the arithmetic matters."""
    generator = torch.Generator().manual_seed(seed)
    size = FlatNetwork(network()).size
    walk = step * torch.randn(count, epochs + 1, size, generator=generator)
    walk[:, 0] = 0.3 * torch.randn(count, size, generator=generator)
    return TrajectoryBuffer(list(walk.cumsum(1)))


SMALL = {
    "ipc": 2, "steps": 20, "inner_steps": 3, "max_start": 5, "batch_synthetic": 4, "lr_images": 1.0, "judge_seeds": 1,
    "judge_steps": 5, "judge_networks": ("convnet-w4-d2",),
}  # fmt: skip


class Stepper:
    """Does what the engine's does, without the engine."""

    def __init__(self, optimised: dict[str, Optimised]) -> None:
        self.optimised, self.step = optimised, 0

    def minimise(self, losses: Any, *names: str) -> None:
        for made in self.optimised.values():
            made.optimizer.zero_grad()
        (losses.total if hasattr(losses, "total") else losses).backward()
        for made in self.optimised.values():
            made.optimizer.step()
