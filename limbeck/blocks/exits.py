"""Exit branches: heads that read logits off the intermediate stages of a student.

Every branch maps one stage's features into the logit space. The shallower the stage, the more layers its branch has,
so that all branches end on features of a like depth. Branches are trained with the student and dropped afterwards.

Source: Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation"
(NeurIPS 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, cat, nn

from limbeck.core.errors import InputError


def make_exit(
    feature_shape: Sequence[int],
    k: int,
    num_stages: int,
    out_width: int,
    num_classes: int,
    prefix_tokens: int = 0,
    grid: int | tuple[int, int] | None = None,
    target_grid: int = 7,
) -> ConvExit | TokenExit:
    """The branch for the features of one stage: a :class:`ConvExit` for maps, a :class:`TokenExit` for tokens.

    Args:
        feature_shape: ``(B, C, H, W)`` or ``(B, N, D)``, batch included.
        k: stage, 1 (shallowest) to ``num_stages``.
        num_stages: stages K of the network that the features come from; 4 in the paper.
        out_width: width of the features in front of the branch's linear layer. In the paper, the larger of the two
            networks' feature widths for a student with maps, and the student's own for one with tokens.
        num_classes: number of logits.
        prefix_tokens: tokens in front of the patch tokens (class, distillation, register tokens).
        grid: rows and columns of the patch grid, one number if square; a square is assumed if not given.
        target_grid: side of the patch grid at which merging ends.

    Raises:
        InputError: the features are neither maps nor tokens, or the sizes contradict one another.
    """
    shape = tuple(feature_shape)
    if len(shape) == 4:
        return ConvExit(shape[1], k, num_stages, out_width, num_classes)
    if len(shape) == 3:
        patches = shape[1] - prefix_tokens
        rows_columns = _grid(grid, patches)
        if rows_columns[0] * rows_columns[1] != patches:
            raise InputError(
                f"features of shape {shape} hold {patches} patch tokens after {prefix_tokens} prefix tokens, "
                f"not a grid of {rows_columns[0]}x{rows_columns[1]}; give the right grid and prefix_tokens"
            )
        return TokenExit(
            shape[2], rows_columns, k, num_stages, out_width, num_classes, prefix_tokens, target_grid=target_grid
        )
    raise InputError(
        f"an exit branch reads maps (B, C, H, W) or tokens (B, N, D), got features of shape {shape}; tap another layer"
    )


class ConvExit(nn.Module):
    """Branch for a stage that gives maps.

    Stage k < K: K - k halving :class:`SepConv` blocks, block j from ``C 2^j`` to ``C 2^(j+1)`` channels and the last
    one to ``out_width``. Stage K: one 1x1 convolution to ``out_width``. Then the mean over positions and a linear layer.

    Args:
        in_channels: channels C of the stage.
        k: stage, 1 to ``num_stages``.
        num_stages: K.
        out_width: channels in front of the linear layer.
        num_classes: number of logits.

    Raises:
        InputError: ``k`` is not a stage, or a size is below 1.
    """

    def __init__(self, in_channels: int, k: int, num_stages: int, out_width: int, num_classes: int) -> None:
        super().__init__()
        _check(k, num_stages, in_channels=in_channels, out_width=out_width, num_classes=num_classes)
        if k < num_stages:
            widths = [in_channels * 2**j for j in range(num_stages - k)] + [out_width]
            self.body = nn.Sequential(*[SepConv(a, b) for a, b in pairwise(widths)])
        else:
            self.body = nn.Sequential(nn.Conv2d(in_channels, out_width, 1))
        self.head = nn.Linear(out_width, num_classes)
        init_exit(self)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, num_classes)`` logits."""
        logits: Tensor = self.head(self.body(x).mean((2, 3)))
        return logits


class TokenExit(nn.Module):
    """Branch for a stage that gives tokens.

    Patch tokens are merged 2x2 until the grid has ``target_grid`` a side: ``floor(log2(side / target_grid))`` times for
    the shorter side, fewer where a side becomes odd. The prefix tokens skip the merging and are put back in front;
    ``max(K - k, 1)`` transformer blocks follow, then a linear layer on the first prefix token, or on the mean token
    where there is none. Where the stage's width is not ``out_width``, tokens that no merging brings to it (the prefix
    tokens; all of them if nothing is merged) are brought there by one linear layer.

    Args:
        in_width: token width D of the stage.
        grid: rows and columns of its patch grid.
        k: stage, 1 to ``num_stages``.
        num_stages: K.
        out_width: token width of the blocks.
        num_classes: number of logits.
        prefix_tokens: tokens in front of the patch tokens.
        target_grid: side of the patch grid at which merging ends; 7 in the paper.
        heads: attention heads of the blocks; the largest divisor of ``out_width`` up to this number is taken.

    Raises:
        InputError: ``k`` is not a stage, or a size is below 1.
    """

    def __init__(
        self,
        in_width: int,
        grid: int | tuple[int, int],
        k: int,
        num_stages: int,
        out_width: int,
        num_classes: int,
        prefix_tokens: int = 0,
        *,
        target_grid: int = 7,
        heads: int = 4,
    ) -> None:
        super().__init__()
        rows, columns = (grid, grid) if isinstance(grid, int) else grid
        sizes = {"in_width": in_width, "grid": min(rows, columns), "target_grid": target_grid, "heads": heads}
        _check(k, num_stages, **sizes, out_width=out_width, num_classes=num_classes)
        if prefix_tokens < 0:
            raise InputError(f"prefix_tokens must not be negative, got {prefix_tokens}")
        self.prefix_tokens = prefix_tokens
        self.tokens = prefix_tokens + rows * columns

        merges = merge_count((rows, columns), target_grid)
        self.merging = nn.Sequential()
        for step in range(merges):
            width = in_width if step == 0 else out_width
            last = step == merges - 1
            self.merging.append(PatchMerging(width, out_width, (rows >> step, columns >> step), activate=not last))
        projected = in_width != out_width and (merges == 0 or prefix_tokens > 0)
        self.projection = nn.Linear(in_width, out_width) if projected else nn.Identity()

        heads = next(h for h in range(heads, 0, -1) if out_width % h == 0)
        self.blocks = nn.Sequential(
            *[
                nn.TransformerEncoderLayer(
                    out_width,
                    heads,
                    dim_feedforward=4 * out_width,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(max(num_stages - k, 1))
            ]
        )
        self.head = nn.Linear(out_width, num_classes)
        init_exit(self)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, prefix_tokens + rows * columns, D) -> (B, num_classes)`` logits.

        Raises:
            InputError: the number of tokens is not the one that the branch was made for.
        """
        if x.shape[1] != self.tokens:
            raise InputError(
                f"this exit branch reads {self.tokens} tokens ({self.prefix_tokens} of them prefix tokens), "
                f"got features of shape {tuple(x.shape)}"
            )
        if len(self.merging) == 0:
            tokens = self.projection(x)
        else:
            prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
            patches = self.merging(patches)
            tokens = cat((self.projection(prefix), patches), 1) if self.prefix_tokens else patches
        tokens = self.blocks(tokens)
        logits: Tensor = self.head(tokens[:, 0] if self.prefix_tokens else tokens.mean(1))
        return logits


class SepConv(nn.Module):
    """Two depthwise-separable 3x3 convolutions, each with batch norm and ReLU; the first halves the map.

    Depthwise 3x3 of stride 2, pointwise ``in -> in``, norm, ReLU, depthwise 3x3, pointwise ``in -> out``, norm, ReLU;
    no biases.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False),
            nn.Conv2d(in_channels, in_channels, 1, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in, H, W) -> (B, out, ceil(H / 2), ceil(W / 2))``."""
        out: Tensor = self.layers(x)
        return out


class PatchMerging(nn.Module):
    """Joins each 2x2 neighbourhood of patch tokens into one token: concatenation, layer norm, linear layer, GELU.

    Args:
        in_width: token width D.
        out_width: width of the merged tokens.
        grid: rows and columns before merging, both even.
        activate: ends with GELU.

    Raises:
        InputError: a side of the grid is odd.

    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (2021).
    """

    def __init__(self, in_width: int, out_width: int, grid: tuple[int, int], activate: bool = True) -> None:
        super().__init__()
        if grid[0] % 2 or grid[1] % 2:
            raise InputError(f"a grid of {grid[0]}x{grid[1]} patches cannot be merged 2x2; both sides must be even")
        self.grid = grid
        self.norm = nn.LayerNorm(4 * in_width)
        self.linear = nn.Linear(4 * in_width, out_width, bias=False)
        self.activation = nn.GELU() if activate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, rows * columns, in_width) -> (B, rows * columns / 4, out_width)``, both row by row."""
        rows, columns = self.grid
        pairs = x.unflatten(1, (rows // 2, 2, columns // 2, 2))  # (B, rows / 2, 2, columns / 2, 2, D)
        quads = pairs.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, rows * columns / 4, 4 D)
        merged: Tensor = self.activation(self.linear(self.norm(quads)))
        return merged


def merge_count(grid: tuple[int, int], target_grid: int) -> int:
    """How often a grid can be halved while both sides are even and the shorter stays at ``target_grid`` or above."""
    rows, columns = grid
    count = 0
    while min(rows, columns) >= 2 * target_grid and rows % 2 == 0 and columns % 2 == 0:
        rows, columns, count = rows // 2, columns // 2, count + 1
    return count


def init_exit(branch: nn.Module, std: float | None = 0.02) -> None:
    """Initialise a branch in place.

    Convolutions are Kaiming normal (fan out), linear and attention weights normal with deviation ``std`` truncated at
    -2 and 2, norms the identity, biases 0.

    Args:
        branch: any module.
        std: 0.02 in the paper, which suits widths of many hundreds; None takes ``1 / sqrt(inputs)`` for each layer,
            without which narrow branches hardly learn at first.
    """
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5 if std is None else std)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.trunc_normal_(module.in_proj_weight, std=module.embed_dim**-0.5 if std is None else std)
            nn.init.zeros_(module.in_proj_bias)
            continue
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _grid(grid: int | tuple[int, int] | None, patches: int) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(max(patches, 0))
        return side, side
    return (grid, grid) if isinstance(grid, int) else (int(grid[0]), int(grid[1]))


def _check(k: int, num_stages: int, **sizes: int) -> None:
    if not 1 <= k <= num_stages:
        raise InputError(f"stage {k} of an exit branch must lie between 1 and the number of stages, {num_stages}")
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} of an exit branch must be at least 1, got {size}")
