"""ZCA whitening: pixels decorrelated, images still images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.errors import InputError


@dataclass(frozen=True)
class ZCA:
    """The affine map ``x -> (x - mean) W`` on flattened images, with symmetric W.

    Attributes:
        mean: (D,) mean of the images that it was fitted on.
        matrix: (D, D) whitening matrix W.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(cls, images: Tensor, eps: float = 0.1) -> ZCA:
        """Whitening for images (N, C, H, W).

        Args:
            eps: added to the eigenvalues of the covariance, relative to their mean, so that directions without variance
                are not blown up.

        Raises:
            InputError: fewer than two images, or more than 16,384 values each, whose covariance does not fit.
        """
        if len(images) < 2:
            raise InputError("whitening needs at least two images")
        x = images.flatten(1).double()
        if x.shape[1] > 16_384:
            raise InputError(f"whitening images of {x.shape[1]} values needs too much memory: leave zca off")
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / (len(x) - 1)
        values, vectors = torch.linalg.eigh(covariance)
        scale = (values.clamp_min(0) + eps * values.mean()).rsqrt()
        return cls(mean.float(), (vectors * scale @ vectors.T).float())

    def __call__(self, images: Tensor) -> Tensor:
        """Whitened images, the same shape."""
        return ((images.flatten(1) - self.mean) @ self.matrix).view_as(images)

    def inverse(self, images: Tensor) -> Tensor:
        """Images from whitened images, for looking at."""
        flat = torch.linalg.solve(self.matrix, images.flatten(1).T).T + self.mean
        return flat.view_as(images)

    @property
    def nbytes(self) -> int:
        return 4 * (self.mean.numel() + self.matrix.numel())
