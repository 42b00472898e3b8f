"""Residual networks for small images: the CIFAR ResNets and the wide, pre-activated ones."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

from limbeck.core.errors import InputError
from limbeck.networks.base import Network


class ResNet(Network):
    """Three stages ``layer1..3`` of n basic blocks each, 6n + 2 layers deep; widths 16, 32, 64 times ``multiplier``.

    Shortcuts that change the shape are a 1x1 convolution with batch norm. The stem has 16 channels, 32 in a widened
    network (``resnet8x4``, ``resnet32x4``).

    Args:
        in_shape: ``(C, H, W)``; works from 8x8 up.
        num_classes: number of logits.
        depth: 6n + 2, such as 8, 20, 32, 56, 110.
        multiplier: widens all three stages.

    Raises:
        InputError: ``depth`` is not 6n + 2.

    Source: He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (2016), section 4.2; stem width and
    shortcuts as in the teacher-student pairs of Tian, Krishnan and Isola, "Contrastive Representation Distillation"
    (2020).
    """

    def __init__(self, in_shape: tuple[int, ...], num_classes: int, *, depth: int = 20, multiplier: int = 1) -> None:
        super().__init__(in_shape, num_classes)
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"the depth of a CIFAR ResNet is 6n + 2 (8, 14, 20, 32, 56, 110, ...), got {depth}")
        blocks = (depth - 2) // 6
        stem = 16 if multiplier == 1 else 32
        widths = [16 * multiplier, 32 * multiplier, 64 * multiplier]
        self.conv1 = nn.Conv2d(self.in_shape[0], stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(BasicBlock, stem, widths[0], blocks, stride=1)
        self.layer2 = _stage(BasicBlock, widths[0], widths[1], blocks, stride=2)
        self.layer3 = _stage(BasicBlock, widths[1], widths[2], blocks, stride=2)
        self.feature_dim = widths[2]
        self.head = nn.Linear(widths[2], self.num_classes)
        self.stage_paths = ["layer1", "layer2", "layer3"]
        _init_convolutions(self)

    def embed(self, x: Tensor) -> Tensor:
        """The pooled last map, ``(B, C, H, W) -> (B, feature_dim)``."""
        x = relu(self.bn1(self.conv1(x)))
        features: Tensor = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return features


class WideResNet(Network):
    """Three stages ``layer1..3`` of n pre-activated blocks each, 6n + 4 layers deep; widths 16, 32, 64 times ``widen``.

    The stages give raw sums; batch norm and ReLU (``bn1``) follow the last one.

    Args:
        in_shape: ``(C, H, W)``; works from 8x8 up.
        num_classes: number of logits.
        depth: 6n + 4, such as 10, 16, 28, 40.
        widen: factor on the widths.

    Raises:
        InputError: ``depth`` is not 6n + 4.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks" (2016), without dropout.
    """

    def __init__(self, in_shape: tuple[int, ...], num_classes: int, *, depth: int = 16, widen: int = 1) -> None:
        super().__init__(in_shape, num_classes)
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"the depth of a WRN is 6n + 4 (10, 16, 22, 28, 40, ...), got {depth}")
        blocks = (depth - 4) // 6
        widths = [16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(self.in_shape[0], 16, 3, padding=1, bias=False)
        self.layer1 = _stage(PreActBlock, 16, widths[0], blocks, stride=1)
        self.layer2 = _stage(PreActBlock, widths[0], widths[1], blocks, stride=2)
        self.layer3 = _stage(PreActBlock, widths[1], widths[2], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.feature_dim = widths[2]
        self.head = nn.Linear(widths[2], self.num_classes)
        self.stage_paths = ["layer1", "layer2", "layer3"]
        _init_convolutions(self)

    def embed(self, x: Tensor) -> Tensor:
        """The normalised and pooled last map, ``(B, C, H, W) -> (B, feature_dim)``."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return relu(self.bn1(x)).mean((2, 3))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut; ReLU after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W) -> (B, C, H / stride, W / stride)``."""
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(out + self.shortcut(x))


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, and a shortcut.

    A shortcut that changes the width starts from the activated input, one that does not from the raw input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W) -> (B, C, H / stride, W / stride)``."""
        active = relu(self.bn1(x))
        out: Tensor = self.conv2(relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def _stage(
    block: type[BasicBlock] | type[PreActBlock], in_channels: int, channels: int, blocks: int, stride: int
) -> nn.Sequential:
    rest = [block(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(in_channels, channels, stride), *rest)


def _init_convolutions(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
