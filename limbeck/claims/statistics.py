"""Paired differences over seeds, with an interval that is honest about few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["holds", "fails", "undecided"]
RESAMPLES = 20_000


@dataclass(frozen=True)
class Difference:
    """Paired differences method - baseline, signed so that positive is better for the method."""

    per_seed: list[float]
    mean: float
    low: float
    high: float

    def verdict(self, margin: float = 0.0) -> Verdict:
        """``holds`` if the whole interval lies above ``margin``, ``fails`` if it lies below, else ``undecided``."""
        if self.low > margin:
            return "holds"
        return "fails" if self.high < margin else "undecided"


def paired_difference(
    method: Sequence[float], baseline: Sequence[float], *, higher_is_better: bool = True, level: float = 0.95
) -> Difference:
    """The mean paired difference with its bootstrap interval.

    The interval is the expanded percentile interval (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015):
    percentiles of resampled means, at levels widened by the t quantile and sqrt(n / (n - 1)), because the plain
    percentile interval is too narrow for few pairs. For three seeds it is the range of the three differences.

    Args:
        method, baseline: one value per seed, in the same order.
        higher_is_better: False for losses and errors.
        level: coverage aimed at.
    """
    from scipy.stats import norm, t

    d = (np.asarray(method, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)) * (
        1 if higher_is_better else -1
    )
    n = len(d)
    if n < 2 or np.ptp(d) == 0:
        return Difference(d.tolist(), float(d.mean()), float(d.min()), float(d.max()))
    generator = np.random.default_rng(0)
    means = d[generator.integers(0, n, (RESAMPLES, n))].mean(1)
    tail = norm.cdf(-np.sqrt(n / (n - 1)) * t.ppf(0.5 + level / 2, n - 1))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(d.tolist(), float(d.mean()), float(low), float(high))


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """``holds`` only if all do; ``fails`` as soon as one does."""
    if "fails" in verdicts:
        return "fails"
    return "undecided" if "undecided" in verdicts else "holds"
