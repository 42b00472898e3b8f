"""A residual multilayer perceptron that denoises vectors and small images."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.networks.base import check_sizes


class FiLMBlock(nn.Module):
    """h + W2 silu(W1 (LN(h) (1 + a) + b)), with a and b linear in the condition's vector; h and it (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, h: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.modulation(vector).chunk(2, -1)
        found: Tensor = h + self.outer(F.silu(self.inner(self.norm(h) * (1 + scale) + shift)))
        return found


class DiffusionMLP(nn.Module):
    """``(x (B, *shape), time (B,), class (B,) or None) -> (B, *shape)``.

    The output is what the layers give plus the input times a number that depends on time and class, so that a network that is narrower than a
    sample need not carry all of its noise. Class ids go from 0 to C - 1; C is the null class, and what None means. Last layers start at zero.

    Args:
        shape: of one sample.
        width: of the hidden layers.
        blocks: residual blocks.
        num_classes: C; None: unconditional.
        time_features: half sines, half cosines, of ``time * time_scale`` at frequencies from 1 to 64, evenly in their logarithm.
        time_scale: 1e-3 for times that go to 1000; 1 for ln(sigma)/4.

    Raises:
        InputError: sizes below 1, an odd number of features.
    """

    frequencies: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 160,
        blocks: int = 3,
        num_classes: int | None = None,
        time_features: int = 32,
        time_scale: float = 1e-3,
    ) -> None:
        super().__init__()
        self.shape, _ = check_sizes(shape, 1 if num_classes is None else num_classes)
        if width < 1 or blocks < 1 or time_features < 2 or time_features % 2:
            raise InputError("width and blocks must be at least 1, time_features even and at least 2")
        self.spec: dict[str, Any] = {
            "shape": list(self.shape),
            "width": width,
            "blocks": blocks,
            "num_classes": num_classes,
            "time_features": time_features,
            "time_scale": time_scale,
        }
        self.num_classes, self.time_scale = num_classes, time_scale
        size = math.prod(self.shape)
        half = time_features // 2
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(64), half)), persistent=False)
        self.time = nn.Sequential(nn.Linear(time_features, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = None if num_classes is None else nn.Embedding(num_classes + 1, width)
        self.first = nn.Linear(size, width)
        self.blocks = nn.ModuleList(FiLMBlock(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, size)
        self.skip = nn.Linear(width, 1)
        for layer in (self.last, self.skip):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        """See the class.

        Raises:
            InputError: samples of another shape, class ids out of range, or classes given to an unconditional network.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise InputError(f"the network takes samples of shape {self.shape}, not {tuple(x.shape[1:])}")
        angles = time.to(self.frequencies.dtype)[:, None] * self.time_scale * self.frequencies
        vector = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(self.first.weight.dtype))
        if self.classes is not None:
            vector = vector + self.classes(self._class_ids(cond, x))
        elif cond is not None:
            raise InputError("the network is unconditional: it takes no classes")
        vector = F.silu(vector)
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, vector)
        found: Tensor = self.last(F.silu(self.norm(h))) + self.skip(vector) * x.flatten(1)
        return found.view_as(x)

    def _class_ids(self, cond: Tensor | None, x: Tensor) -> Tensor:
        assert self.num_classes is not None
        if cond is None:
            return torch.full((len(x),), self.num_classes, device=x.device)
        if not isinstance(cond, Tensor) or cond.is_floating_point() or cond.ndim != 1:
            raise InputError("the condition must be class ids (B,), integers")
        if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(cond):
            return cond
        low, high = int(cond.min()), int(cond.max())
        if low < 0 or high > self.num_classes:
            wrong = low if low < 0 else high
            raise InputError(
                f"class {wrong} was never seen by the network: ids go from 0 to {self.num_classes - 1}, {self.num_classes} is 'no class'"
            )
        return cond


_NAME = re.compile(r"mlp(?:-w([0-9]+))?(?:-b([0-9]+))?")


def named_mlp(name: str, shape: tuple[int, ...], num_classes: int | None, time_scale: float) -> DiffusionMLP | None:
    """The network that ``mlp[-w<width>][-b<blocks>]`` names; None for other names."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    sizes = {key: int(value) for key, value in zip(("width", "blocks"), found.groups(), strict=True) if value}
    return DiffusionMLP(shape, num_classes=num_classes, time_scale=time_scale, **sizes)
