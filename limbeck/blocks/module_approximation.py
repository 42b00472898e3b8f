"""From a multifiltration to interval summands: multiparameter module approximation (MMA) by vineyards along parallel lines.

The lines are diagonal and cover a box. The barcode of the first line is computed, then updated from line to line, so that every
bar keeps its identity; where it is born and dies on all lines are the corners of one interval summand. For modules that are sums
of intervals this is right up to the distance of the lines; for others it is close along every line.

The work is done by multipers; without it, :mod:`limbeck.blocks.fibered_summands` does nearly the same for two parameters.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.blocks.fibered_summands import fibered_summands
from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.blocks.multifiltrations import Multifiltration
from limbeck.core.errors import InputError, MissingDependencyError, UnknownNameError

Backend = Literal["auto", "multipers", "fibered"]
FULL_COLLAPSE = -2  # multipers: strong collapses until nothing changes, then plain ones


def decompose(
    filtration: Multifiltration,
    *,
    degrees: Sequence[int] = (0, 1),
    lines: int = 120,
    box: tuple[Any, Any] | None = None,
    collapse: bool = True,
    backend: Backend = "auto",
) -> IntervalSummands:
    """A candidate decomposition of the persistent homology of a filtration.

    Args:
        filtration: n parameters in comparable units, since the lines are diagonal; n = 1 gives the barcode.
        degrees: of homology.
        lines: how many; their distance is about the longest side of the box, divided by this number.
        box: lower and upper corner; None: the range of the filtration's values.
        collapse: leave out edges that change no homology (clique complexes of two parameters).
        backend: ``multipers``, ``fibered`` (without it, up to two parameters; much faster with gudhi), or ``auto``: multipers where it is installed.

    Returns:
        summands of all degrees, in float64; coordinates where nothing dies within the box may be infinite.

    Raises:
        InputError: a degree above the complex's dimension, or more than two parameters without multipers.
        MissingDependencyError: the backend is not installed.
    """
    if not degrees or min(degrees) < 0 or lines < 2:
        raise InputError(f"degrees must be from 0 (got {tuple(degrees)}) and lines at least 2 (got {lines})")
    if box is None:
        box = filtration.bounds()
    corners = np.array([np.asarray(side, dtype=np.float64) for side in box])
    if corners.shape != (2, filtration.parameters) or not np.isfinite(corners).all() or (corners[1] < corners[0]).any():
        raise InputError(f"the box must be two finite corners of {filtration.parameters} numbers, the lower one first")
    corners[1] = np.where(corners[1] > corners[0], corners[1], corners[0] + 1.0)  # a constant parameter still has lines
    if backend == "auto":
        backend = "multipers" if importlib.util.find_spec("multipers") is not None else "fibered"
    if backend == "fibered":
        return fibered_summands(filtration, degrees=degrees, lines=lines, box=corners)
    if backend != "multipers":
        raise UnknownNameError("backend", str(backend), ("auto", "multipers", "fibered"))
    if filtration.parameters == 1:
        return fibered_summands(filtration, degrees=degrees, lines=lines, box=corners)
    return _approximate(filtration, tuple(degrees), lines, corners, collapse)


def _approximate(
    filtration: Multifiltration, degrees: tuple[int, ...], lines: int, box: NDArray[np.float64], collapse: bool
) -> IntervalSummands:
    multipers = _multipers()
    tree = simplex_tree(filtration, max(degrees) + 1, collapse)
    module = multipers.module_approximation(tree, box=box, nlines=lines, n_jobs=1)
    found: list[tuple[Any, Any]] = []
    owners: list[int] = []
    for degree in dict.fromkeys(degrees):
        for summand in module.get_module_of_degree(degree):
            births, deaths = _corners(summand.get_birth_list(), box), _corners(summand.get_death_list(), box)
            births = births[(births < np.inf).all(1)]
            deaths = deaths[(deaths > -np.inf).all(1)]
            if len(births) and len(deaths):
                found.append((torch.from_numpy(births), torch.from_numpy(deaths)))
                owners.append(degree)
    return IntervalSummands.of(found, owners, filtration.parameters)


def _multipers() -> Any:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it imports pykeops, which prints that there is no GPU
            import multipers
    except ImportError:
        raise MissingDependencyError("multipers", "topology", "multiparameter module approximation") from None
    return multipers


def _corners(listed: Any, box: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners as (·, n); an infinite one may be listed with a single number."""
    n = box.shape[1]
    rows = [np.broadcast_to(np.asarray(corner, dtype=np.float64), (n,)) for corner in listed]
    return np.array(rows).reshape(-1, n)


def simplex_tree(filtration: Multifiltration, dimension: int, collapse: bool = True) -> Any:
    """The filtration as multipers' simplex tree, filled up to a dimension; every simplex is inserted by hand."""
    multipers = _multipers()
    tree = multipers.SimplexTreeMulti(num_parameters=filtration.parameters)
    for cells, values in zip(filtration.cells, filtration.values, strict=True):
        if len(cells) and cells.shape[1] <= dimension + 1:
            tree.insert_batch(np.ascontiguousarray(cells.T, dtype=np.int32), np.ascontiguousarray(values))
    if filtration.clique_dimension is None:
        return tree
    top = min(dimension, filtration.clique_dimension)
    if collapse and filtration.parameters == 2 and len(filtration.cells) > 1 and len(filtration.cells[1]) and top > 1:
        tree.collapse_edges(FULL_COLLAPSE)
    if top > 1:
        tree.expansion(top)
    return tree
