"""Differentiable siamese augmentation: random image changes that gradients pass through and that can be replayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import UnknownNameError

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
_DRAWS = 6  # uniform numbers that an operation may use
Shared = Literal["none", "op", "all"]


class DiffAug:
    """One operation for each image, drawn uniformly from a list; parameters are drawn first and applied afterwards.

    ==========  =================================================================================================
    operation   what it does
    ==========  =================================================================================================
    color       brightness ``x + b (u - 1/2)``, then saturation ``m + s u (x - m)`` about the channels' mean, then contrast
                ``m + (c + u)(x - m)`` about the image's mean
    crop        a shift by up to ``crop`` of each side, in whole pixels; what comes in is zero
    cutout      a square of ``cutout`` of each side is zero
    flip        mirrored left to right with probability 1/2
    scale       height and width stretched by factors between ``1 / scale`` and ``scale``
    rotate      turned by up to ``rotate`` degrees
    ==========  =================================================================================================

    Zeros are the mean colour if images are normalised. The parameters are plain uniform numbers, so what was drawn for one set of
    images can be applied to another (siamese augmentation), and again in a second pass.

    Args:
        operations: which may be drawn, of ``OPERATIONS``; none leaves images as they are. A string is the usual notation
            ``color_crop_cutout_flip_scale_rotate``, or ``none``.
        brightness, saturation, contrast, crop, cutout, scale, rotate: strengths, see above.

    Raises:
        UnknownNameError: no such operation.

    Source: "Dataset Condensation with Differentiable Siamese Augmentation" (2021); operations and strengths are its published ones.
    """

    def __init__(
        self,
        operations: str | Sequence[str] = OPERATIONS,
        *,
        brightness: float = 1.0,
        saturation: float = 2.0,
        contrast: float = 0.5,
        crop: float = 0.125,
        cutout: float = 0.5,
        scale: float = 1.2,
        rotate: float = 15.0,
    ) -> None:
        if isinstance(operations, str):
            operations = () if operations in ("", "none") else operations.split("_")
        for name in operations:
            if name not in OPERATIONS:
                raise UnknownNameError("augmentation", name, OPERATIONS, hint=f"Known: {', '.join(OPERATIONS)}.")
        self.operations = tuple(operations)
        self.brightness, self.saturation, self.contrast = brightness, saturation, contrast
        self.crop, self.cutout, self.scale, self.rotate = crop, cutout, scale, rotate

    def draw(self, n: int, generator: torch.Generator | None = None, *, shared: Shared = "none") -> Tensor:
        """Parameters (n, 7) for ``n`` images.

        Args:
            generator: None: torch's random state.
            shared: ``op``: one operation for all of them, with parameters of their own; ``all``: one draw for all.
        """
        rows = torch.rand(n, 1 + _DRAWS, generator=generator)
        rows[:, 0] = (rows[:, 0] * max(1, len(self.operations))).floor()
        if shared == "op":
            rows[:, 0] = rows[:1, 0]
        elif shared == "all":
            rows = rows[:1].expand(n, -1).clone()
        return rows

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Images (B, C, H, W) in, augmented images out; ``parameters`` (B, 7) from :meth:`draw`."""
        if not self.operations:
            return images
        chosen = parameters[:, 0]
        draws = parameters[:, 1:].to(images)
        if bool((chosen == chosen[0]).all()):
            return self._operation(int(chosen[0]))(images, draws)
        out = images
        for number in range(len(self.operations)):
            ids = (chosen == number).nonzero().flatten().to(images.device)
            if len(ids):
                out = out.index_copy(0, ids, self._operation(number)(images[ids], draws[ids]))
        return out

    def __call__(self, images: Tensor, *, shared: Shared = "none") -> Tensor:
        """Draw and apply."""
        return self.apply(images, self.draw(len(images), shared=shared))

    def _operation(self, number: int) -> Callable[[Tensor, Tensor], Tensor]:
        operation: Callable[[Tensor, Tensor], Tensor] = getattr(self, f"_{self.operations[number]}")
        return operation

    # ---- the operations: images (B, C, H, W) and uniform numbers (B, 6) in, images out ------------------------------------------

    def _color(self, x: Tensor, u: Tensor) -> Tensor:
        u = u[:, :, None, None, None]
        x = x + self.brightness * (u[:, 0] - 0.5)
        mean = x.mean(1, keepdim=True)
        x = mean + self.saturation * u[:, 1] * (x - mean)
        mean = x.mean((1, 2, 3), keepdim=True)
        return mean + (self.contrast + u[:, 2]) * (x - mean)

    def _crop(self, x: Tensor, u: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        down, right = int(height * self.crop + 0.5), int(width * self.crop + 0.5)
        rows = _positions(u[:, 0], down, height)
        columns = _positions(u[:, 1], right, width)
        padded = F.pad(x, (right, right, down, down)).permute(0, 2, 3, 1)
        batch = torch.arange(len(x), device=x.device)[:, None, None]
        return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _cutout(self, x: Tensor, u: Tensor) -> Tensor:
        rows = _hole(u[:, 0], self.cutout, x.shape[-2])
        columns = _hole(u[:, 1], self.cutout, x.shape[-1])
        hole = rows[:, :, None] & columns[:, None, :]
        return x * (~hole[:, None]).to(x.dtype)

    def _flip(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.where((u[:, 0] < 0.5)[:, None, None, None], x.flip(-1), x)

    def _scale(self, x: Tensor, u: Tensor) -> Tensor:
        factors = 1 / self.scale + (self.scale - 1 / self.scale) * u[:, :2]
        return _warp(x, torch.diag_embed(factors))

    def _rotate(self, x: Tensor, u: Tensor) -> Tensor:
        angle = math.radians(self.rotate) * (2 * u[:, 0] - 1)
        cos, sin = angle.cos(), angle.sin()
        return _warp(x, torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2))


def _positions(u: Tensor, most: int, size: int) -> Tensor:
    """(B, size) indices into an axis padded by ``most`` on both sides, shifted by a whole number in [-most, most]."""
    start = (u * (2 * most + 1)).long().clamp_(max=2 * most)
    return start[:, None] + torch.arange(size, device=u.device)


def _hole(u: Tensor, share: float, size: int) -> Tensor:
    """(B, size) True within a stretch of ``share`` of the axis whose middle lies anywhere on it."""
    length = int(size * share + 0.5)
    middle = (u * (size + 1 - length % 2)).long().clamp_(max=size - length % 2)
    start = (middle - length // 2)[:, None]
    at = torch.arange(size, device=u.device)
    return (at >= start) & (at < start + length)


def _warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Images (B, C, H, W) sampled bilinearly at linearly mapped coordinates; ``matrix`` (B, 2, 2), zeros outside."""
    theta = F.pad(matrix.to(x), (0, 1))
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
