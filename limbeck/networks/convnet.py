"""The ConvNet of dataset distillation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.networks.base import Network

Norm = Literal["instance", "batch", "layer", "none"]


class ConvNet(Network):
    """``depth`` blocks of [3x3 convolution, normalisation, ReLU, 2x2 average pooling], then one linear layer.

    The first convolution pads 28x28 inputs to 32x32, so that the MNIST family passes three blocks on even sizes.

    Args:
        in_shape: ``(C, H, W)``; each side at least ``2 ** depth``.
        num_classes: number of logits.
        width: channels of every block.
        depth: number of blocks.
        norm: ``instance`` (a group norm with one channel a group, affine), ``batch``, ``layer`` (over channels and
            positions) or ``none``.

    Raises:
        InputError: the blocks would shrink the map below 1x1, or ``norm`` is unknown.

    Source: Gidaris and Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting" (2018); widths, norms and
    padding as in Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching" (2021).
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 128,
        depth: int = 3,
        norm: Norm = "instance",
    ) -> None:
        super().__init__(in_shape, num_classes)
        channels, height, breadth = self.in_shape
        if min(height, breadth) < 2**depth:
            most = min(height, breadth).bit_length() - 1
            raise InputError(
                f"depth {depth} shrinks a {height}x{breadth} image below 1x1; a ConvNet on it has depth {most} at most"
            )
        blocks = []
        for index in range(depth):
            padding = 3 if index == 0 and (height, breadth) == (28, 28) else 1
            height, breadth = height + 2 * padding - 2, breadth + 2 * padding - 2
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(channels, width, 3, padding=padding),
                    _norm(norm, width, height, breadth),
                    nn.ReLU(),
                    nn.AvgPool2d(2),
                )
            )
            channels, height, breadth = width, height // 2, breadth // 2
        self.blocks = nn.Sequential(*blocks)
        self.feature_dim = width * height * breadth
        self.head = nn.Linear(self.feature_dim, self.num_classes)
        self.stage_paths = [f"blocks.{index}" for index in range(depth)]

    def embed(self, x: Tensor) -> Tensor:
        """The flattened last map, ``(B, C, H, W) -> (B, feature_dim)``."""
        features: Tensor = self.blocks(x).flatten(1)
        return features


def _norm(kind: str, width: int, height: int, breadth: int) -> nn.Module:
    if kind == "instance":
        return nn.GroupNorm(width, width)
    if kind == "batch":
        return nn.BatchNorm2d(width)
    if kind == "layer":
        return nn.LayerNorm([width, height, breadth])
    if kind == "none":
        return nn.Identity()
    raise InputError(f"unknown norm '{kind}' of a ConvNet; choose instance, batch, layer or none")
