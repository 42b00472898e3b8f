"""Plain convolutional networks without any normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.networks.base import Network

PLANS: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}
"""Widths of the published depths, by stage; each ends in a pooling."""


class VGG(Network):
    """Stages of [3x3 convolution, ReLU], no normalisation; global average pooling and one linear layer follow.

    Without batch statistics a network computes the same in training and in evaluation mode. Convolutions have biases, which start
    at 0; weights start Kaiming normal by their inputs, so that the
    scale of the maps is kept from layer to layer.

    Args:
        in_shape: ``(C, H, W)``.
        num_classes: number of logits.
        plan: widths of the convolutions of each stage.
        halving: ``stride``, the first convolution of every stage but the first has stride 2; ``max``, every stage ends in a 2x2
            max pooling.

    Raises:
        InputError: the map would shrink below 1x1.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015), with the one
    linear layer that is usual on small images.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        *,
        plan: Sequence[Sequence[int]],
        halving: Literal["stride", "max"] = "stride",
    ) -> None:
        super().__init__(in_shape, num_classes)
        channels, height, breadth = self.in_shape
        side, halvings = min(height, breadth), len(plan) - (halving == "stride")
        # A stride rounds odd sides up, a pooling rounds them down.
        most = (side - 1).bit_length() if halving == "stride" else side.bit_length() - 1
        if halvings > most:
            raise InputError(
                f"a VGG of {len(plan)} stages halves a {height}x{breadth} image {halvings} times, which has room for {most}: "
                "take larger images or fewer stages (vgg-w32-s3)"
            )
        built = []
        for number, widths in enumerate(plan):
            layers: list[nn.Module] = []
            for position, out in enumerate(widths):
                stride = 2 if halving == "stride" and number > 0 and position == 0 else 1
                layers += [nn.Conv2d(channels, out, 3, stride, padding=1), nn.ReLU()]
                channels = out
            built.append(nn.Sequential(*layers, *([nn.MaxPool2d(2)] if halving == "max" else [])))
        self.stages = nn.Sequential(*built)
        self.feature_dim = channels
        self.head = nn.Linear(channels, self.num_classes)
        self.stage_paths = [f"stages.{number}" for number in range(len(plan))]
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        """The pooled last map, ``(B, C, H, W) -> (B, feature_dim)``."""
        features: Tensor = self.stages(x).mean((2, 3))
        return features


def vgg(
    in_shape: tuple[int, ...],
    num_classes: int,
    *,
    depth: Sequence[int] = (),
    width: int | None = None,
    stages: int | None = None,
    blocks: int | None = None,
) -> VGG:
    """A :class:`VGG` from the options of a name.

    Args:
        in_shape, num_classes: see :class:`VGG`.
        depth: one published depth, 11, 13, 16 or 19, with max pooling (images of 32x32 and more); or nothing, for a small one
            with strides:
        width: channels of its first convolution, 32 if None; every further stage doubles them.
        stages: 4 if None.
        blocks: convolutions of every stage but the first, which has one; 2 if None.

    Raises:
        InputError: no such depth, or a depth together with other sizes.
    """
    if depth:
        if len(depth) > 1 or depth[0] not in PLANS:
            raise InputError(f"a VGG has depth {', '.join(map(str, PLANS))}, got {', '.join(map(str, depth))}")
        if (width, stages, blocks) != (None, None, None):
            raise InputError(f"vgg{depth[0]} has its published sizes: leave out -w, -s and -b, or the depth")
        return VGG(in_shape, num_classes, plan=PLANS[depth[0]], halving="max")
    first = 32 if width is None else width
    later = range(1, 4 if stages is None else stages)
    plan = [[first], *([first * 2**stage] * (2 if blocks is None else blocks) for stage in later)]
    return VGG(in_shape, num_classes, plan=plan)
