"""What every reference network has: shapes, a last representation, a head, and tap paths of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from limbeck.core.errors import InputError


class Network(nn.Module):
    """A classifier ``x -> head(embed(x))``.

    Attributes:
        in_shape: ``(C, H, W)`` of one input; see ``axes``.
        num_classes: number of logits.
        feature_dim: width of ``embed(x)``, the last representation before the head.
        stage_paths: module paths of the stages, shallow to deep; at most four for isotropic networks.
        head_path: module path of the linear head.
        prefix_tokens: tokens in front of the patch tokens (isotropic networks; 0 elsewhere).
        grid: rows and columns of the patch grid, ``None`` for networks without tokens.
    """

    axes: ClassVar[tuple[str, ...] | None] = ("channels", "height", "width")
    """What the axes of an input are called; None: any number of them will do."""

    in_shape: tuple[int, ...]
    num_classes: int
    feature_dim: int
    stage_paths: list[str]
    head_path: str = "head"
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None

    def __init__(self, in_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.in_shape, self.num_classes = check_sizes(in_shape, num_classes)
        if self.axes is not None and len(self.in_shape) != len(self.axes):
            raise InputError(
                f"{type(self).__name__} takes inputs of shape ({', '.join(self.axes)}), not {self.in_shape}: "
                "choose a network for such inputs (any shape: mlp-256-256)"
            )

    def embed(self, x: Tensor) -> Tensor:
        """The last representation, ``(B, C, H, W) -> (B, feature_dim)``."""
        raise NotImplementedError(f"{type(self).__name__} defines no embed")

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``(B, C, H, W) -> (B, num_classes)``."""
        logits: Tensor = self.get_submodule(self.head_path)(self.embed(x))
        return logits


def check_sizes(in_shape: Sequence[int], num_classes: int) -> tuple[tuple[int, ...], int]:
    """Both as plain positive integers.

    Raises:
        InputError: ``in_shape`` is not one or more positive integers, or ``num_classes`` is not one.
    """
    shape = tuple(int(n) for n in in_shape)
    if not shape or min(shape) < 1:
        raise InputError(
            f"in_shape must be positive integers, such as (channels, height, width); got {tuple(in_shape)}"
        )
    if int(num_classes) < 1:
        raise InputError(f"num_classes must be at least 1, got {num_classes}")
    return shape, int(num_classes)


def patch_grid(in_shape: tuple[int, ...], patch: int) -> tuple[int, int]:
    """Rows and columns of the square patches of side ``patch`` (pixels) that tile the image.

    Raises:
        InputError: the patches do not tile it.
    """
    _, height, width = in_shape
    if height % patch or width % patch:
        fits = [str(p) for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
        raise InputError(
            f"patch size {patch} does not divide the image size {height}x{width}; choose one of {', '.join(fits)}"
        )
    return height // patch, width // patch


def isotropic_stages(depth: int) -> list[int]:
    """Indices of the blocks that stand for four stages in a stack of ``depth`` equal blocks.

    Twelve blocks count as stages of 2, 2, 6 and 2, so the outputs of blocks 1, 3, 9 and 11 (from 0) are the stage
    outputs; other depths are cut at the same fractions, and indices that coincide are kept once.

    Source: "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation" (2023), for 12.
    """
    return sorted({-(-depth * end // 12) - 1 for end in (2, 4, 10, 12)})
