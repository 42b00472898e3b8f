"""A residual multilayer perceptron with a hidden width of its own in every block, and the super-network of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from limbeck.networks.base import Network, isotropic_stages
from limbeck.networks.supernets import Knob, SuperNetwork


class ResidualMLP(Network):
    """A linear stem, residual blocks ``width -> hidden -> width``, and a linear head.

    Args:
        in_shape: any shape; inputs are flattened.
        num_classes: number of logits.
        width: of the residual stream.
        hidden: of each block.
    """

    axes = None

    def __init__(
        self, in_shape: tuple[int, ...], num_classes: int, *, width: int = 128, hidden: Sequence[int] = (512, 512, 512)
    ) -> None:
        super().__init__(in_shape, num_classes)
        self.stem = nn.Linear(math.prod(self.in_shape), width)
        self.blocks = nn.Sequential(*[MLPBlock(width, h) for h in hidden])
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, self.num_classes)
        self.feature_dim = width
        depth = len(hidden)
        self.stage_paths = [f"blocks.{i}" for i in (range(depth) if depth <= 4 else isotropic_stages(depth))]

    def embed(self, x: Tensor) -> Tensor:
        """The normalised residual stream, ``(B, *in_shape) -> (B, width)``."""
        return relu(self.norm(self.blocks(self.stem(x.flatten(1)))))


class MLPBlock(nn.Module):
    """Batch norm, ReLU, a linear layer to ``hidden``, the same back to ``width``, and the shortcut."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.fc1 = nn.BatchNorm1d(width), nn.Linear(width, hidden, bias=False)
        self.norm2, self.fc2 = nn.BatchNorm1d(hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width) -> (B, width)``."""
        out: Tensor = x + self.fc2(relu(self.norm2(self.fc1(relu(self.norm1(x))))))
        return out


def elastic_mlp(
    in_shape: tuple[int, ...], num_classes: int, *, width: int = 128, hidden: int = 512, depth: int = 3
) -> SuperNetwork:
    """Residual perceptrons of 1 … ``depth`` blocks with an eighth, a quarter, a half or all of ``hidden`` in each."""
    options = tuple(sorted({max(1, hidden // part) for part in (8, 4, 2, 1)}))
    network = ResidualMLP(in_shape, num_classes, width=width, hidden=(hidden,) * depth)
    knobs = [Knob("depth", "depth", ("blocks",), tuple(range(1, depth + 1)))]
    for i in range(depth):
        b = f"blocks.{i}"
        knobs.append(Knob(f"hidden{i + 1}", "width", (f"{b}.fc1",), options, (f"{b}.norm2",), f"{b}.fc2"))

    def name_of(chosen: Mapping[str, Any]) -> str:
        widths = [chosen[f"hidden{i + 1}"] for i in range(chosen["depth"])]
        return f"resmlp-d{width}-" + "-".join(map(str, widths))

    return SuperNetwork(
        network, knobs, torch.zeros(1, *in_shape), name_of=name_of, in_shape=in_shape, num_classes=num_classes
    )
