"""A small encoder-decoder that gives every pixel a class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.networks.base import Network

DECODER_WIDTH = 32


class Segmenter(Network):
    """Encoder levels of 3x3 convolutions, joined top-down into one map of 32 channels, from which a 1x1 convolution classifies.

    The first convolution halves the image, every level after the first halves it again and doubles the width. Each level's map
    goes through a 1x1 convolution to 32 channels; from the deepest on, maps are enlarged and added up, and a 3x3 convolution
    smooths the sum. Logits are enlarged (bilinear) to the input's size, whatever that is: the network takes images of any size.

    Whatever its width and depth, a network has 32 channels before the classifier, the module ``feature_path``.

    Args:
        in_shape: ``(channels, height, width)`` that the network is meant for.
        num_classes: number of logits of each pixel.
        width: channels of the first level.
        levels: number of levels.
        blocks: convolutions in each level; all but a level's first have a shortcut.

    Raises:
        InputError: a level would have to halve a map of side 1.

    Source: the top-down pathway of "Feature Pyramid Networks for Object Detection" (2017), with one output for pixels as in
    "Panoptic Feature Pyramid Networks" (2019); sizes are ours.
    """

    head_path = "classifier"
    feature_path = "smooth"

    def __init__(
        self, in_shape: tuple[int, ...], num_classes: int, *, width: int = 16, levels: int = 3, blocks: int = 1
    ) -> None:
        super().__init__(in_shape, num_classes)
        channels, height, breadth = self.in_shape
        most = (min(height, breadth) - 1).bit_length()
        if levels > most:
            raise InputError(f"a segmenter on a {height}x{breadth} image has {most} levels at most, got {levels}")
        self.stem = _convolution(channels, width, 3, stride=2)
        widths = [width * 2**level for level in range(levels)]
        self.levels = nn.ModuleList(
            _Level(widths[max(level - 1, 0)], out, 1 if level == 0 else 2, blocks) for level, out in enumerate(widths)
        )
        self.laterals = nn.ModuleList(_convolution(w, DECODER_WIDTH, 1, active=False) for w in widths)
        self.smooth = _convolution(DECODER_WIDTH, DECODER_WIDTH, 3)
        self.classifier = nn.Conv2d(DECODER_WIDTH, self.num_classes, 1)
        self.feature_dim = DECODER_WIDTH
        self.stage_paths = [f"levels.{level}" for level in range(levels)]
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.classifier:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def embed(self, x: Tensor) -> Tensor:
        """The decoder's map before the classifier, ``(B, C, H, W) -> (B, 32, H/2, W/2)`` (rounded up)."""
        maps = []
        x = self.stem(x)
        for level, lateral in zip(self.levels, self.laterals, strict=True):
            x = level(x)
            maps.append(lateral(x))
        joined = maps.pop()
        while maps:
            finer = maps.pop()
            joined = finer + F.interpolate(joined, finer.shape[2:], mode="bilinear", align_corners=False)
        features: Tensor = self.smooth(F.relu(joined))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``(B, C, H, W) -> (B, num_classes, H, W)``."""
        return F.interpolate(self.classifier(self.embed(x)), x.shape[2:], mode="bilinear", align_corners=False)


class _Level(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _convolution(channels if n == 0 else out, out, 3, stride=stride if n == 0 else 1) for n in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        for block in list(self.blocks)[1:]:
            x = x + block(x)
        return x


def _convolution(channels: int, out: int, size: int, *, stride: int = 1, active: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if active else nn.Sequential(*layers)
