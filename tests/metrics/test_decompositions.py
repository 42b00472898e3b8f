"""The bottleneck distance of decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.blocks.summand_images import represent
from limbeck.core.errors import InputError
from limbeck.metrics.decompositions import bottleneck_distance, summand_distances

torch.set_num_threads(1)
INF = float("inf")


def boxes(rng: np.random.Generator, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    births = rng.uniform(0, 2, (count, 2))
    return [(b, b + rng.uniform(0.05, 1.5, 2)) for b in births]


def test_in_one_parameter_it_is_that_of_gudhi() -> None:
    gudhi = pytest.importorskip("gudhi")
    rng = np.random.default_rng(0)
    for _ in range(8):
        tables = []
        for _ in range(2):
            births = rng.uniform(0, 1, rng.integers(0, 7))
            tables.append(np.column_stack([births, births + rng.uniform(0, 1, len(births))]))
        tables = [np.concatenate([t, [[0.3, INF]]]) for t in tables]
        found = bottleneck_distance(*map(IntervalSummands.bars, tables))
        assert found == pytest.approx(gudhi.bottleneck_distance(*tables), abs=1e-12)


def test_known_distances() -> None:
    box = IntervalSummands.of([([0.0, 0.0], [2.0, 3.0])])
    moved = IntervalSummands.of([([0.1, -0.2], [2.0, 3.3])])
    assert bottleneck_distance(box, moved) == pytest.approx(0.3)
    assert bottleneck_distance(box, IntervalSummands.empty(2)) == 1.0  # half of its longest diagonal
    far = IntervalSummands.of([([9.0, 9.0], [11.0, 10.0])])
    assert summand_distances(box, far).tolist() == [[1.0]]  # both to zero
    assert bottleneck_distance(IntervalSummands.empty(2), IntervalSummands.empty(2)) == 0.0


def test_degrees_are_apart() -> None:
    corners = [([0.0, 0.0], [2.0, 2.0])]
    first, second = IntervalSummands.of(corners, [0]), IntervalSummands.of(corners, [1])
    assert bottleneck_distance(first, second) == 1.0
    assert bottleneck_distance(first, first) == 0.0


def test_endless_summands_need_endless_ones() -> None:
    endless = IntervalSummands.of([([0.0, 0.0], [INF, INF])])
    assert bottleneck_distance(endless, IntervalSummands.of([([0.0, 0.5], [INF, INF])])) == 0.5
    assert bottleneck_distance(endless, IntervalSummands.empty(2)) == INF
    assert bottleneck_distance(endless, IntervalSummands.empty(2), ([0.0, 0.0], [1.0, 4.0])) == 0.5


def test_it_is_a_distance_between_boxes() -> None:
    rng = np.random.default_rng(1)
    a, b, c = (IntervalSummands.of(boxes(rng, n)) for n in (3, 4, 5))
    ab, bc, ac = bottleneck_distance(a, b), bottleneck_distance(b, c), bottleneck_distance(a, c)
    assert ab == bottleneck_distance(b, a) and ac <= ab + bc + 1e-12
    assert bottleneck_distance(a, a.chosen(torch.tensor([2, 0, 1]))) == 0


def test_images_are_stable_in_it() -> None:
    """|V(M) - V(M')| <= min(d, delta) / delta for p = infinity, and with as many summands times that for p = 0."""
    rng = np.random.default_rng(2)
    axes = [np.linspace(0, 3, 9)] * 2
    for trial in range(20):
        corners = boxes(rng, 5)
        moved = [
            (b + rng.uniform(-s, s, 2), d + rng.uniform(-s, s, 2))
            for (b, d), s in zip(corners, [0.02 * trial] * 5, strict=True)
        ]
        extra = [(b, b + 0.03 * trial) for b in rng.uniform(0, 2, (2, 2))]
        first, second = IntervalSummands.of(corners), IntervalSummands.of(moved + extra)
        distance = bottleneck_distance(first, second)
        for delta in (0.1, 0.4):
            images = [represent(m, axes, bandwidth=delta, power=INF) for m in (first, second)]
            assert float((images[0] - images[1]).abs().max()) <= min(distance, delta) / delta + 1e-9
            sums = [represent(m, axes, bandwidth=delta, power=0) for m in (first, second)]
            assert float((sums[0] - sums[1]).abs().max()) <= 7 * min(distance, delta) / delta + 1e-9


def test_other_numbers_of_parameters_have_no_distance() -> None:
    with pytest.raises(InputError, match="over 2 and 3 parameters"):
        bottleneck_distance(IntervalSummands.empty(2), IntervalSummands.empty(3))
