"""The rows of a bank that are most similar to given rows, read block by block: no matrix of all similarities is ever held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.blocks.similarity_kernels import unit_rows
from limbeck.core.errors import InputError

Rows = Tensor | NDArray[Any]
Skip = Literal["nothing", "same", "copies"]
Block = tuple[int, int]
BLOCK: Block = (1024, 8192)
"""Rows and bank rows that are compared at a time: 32 MiB of similarities in single precision."""
COPY = 1 - 1e-5
"""Cosine from which two rows count as the same one."""


def checked_rows(rows: Any, what: str = "embeddings", width: int | None = None) -> Rows:
    """``rows`` if it is a matrix (N, D), N and D at least 1, of ``width`` columns where that is given.

    Raises:
        InputError: it is not.
    """
    if not isinstance(rows, Tensor | np.ndarray):
        raise InputError(f"{what} must be a numpy array or a torch tensor, not {type(rows).__name__}")
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"{what} must be a matrix with one embedding a row, not of shape {tuple(rows.shape)}")
    if width is not None and rows.shape[1] != width:
        raise InputError(f"{what} have {rows.shape[1]} dimensions, not {width}: all sides must be of one space")
    return rows


def unit_block(rows: Rows, start: int, stop: int, device: Any = None) -> Tensor:
    """Rows ``start`` to ``stop`` at length 1, in single precision at least; rows of zeros stay zeros.

    Arrays that are mapped from a file, and half precision, are converted here, so never as a whole.

    Raises:
        InputError: NaN or infinity; it says in which row.
    """
    part = rows[start:stop]
    if not isinstance(part, Tensor):
        part = torch.from_numpy(np.ascontiguousarray(part) if part.flags.writeable else np.array(part))
    if device is not None:
        part = part.to(device)
    try:
        return unit_rows(part)
    except InputError:
        bad = start + int((~torch.isfinite(part)).any(1).nonzero()[0])
        raise InputError(f"the embeddings hold NaN or infinity (first in row {bad}): clean them first") from None


def blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of blocks of ``size`` (the last may be shorter).

    Raises:
        InputError: a size below 1.
    """
    if size < 1:
        raise InputError(f"blocks need at least one row (got {size})")
    return ((start, min(start + size, count)) for start in range(0, count, size))


def unit_blocks(rows: Rows, size: int, device: Any = None) -> Iterator[tuple[int, Tensor]]:
    """Where each block starts, and its unit rows."""
    return ((start, unit_block(rows, start, stop, device)) for start, stop in blocks(len(rows), size))


@torch.no_grad()
def top_k(rows: Rows, bank: Rows, k: int, *, skip: Skip = "nothing", block: Block = BLOCK) -> tuple[Tensor, Tensor]:
    """The ``k`` largest cosines of each row with the bank, best first, and where they are.

    Args:
        rows: (N, D). bank: (M, D).
        k: from 1 to M.
        skip: ``same``: position i of the bank is row i itself, and does not count; ``copies``: nothing counts whose cosine is above
            1 - 1e-5. A place that cannot be filled has the similarity -infinity.
        block: rows and bank rows at a time.

    Returns:
        similarities (N, k) and positions (N, k) int64, on the device of ``rows``.

    Raises:
        InputError: shapes that do not fit, a ``k`` out of range, NaN or infinity.
    """
    checked_rows(rows)
    checked_rows(bank, "the bank's embeddings", rows.shape[1])
    if not 1 <= k <= len(bank):
        raise InputError(f"k must be between 1 and the bank's {len(bank)} rows (got {k})")
    found = [
        nearest_of(unit, bank, k, skip=skip, first=start, bank_rows=block[1])
        for start, unit in unit_blocks(rows, block[0])
    ]
    return torch.cat([values for values, _ in found]), torch.cat([places for _, places in found])


def nearest_of(
    unit: Tensor, bank: Rows, k: int, *, skip: Skip = "nothing", first: int = 0, bank_rows: int = BLOCK[1]
) -> tuple[Tensor, Tensor]:
    """:func:`top_k` of one block of unit rows, whose first row has number ``first``."""
    values = unit.new_full((len(unit), 0), 0.0)
    places = torch.empty(len(unit), 0, dtype=torch.long, device=unit.device)
    for start, other in unit_blocks(bank, bank_rows, unit.device):
        near = unit @ other.T.to(unit.dtype)
        if skip == "copies":
            near.masked_fill_(near > COPY, -torch.inf)
        elif skip == "same":
            near[_same(first, len(unit), start, len(other), unit.device)] = -torch.inf
        best, where = near.topk(min(k, len(other)), dim=1)
        values, places = torch.cat([values, best], 1), torch.cat([places, where + start], 1)
        if values.shape[1] > k:
            values, where = values.topk(k, dim=1)
            places = places.gather(1, where)
    return values, places


def _same(first: int, count: int, start: int, width: int, device: Any) -> tuple[Tensor, Tensor]:
    """Row and column of the entries of a block of the similarity matrix that lie on its diagonal."""
    low, high = max(first, start), min(first + count, start + width)
    numbers = torch.arange(low, max(low, high), device=device)
    return numbers - first, numbers - start
