"""Summands from matched barcodes, and the Hilbert function."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.blocks.fibered_summands import barcodes, border, fibered_summands, hilbert_function, match_bars, minimal
from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.blocks.multifiltrations import Multifiltration, function_rips, graph_lower_star, image_lower_star
from limbeck.core.errors import InputError
from limbeck.metrics.decompositions import bottleneck_distance

torch.set_num_threads(1)
BOX = (np.zeros(2), np.full(2, 4.0))
TRIANGLE = Multifiltration(  # a circle of three edges that a triangle fills late
    (np.arange(3)[:, None], np.array([[0, 1], [0, 2], [1, 2]]), np.array([[0, 1, 2]])),
    (np.zeros((3, 2)), np.array([[1.0, 0.5], [0.5, 1.0], [0.2, 0.2]]), np.array([[3.0, 2.0]])),
)


def counts(summands: IntervalSummands, axes) -> np.ndarray:
    """How many supports hold each point of a grid."""
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    found = np.zeros(points.shape[:-1])
    for number in range(len(summands)):
        births, deaths = (c.numpy() for c in summands.corners(number))
        born = (births <= points[:, :, None]).all(-1).any(-1)
        found += born & (points[:, :, None] < deaths).all(-1).any(-1)
    return found


def test_barcodes_of_a_circle_that_is_filled() -> None:
    zero, one = barcodes(TRIANGLE, [v[:, 0] for v in TRIANGLE.values], (0, 1))
    assert sorted(zero[:, 1].tolist()) == [0.2, 0.5, np.inf] and one.tolist() == [[1.0, 3.0]]


def test_a_box_gets_its_very_corners() -> None:
    found = fibered_summands(TRIANGLE, degrees=(1,), lines=60, box=BOX)
    assert len(found) == 1
    births, deaths = found.corners(0)
    assert np.allclose(births, [[1.0, 1.0]], atol=1e-9)
    # the triangle appears at (3, 2), and only above both numbers is the circle filled; nothing is known beyond the box
    assert np.allclose(deaths, [[np.inf, 2.0], [3.0, np.inf]], atol=1e-9)
    axes = [np.linspace(1.1, 3.9, 8)] * 2
    assert np.array_equal(counts(found, axes), hilbert_function(TRIANGLE, axes, 1))


def test_one_parameter_gives_the_barcode() -> None:
    one = Multifiltration(TRIANGLE.cells, tuple(v[:, :1] for v in TRIANGLE.values))
    found = fibered_summands(one, degrees=(0, 1), lines=2, box=(np.zeros(1), np.ones(1)))
    assert found.parameters == 1 and found.degrees.tolist() == [0, 0, 0, 1]
    assert found.of_degree(1).corners(0)[1].tolist() == [[3.0]]


def test_supports_count_the_classes_of_clouds() -> None:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 14)
    points = np.column_stack([np.cos(angle), np.sin(angle)]) + rng.normal(0, 0.1, (14, 2))
    filtration = function_rips(points, rng.uniform(0, 1, 14))
    low, high = filtration.bounds()
    axes = [np.linspace(a, b, 12) + 1e-3 for a, b in zip(low, high, strict=True)]
    for degree in (0, 1):
        found = fibered_summands(filtration, degrees=(degree,), lines=100, box=(low, high))
        wrong = counts(found, axes) != hilbert_function(filtration, axes, degree)
        assert wrong.mean() < 0.1  # near the borders of supports, and where bars were exchanged


def test_more_lines_come_nearer() -> None:
    def distance(lines: int) -> float:
        first = fibered_summands(TRIANGLE, degrees=(0, 1), lines=lines, box=BOX)
        return bottleneck_distance(first, exact, BOX)

    exact = fibered_summands(TRIANGLE, degrees=(0, 1), lines=300, box=BOX)
    assert distance(10) <= 8 / 11 + 1e-9 and distance(80) <= 8 / 81 + 1e-9


def test_the_hilbert_function_counts_components_and_holes() -> None:
    path = graph_lower_star(3, [[0, 1], [1, 2]], np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]]))
    found = hilbert_function(path, [[0.0, 1.0], [0.0, 1.0, 2.0]], 0)
    assert found.tolist() == [[1.0, 1.0, 2.0], [1.0, 1.0, 1.0]]
    image = np.ones((2, 3, 3))
    image[:, 1, 1] = 5.0  # a hole until (5, 5); the diagonals must not close it
    holes = hilbert_function(image_lower_star(image), [[0.0, 1.0, 5.0]] * 2, 1)
    assert holes.tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 0]]
    apart = np.ones((2, 2, 2))
    apart[:, [0, 1], [0, 1]] = 0.0  # two pixels that touch at a corner only
    assert hilbert_function(image_lower_star(apart), [[0.0, 1.0]] * 2, 0).tolist() == [[2, 2], [2, 1]]


def test_matching_moves_bars_least() -> None:
    first = np.array([[[0.0, 0.0], [1.0, 1.0]], [[0.2, 0.2], [3.0, 3.0]], [[2.0, 2.0], [2.05, 2.05]]])
    second = np.array([[[0.25, 0.25], [3.0, 3.1]], [[0.0, 0.1], [1.0, 1.1]]])
    rows, columns = match_bars(first, second, 0.1)
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {0: 1, 1: 0}
    assert len(match_bars(first[:0], second, 0.1)[0]) == 0


def test_corners_of_an_up_set() -> None:
    points = np.array([[1.0, 3.0], [1.0, 2.0], [2.0, 2.5], [3.0, 0.0], [3.0, 0.0]])
    assert minimal(points).tolist() == [[1.0, 2.0], [3.0, 0.0]]
    sides = np.array([[1.0, 2.0], [1.0, 1.1], [1.2, 1.0], [2.0, 1.0]])  # on the border of what is above (1, 1)
    assert border(sides, 0.3).tolist() == [[1.0, 1.0]]
    assert border(sides, 0.05).tolist() == [[1.0, 1.1], [1.2, 1.0]]


def test_more_parameters_say_what_to_install() -> None:
    three = Multifiltration((np.zeros((1, 1), dtype=int),), (np.zeros((1, 3)),))
    with pytest.raises(InputError, match="one or two parameters, not 3: install multipers"):
        fibered_summands(three, degrees=(0,), lines=5, box=(np.zeros(3), np.ones(3)))
    with pytest.raises(InputError, match="two parameters, not 3"):
        hilbert_function(three, [[0.0]] * 3, 0)
