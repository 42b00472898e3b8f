from __future__ import annotations

import numpy as np
import pytest

from limbeck.blocks.acyclicity import VARIANTS, log_det, squared, variant, walks
from limbeck.core.errors import InputError, UnknownNameError


def dag(d: int = 6, seed: int = 0, share: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    along = np.triu(generator.uniform(0.2, 1.5, (d, d)) * (generator.random((d, d)) < share), 1)
    order = generator.permutation(d)
    strengths = np.zeros((d, d))
    strengths[np.ix_(order, order)] = along
    return strengths, order


def reachable(strengths: np.ndarray) -> np.ndarray:
    """(i, j): whether a walk of any length, zero included, goes from i to j."""
    found = np.eye(len(strengths), dtype=int)
    for _ in strengths:
        found = ((found + found @ (strengths != 0)) > 0).astype(int)
    return found > 0


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cyclic", [False, True])
def test_gradients_are_those_of_finite_differences(name: str, cyclic: bool) -> None:
    strengths = dag(5)[0]
    if cyclic:
        strengths = np.random.default_rng(1).uniform(0, 0.15, (5, 5))
    _, gradient = variant(name)(strengths)
    for i in range(5):
        for j in range(5):
            step = np.zeros((5, 5))
            step[i, j] = 1e-6
            # One-sided, since strengths are not negative.
            near, far = (variant(name)(strengths + scale * step)[0] for scale in (1, 2))
            slope = (4 * near - far - 3 * variant(name)(strengths)[0]) / 2e-6
            assert slope == pytest.approx(gradient[i, j], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["exponential", "polynomial"])
def test_the_gradient_of_the_squared_weights_is_that_of_finite_differences(name: str) -> None:
    weights = np.random.default_rng(2).normal(0, 0.5, (4, 4))
    _, gradient = squared(name, weights)
    for i in range(4):
        for j in range(4):
            step = np.zeros((4, 4))
            step[i, j] = 1e-6
            slope = (squared(name, weights + step)[0] - squared(name, weights - step)[0]) / 2e-6
            assert slope == pytest.approx(gradient[i, j], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_zero_on_dags_and_positive_on_a_cycle_of_two(name: str) -> None:
    strengths, _ = dag()
    assert variant(name)(strengths)[0] == pytest.approx(0, abs=1e-10)
    cycle = np.array([[0.0, 0.5], [0.4, 0.0]])
    assert variant(name)(cycle)[0] > 0.01


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_is_zero_exactly_where_an_edge_closes_no_cycle(name: str, seed: int) -> None:
    strengths, order = dag(7, seed, 0.25)
    found = walks(strengths, order, name)
    reach = reachable(strengths)
    for a in range(7):
        for b in range(7):
            assert (found[a, b] > 0) == reach[order[a], order[b]]
    general = variant(name)(strengths)[1]
    np.testing.assert_allclose(found, general[np.ix_(order, order)].T, atol=1e-10)


def test_walks_count_what_goes_through() -> None:
    strengths = np.zeros((3, 3))
    strengths[0, 1], strengths[1, 2], strengths[0, 2] = 2.0, 3.0, 5.0
    assert walks(strengths, np.arange(3))[0, 2] == 2 * 3 + 5


def test_sums_that_overflow_are_infinite_and_never_nan() -> None:
    d = 400
    strengths = np.triu(np.full((d, d), 1e4), 1)
    strengths[:, -1] = 0
    found = walks(strengths, np.arange(d))
    assert np.isinf(found[0, d - 2]) and found[0, d - 1] == 0 and not np.isnan(found).any()


def test_the_log_determinant_says_where_it_ends() -> None:
    with pytest.raises(InputError, match="spectral radius below s = 1"):
        log_det(np.array([[0.0, 2.0], [2.0, 0.0]]))
    assert log_det(np.array([[0.0, 2.0], [2.0, 0.0]]), s=3.0)[0] == pytest.approx(-np.log(5) + 2 * np.log(3))
    with pytest.raises(UnknownNameError, match="did you mean log-det"):
        variant("logdet")
