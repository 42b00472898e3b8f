"""Barcodes without a library: by hand, as gudhi's, and the methods that rest on them where gudhi is missing."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from limbeck.blocks.boundary_reduction import cliques, reduced_barcodes
from limbeck.blocks.fibered_summands import barcodes
from limbeck.blocks.multifiltrations import Multifiltration, function_rips, image_lower_star
from limbeck.methods.structures.multiparameter_persistence import MultiparameterRepresentation


def ordered(bars: np.ndarray) -> np.ndarray:
    return bars[np.lexsort(bars.T)]


def simplex(dimension: int) -> list[np.ndarray]:
    """All faces of one simplex, by dimension."""
    return [np.array(list(itertools.combinations(range(dimension + 1), k + 1))) for k in range(dimension + 1)]


def test_a_circle_that_is_filled() -> None:
    cells = simplex(2)
    zero, one, two = reduced_barcodes(cells, [np.zeros(3), np.array([1.0, 0.5, 0.2]), np.array([3.0])], (0, 1, 2))
    assert ordered(zero).tolist() == [[0.0, 0.2], [0.0, 0.5], [0.0, np.inf]]
    assert one.tolist() == [[1.0, 3.0]] and two.shape == (0, 2)


def test_an_empty_sphere_has_one_hole_that_stays() -> None:
    shell = simplex(3)[:3]
    found = reduced_barcodes(shell, [np.zeros(4), np.ones(6), np.full(4, 2.0)], (0, 1, 2, 3))
    assert [len(bars) for bars in found] == [4, 3, 1, 0] and found[2].tolist() == [[2.0, np.inf]]


def test_cliques_are_all_of_them_and_as_high_as_their_edges() -> None:
    rng = np.random.default_rng(0)
    edges = np.array([e for e in itertools.combinations(range(9), 2) if rng.random() < 0.7])
    heights = [np.zeros(9), rng.uniform(size=len(edges))]
    cells, values = cliques(edges, heights, 3)
    height = dict(zip(map(tuple, edges.tolist()), heights[1], strict=True))
    for k in (2, 3):
        wanted = {
            c: max(height[e] for e in itertools.combinations(c, 2))
            for c in itertools.combinations(range(9), k + 1)
            if all(e in height for e in itertools.combinations(c, 2))
        }
        assert dict(zip(map(tuple, cells[k].tolist()), values[k], strict=True)) == wanted and len(wanted) > 3


@pytest.mark.parametrize("seed", range(6))
def test_barcodes_are_those_of_gudhi(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gudhi")
    rng = np.random.default_rng(seed)
    rips = function_rips(rng.normal(size=(12, 3)), rng.integers(0, 4, 12), dimension=3)
    image = image_lower_star(rng.integers(0, 5, (2, 5, 4)))
    cases = [
        (f, [v.max(1) for v in f.values], degrees) for f, degrees in ((rips, (2, 0, 1)), (rips, (0,)), (image, (0, 1)))
    ]
    theirs = [barcodes(*case) for case in cases]
    monkeypatch.setitem(sys.modules, "gudhi", None)
    for case, expected in zip(cases, theirs, strict=True):
        for own, other in zip(barcodes(*case), expected, strict=True):
            assert np.allclose(ordered(own), ordered(other)) and own.shape == other.shape


def test_vertices_alone_and_representations_need_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gudhi", None)
    alone = Multifiltration((np.arange(3)[:, None],), (np.zeros((3, 1)),), 2)
    assert barcodes(alone, [np.array([2.0, 0.0, 1.0])], (0, 1))[0].tolist() == [[0, np.inf], [1, np.inf], [2, np.inf]]
    angle = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    clouds = np.stack([np.column_stack([np.cos(angle), np.sin(angle)]) * (1 + k / 9) for k in range(3)])
    model = MultiparameterRepresentation(threshold=0.6, lines=8, resolution=5, backend="fibered")
    found = model.fit_transform(clouds)
    assert found.shape == (3, 50) and min(found[0, :25].max(), found[0, 25:].max()) > 0.5
