"""Augmentation that moves images and their label maps alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class WindowFlip:
    """A random square window of the image, enlarged or reduced to one size, and mirrored half of the time.

    Windows lie inside the image, so nothing is ever padded. Images are sampled bilinearly, label maps take the nearest pixel.

    Args:
        size: side of what comes out, in pixels.
        smallest, largest: the window's side as a fraction of the image's, drawn uniformly; within (0, 1].
        flip: mirror half of the images left to right.
    """

    def __init__(self, size: int, smallest: float = 0.7, largest: float = 1.0, flip: bool = True) -> None:
        self.size, self.smallest, self.largest, self.flip = size, smallest, largest, flip

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, 4): side of the window, its centre's y and x in [-1, 1] coordinates, and 1 or -1 where the image is mirrored."""
        draws = torch.rand(n, 4, generator=generator)
        side = self.smallest + (self.largest - self.smallest) * draws[:, 0]
        centre = (2 * draws[:, 1:3] - 1) * (1 - side)[:, None]
        sign = torch.where((draws[:, 3] < 0.5) & self.flip, -1.0, 1.0)
        return torch.cat([side[:, None], centre, sign[:, None]], 1)

    def apply(self, inputs: Tensor, parameters: Tensor) -> Tensor:
        """Images (B, C, H, W) in, (B, C, size, size) out."""
        return F.grid_sample(inputs, self._places(parameters, inputs), padding_mode="border", align_corners=False)

    def apply_labels(self, labels: Tensor, parameters: Tensor) -> Tensor:
        """Label maps (B, H, W) in, (B, size, size) out, of the same type and with no labels but those there were."""
        values = labels[:, None].double()
        places = self._places(parameters, values)
        moved = F.grid_sample(values, places, mode="nearest", padding_mode="border", align_corners=False)
        return moved[:, 0].to(labels.dtype)

    def _places(self, parameters: Tensor, like: Tensor) -> Tensor:
        """Where every output pixel is read, (B, size, size, 2) x and y in [-1, 1]."""
        side, y, x, sign = parameters.to(like.device, like.dtype).unbind(1)
        zero = torch.zeros_like(side)
        rows = torch.stack([torch.stack([sign * side, zero, x], -1), torch.stack([zero, side, y], -1)], 1)
        return F.affine_grid(rows, [len(side), 1, self.size, self.size], align_corners=False)
