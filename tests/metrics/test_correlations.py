from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from limbeck.core.errors import InputError
from limbeck.metrics.correlations import means_by_rank, pearson, spearman


def test_correlations_are_scipys() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 6, 50)
    y = x + rng.standard_normal(50)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


def test_constants_and_single_samples_have_none() -> None:
    assert math.isnan(pearson([0.1] * 5, [1, 2, 3, 4, 5])) and math.isnan(spearman([1, 2, 3], [7, 7, 7]))
    assert math.isnan(pearson([1.0], [2.0]))


def test_groups_follow_ranks_and_keep_ties_together() -> None:
    groups = means_by_rank(np.arange(100), np.arange(100) * 2, 10)
    assert [g[2] for g in groups] == [10] * 10 and groups[0][:2] == (4.5, 9.0)
    tied = means_by_rank([0, 0, 0, 0, 5, 6], [1, 1, 1, 1, 3, 5], 3)
    assert sum(g[2] for g in tied) == 6 and tied[0] == (0.0, 1.0, 4)
    assert means_by_rank([], []) == []


def test_wrong_input_is_named() -> None:
    with pytest.raises(InputError, match="as many"):
        pearson([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="1 group or more"):
        means_by_rank([1], [1], 0)
