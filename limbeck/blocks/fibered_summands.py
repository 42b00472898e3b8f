"""Interval summands of two-parameter persistence from one-parameter barcodes, where multipers is not at hand.

Along each of many parallel diagonal lines the barcode is computed (:func:`barcodes`); bars of neighbouring lines are matched by the
assignment that moves their ends least (Hungarian algorithm; a bar may also end or begin between two lines, at the cost of half its
length and the lines' distance). A chain of matched bars is one summand. Its birth points on the lines lie on the border of where
it is born; where two neighbouring ones are nearer than the lines, the corner between them is added; deaths in the same way. For a
box that gives its very corners, for others the error is at most the lines' distance. Vineyards follow the bars where this matching
guesses, so that two bars that cross may be exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.blocks.boundary_reduction import cliques, reduced_barcodes
from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.blocks.multifiltrations import Multifiltration
from limbeck.core.errors import InputError

Floats = NDArray[np.float64]


def fibered_summands(
    filtration: Multifiltration, *, degrees: Sequence[int], lines: int, box: tuple[Any, Any] | Floats
) -> IntervalSummands:
    """A candidate decomposition from matched fibered barcodes.

    Args:
        filtration: of one or two parameters; one gives its barcode.
        degrees: of homology.
        lines: how many diagonal lines cover the box.
        box: lower and upper corner.

    Raises:
        InputError: more than two parameters.
    """
    if filtration.parameters > 2:
        raise InputError(
            f"barcodes along lines decompose one or two parameters, not {filtration.parameters}: install multipers"
        )
    wanted = list(dict.fromkeys(degrees))
    if filtration.parameters == 1:
        found = barcodes(filtration, [v[:, 0] for v in filtration.values], wanted)
        every = IntervalSummands.bars(np.concatenate(found))
        return replace(every, degrees=torch.from_numpy(np.repeat(wanted, [len(b) for b in found])))
    low, high = np.asarray(box[0], dtype=np.float64), np.asarray(box[1], dtype=np.float64)
    starts = _starts(low, high, lines)
    apart = float((high - low).sum() / (lines + 1))
    chains: dict[int, list[tuple[list[Floats], list[Floats]]]] = {degree: [] for degree in wanted}
    ends_of: dict[int, list[int]] = {degree: [] for degree in wanted}
    before: dict[int, Floats] = {degree: np.zeros((0, 2, 2)) for degree in wanted}
    for start in starts:
        pushed = [(values - start).max(1) for values in filtration.values]
        for degree, bars in zip(wanted, barcodes(filtration, pushed, wanted), strict=True):
            points = start + bars[:, :, None]  # (bars, birth and death, 2)
            points = points[(points[:, 1] > points[:, 0]).all(1)]
            inside = np.minimum(points, high)
            earlier, later = match_bars(before[degree], inside, apart)
            owner = np.full(len(points), -1)
            owner[later] = np.array(ends_of[degree], dtype=np.int64)[earlier]
            for number, (birth, death) in enumerate(points):
                if owner[number] < 0:
                    owner[number] = len(chains[degree])
                    chains[degree].append(([], []))
                births, deaths = chains[degree][owner[number]]
                births.append(birth)
                deaths.append(death)
            before[degree], ends_of[degree] = inside, owner.tolist()
    corners, owners = [], []
    for degree in wanted:
        for births, deaths in chains[degree]:
            ends = np.array(deaths)
            ends = np.where(ends > high, np.inf, ends)  # the lines say nothing about what lies beyond the box
            lower, upper = border(np.array(births), apart), -border(-ends, apart)
            corners.append((torch.from_numpy(lower), torch.from_numpy(upper)))
            owners.append(degree)
    return IntervalSummands.of(corners, owners, 2)


def _starts(low: Floats, high: Floats, lines: int) -> Floats:
    """Where diagonal lines enter the box: along its left side from the top, then along its lower side."""
    offsets = np.linspace(high[1] - low[1], low[0] - high[0], lines + 2)[1:-1]
    return np.column_stack([low[0] + np.maximum(-offsets, 0), low[1] + np.maximum(offsets, 0)])


def match_bars(first: Floats, second: Floats, apart: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which bars of two neighbouring lines belong together, by least total movement.

    Args:
        first, second: (S, 2, 2) and (T, 2, 2): by bar the finite points of birth and death.
        apart: distance of the lines.

    Returns:
        numbers of matched bars, in ``first`` and in ``second``.
    """
    from scipy.optimize import linear_sum_assignment

    s, t = len(first), len(second)
    none = np.zeros(0, dtype=np.int64)
    if not s or not t:
        return none, none
    cost = np.zeros((s + t, s + t))
    cost[:s, :t] = np.abs(first[:, None] - second[None]).max((2, 3))
    cost[:s, t:] = ((first[:, 1] - first[:, 0]).min(1) / 2 + apart)[:, None]
    cost[s:, :t] = ((second[:, 1] - second[:, 0]).min(1) / 2 + apart)[None]
    rows, columns = linear_sum_assignment(cost)
    kept = (rows < s) & (columns < t)
    return rows[kept], columns[kept]


def border(points: Floats, apart: float) -> Floats:
    """Corners (·, 2) of the up-set on whose border the points lie, points of neighbouring lines that are ``apart``."""
    found = minimal(points) if len(points) > 1 else points
    if len(found) < 2:
        return found
    steps = np.abs(np.diff(found, axis=0))
    with np.errstate(invalid="ignore"):
        near = (steps <= apart * (1 + 1e-9)).all(1)
    between = np.minimum(found[:-1], found[1:])[near]
    return minimal(np.concatenate([found, between]))


def minimal(points: Floats) -> Floats:
    """The points (N, 2) that no other lies below of, coordinate by coordinate; each once."""
    points = points[np.lexsort((points[:, 1], points[:, 0]))]
    least = np.minimum.accumulate(points[:, 1])
    kept = np.concatenate([[True], points[1:, 1] < least[:-1]])
    found: Floats = points[kept]
    return found


# ---- one parameter -----------------------------------------------------------------------------------------------------


def barcodes(filtration: Multifiltration, heights: Sequence[Floats], degrees: Sequence[int]) -> list[Floats]:
    """Barcodes (·, 2) by degree of the complex with one height for every cell, given by dimension; death may be infinite.

    gudhi computes them; where it is not installed, :mod:`limbeck.blocks.boundary_reduction`, which takes many times as long.
    """
    top = min(max(degrees) + 1, filtration.top_dimension)
    try:
        import gudhi
    except ImportError:
        every, high = list(filtration.cells[: top + 1]), list(heights[: top + 1])
        if filtration.clique_dimension is not None and len(every) > 1:
            every, high = cliques(every[1], high, top)
        return reduced_barcodes(every, high, degrees)
    tree = gudhi.SimplexTree()
    for cells, at in zip(filtration.cells, heights, strict=True):
        if len(cells) and cells.shape[1] <= max(top, 1) + 1:
            tree.insert_batch(np.ascontiguousarray(cells.T, dtype=np.int32), np.ascontiguousarray(at))
    if filtration.clique_dimension is not None and top > 1 and len(filtration.cells) > 1:
        tree.collapse_edges()
        tree.expansion(top)
    tree.compute_persistence(homology_coeff_field=2, persistence_dim_max=True)
    return [np.asarray(tree.persistence_intervals_in_dimension(d), dtype=np.float64).reshape(-1, 2) for d in degrees]


def hilbert_function(filtration: Multifiltration, axes: Sequence[Any], degree: int) -> Floats:
    """The Betti number of one degree at every point of a grid of two parameters, (r_1, r_2).

    It says how many classes live at each point and nothing about which of them are the same: no image of a decomposition, but a
    common one to compare with.

    Raises:
        InputError: other than two parameters.
    """
    if filtration.parameters != 2:
        raise InputError(f"the Hilbert function is computed for two parameters, not {filtration.parameters}")
    first, second = (np.asarray(axis, dtype=np.float64) for axis in axes)
    beyond = np.inf
    found = np.zeros((len(first), len(second)))
    for column, level in enumerate(second):
        heights = [np.where(values[:, 1] <= level, values[:, 0], beyond) for values in filtration.values]
        if not np.isfinite(heights[0]).any():
            continue
        for birth, death in barcodes(_finite_part(filtration, heights), _kept(heights), (degree,))[0]:
            found[:, column] += (birth <= first) & (first < death)
    return found


def _kept(heights: Sequence[Floats]) -> list[Floats]:
    return [h[np.isfinite(h)] for h in heights]


def _finite_part(filtration: Multifiltration, heights: Sequence[Floats]) -> Multifiltration:
    """The cells of finite height; vertices are numbered anew."""
    number = np.cumsum(np.isfinite(heights[0])) - 1
    cells = tuple(number[c[np.isfinite(h)]] for c, h in zip(filtration.cells, heights, strict=True))
    values = tuple(v[np.isfinite(h)] for v, h in zip(filtration.values, heights, strict=True))
    return Multifiltration(cells, values, filtration.clique_dimension)
