"""Augmentations that can be replayed: a whole view's parameters are drawn at once, then applied by sample id."""

from __future__ import annotations

import torch
from torch import Tensor


class ShiftFlip:
    """Random translation with zero padding, and optionally a horizontal flip.

    Args:
        shift: largest translation in pixels, each axis; 0 for none.
        flip: mirror half of the images. Not for digits or text.
    """

    def __init__(self, shift: int, flip: bool = False) -> None:
        self.shift, self.flip = shift, flip

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, 3) int64: dy, dx in [-shift, shift], and 1 where the image is mirrored."""
        moves = torch.randint(-self.shift, self.shift + 1, (n, 2), generator=generator)
        mirrored = torch.randint(0, 2 if self.flip else 1, (n, 1), generator=generator)
        return torch.cat([moves, mirrored], 1)

    def apply(self, inputs: Tensor, parameters: Tensor) -> Tensor:
        """Images (B, C, H, W); one gather for the whole batch."""
        b, c, h, w = inputs.shape
        s = self.shift
        padded = torch.nn.functional.pad(inputs, (s, s, s, s)) if s else inputs
        rows = torch.arange(h)[None, :] + s + parameters[:, 0:1]
        columns = torch.arange(w)[None, :]
        columns = torch.where(parameters[:, 2:3] == 1, w - 1 - columns, columns) + s + parameters[:, 1:2]
        flat = (rows[:, :, None] * (w + 2 * s) + columns[:, None, :]).reshape(b, 1, h * w)
        return padded.flatten(2).gather(2, flat.expand(b, c, h * w)).reshape(b, c, h, w)
