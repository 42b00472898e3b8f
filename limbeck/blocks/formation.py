"""How stored synthetic images become the images that a loss sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError

Formation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images (N, C, H, W), labels (N,) or (N, K)) -> the same, possibly more of them; differentiable."""


def identity(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images as they are."""
    return images, labels


def flip_union(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images and their mirror images (left to right), labels repeated: (2N, C, H, W).

    Source: "FYI: Flip Your Images for Dataset Distillation" (2024).
    """
    return torch.cat([images, images.flip(-1)]), torch.cat([labels, labels])


class MultiFormation:
    """Every stored image is a grid of ``factor`` x ``factor`` small images, each enlarged to full size: (factor^2 N, C, H, W).

    Args:
        factor: at least 1, which leaves the images as they are.

    Raises:
        InputError: ``factor`` below 1; when called: images whose sides it does not divide.

    Source: "Dataset Condensation via Efficient Synthetic-Data Parameterization" (2022).
    """

    def __init__(self, factor: int) -> None:
        if factor < 1:
            raise InputError(f"a multi-formation factor is at least 1 (got {factor})")
        self.factor = factor

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.factor == 1:
            return images, labels
        n, channels, height, width = images.shape
        f = self.factor
        if height % f or width % f:
            raise InputError(f"images of {height}x{width} pixels cannot be cut into {f}x{f} equal parts")
        parts = images.unflatten(3, (f, width // f)).unflatten(2, (f, height // f))  # N, C, f, h, f, w
        parts = parts.permute(0, 2, 4, 1, 3, 5).reshape(n * f * f, channels, height // f, width // f)
        large = F.interpolate(parts, size=(height, width), mode="bilinear", align_corners=False)
        return large, labels.repeat_interleave(f * f, 0)
