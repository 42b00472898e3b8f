"""Products of a fixed sparse matrix with dense rows, whose gradient does not turn the matrix around again in every step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_TRANSPOSED: Any = WeakIdKeyDictionary()


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix @ x`` with gradient for x alone.

    Args:
        matrix: (M, N) CSR. Its transpose is made at the first gradient and kept as long as the matrix lives.
        x: (N, F) dense.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        found: Tensor = matrix @ x
        return found
    made: Tensor = _Product.apply(matrix, x)
    return made


def transposed(matrix: Tensor) -> Tensor:
    """The transpose of a CSR matrix, in CSR form; made once for each."""
    found: Tensor | None = _TRANSPOSED.get(matrix)
    if found is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the layout is young
            found = matrix.detach().transpose(0, 1).to_sparse_csr()
        _TRANSPOSED[matrix] = found
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor) -> Tensor:
        ctx.matrix = matrix
        found: Tensor = matrix @ x
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor]:
        return None, product(transposed(ctx.matrix), upstream[0])
