r"""Inverse graph convolution: what an item's neighbours in a bank have in common is subtracted from its embedding.

For unit rows :math:`g_i` of a gallery and a bank B (M, D), with :math:`S = G B^\top`,

.. math:: U_B(G) = \mathrm{norm}\big(G - r\,P_B(G)\big),

norm being the scaling of rows to length 1, and the pull :math:`P_B` one of two.

Dense (:class:`DenseBank`): :math:`P_B(G) = \tfrac1M (S - s_0) B`, :math:`s_0` a constant, the mean of S. It is linear in G,

.. math:: P_B(G) = G\,C - s_0\,\bar b, \qquad C = \tfrac1M B^\top B, \quad \bar b = \tfrac1M B^\top 1, \qquad \overline{S} = \bar g \cdot \bar b,

so the whole bank is a D x D matrix and a vector, exactly, and S is never formed.

Local adjacency (:class:`LocalBank`): :math:`P_B(G) = \tfrac1k\,\mathrm{top}_k(S)\,B`, with all but the k largest entries of each row of S set to 0. The bank is
searched in blocks; at most rows x bank rows of a block, and k neighbours for each row of it, are held.

Source: "InvGC: Robust Cross-Modal Retrieval by Inverse Graph Convolution" (2023), in the form of its published code, which centres S and divides by
M; the paper's :math:`x_i - r\sum_j S_{ij}x_j` is ``centre=0`` with an r that is M times smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.blocks.nearest_rows import BLOCK, Block, Rows, Skip, checked_rows, nearest_of, unit_blocks
from limbeck.core.errors import InputError

VANISHED = 1e-6
"""Length below which a difference of unit vectors is rounding noise."""


@dataclass(frozen=True, eq=False)
class DenseBank:
    """A bank of which every row counts as a neighbour, as its first two moments.

    Attributes:
        second: C (D, D).
        mean: (D,).
        size: M.
    """

    second: Tensor
    mean: Tensor
    size: int

    @classmethod
    @torch.no_grad()
    def of(cls, bank: Rows, block: Block = BLOCK) -> DenseBank:
        """Read the bank once, block by block.

        Raises:
            InputError: no matrix, NaN or infinity.
        """
        checked_rows(bank, "the bank's embeddings")
        second = mean = torch.zeros((), dtype=torch.float64)
        for _, unit in unit_blocks(bank, block[1]):
            second = second + (unit.T @ unit).double()
            mean = mean + unit.double().sum(0)
        return cls((second / len(bank)).to(unit.dtype), (mean / len(bank)).to(unit.dtype), len(bank))

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored."""
        return {"second": self.second, "mean": self.mean}

    def pull(self, unit: Tensor, centre: float = 0.0) -> Tensor:
        """P (n, D) for unit rows (n, D), with s0 = ``centre``."""
        return unit @ self.second.to(unit) - centre * self.mean.to(unit)


@dataclass(frozen=True, eq=False)
class LocalBank:
    """A bank of which the ``k`` nearest rows count as neighbours.

    Attributes:
        rows: (M, D), of any length, an array or tensor, perhaps mapped from a file; kept as it is.
        k: from 1 to M.
        skip_copies: leave out rows that equal the item (cosine above 1 - 1e-5): needed where the gallery is its own bank, since every
            item would be its own nearest neighbour.
        bank_rows: of the bank that are read at a time.
    """

    rows: Rows
    k: int
    skip_copies: bool = False
    bank_rows: int = BLOCK[1]

    def __post_init__(self) -> None:
        checked_rows(self.rows, "the bank's embeddings")
        if not 1 <= self.k <= self.size:
            raise InputError(f"k must be between 1 and the bank's {self.size} rows (got {self.k})")

    @property
    def size(self) -> int:
        return len(self.rows)

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored."""
        return {"rows": self.rows if isinstance(self.rows, Tensor) else torch.from_numpy(np.array(self.rows))}

    @torch.no_grad()
    def pull(self, unit: Tensor, centre: float = 0.0) -> Tensor:
        """P (n, D) for unit rows (n, D). Nothing is centred: ``centre`` is there for the dense bank's sake."""
        skip: Skip = "copies" if self.skip_copies else "nothing"
        near, places = nearest_of(unit, self.rows, self.k, skip=skip, bank_rows=self.bank_rows)
        near = near.where(near > -torch.inf, near.new_zeros(()))
        total = torch.zeros_like(unit)
        for start, other in unit_blocks(self.rows, self.bank_rows, unit.device):
            inside = (places >= start) & (places < start + len(other))
            counts = inside.sum(1)
            total += F.embedding_bag(
                places[inside] - start,
                other.to(unit.dtype),
                counts.cumsum(0) - counts,
                mode="sum",
                per_sample_weights=near[inside],
            )
        return total / self.k


Bank = DenseBank | LocalBank


def neighbour_count(k: float, size: int) -> int:
    """How many rows of a bank of ``size`` are neighbours: ``k`` itself if it is an integer, else that share of the bank, at least 1.

    Raises:
        InputError: an integer below 1 or above the bank, a share outside (0, 1], no number.
    """
    if isinstance(k, Integral) and not isinstance(k, bool):
        if not 1 <= k <= size:
            raise InputError(f"k must be between 1 and the bank's {size} rows, or a share of it (got {k})")
        return int(k)
    if isinstance(k, bool) or not isinstance(k, Real) or not 0 < k <= 1:
        raise InputError(f"k must be a number of neighbours, or a share of the bank above 0 and at most 1 (got {k!r})")
    return max(1, int(k * size))


def make_bank(rows: Rows, k: float | None, *, skip_copies: bool = False, block: Block = BLOCK) -> Bank:
    """A dense bank for ``k`` None, else a local one; see :func:`neighbour_count`."""
    if k is None:
        return DenseBank.of(rows, block)
    checked_rows(rows, "the bank's embeddings")
    return LocalBank(rows, neighbour_count(k, len(rows)), skip_copies, block[1])


@torch.no_grad()
def mean_row(rows: Rows, block: Block = BLOCK) -> Tensor:
    """The mean (D,) of the rows at length 1."""
    total = torch.zeros((), dtype=torch.float64)
    for _, unit in unit_blocks(checked_rows(rows), block[1]):
        total = total + unit.double().sum(0)
    return (total / len(rows)).to(unit.dtype)


def pushed(unit: Tensor, pull: Tensor, r: float) -> Tensor:
    """norm(G - r P) for unit rows; where nothing is left of a row it stays as it was. With r = 0 the rows themselves."""
    if r == 0:
        return unit
    moved = unit - r * pull
    length = moved.norm(dim=1, keepdim=True)
    return torch.where(length > VANISHED, moved / length.clamp_min(VANISHED), unit)


def merged(branches: Sequence[Tensor]) -> Tensor:
    """norm of the mean of unit rows; the first where they cancel each other."""
    first, *others = branches
    if all(other is first for other in others):
        return first
    return pushed(first, sum((first - b for b in branches), torch.zeros_like(first)) / len(branches), 1.0)


@torch.no_grad()
def inverse_convolution(
    gallery: Rows,
    gallery_bank: Rows | Bank | None,
    query_bank: Rows | Bank | None = None,
    *,
    r_gallery: float = 1.0,
    r_query: float = 1.0,
    k: float | None = None,
    centre: float | Sequence[float] | None = None,
    skip_copies: bool = False,
    block: Block = BLOCK,
    out: Any = None,
) -> Any:
    r"""A gallery with what it shares with its neighbours in two banks taken out: norm(½ U of the gallery bank + ½ U of the query bank).

    Args:
        gallery: (N, D), an array or a tensor, of half precision or better, perhaps mapped from a file.
        gallery_bank, query_bank: (M, D) reference embeddings of each modality, or prepared banks; a bank that is None leaves its branch
            as with r = 0.
        r_gallery, r_query: strengths, 0 and above; both 0 give the gallery at length 1, exactly.
        k: None: dense; else local adjacency with so many neighbours (integer) or that share of the bank.
        centre: s0 of the dense form, one number or one for each bank; None: the mean similarity of this gallery and the bank.
        skip_copies: see :class:`LocalBank`.
        block: rows of the gallery and of the bank at a time.
        out: where to write (N, D); None: a new array or tensor of the gallery's kind, in single precision at least.

    Returns:
        (N, D), rows of length 1: ``out`` if it was given.

    Raises:
        InputError: shapes that do not fit, a strength or ``k`` out of range, NaN or infinity.
    """
    checked_rows(gallery, "the gallery's embeddings")
    for name, r in (("r_gallery", r_gallery), ("r_query", r_query)):
        checked_strength(name, r)
    made: list[Bank | None] = []
    for bank in (gallery_bank, query_bank):
        if bank is not None and not isinstance(bank, DenseBank | LocalBank):
            checked_rows(bank, "the bank's embeddings", gallery.shape[1])
            bank = make_bank(bank, k, skip_copies=skip_copies, block=block)
        made.append(bank)
    if centre is None:
        own = mean_row(gallery, block)
        centre = [float(own @ b.mean.to(own)) if isinstance(b, DenseBank) else 0.0 for b in made]
    centres = [float(centre)] * 2 if isinstance(centre, int | float) else [float(c) for c in centre]
    if out is not None and tuple(out.shape) != tuple(gallery.shape):
        raise InputError(f"out must have the gallery's shape {tuple(gallery.shape)}, not {tuple(out.shape)}")
    for start, unit in unit_blocks(gallery, block[0]):
        branches = [
            unit if bank is None or r == 0 else pushed(unit, bank.pull(unit, s0), r)
            for bank, r, s0 in zip(made, (r_gallery, r_query), centres, strict=True)
        ]
        rows = merged(branches)
        if out is None:
            out = _like(gallery, rows)
        out[start : start + len(rows)] = rows if isinstance(out, Tensor) else rows.cpu().numpy()
    return out


def checked_strength(name: str, r: Any) -> None:
    """Raise an InputError if ``r`` is no finite number from 0."""
    if isinstance(r, bool) or not isinstance(r, Real) or not math.isfinite(r) or r < 0:
        raise InputError(f"{name} must be a number of at least 0 (got {r!r})")


def _like(gallery: Rows, rows: Tensor) -> Any:
    empty = torch.empty(tuple(gallery.shape), dtype=rows.dtype, device=rows.device)
    return empty if isinstance(gallery, Tensor) else empty.numpy()
