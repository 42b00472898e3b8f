"""What every reference network has: shapes, a last representation, a head, and tap paths of its stages."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.errors import InputError


class Network(nn.Module):
    """An image classifier ``x -> head(embed(x))``.

    Attributes:
        in_shape: ``(C, H, W)`` of one input.
        num_classes: number of logits.
        feature_dim: width of ``embed(x)``, the last representation before the head.
        stage_paths: module paths of the stages, shallow to deep; at most four for isotropic networks.
        head_path: module path of the linear head.
        prefix_tokens: tokens in front of the patch tokens (isotropic networks; 0 elsewhere).
        grid: rows and columns of the patch grid, ``None`` for networks without tokens.
    """

    in_shape: tuple[int, int, int]
    num_classes: int
    feature_dim: int
    stage_paths: list[str]
    head_path: str = "head"
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None

    def __init__(self, in_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.in_shape, self.num_classes = check_sizes(in_shape, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """The last representation, ``(B, C, H, W) -> (B, feature_dim)``."""
        raise NotImplementedError(f"{type(self).__name__} defines no embed")

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``(B, C, H, W) -> (B, num_classes)``."""
        logits: Tensor = self.get_submodule(self.head_path)(self.embed(x))
        return logits


def check_sizes(in_shape: tuple[int, int, int], num_classes: int) -> tuple[tuple[int, int, int], int]:
    """Both as plain positive integers.

    Raises:
        InputError: ``in_shape`` is not three positive integers, or ``num_classes`` is not one.
    """
    shape = tuple(int(n) for n in in_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"in_shape must be three positive integers (channels, height, width), got {tuple(in_shape)}")
    if int(num_classes) < 1:
        raise InputError(f"num_classes must be at least 1, got {num_classes}")
    return (shape[0], shape[1], shape[2]), int(num_classes)


def patch_grid(in_shape: tuple[int, int, int], patch: int) -> tuple[int, int]:
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
