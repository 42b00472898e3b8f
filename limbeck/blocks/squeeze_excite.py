"""Squeeze and excitation: channels of a map weighed by what the whole map shows."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import hardsigmoid, relu

REDUCTION = 4


class SqueezeExcite(nn.Module):
    """Channels times a gate of their means: mean, 1x1 convolution to fewer, ReLU, 1x1 convolution back, hard sigmoid.

    Args:
        channels: of the map.

    Source: "Squeeze-and-Excitation Networks" (2018), with the hard gate of "Searching for MobileNetV3" (2019).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = self.squeezed(channels)
        self.reduce: nn.Module = nn.Conv2d(channels, squeezed, 1)
        self.expand: nn.Module = nn.Conv2d(squeezed, channels, 1)

    @staticmethod
    def squeezed(channels: int) -> int:
        """A quarter of the channels, rounded down to a multiple of 4 as far as there are so many."""
        quarter = channels // REDUCTION
        return max(1, quarter // 4 * 4 or quarter)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C, H, W)``."""
        gate = hardsigmoid(self.expand(relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return x * gate
