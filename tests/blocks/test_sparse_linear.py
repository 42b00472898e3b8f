"""Sparse layers give what the dense ones give, whatever runs them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from limbeck.blocks.one_shot_pruning import Pattern, as_matrix, from_matrix, magnitude
from limbeck.blocks.sparse_linear import SparseLinear, can_semi_structured, choose_backend, sparse_execution
from limbeck.core.errors import InputError


def pruned(layer: nn.Module, share: float = 0.8) -> nn.Module:
    with torch.no_grad():
        matrix = as_matrix(layer)
        layer.weight.copy_(from_matrix(layer, matrix * magnitude(matrix, Pattern(share))))
    return layer


@pytest.mark.parametrize("backend", ["scipy", "torch", "csr", "dense", "auto"])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(24, 10), lambda: nn.Linear(24, 10, bias=False), lambda: Conv1D(10, 24)]
)
@pytest.mark.parametrize("shape", [(1, 24), (24,), (5, 24), (2, 3, 24)])
def test_outputs_are_those_of_the_dense_layer(backend, make, shape) -> None:
    torch.manual_seed(0)
    layer = pruned(make())
    x = torch.randn(*shape)
    with torch.no_grad():
        made = SparseLinear(layer, backend)
        torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-6)
        assert torch.equal(made.weight.to_dense(), as_matrix(layer))


def test_double_precision_and_empty_rows() -> None:
    layer = pruned(nn.Linear(6, 4).double(), 0.5)
    with torch.no_grad():
        layer.weight[1] = 0
        x = torch.randn(3, 6, dtype=torch.float64)
        for backend in ("scipy", "torch"):
            torch.testing.assert_close(SparseLinear(layer, backend)(x), layer(x))


def test_auto_skips_zeros_where_that_is_faster() -> None:
    assert choose_backend(torch.ones(8, 8)) == "dense"
    assert choose_backend(torch.eye(512)) == "csr"
    assert choose_backend(torch.eye(512, dtype=torch.bfloat16)) == choose_backend(torch.eye(256)) == "dense"
    assert not can_semi_structured(torch.zeros(64, 64))


def test_a_network_runs_sparsely_and_stays_as_it_was() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten(), pruned(nn.Linear(12, 8)), nn.ReLU(), pruned(nn.Linear(8, 2)))
    chosen = {name: net.get_submodule(name) for name in ("0", "2", "4")}
    made = sparse_execution(net, chosen, "torch")
    assert [type(made[i]) for i in (0, 2, 4)] == [nn.Conv1d, SparseLinear, SparseLinear]
    assert isinstance(net[2], nn.Linear) and not made.training
    x = torch.randn(5, 4, 3)
    with torch.no_grad():
        torch.testing.assert_close(made(x), net(x), rtol=1e-5, atol=1e-6)


def test_transformers_of_pytorch_itself() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    made = sparse_execution(net, {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear)}, "scipy")
    assert isinstance(made.layers[0].linear1, SparseLinear)
    assert not isinstance(made.layers[0].self_attn.out_proj, SparseLinear)
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False] * 3, [False, False, True]])
    with torch.no_grad():  # where PyTorch would take its fused kernels
        torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-5)
        masked = [m(x, src_key_padding_mask=padding)[~padding] for m in (made, net)]
        torch.testing.assert_close(masked[0], masked[1], rtol=1e-4, atol=1e-5)


def test_what_cannot_run_is_named() -> None:
    with pytest.raises(InputError, match="not Conv1d"):
        SparseLinear(nn.Conv1d(2, 2, 1))
    with pytest.raises(InputError, match=r"2:4 sparse weights in half precision .* on cpu"):
        SparseLinear(nn.Linear(64, 64), "semi-structured")
    with pytest.raises(InputError, match="single or double precision"), torch.no_grad():
        SparseLinear(nn.Linear(4, 4).half(), "scipy")(torch.zeros(1, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_two_of_four_on_a_gpu() -> None:
    layer = nn.Linear(256, 128).half().cuda()
    with torch.no_grad():
        layer.weight.mul_(magnitude(layer.weight, Pattern.parse("2:4")))
    made = SparseLinear(layer)
    assert made.backend == "semi-structured"
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        torch.testing.assert_close(made(x), layer(x), rtol=1e-2, atol=1e-2)
