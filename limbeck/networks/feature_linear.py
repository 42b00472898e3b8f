"""A linear layer on rows that may be sparse: bags of words have a few entries in thousands."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from limbeck.core.sparse_products import product

SPARSE_BELOW = 0.1  # of the entries: above it dense products are faster


class FeatureLinear(nn.Linear):
    """``x W + b`` for dense rows (N, F) and for sparse ones (CSR)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.layout == torch.strided:
            return super().forward(x)
        found = product(x, self.weight.t())
        return found if self.bias is None else found + self.bias


def thinned(x: Tensor) -> Tensor:
    """Rows (N, F) in CSR form where less than :data:`SPARSE_BELOW` of the entries are not 0, else as they are."""
    if x.layout != torch.strided or x.ndim != 2 or float((x != 0).float().mean()) >= SPARSE_BELOW:
        return x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the layout is young
        return x.to_sparse_csr()
