"""A residual convolutional network with a middle width of its own in every block, and the super-network of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from limbeck.core.errors import InputError
from limbeck.networks.base import Network
from limbeck.networks.supernets import Knob, SuperNetwork


class ResidualCNN(Network):
    """A convolutional stem, stages of residual blocks ``channels -> middle -> channels`` of 3x3 convolutions, pooling and a head.

    Stage s has ``width * 2**s`` channels; every stage but the first begins with stride 2.

    Args:
        in_shape: ``(C, H, W)``.
        num_classes: number of logits.
        width: channels of the first stage.
        depths: blocks of each stage, as the digits of a number: 223 is 2, 2 and 3.
        middles: middle channels of each block.

    Raises:
        InputError: the numbers of blocks differ.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 16,
        depths: int = 22,
        middles: Sequence[int] = (),
    ) -> None:
        super().__init__(in_shape, num_classes)
        counts = [int(digit) for digit in str(depths)]
        middles = tuple(middles) or tuple(width * 2**s for s, count in enumerate(counts) for _ in range(count))
        if min(counts) < 1 or sum(counts) != len(middles):
            raise InputError(
                f"depths {depths} are {sum(counts)} blocks in stages of at least one, but {len(middles)} middle widths are named"
            )
        self.stem, self.norm = nn.Conv2d(self.in_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        rest, channels = iter(middles), width
        stages = []
        for s, count in enumerate(counts):
            layers = []
            for i in range(count):
                out = width * 2**s
                layers.append(MiddleBlock(channels, next(rest), out, 2 if s and not i else 1))
                channels = out
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.feature_dim = channels
        self.head = nn.Linear(channels, self.num_classes)
        self.stage_paths = [f"stages.{s}" for s in range(len(counts))][-4:]

    def embed(self, x: Tensor) -> Tensor:
        """The pooled last map, ``(B, C, H, W) -> (B, feature_dim)``."""
        features: Tensor = self.stages(relu(self.norm(self.stem(x)))).mean((2, 3))
        return features


class MiddleBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, ``middle`` channels between them, and a shortcut; ReLU after the sum."""

    def __init__(self, channels: int, middle: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, middle, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(middle)
        self.conv2, self.norm2 = nn.Conv2d(middle, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, out, H / stride, W / stride)``."""
        return relu(self.norm2(self.conv2(relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


def elastic_cnn(
    in_shape: tuple[int, ...], num_classes: int, *, width: int = 16, stages: int = 3, depth: int = 2, middle: int = 1
) -> SuperNetwork:
    """Residual networks of 1 … ``depth`` blocks a stage with a quarter, a half, three quarters or all of the middle channels,
    ``middle`` times the stage's."""
    if not 1 <= depth <= 9:
        raise InputError(f"a stage has 1 to 9 blocks (got {depth})")
    full = [width * middle * 2**s for s in range(stages)]
    network = ResidualCNN(
        in_shape,
        num_classes,
        width=width,
        depths=int(str(depth) * stages),
        middles=tuple(m for m in full for _ in range(depth)),
    )
    knobs = []
    for s, widest in enumerate(full):
        options = tuple(sorted({max(1, widest * quarter // 4) for quarter in (1, 2, 3, 4)}))
        knobs.append(Knob(f"depth{s + 1}", "depth", (f"stages.{s}",), tuple(range(1, depth + 1))))
        for i in range(depth):
            b = f"stages.{s}.{i}"
            knobs.append(
                Knob(f"width{s + 1}_{i + 1}", "width", (f"{b}.conv1",), options, (f"{b}.norm1",), f"{b}.conv2")
            )

    def name_of(chosen: Mapping[str, Any]) -> str:
        counts = [chosen[f"depth{s + 1}"] for s in range(stages)]
        middles = [chosen[f"width{s + 1}_{i + 1}"] for s, count in enumerate(counts) for i in range(count)]
        return f"rescnn-w{width}-d{''.join(map(str, counts))}-" + "-".join(map(str, middles))

    return SuperNetwork(
        network, knobs, torch.zeros(1, *in_shape), name_of=name_of, in_shape=in_shape, num_classes=num_classes
    )
