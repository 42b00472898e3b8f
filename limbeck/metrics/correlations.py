"""How one quantity of samples goes with another: correlations, and means by rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from limbeck.core.errors import InputError


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """The linear correlation of two quantities (n,), in [-1, 1]; NaN where one of them is constant or there are fewer than two samples.

    Raises:
        InputError: different numbers of samples.
    """
    a, b = _pair(x, y)
    if len(a) < 2:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    # A constant that is no binary fraction leaves deviations of the size of rounding.
    scale = np.sqrt((a @ a) * (b @ b))
    flat = np.ptp(a) <= 1e-12 * max(1.0, float(np.abs(a).max())) or np.ptp(b) <= 1e-12 * max(
        1.0, float(np.abs(b).max())
    )
    return float("nan") if flat or scale == 0 else float(np.clip((a @ b) / scale, -1, 1))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """The correlation of ranks, ties sharing their mean rank; otherwise as :func:`pearson`."""
    from scipy.stats import rankdata

    a, b = _pair(x, y)
    return pearson(rankdata(a), rankdata(b))


def means_by_rank(x: ArrayLike, y: ArrayLike, groups: int = 10) -> list[tuple[float, float, int]]:
    """Mean x, mean y and size of groups of (nearly) equal size from the smallest x to the largest; equal x fall into one group.

    Raises:
        InputError: fewer than one group.
    """
    if groups < 1:
        raise InputError(f"there is 1 group or more, not {groups}")
    from scipy.stats import rankdata

    a, b = _pair(x, y)
    if not len(a):
        return []
    group = np.minimum(((rankdata(a) - 0.5) * groups / len(a)).astype(np.int64), groups - 1)
    counts = np.bincount(group, minlength=groups)
    sums = [np.bincount(group, weights=v, minlength=groups) for v in (a, b)]
    return [(float(s / n), float(t / n), int(n)) for s, t, n in zip(*sums, counts, strict=True) if n]


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = (np.asarray(v, dtype=np.float64).ravel() for v in (x, y))
    if len(a) != len(b):
        raise InputError(f"{len(a)} values of one quantity, {len(b)} of the other: they must be as many")
    return a, b
