"""Rank correlations against counted pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from limbeck.core.errors import InputError
from limbeck.metrics.rank_correlations import kendall, partial_kendall, rank_correlations


def test_kendall_counts_pairs():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=30), generator.normal(size=30)
    pairs = [np.sign((x[i] - x[j]) * (y[i] - y[j])) for i, j in itertools.combinations(range(30), 2)]
    assert kendall(x, y) == pytest.approx(np.mean(pairs))
    assert kendall([1, 2, -math.inf], [2, 3, 0]) == pytest.approx(1)
    assert math.isnan(kendall([1, 1, 1], [1, 2, 3]))


def test_what_goes_over_a_third_quantity_is_taken_out():
    z = np.arange(200.0)
    generator = np.random.default_rng(1)
    x, y = z + 40 * generator.normal(size=200), z + 40 * generator.normal(size=200)
    assert kendall(x, y) > 0.35 and partial_kendall(x, y, z) < 0.5 * kendall(x, y)
    ranks = {"x": [1, 2, 3, 4, 5, 6], "y": [2, 1, 3, 4, 6, 5], "z": [1, 3, 2, 6, 4, 5]}
    xy, xz, yz = (kendall(ranks[a], ranks[b]) for a, b in ("xy", "xz", "yz"))
    by_hand = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial_kendall(ranks["x"], ranks["y"], ranks["z"]) == pytest.approx(by_hand)
    assert math.isnan(partial_kendall(z, y, z))


def test_the_table_says_what_would_be_picked():
    truth = [0.2, 0.9, 0.5, 0.7]
    table = rank_correlations(
        {"good": [1, 4, 2, 3], "bad": [4, 1, 3, 3], "tied": [0, 5, 5, -math.inf]}, truth, [1, 2, 2, 3]
    )
    assert table["good"]["kendall"] == table["good"]["spearman"] == pytest.approx(1)
    assert table["good"]["picked"] == 0.9 and table["bad"]["picked"] == 0.2
    assert table["tied"]["picked"] == pytest.approx(0.7)
    assert "partial" in table["good"] and "partial" not in rank_correlations({"s": truth}, truth)["s"]


def test_mistakes_are_named():
    with pytest.raises(InputError, match="as many"):
        kendall([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="NaN"):
        kendall([1, math.nan], [1, 2])
