"""Random masks over the patches of an image, one mask for several networks, and the patches as targets.

Source of the scheme: "Masked Autoencoders Are Scalable Vision Learners" (2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from limbeck.core.errors import InputError


@dataclass(frozen=True)
class TokenMask:
    """Which of L patch tokens of each image are visible, and in which order.

    Two networks that are given the same mask see the same patches in the same order.

    Attributes:
        keep: (B, K) int64, positions of the visible patches.
        restore: (B, L) int64; gathering the sequence "visible tokens, then removed ones" by it gives back the image's order.
        removed: (B, L) bool, True where a patch is hidden.
    """

    keep: Tensor
    restore: Tensor
    removed: Tensor

    @classmethod
    def draw(cls, batch: int, patches: int, ratio: float, device: torch.device | None = None) -> Self:
        """A random mask; all draws come from torch's global random state of ``device``.

        Args:
            batch, patches: B and L.
            ratio: share of hidden patches in [0, 1). ``int(L (1 - ratio))`` stay visible, but at least one.
        """
        return cls.of(torch.rand(batch, patches, device=device), ratio)

    @classmethod
    def of(cls, noise: Tensor, ratio: float) -> Self:
        """The mask that keeps the patches of smallest ``noise`` (B, L), in the order of the noise.

        Raises:
            InputError: ``ratio`` outside [0, 1), or no patches.
        """
        if not 0 <= ratio < 1:
            raise InputError(f"the mask ratio must be at least 0 and below 1 (got {ratio})")
        patches = noise.shape[1]
        if patches < 1:
            raise InputError("there are no patches to mask")
        # a product such as 16 * (1 - 0.75) may come out a hair below its value
        visible = max(1, int(patches * (1 - ratio) + 1e-9))
        shuffled = noise.argsort(1)
        restore = shuffled.argsort(1)
        return cls(shuffled[:, :visible], restore, restore >= visible)

    @property
    def visible(self) -> int:
        """K."""
        return self.keep.shape[1]

    def select(self, tokens: Tensor) -> Tensor:
        """(B, L, D) patch tokens in, the visible ones (B, K, D) out.

        Raises:
            InputError: another number of tokens than the mask is for.
        """
        if tokens.shape[:2] != self.restore.shape:
            raise InputError(
                f"a mask over {self.restore.shape[1]} patches of {self.restore.shape[0]} images does not fit tokens of shape "
                f"{tuple(tokens.shape)}: teacher and student must cut images into the same grid of patches"
            )
        return tokens.gather(1, self.keep[:, :, None].expand(-1, -1, tokens.shape[2]))

    def fill(self, tokens: Tensor, filler: Tensor) -> Tensor:
        """Visible tokens (B, K, D) back in the image's order, ``filler`` (1, 1, D) in the place of the hidden: (B, L, D)."""
        b, k, d = tokens.shape
        whole = torch.cat([tokens, filler.expand(b, self.restore.shape[1] - k, d).to(tokens.dtype)], 1)
        return whole.gather(1, self.restore[:, :, None].expand(-1, -1, d))


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) images as rows of patches, (B, L, patch * patch * C), channels last within a patch.

    Raises:
        InputError: the patches do not tile the image.
    """
    b, c, h, w = images.shape
    if h % patch or w % patch:
        raise InputError(f"patches of {patch} pixels do not tile images of {h}x{w}")
    grid = images.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return grid.reshape(b, -1, patch * patch * c)


def unpatchify(rows: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify` for a grid of (rows, columns) patches."""
    b, _, d = rows.shape
    c = d // (patch * patch)
    cells = rows.reshape(b, grid[0], grid[1], patch, patch, c).permute(0, 5, 1, 3, 2, 4)
    return cells.reshape(b, c, grid[0] * patch, grid[1] * patch)


def standardise_patches(rows: Tensor, eps: float = 1e-6) -> Tensor:
    """Each patch (…, D) minus its mean, over the root of its (unbiased) variance plus ``eps``.

    On images with flat patches a larger ``eps`` (1e-2) keeps their noise from being blown up.
    """
    return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True) + eps).sqrt()


def masked_mse(predicted: Tensor, target: Tensor, removed: Tensor) -> Tensor:
    """Squared error of (B, L, D) rows, mean over D and over the hidden positions; a scalar, 0 where nothing is hidden.

    Args:
        removed: (B, L) bool.
    """
    error = (predicted - target).square().mean(-1)
    return (error * removed).sum() / removed.sum().clamp_min(1)
