"""The multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.networks.base import Network, isotropic_stages


class MLP(Network):
    """Fully connected layers with ReLU on the flattened input, then one linear layer.

    Hidden layers are the modules ``layers.0``, ``layers.1``, ...; their outputs, after ReLU, are ``(B, width)``.

    Args:
        in_shape: any shape, such as ``(F,)`` or ``(C, H, W)``.
        num_classes: number of logits.
        widths: the hidden widths, first to last.

    Raises:
        InputError: there is no hidden layer.

    Source: Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors" (1986); ReLU by Nair
    and Hinton (2010).
    """

    axes = None

    def __init__(self, in_shape: tuple[int, ...], num_classes: int, *, widths: Sequence[int] = (256, 256)) -> None:
        super().__init__(in_shape, num_classes)
        if not widths:
            raise InputError("an MLP needs at least one hidden width, such as mlp-256")
        sizes = [math.prod(self.in_shape), *widths]
        self.layers = nn.Sequential(
            *[nn.Sequential(nn.Linear(before, after), nn.ReLU()) for before, after in pairwise(sizes)]
        )
        self.feature_dim = sizes[-1]
        self.head = nn.Linear(sizes[-1], self.num_classes)
        depth = len(widths)
        self.stage_paths = [f"layers.{index}" for index in (range(depth) if depth <= 4 else isotropic_stages(depth))]

    def embed(self, x: Tensor) -> Tensor:
        """The last hidden layer, ``(B, *in_shape) -> (B, feature_dim)``."""
        features: Tensor = self.layers(x.flatten(1))
        return features
