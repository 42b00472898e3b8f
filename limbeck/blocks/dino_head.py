"""The projection head of self-distillation: features to cosines with many prototypes."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import InputError

INIT_STD = 0.02


class DINOHead(nn.Module):
    r"""A multilayer perceptron, its output put on the unit sphere, then a weight-normalised linear layer.

    .. math::
        u = \mathrm{MLP}(x) \in R^b, \qquad z_j = \frac{u^\top v_j}{\|u\| \, \|v_j\|}, \quad j = 1 \dots m

    The MLP is Linear(in, hidden) - activation - ... - Linear(hidden, bottleneck); the last layer has neither bias nor gain, so the
    logits are cosines in [-1, 1]. Linear weights, V too, start from a normal distribution of standard deviation 0.02 cut off at
    two deviations; biases start at 0.

    Args:
        in_features: width of the features.
        out_features: m, number of logits.
        hidden: width of the MLP.
        bottleneck: b.
        layers: linear layers of the MLP, at least 1.
        activation: ``gelu`` or ``relu``.
        normalise: False gives the simpler head :math:`z = V u`, without unit lengths.

    Source: "Emerging Properties in Self-Supervised Vision Transformers" (2021), without its trainable gain and batch norm.

    Raises:
        InputError: a size below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 65536,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        activation: Literal["gelu", "relu"] = "gelu",
        normalise: bool = True,
    ) -> None:
        super().__init__()
        sizes = {
            "in_features": in_features,
            "out_features": out_features,
            "hidden": hidden,
            "bottleneck": bottleneck,
            "layers": layers,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} of a DINO head must be at least 1 (got {size})")
        widths = [in_features, *[hidden] * (layers - 1), bottleneck]
        built: list[nn.Module] = []
        for before, after in pairwise(widths):
            built += [nn.Linear(before, after), nn.GELU() if activation == "gelu" else nn.ReLU()]
        self.mlp = nn.Sequential(*built[:-1])
        self.prototypes = nn.Parameter(torch.empty(out_features, bottleneck))
        self.in_features, self.normalise = in_features, normalise
        _truncated_normal(self.prototypes)
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                _truncated_normal(module.weight)
                nn.init.zeros_(module.bias)

    def bottleneck(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, b), of length 1 with ``normalise``."""
        hidden: Tensor = self.mlp(x)
        return F.normalize(hidden, dim=-1) if self.normalise else hidden

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, m)."""
        prototypes = F.normalize(self.prototypes, dim=-1) if self.normalise else self.prototypes
        return F.linear(self.bottleneck(x), prototypes)


def _truncated_normal(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
