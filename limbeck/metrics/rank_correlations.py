"""How well a score ranks things as their true worth does."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from limbeck.core.errors import InputError
from limbeck.metrics.correlations import spearman


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b of two quantities (n,), in [-1, 1]; infinities rank as the least and greatest. NaN where one of them is constant.

    Raises:
        InputError: different numbers of values, NaN among them.
    """
    from scipy.stats import kendalltau

    a, b = _ranked(x), _ranked(y)
    if len(a) != len(b):
        raise InputError(f"{len(a)} values of one quantity, {len(b)} of the other: they must be as many")
    return math.nan if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0 else float(kendalltau(a, b).statistic)


def partial_kendall(x: ArrayLike, y: ArrayLike, given: ArrayLike) -> float:
    """Kendall's partial tau of x and y with a third quantity held fixed: (t_xy - t_xz t_yz) / sqrt((1 - t_xz²) (1 - t_yz²)).

    Small (though not quite 0) where x knows no more of y than the third quantity does. NaN where the third determines one of them.
    """
    xy, xz, yz = kendall(x, y), kendall(x, given), kendall(y, given)
    scale = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / math.sqrt(scale) if scale > 1e-12 else math.nan


def rank_correlations(
    scores: Mapping[str, ArrayLike], truth: ArrayLike, given: ArrayLike | None = None
) -> dict[str, dict[str, float]]:
    """For each score ``kendall`` and ``spearman`` with the truth, ``partial`` with a third quantity held fixed if there is one, and ``picked``, the truth
    of the member with the highest score (the mean over those that share it).

    Args:
        scores: (n,) by name.
        truth: (n,), accuracies say.
        given: (n,), such as the numbers of parameters.
    """
    worth = np.asarray(truth, dtype=np.float64)
    table: dict[str, dict[str, float]] = {}
    for name, values in scores.items():
        ranks = _ranked(values)
        found = {"kendall": kendall(values, truth), "spearman": spearman(ranks, _ranked(truth))}
        if given is not None:
            found["partial"] = partial_kendall(values, truth, given)
        table[name] = {**found, "picked": float(worth[ranks == ranks.max()].mean())}
    return table


def _ranked(values: ArrayLike) -> NDArray[np.float64]:
    from scipy.stats import rankdata

    found = np.asarray(values, dtype=np.float64).ravel()
    if np.isnan(found).any():
        raise InputError("a NaN has no rank: score what cannot be scored with minus infinity")
    ranks: NDArray[np.float64] = rankdata(found)
    return ranks
