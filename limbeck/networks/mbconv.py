"""Inverted bottlenecks in the style of MobileNetV3, each with its own kernel and expansion, and the super-network of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import hardswish

from limbeck.blocks.squeeze_excite import SqueezeExcite
from limbeck.core.errors import InputError
from limbeck.networks.base import Network
from limbeck.networks.supernets import Knob, SuperNetwork


class MBConvNet(Network):
    """A convolutional stem, stages of inverted bottlenecks, a 1x1 convolution, pooling and a linear head.

    Stage s has ``width * 2**s`` channels; every stage but the first begins with stride 2.

    Args:
        in_shape: ``(C, H, W)``.
        num_classes: number of logits.
        width: channels of the first stage.
        depths: blocks of each stage, as the digits of a number: 223 is 2, 2 and 3.
        blocks: for each block ten times its expansion plus the side of its kernel: 65 is expansion 6, kernel 5x5.

    Raises:
        InputError: the numbers of blocks differ, or a kernel is even.

    Source: block and activation of "Searching for MobileNetV3" (2019).
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 16,
        depths: int = 22,
        blocks: Sequence[int] = (),
    ) -> None:
        super().__init__(in_shape, num_classes)
        counts = [int(digit) for digit in str(depths)]
        blocks = tuple(blocks) or (65,) * sum(counts)
        if min(counts) < 1 or sum(counts) != len(blocks):
            raise InputError(
                f"depths {depths} are {sum(counts)} blocks in stages of at least one, but {len(blocks)} blocks are named"
            )
        if any(block % 2 == 0 or block < 11 for block in blocks):
            raise InputError(f"a block is ten times its expansion plus an odd kernel side, such as 65 (got {blocks})")
        self.stem = nn.Conv2d(self.in_shape[0], width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        rest, channels = iter(blocks), width
        stages = []
        for s, count in enumerate(counts):
            layers = []
            for i in range(count):
                expansion, kernel = divmod(next(rest), 10)
                out, stride = width * 2**s, 2 if s and not i else 1
                layers.append(InvertedBottleneck(channels, out, expansion, kernel, stride))
                channels = out
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.feature_dim = 4 * channels
        self.last = nn.Conv2d(channels, self.feature_dim, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(self.feature_dim)
        self.head = nn.Linear(self.feature_dim, self.num_classes)
        self.stage_paths = [f"stages.{s}" for s in range(len(counts))][-4:]

    def embed(self, x: Tensor) -> Tensor:
        """The pooled last map, ``(B, C, H, W) -> (B, feature_dim)``."""
        x = self.stages(hardswish(self.stem_norm(self.stem(x))))
        features: Tensor = hardswish(self.last_norm(self.last(x))).mean((2, 3))
        return features


class InvertedBottleneck(nn.Module):
    """1x1 to ``expansion`` times the channels, depth-wise convolution, squeeze-excite, 1x1 back; a shortcut where shapes allow."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        middle = channels * expansion
        self.expand, self.norm1 = nn.Conv2d(channels, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.depthwise = nn.Conv2d(middle, middle, kernel, stride, kernel // 2, groups=middle, bias=False)
        self.norm2, self.gate = nn.BatchNorm2d(middle), SqueezeExcite(middle)
        self.project, self.norm3 = nn.Conv2d(middle, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, out, H / stride, W / stride)``."""
        inner = hardswish(self.norm1(self.expand(x)))
        inner = self.gate(hardswish(self.norm2(self.depthwise(inner))))
        result: Tensor = self.norm3(self.project(inner))
        return x + result if self.shortcut else result


def elastic_mbconv(
    in_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: int = 16,
    stages: int = 2,
    depth: int = 2,
    expansion: int = 4,
    kernel: int = 5,
) -> SuperNetwork:
    """Inverted bottlenecks with elastic kernels (3 … ``kernel``), expansions (a quarter, a half, three quarters or all of ``expansion``)
    and depths (1 … ``depth`` blocks in each of the stages; 2 … from 4 on)."""
    if kernel % 2 == 0 or not 3 <= kernel <= 9:
        raise InputError(f"the largest kernel must be 3, 5, 7 or 9 (got {kernel})")
    if not 1 <= depth <= 9:
        raise InputError(f"a stage has 1 to 9 blocks (got {depth})")
    network = MBConvNet(
        in_shape,
        num_classes,
        width=width,
        depths=int(str(depth) * stages),
        blocks=(10 * expansion + kernel,) * (stages * depth),
    )
    ratios = (3, 4, 6) if expansion == 6 else tuple(sorted({max(1, expansion * q // 4) for q in (1, 2, 3, 4)}))
    depths = tuple(range(2 if depth >= 4 else 1, depth + 1))
    knobs = []
    for s in range(stages):
        knobs.append(Knob(f"depth{s + 1}", "depth", (f"stages.{s}",), depths))
        for i in range(depth):
            b, label = f"stages.{s}.{i}", f"{s + 1}_{i + 1}"
            middle = network.get_submodule(f"{b}.expand")
            channels = int(middle.in_channels)  # type: ignore[arg-type]
            through = (f"{b}.norm1", f"{b}.depthwise", f"{b}.norm2", f"{b}.gate")
            widths = tuple(channels * r for r in ratios)
            knobs.append(Knob(f"width{label}", "width", (f"{b}.expand",), widths, through, f"{b}.project"))
            knobs.append(Knob(f"kernel{label}", "kernel", (f"{b}.depthwise",), tuple(range(3, kernel + 1, 2))))

    def name_of(chosen: Mapping[str, Any]) -> str:
        blocks = []
        for s in range(stages):
            for i in range(chosen[f"depth{s + 1}"]):
                inputs = width if s == 0 else width * 2 ** (s - 1 if i == 0 else s)
                blocks.append(10 * (chosen[f"width{s + 1}_{i + 1}"] // inputs) + chosen[f"kernel{s + 1}_{i + 1}"])
        digits = "".join(str(chosen[f"depth{s + 1}"]) for s in range(stages))
        return f"mbconv-w{width}-d{digits}-" + "-".join(map(str, blocks))

    return SuperNetwork(
        network, knobs, torch.zeros(1, *in_shape), name_of=name_of, in_shape=in_shape, num_classes=num_classes
    )
