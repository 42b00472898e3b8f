"""A plain staged convolutional network, for small teachers and students."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.networks.base import Network


class CNN(Network):
    """Stages of [3x3 convolution, batch norm, ReLU]; each after the first halves the map and doubles the width.

    Global average pooling and one linear layer follow. Stages are the modules ``stages.0``, ``stages.1``, ...

    Args:
        in_shape: ``(C, H, W)``.
        num_classes: number of logits.
        width: channels of the first stage.
        stages: number of stages.
        blocks: convolutions in each stage.

    Raises:
        InputError: a stage would have to halve a map of side 1.

    Source: the plain networks of Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition" (2015), with batch norm and strides in place of max pooling.
    """

    def __init__(
        self, in_shape: tuple[int, ...], num_classes: int, *, width: int = 16, stages: int = 3, blocks: int = 1
    ) -> None:
        super().__init__(in_shape, num_classes)
        channels, height, breadth = self.in_shape
        most = (min(height, breadth) - 1).bit_length() + 1
        if stages > most:
            raise InputError(f"a CNN on a {height}x{breadth} image has {most} stages at most, got {stages}")
        built = []
        for stage in range(stages):
            out = width * 2**stage
            layers: list[nn.Module] = []
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
            built.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*built)
        self.feature_dim = channels
        self.head = nn.Linear(channels, self.num_classes)
        self.stage_paths = [f"stages.{stage}" for stage in range(stages)]
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def embed(self, x: Tensor) -> Tensor:
        """The pooled last map, ``(B, C, H, W) -> (B, feature_dim)``."""
        features: Tensor = self.stages(x).mean((2, 3))
        return features
