"""What the tests of selection methods share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck import networks
from limbeck.core.data import TensorData

torch.set_num_threads(1)


def build() -> nn.Module:
    return networks.build("convnet-w4-d2", in_shape=(1, 8, 8), num_classes=3)


def encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def images(n: int = 60) -> tuple[Tensor, Tensor]:
    """Three classes, stripes at different heights with noise."""
    y = torch.arange(n) % 3
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.3
    for row in range(2):
        x[torch.arange(n), 0, 2 * y + row] += 1.5
    return x, y


def data(n: int = 60) -> TensorData:
    """The same as 8-bit images with a normalisation."""
    x, y = images(n)
    codes = ((x + 1.5) / 4.5).clamp(0, 1).mul(255).to(torch.uint8)
    return TensorData(codes, y, mean=[0.4], std=[0.2])


SHORT = {"judge_steps": 5, "judge_seeds": 1, "judge_networks": ("mlp-8",)}
