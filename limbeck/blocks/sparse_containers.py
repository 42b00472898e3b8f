"""Sparse matrices as they are stored: a bit for each weight and the values, rows with column numbers, or n of every m.

A packed matrix is a few plain tensors, so that safetensors keeps them. Its values are exactly those of the matrix in the type that was asked for, zeros
exact. With nnz values of v bits, R rows and C columns

- ``bitmask`` takes nnz·v + R·C bits (the mask filled up to a byte): (1 - s)·v + 1 for each weight at sparsity s;
- ``csr`` takes nnz·(v + 16) + 32·(R + 1) bits, column numbers being 16 bits wide up to 65,536 columns and 32 beyond;
- ``n:m`` takes n·(v + ceil(log2 m)) bits for every m weights of a row, whether those n values are zero or not (filled up to a byte).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck.blocks.storage import Stored
from limbeck.core.errors import InputError, RunError
from limbeck.core.files import atomic_path

Form = Literal["auto", "bitmask", "csr", "nm"]
_SEPARATOR = "::"


@dataclass(frozen=True)
class Packed:
    """A matrix in one of the forms.

    Attributes:
        form: ``bitmask``, ``csr`` or ``n:m``.
        shape: (rows, columns).
        tensors: its parts by name.
    """

    form: str
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    @property
    def bits(self) -> int:
        return sum(8 * t.numel() * t.element_size() for t in self.tensors.values())

    def stored(self) -> Stored:
        """For :class:`~limbeck.blocks.storage.Storage`."""
        return Stored(self.shape[0] * self.shape[1], self.bits, self.form)

    def unpacked(self) -> Tensor:
        """The matrix (rows, columns), in the type that its values are kept in."""
        if self.form == "bitmask":
            return _from_bitmask(self)
        return _from_csr(self) if self.form == "csr" else _from_groups(self)


def pack(
    matrix: Tensor, form: str = "auto", dtype: torch.dtype | None = None, pattern: tuple[int, int] | None = None
) -> Packed:
    """A matrix in a form.

    Args:
        matrix: (rows, columns), with exact zeros.
        form: ``auto`` is the smallest that there is for it.
        dtype: of the values; None: the matrix's.
        pattern: (n, m), where every m consecutive weights of a row hold at most n values; needed for ``nm``.

    Raises:
        InputError: a form that does not exist or does not fit.
    """
    if matrix.ndim != 2:
        raise InputError(f"a sparse matrix has two axes, not the shape {tuple(matrix.shape)}")
    matrix = matrix.detach().cpu().to(dtype or matrix.dtype).contiguous()
    if form == "auto":
        forms = [_bitmask(matrix), _csr(matrix), *([] if pattern is None else [_groups(matrix, *pattern)])]
        return min(forms, key=lambda packed: packed.bits)
    if form == "bitmask":
        return _bitmask(matrix)
    if form == "csr":
        return _csr(matrix)
    if form == "nm":
        if pattern is None:
            raise InputError("the container 'nm' stores n:m sparsity: prune to a pattern such as 2:4, or take another")
        return _groups(matrix, *pattern)
    raise InputError(f"sparse matrices are stored as bitmask, csr or nm, not '{form}'")


def _bitmask(matrix: Tensor) -> Packed:
    there = matrix != 0
    bits = torch.from_numpy(np.packbits(there.numpy()))
    return Packed("bitmask", (matrix.shape[0], matrix.shape[1]), {"mask": bits, "values": matrix[there]})


def _from_bitmask(packed: Packed) -> Tensor:
    values = packed.tensors["values"]
    count = packed.shape[0] * packed.shape[1]
    there = np.unpackbits(packed.tensors["mask"].numpy(), count=count).astype(bool)
    dense = torch.zeros(count, dtype=values.dtype)
    dense[torch.from_numpy(there)] = values
    return dense.view(packed.shape)


def _csr(matrix: Tensor) -> Packed:
    rows, columns = matrix.shape
    at = matrix.nonzero()
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(at[:, 0], minlength=rows).cumsum(0)
    numbers = at[:, 1]
    if columns <= 1 << 16:  # unsigned 16 bits, kept in the signed type that every library knows
        numbers = torch.where(numbers < 1 << 15, numbers, numbers - (1 << 16)).to(torch.int16)
    parts = {"starts": starts.int(), "columns": numbers if columns <= 1 << 16 else numbers.int()}
    return Packed("csr", (rows, columns), {**parts, "values": matrix[at[:, 0], at[:, 1]]})


def _from_csr(packed: Packed) -> Tensor:
    values, columns = packed.tensors["values"], packed.tensors["columns"].long()
    if packed.tensors["columns"].dtype == torch.int16:
        columns = columns % (1 << 16)
    counts = packed.tensors["starts"].long().diff()
    dense = torch.zeros(packed.shape, dtype=values.dtype)
    dense[torch.arange(packed.shape[0]).repeat_interleave(counts), columns] = values
    return dense


def _groups(matrix: Tensor, keep: int, of: int) -> Packed:
    rows, columns = matrix.shape
    if columns % of:
        raise InputError(f"{keep}:{of} sparsity needs rows that {of} divides, not {columns} columns")
    groups = matrix.reshape(-1, of)
    there = groups != 0
    if int(there.sum(1).max()) > keep:
        raise InputError(f"the matrix is not {keep}:{of} sparse: some {of} consecutive weights hold more than {keep}")
    # The values in order, filled up by zeros.
    places = (~there).to(torch.int8).argsort(dim=1, stable=True)[:, :keep].sort(1).values
    width = max(1, (of - 1).bit_length())
    shifts = np.arange(width - 1, -1, -1)
    bits = (places.numpy().reshape(-1, 1) >> shifts) & 1
    parts = {"places": torch.from_numpy(np.packbits(bits.astype(np.uint8))), "values": groups.gather(1, places)}
    return Packed(f"{keep}:{of}", (rows, columns), parts)


def _from_groups(packed: Packed) -> Tensor:
    keep, of = map(int, packed.form.split(":"))
    values = packed.tensors["values"]
    width = max(1, (of - 1).bit_length())
    bits = np.unpackbits(packed.tensors["places"].numpy(), count=values.numel() * width).reshape(-1, width)
    places = torch.from_numpy(bits.astype(np.int64) @ (1 << np.arange(width - 1, -1, -1)))
    dense = torch.zeros(len(values), of, dtype=values.dtype)
    return dense.scatter_(1, places.view(-1, keep), values).view(packed.shape)


# ---- files -----------------------------------------------------------------------------------------------------------


def save_packed(path: Path, packed: Mapping[str, Packed], plain: Mapping[str, Tensor]) -> None:
    """Write a network: some tensors packed, the others as they are, as one safetensors file.

    The file's header says of each packed tensor its form and shape, as JSON.
    """
    tensors = {f"{name}{_SEPARATOR}{part}": t for name, p in packed.items() for part, t in p.tensors.items()}
    tensors |= {name: tensor.detach().cpu().clone() for name, tensor in plain.items()}
    about = {name: json.dumps({"form": p.form, "shape": list(p.shape)}) for name, p in packed.items()}
    with atomic_path(path) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata=about)


def load_packed(path: Path) -> tuple[dict[str, Packed], dict[str, Tensor]]:
    """What :func:`save_packed` wrote.

    Raises:
        RunError: no such file, or not one of these.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        packed = {
            name: Packed(
                entry["form"],
                (entry["shape"][0], entry["shape"][1]),
                {
                    key.removeprefix(f"{name}{_SEPARATOR}"): tensors.pop(key)
                    for key in [k for k in tensors if k.startswith(f"{name}{_SEPARATOR}")]
                },
            )
            for name, entry in about.items()
        }
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is no file of packed weights or is damaged ({error})") from None
    return packed, tensors


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A network's parameters and persistent buffers by name; one that several modules share only under its first name."""
    kept = model.state_dict().keys()
    return {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if name in kept}


@torch.no_grad()
def fill_from_packed(model: nn.Module, path: Path, matrices: Mapping[str, Callable[[Tensor], Tensor]]) -> nn.Module:
    """Fill a network from a file of packed weights.

    Args:
        model: of the architecture that was written.
        path: the file.
        matrices: by tensor name, how a matrix gets the shape of the tensor; a plain view where there is none.

    Raises:
        RunError: the file is damaged, or does not fit the network.
    """
    packed, plain = load_packed(path)
    own = own_tensors(model)
    if own.keys() != packed.keys() | plain.keys():
        odd = sorted(own.keys() ^ (packed.keys() | plain.keys()))
        raise RunError(f"{path} does not fit {type(model).__name__}: {', '.join(odd[:3])} on one side only")
    for name, tensor in own.items():
        value = plain[name] if name in plain else packed[name].unpacked()
        shape = matrices.get(name, lambda matrix, like=tensor: matrix.view(like.shape))
        tensor.copy_(value if name in plain else shape(value))
    return model
