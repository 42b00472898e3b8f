"""Mixing the images of a batch with one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from limbeck.core.errors import InputError


@dataclass(frozen=True)
class CutMix:
    """Boxes to paste from one image of a batch into another. Drawn once, it can be applied to several versions of the batch.

    Labels are left to the caller: where teachers look at the mixed image there is nothing to mix.

    Attributes:
        partner: (B,) int64, the image that each image gets its box from.
        box: (B, 4) top, bottom, left, right, as fractions of height and width in [0, 1].

    Source: "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (2019). The published code
    draws one box for a whole batch and rounds to pixels before it clips; here every image has its own box, kept in fractions
    so that student and teacher may see different resolutions.
    """

    partner: Tensor
    box: Tensor

    @classmethod
    def draw(cls, batch_size: int, alpha: float = 1.0) -> Self:
        """A random pairing and random boxes.

        A box has sides sqrt(1 - share) of the image's with share ~ Beta(alpha, alpha) (uniform for 1) and a centre that is
        uniform in the image; what sticks out is cut off. Partners are a random permutation, so an image may get itself. All
        draws come from torch's global random state on the CPU, which a run seeds and its checkpoints keep.

        Raises:
            InputError: ``alpha`` not above 0, or an empty batch.
        """
        if not alpha > 0:
            raise InputError(f"alpha of CutMix must be above 0 (got {alpha})")
        if batch_size < 1:
            raise InputError(f"CutMix needs at least one image (got a batch of {batch_size})")
        share = torch.distributions.Beta(alpha, alpha).sample((batch_size, 1))
        half = (1 - share).clamp_min(0).sqrt() / 2
        centre = torch.rand(batch_size, 2)
        low, high = (centre - half).clamp_min(0), (centre + half).clamp_max(1)
        box = torch.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)
        return cls(torch.randperm(batch_size), box)

    def mask(self, height: int, width: int) -> Tensor:
        """(B, height, width) bool, True inside the boxes; their bounds are rounded to pixels."""
        rows, columns = torch.arange(height), torch.arange(width)
        top, bottom = (self.box[:, :2, None] * height).round().unbind(1)
        left, right = (self.box[:, 2:, None] * width).round().unbind(1)
        inside_rows = (rows >= top) & (rows < bottom)
        inside_columns = (columns >= left) & (columns < right)
        return inside_rows[:, :, None] & inside_columns[:, None, :]

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in, mixed images of the same shape out.

        Raises:
            InputError: another number of axes, or another batch size than was drawn for.
        """
        if images.ndim != 4 or len(images) != len(self.partner):
            raise InputError(
                f"CutMix needs images of shape ({len(self.partner)}, channels, height, width), not {tuple(images.shape)}"
            )
        mask = self.mask(*images.shape[2:]).to(images.device).unsqueeze(1)
        return torch.where(mask, images[self.partner.to(images.device)], images)
