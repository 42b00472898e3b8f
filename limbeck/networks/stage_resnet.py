"""Residual networks whose stages each have a depth of their own."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

from limbeck.core.errors import InputError
from limbeck.networks.base import Network
from limbeck.networks.resnet import BasicBlock


class StageResNet(Network):
    """As the ResNets for CIFAR, with a number of basic blocks for each stage; each stage after the first halves the sides and doubles the width.

    ``stageresnet-9-9-9`` is ResNet-56. Convolutions start Kaiming normal (fan out).

    Args:
        in_shape: ``(C, H, W)``; works from 8x8 up with three stages.
        num_classes: number of logits.
        blocks: of each stage, one or more.
        width: channels of the first stage.

    Raises:
        InputError: no stages.

    Source: the space S0 of "DisWOT: Student Architecture Search for Distillation WithOut Training" (2023): three stages of 1, 3, 5 or 7 blocks.
    """

    def __init__(
        self, in_shape: tuple[int, ...], num_classes: int, *, blocks: tuple[int, ...] = (3, 3, 3), width: int = 16
    ) -> None:
        super().__init__(in_shape, num_classes)
        if not blocks:
            raise InputError("a stageresnet has one stage or more: stageresnet-3-3-3")
        self.conv1 = nn.Conv2d(self.in_shape[0], width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = nn.ModuleList()
        before = width
        for number, count in enumerate(blocks):
            channels, stride = width * 2**number, 2 if number else 1
            first = BasicBlock(before, channels, stride)
            self.stages.append(nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(count - 1))))
            before = channels
        self.feature_dim = before
        self.head = nn.Linear(before, self.num_classes)
        self.stage_paths = [f"stages.{n}" for n in range(len(blocks))]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def embed(self, x: Tensor) -> Tensor:
        """The pooled last map, ``(B, C, H, W) -> (B, feature_dim)``."""
        x = relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = stage(x)
        features: Tensor = x.mean((2, 3))
        return features
