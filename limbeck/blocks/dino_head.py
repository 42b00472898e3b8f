"""The projection head of self-distillation: features to cosines with many prototypes."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import InputError

INIT_STD, INIT_WIDTH = 0.02, 2048
"""The published deviation of the weights, at the published width of the head."""


class DINOHead(nn.Module):
    r"""A multilayer perceptron, its output put on the unit sphere, then a weight-normalised linear layer.

    .. math::
        u = \mathrm{MLP}(x) \in R^b, \qquad z_j = \frac{u^\top v_j}{\|u\| \, \|v_j\|}, \quad j = 1 \dots m

    The MLP is Linear(in, hidden) - activation - ... - Linear(hidden, bottleneck); the last layer has neither bias nor gain, so the
    logits are cosines in [-1, 1]. Prototypes start in uniformly random directions. Weights of the MLP start from a normal
    distribution cut off at two deviations, biases at 0. The published deviation, 0.02, belongs to layers of 2048 inputs. In a narrow
    head it makes u so short that the first steps of the last bias decide its direction, and a trained head collapses to a constant;
    by default it is therefore kept at the same strength, 0.02 sqrt(2048 / inputs of the layer).

    Args:
        in_features: width of the features.
        out_features: m, number of logits.
        hidden: width of the MLP.
        bottleneck: b.
        layers: linear layers of the MLP, at least 1.
        activation: ``gelu`` or ``relu``.
        normalise: False gives the simpler head :math:`z = V u`, without unit lengths.
        init_std: deviation of the MLP's weights; None: see above.

    Source: "Emerging Properties in Self-Supervised Vision Transformers" (2021), without its trainable gain and batch norm.

    Raises:
        InputError: a size below 1, or a deviation that is not positive.
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
        init_std: float | None = None,
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
        self.prototypes = nn.Parameter(F.normalize(torch.randn(out_features, bottleneck), dim=-1))
        self.in_features, self.normalise = in_features, normalise
        if init_std is not None and not init_std > 0:
            raise InputError(f"init_std of a DINO head must be positive (got {init_std})")
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                std = INIT_STD * (INIT_WIDTH / module.in_features) ** 0.5 if init_std is None else init_std
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(module.bias)

    def bottleneck(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, b), of length 1 with ``normalise``."""
        hidden: Tensor = self.mlp(x)
        return F.normalize(hidden, dim=-1) if self.normalise else hidden

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_features) -> (B, m)."""
        prototypes = F.normalize(self.prototypes, dim=-1) if self.normalise else self.prototypes
        return F.linear(self.bottleneck(x), prototypes)
