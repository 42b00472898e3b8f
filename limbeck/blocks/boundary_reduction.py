"""Barcodes of one-parameter filtrations by reduction of boundary matrices over the field of two elements, without any library.

Columns are Python integers, one bit for each face, so that adding two of them is one operation. Dimensions are reduced from the top down: what kills a class
says which cell gave birth to it, and that cell's own column need not be reduced ("clearing", Chen and Kerber, 2011). Good for some ten thousand cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def reduced_barcodes(cells: Sequence[Ints], heights: Sequence[Floats], degrees: Sequence[int]) -> list[Floats]:
    """Barcodes (·, 2) by degree; bars without length are left out, what never dies has death infinity.

    Args:
        cells: by dimension k the simplices (m_k, k + 1), vertices rising, with all faces; to be exact in degree k, up to dimension k + 1.
        heights: by dimension (m_k,); no cell below one of its faces.
        degrees: of homology.
    """
    orders = [np.argsort(h, kind="stable") for h in heights]
    paired: dict[int, list[tuple[int, int]]] = {}  # by degree: ranks of birth and death
    cleared: set[int] = set()
    for k in range(len(cells) - 1, 0, -1):
        columns = _boundaries(cells[k][orders[k]], cells[k - 1][orders[k - 1]])
        paired[k - 1] = _reduced(columns, cleared)
        cleared = {born for born, _ in paired[k - 1]}
    found = []
    for degree in degrees:
        if degree >= len(cells):
            found.append(np.zeros((0, 2)))
            continue
        pairs = np.array(paired.get(degree, []), dtype=np.int64).reshape(-1, 2)
        endless = np.ones(len(cells[degree]), dtype=bool)
        endless[pairs[:, 0]] = False
        endless[[died for _, died in paired.get(degree - 1, [])]] = False
        born = heights[degree][orders[degree]]
        died = heights[degree + 1][orders[degree + 1]][pairs[:, 1]] if len(pairs) else np.zeros(0)
        bars = np.column_stack([born[pairs[:, 0]], died])
        forever = np.column_stack([born[endless], np.full(int(endless.sum()), np.inf)])
        found.append(np.concatenate([bars[bars[:, 1] > bars[:, 0]], forever]))
    return found


def cliques(edges: Ints, heights: Sequence[Floats], top: int) -> tuple[list[Ints], list[Floats]]:
    """All cliques of a graph up to dimension ``top`` (at least 1), each as high as the highest of its edges.

    Args:
        edges: (E, 2), the smaller end first.
        heights: of the vertices (V,) and of the edges (E,).
        top: dimension of the largest simplices.
    """
    count = len(heights[0])
    high = np.full((count, count), np.inf)
    high[edges[:, 0], edges[:, 1]] = heights[1]  # only from a vertex to later ones
    cells, values = [np.arange(count)[:, None], edges], [heights[0], heights[1]]
    while len(cells) <= top and len(cells[-1]):
        reach = high[cells[-1]].max(1)  # (m, V): infinite unless the vertex is a later neighbour of all
        row, vertex = np.nonzero(np.isfinite(reach))
        cells.append(np.column_stack([cells[-1][row], vertex]))
        values.append(np.maximum(values[-1][row], reach[row, vertex]))
    return cells, values


def _boundaries(cells: Ints, faces: Ints) -> list[int]:
    """The boundary of each cell: bit r stands for the r-th face."""
    bit = {face: 1 << rank for rank, face in enumerate(map(tuple, faces.tolist()))}
    return [sum(bit[face] for face in itertools.combinations(cell, len(cell) - 1)) for cell in cells.tolist()]


def _reduced(columns: Sequence[int], cleared: set[int]) -> list[tuple[int, int]]:
    """Pairs (rank of the face that gives birth, rank of the cell that kills); columns in ``cleared`` are known to vanish."""
    lowest: dict[int, int] = {}
    pairs = []
    for number, column in enumerate(columns):
        if number in cleared:
            continue
        while column:
            low = column.bit_length() - 1
            other = lowest.get(low)
            if other is None:
                lowest[low] = column
                pairs.append((low, number))
                break
            column ^= other
    return pairs
