"""Linear layers that skip the zeros: compressed rows through PyTorch or SciPy on a CPU, 2:4 through a GPU's sparse tensor cores."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.one_shot_pruning import as_matrix, transposed
from limbeck.core.errors import InputError

Backend = Literal["auto", "csr", "scipy", "torch", "semi-structured", "dense"]
Named = Literal["csr", "scipy", "torch", "semi-structured", "dense"]
DENSEST, SMALLEST = 0.105, 1 << 18
"""Share of non-zeros up to which, and number of weights from which on, skipping zeros is faster on a CPU; see ``benchmarks/sparse_layers.py``."""


class SparseLinear(nn.Module):
    """``y = W x + b`` with a sparse W, in place of a linear layer, for inference.

    Args:
        layer: an ``nn.Linear``, or 🤗 transformers' ``Conv1D``; it is left alone.
        backend: ``scipy`` (compressed rows, one thread), ``torch`` (compressed rows, all threads), ``csr`` (the former for a single x, the latter for
            several: each is the faster one there), ``semi-structured`` (2:4, on an NVIDIA GPU, in half precision or int8), ``dense``. ``auto``: on a GPU
            semi-structured where W is 2:4 and the GPU can; on a CPU csr where W has a tenth of its weights at most and 512 x 512 at least; else dense,
            which is faster there.

    Raises:
        InputError: another kind of layer, or a backend that cannot work with this weight on this device.
    """

    def __init__(self, layer: nn.Module, backend: Backend = "auto") -> None:
        super().__init__()
        if not (isinstance(layer, nn.Linear) or transposed(layer)):
            raise InputError(f"only linear layers run sparsely, not {type(layer).__name__}")
        matrix = as_matrix(layer)
        bias: Any = layer.bias
        self.out_features, self.in_features = matrix.shape
        self.backend: Named = choose_backend(matrix) if backend == "auto" else backend
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._scipy: Any = None
        if self.backend in ("csr", "scipy", "torch"):
            with warnings.catch_warnings():  # PyTorch says once that the format is in beta
                warnings.simplefilter("ignore")
                sparse = matrix.to_sparse_csr()
            self.register_buffer("starts", sparse.crow_indices())
            self.register_buffer("columns", sparse.col_indices())
            self.register_buffer("values", sparse.values().clone())
        elif self.backend == "dense":
            self.register_buffer("dense", matrix.contiguous().clone())
        else:
            if not can_semi_structured(matrix):
                raise InputError(
                    "semi-structured execution needs 2:4 sparse weights in half precision or int8 on an NVIDIA GPU of compute capability 8 or more, "
                    f"not {matrix.dtype} on {matrix.device}"
                )
            # A tensor subclass that stays on its GPU and goes into no state dict.
            self.dense = torch.sparse.to_sparse_semi_structured(matrix.contiguous())

    bias: Tensor | None
    starts: Tensor
    columns: Tensor
    values: Tensor
    dense: Tensor

    @property
    def weight(self) -> Tensor:
        """W (out, in) in the form in which it is multiplied; some models ask for its type."""
        if self.backend in ("dense", "semi-structured"):
            return self.dense
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.starts, self.columns, self.values, shape, check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.backend in ("dense", "semi-structured"):
            return F.linear(x, self.dense, self.bias)
        rows = x.reshape(-1, self.in_features)
        single = self.backend == "csr" and len(rows) == 1 and rows.device.type == "cpu"
        y = self._by_scipy(rows) if self.backend == "scipy" or single else self._by_torch(rows)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _by_torch(self, rows: Tensor) -> Tensor:
        return self.weight @ rows[0] if len(rows) == 1 else (self.weight @ rows.T).T

    def _by_scipy(self, rows: Tensor) -> Tensor:
        if self._scipy is None or self._scipy.dtype != rows.numpy(force=True).dtype:
            self._scipy = self._matrix(rows.numpy(force=True).dtype)
        x = rows.numpy(force=True)
        y = self._scipy @ x[0] if len(x) == 1 else np.ascontiguousarray((self._scipy @ x.T).T)
        return torch.from_numpy(y).to(rows.device)

    def _matrix(self, dtype: Any) -> Any:
        from scipy.sparse import csr_matrix

        if self.values.device.type != "cpu" or self.values.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"SciPy works on a CPU in single or double precision, not on {self.values.device} in {self.values.dtype}"
            )
        parts = (self.values.numpy(), self.columns.int().numpy(), self.starts.int().numpy())
        return csr_matrix(parts, shape=(self.out_features, self.in_features), dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.backend}"


def choose_backend(matrix: Tensor) -> Named:
    """What ``auto`` means for a matrix where it is, see :class:`SparseLinear`; measured by ``benchmarks/sparse_layers.py``."""
    if matrix.device.type != "cpu":
        return "semi-structured" if can_semi_structured(matrix) else "dense"
    known = matrix.dtype in (torch.float32, torch.float64) and matrix.numel() >= SMALLEST
    return "csr" if known and float((matrix != 0).double().mean()) <= DENSEST else "dense"


def can_semi_structured(matrix: Tensor) -> bool:
    """Whether 2:4 execution works: an NVIDIA GPU of compute capability 8 or more, a type that it multiplies, at most 2 of every 4 weights."""
    if matrix.device.type != "cuda" or torch.cuda.get_device_capability(matrix.device)[0] < 8:
        return False
    if matrix.dtype not in (torch.float16, torch.bfloat16, torch.int8) or matrix.shape[0] % 64 or matrix.shape[1] % 64:
        return False
    return bool(((matrix != 0).view(-1, 4).sum(1) <= 2).all())


def sparse_execution(model: nn.Module, layers: Mapping[str, nn.Module], backend: Backend = "auto") -> nn.Module:
    """A copy of a network for inference whose named linear layers skip their zeros.

    Other kinds of layer stay as they are, and so does the last one in PyTorch's ``MultiheadAttention``, which uses its weight without calling it.

    Args:
        model: in evaluation mode afterwards; the original is left alone.
        layers: its layers by name.
        backend: see :class:`SparseLinear`.
    """
    made = copy.deepcopy(model).eval()
    for name in layers:
        layer = made.get_submodule(name)
        path, _, own = name.rpartition(".")
        parent = made.get_submodule(path)
        if (isinstance(layer, nn.Linear) or transposed(layer)) and not isinstance(parent, nn.MultiheadAttention):
            setattr(parent, own, SparseLinear(layer, backend))
    for module in made.modules():  # their fused kernels read the weights of layers instead of calling them
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return made
