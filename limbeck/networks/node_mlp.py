"""The perceptron that takes the place of a network over a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.networks.base import Network, isotropic_stages
from limbeck.networks.feature_linear import FeatureLinear


class NodeMLP(Network):
    """Linear layers, each with ReLU, batch normalisation and dropout, then one linear layer: a node's class from its features alone.

    ``takes_sparse`` says that rows may be sparse (CSR).

    Hidden layers are the modules ``layers.0``, ``layers.1``, …; their outputs are (B, width).

    Args:
        in_shape: (F,).
        num_classes: number of logits.
        widths: the hidden widths.
        norm: ``batch`` or ``none``.
        percent: dropout after each hidden layer, in percent.
    """

    axes = None
    takes_sparse: ClassVar[bool] = True

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        *,
        widths: Sequence[int] = (128,),
        norm: str = "batch",
        percent: int = 0,
    ) -> None:
        super().__init__(in_shape, num_classes)
        if not 0 <= percent < 100:
            raise InputError(f"dropout of {percent} % leaves nothing: give 1 to 99 (p50), or leave it out")
        sizes = [math.prod(self.in_shape), *widths]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    FeatureLinear(before, after),
                    nn.ReLU(),
                    *([nn.BatchNorm1d(after)] if norm == "batch" else []),
                    nn.Dropout(percent / 100),
                )
                for before, after in pairwise(sizes)
            )
        )
        self.feature_dim = sizes[-1]
        self.head = nn.Linear(sizes[-1], self.num_classes)
        depth = len(widths)
        self.stage_paths = [f"layers.{i}" for i in (range(depth) if depth <= 4 else isotropic_stages(depth))]

    def embed(self, x: Tensor) -> Tensor:
        """The last hidden layer, (B, F), dense or sparse, -> (B, width)."""
        found: Tensor = self.layers(x.flatten(1) if x.layout == torch.strided else x)
        return found
