"""A vision transformer with its own heads and hidden width in every block, and the super-network of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from limbeck.blocks.attention import SelfAttention
from limbeck.core.errors import InputError
from limbeck.networks.base import Network, isotropic_stages, patch_grid
from limbeck.networks.supernets import Knob, SuperNetwork


class SlimViT(Network):
    """Patches, pre-normalised transformer blocks, the mean of the tokens, a linear head.

    Args:
        in_shape: ``(C, H, W)``.
        num_classes: number of logits.
        width: of the tokens.
        patch: side of a patch.
        head_width: channels of one head.
        blocks: for each block its heads and its hidden width, in turn.

    Raises:
        InputError: an odd number of block sizes, or patches that do not tile the image.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 48,
        patch: int = 2,
        head_width: int = 12,
        blocks: Sequence[int] = (4, 96, 4, 96),
    ) -> None:
        super().__init__(in_shape, num_classes)
        if len(blocks) % 2:
            raise InputError(
                f"a slim vit needs heads and a hidden width for each block, such as 4-96-4-96 (got {blocks})"
            )
        self.grid = patch_grid(self.in_shape, patch)
        self.patches = nn.Conv2d(self.in_shape[0], width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], width))
        pairs = list(zip(blocks[::2], blocks[1::2], strict=True))
        self.blocks = nn.Sequential(*[SlimBlock(width, heads, head_width, hidden) for heads, hidden in pairs])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.num_classes)
        self.feature_dim = width
        self.stage_paths = [
            f"blocks.{i}" for i in (range(len(pairs)) if len(pairs) <= 4 else isotropic_stages(len(pairs)))
        ]

    def embed(self, x: Tensor) -> Tensor:
        """The mean token after the last block, ``(B, C, H, W) -> (B, width)``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        features: Tensor = self.norm(self.blocks(tokens)).mean(1)
        return features


class SlimBlock(nn.Module):
    """Attention and a two-layer perceptron, each after layer norm and with a shortcut."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads, head_width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, width) -> (B, N, width)``."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(gelu(self.fc1(self.norm2(x))))
        return out


def elastic_vit(
    in_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: int = 48,
    patch: int = 2,
    head_width: int = 12,
    depth: int = 4,
    heads: int = 4,
    hidden: int = 96,
) -> SuperNetwork:
    """Vision transformers of ``depth // 2`` … ``depth`` blocks, with half … all heads, and a quarter, a half or all of the hidden width."""
    network = SlimViT(
        in_shape, num_classes, width=width, patch=patch, head_width=head_width, blocks=(heads, hidden) * depth
    )
    knobs = [Knob("depth", "depth", ("blocks",), tuple(range(max(1, depth // 2), depth + 1)))]
    head_options = tuple(head_width * h for h in range(max(1, heads // 2), heads + 1))
    hidden_options = tuple(sorted({max(1, hidden // part) for part in (4, 2, 1)}))
    for i in range(depth):
        b = f"blocks.{i}"
        queries = tuple(f"{b}.attention.{part}" for part in ("query", "key", "value"))
        knobs.append(Knob(f"heads{i + 1}", "width", queries, head_options, into=f"{b}.attention.out", group=head_width))
        knobs.append(Knob(f"hidden{i + 1}", "width", (f"{b}.fc1",), hidden_options, into=f"{b}.fc2"))

    def name_of(chosen: Mapping[str, Any]) -> str:
        sizes = [
            n for i in range(chosen["depth"]) for n in (chosen[f"heads{i + 1}"] // head_width, chosen[f"hidden{i + 1}"])
        ]
        return f"slimvit-d{width}-p{patch}-k{head_width}-" + "-".join(map(str, sizes))

    return SuperNetwork(
        network, knobs, torch.zeros(1, *in_shape), name_of=name_of, in_shape=in_shape, num_classes=num_classes
    )
