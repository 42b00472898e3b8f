"""The published table says what its paper says of it."""

from __future__ import annotations

import pytest

from limbeck.metrics.rank_correlations import kendall
from limbeck.tasks.s0_accuracies import ALONE, DISTILLED


def test_the_table_is_that_of_the_paper():
    assert len(DISTILLED) == len(ALONE) == 64
    assert max(ALONE, key=ALONE.__getitem__) == (7, 7, 7) and ALONE[7, 7, 7] == 72.56
    assert max(DISTILLED, key=DISTILLED.__getitem__) == (5, 5, 7) and DISTILLED[5, 5, 7] == 74.86
    assert (ALONE[5, 5, 7], DISTILLED[7, 7, 7], DISTILLED[1, 3, 7]) == (71.93, 74.44, 73.31)
    assert kendall(list(DISTILLED.values()), list(ALONE.values())) == pytest.approx(0.84, abs=0.01)
