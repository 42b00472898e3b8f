from __future__ import annotations

import gc

import torch

from limbeck.core import sparse_products
from limbeck.core.sparse_products import product, transposed

torch.set_num_threads(1)


def matrix() -> torch.Tensor:
    torch.manual_seed(0)
    dense = torch.randn(5, 7, dtype=torch.float64) * (torch.rand(5, 7) < 0.4)
    return dense.to_sparse_csr()


def test_values_and_both_gradients_are_those_of_dense_products() -> None:
    a = matrix()
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(product(a, x), a.to_dense() @ x)
    assert torch.autograd.gradcheck(lambda x: product(a, x), (x,))
    assert torch.autograd.gradgradcheck(lambda x: product(a, x).pow(3), (x,))


def test_the_transpose_is_made_once_and_leaves_with_its_matrix() -> None:
    a = matrix()
    assert transposed(a) is transposed(a)
    torch.testing.assert_close(transposed(a).to_dense(), a.to_dense().T)
    before = len(sparse_products._TRANSPOSED)
    del a
    gc.collect()
    assert len(sparse_products._TRANSPOSED) < before


def test_without_gradients_nothing_is_kept() -> None:
    a, x = matrix(), torch.randn(7, 2, dtype=torch.float64)
    with torch.no_grad():
        product(a, x.requires_grad_())
    product(a, x.detach())
    assert a not in sparse_products._TRANSPOSED
