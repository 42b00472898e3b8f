"""Similarities of all pairs of a ground set, held as a matrix where it is small and computed by columns where it is not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError

Kind = Literal["cosine", "inner"]
DENSE = 2**26
"""A kernel of at most so many entries is held whole (256 MiB in single precision)."""
BLOCK = 2**24
"""So many entries are computed at a time where it is not."""


class Kernel(ABC):
    """A symmetric kernel K (n, n).

    Attributes:
        size: n.
        nonnegative: True if no entry can be negative.
    """

    size: int
    nonnegative: bool

    @abstractmethod
    def columns(self, index: Tensor) -> Tensor:
        """K[:, index], (n, k)."""

    @abstractmethod
    def sums(self) -> Tensor:
        """The sum of every column, (n,) float64."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """K(v, v), (n,) float64."""

    @abstractmethod
    def restrict(self, index: Tensor) -> Kernel:
        """The kernel of the elements ``index`` (m,) alone, in that order."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the entries are."""


class MatrixKernel(Kernel):
    """A kernel that is given as a matrix.

    Args:
        matrix: (n, n), symmetric.

    Raises:
        InputError: not square, not symmetric, or NaN or infinity in it.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
            raise InputError(f"a kernel is a square matrix with at least one row, not of shape {tuple(matrix.shape)}")
        if not bool(torch.isfinite(matrix).all()):
            raise InputError("the kernel holds NaN or infinity: clean the similarities first")
        if not torch.allclose(matrix, matrix.T, rtol=1e-4, atol=1e-5):
            raise InputError("the kernel is not symmetric: give (K + K.T) / 2")
        self.matrix, self.size = matrix, len(matrix)
        self.nonnegative = bool((matrix >= 0).all())

    def columns(self, index: Tensor) -> Tensor:
        return self.matrix[index].T  # rows are contiguous, and the same by symmetry

    def sums(self) -> Tensor:
        return self.matrix.sum(0, dtype=torch.float64)

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().double()

    def restrict(self, index: Tensor) -> MatrixKernel:
        kernel = object.__new__(MatrixKernel)  # checked already
        kernel.matrix, kernel.size, kernel.nonnegative = self.matrix[index][:, index], len(index), self.nonnegative
        return kernel

    @property
    def device(self) -> torch.device:
        return self.matrix.device


class EmbeddingKernel(Kernel):
    """K(a, b) = 0.5 + 0.5 cos(a, b) in [0, 1], or the inner product of unit vectors in [-1, 1]; never held as a matrix.

    A zero vector has cosine 0 with everything, itself included. Both kernels are affine in the unit vectors, so that sums over the
    ground set need one pass over the embeddings and no matrix.

    Args:
        embeddings: (n, e).
        kind: ``cosine``: 0.5 + 0.5 cos, or ``inner``: cos.

    Raises:
        InputError: no (n, e) with n >= 1, NaN or infinity.
    """

    def __init__(self, embeddings: Tensor, kind: Kind = "cosine") -> None:
        self.unit, self.kind = unit_rows(embeddings), kind
        self.offset, self.scale = (0.5, 0.5) if kind == "cosine" else (0.0, 1.0)
        self.size, self.nonnegative = len(self.unit), kind == "cosine"

    def columns(self, index: Tensor) -> Tensor:
        product = self.unit @ self.unit[index].T
        return product if self.kind == "inner" else product.mul_(self.scale).add_(self.offset)

    def sums(self) -> Tensor:
        whole = self.unit.sum(0, dtype=torch.float64)
        return self.offset * self.size + self.scale * (self.unit.double() @ whole)

    def diagonal(self) -> Tensor:
        return self.offset + self.scale * self.unit.double().square().sum(1)

    def restrict(self, index: Tensor) -> EmbeddingKernel:
        kernel = object.__new__(EmbeddingKernel)
        kernel.__dict__.update(self.__dict__)
        kernel.unit, kernel.size = self.unit[index], len(index)
        return kernel

    @property
    def device(self) -> torch.device:
        return self.unit.device


def similarity_kernel(embeddings: Tensor, kind: Kind = "cosine", dense: int = DENSE) -> Kernel:
    """The kernel of embeddings (n, e), as a matrix if it has at most ``dense`` entries.

    Raises:
        InputError: see :class:`EmbeddingKernel`.
    """
    kernel = EmbeddingKernel(embeddings, kind)
    if kernel.size**2 > dense:
        return kernel
    whole = kernel.columns(torch.arange(kernel.size, device=kernel.device))
    held = object.__new__(MatrixKernel)
    held.matrix, held.size, held.nonnegative = (whole + whole.T) / 2, kernel.size, kernel.nonnegative
    return held


def unit_rows(embeddings: Tensor) -> Tensor:
    """Rows (n, e) scaled to length 1; rows of zeros stay zeros.

    Raises:
        InputError: no (n, e) with n >= 1, NaN or infinity.
    """
    if embeddings.ndim != 2 or len(embeddings) == 0:
        raise InputError(f"embeddings are one row per sample (n, e), not of shape {tuple(embeddings.shape)}")
    rows = embeddings.detach()
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows)).any(1).nonzero()[0])
        raise InputError(f"the embeddings hold NaN or infinity (first in sample {bad}): clean them first")
    # dividing by the largest entry first keeps tiny and huge rows from under- and overflowing in the norm
    largest = rows.abs().amax(1, keepdim=True)
    return F.normalize(torch.where(largest > 0, rows / largest.where(largest > 0, 1.0), 0.0), dim=1)
