from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge

from limbeck.blocks.prefix_problems import allowed, least_norm, moved
from limbeck.blocks.prefix_regression import LeastSquares, gram_of, greedy_order, variance_order
from limbeck.core.errors import InputError

MOVES = ("swap", "insert-after", "insert-before")


def samples(n: int = 60, d: int = 7, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(n, d)) @ generator.normal(size=(d, d))
    return mixed - mixed.mean(0)


def windows(d: int) -> np.ndarray:
    return np.stack(np.triu_indices(d, 1), 1)


def test_every_prefix_is_sklearns_least_squares() -> None:
    data = samples()
    order = np.random.default_rng(1).permutation(7)
    found = LeastSquares(gram_of(data)).fit(order)
    for place in range(1, 7):
        parents, node = order[:place], order[place]
        expected = LinearRegression(fit_intercept=False).fit(data[:, parents], data[:, node]).coef_
        np.testing.assert_allclose(found.weights[parents, node], expected, atol=1e-10)
    assert found.score == pytest.approx(((data - data @ found.weights) ** 2).sum() / (2 * len(data)))
    assert not found.weights[allowed(order) == 0].any()


def test_a_ridge_is_sklearns_too() -> None:
    data = samples()
    problem = LeastSquares(gram_of(data), ridge=0.3)
    order = np.arange(7)[::-1].copy()
    found = problem.fit(order)
    expected = Ridge(alpha=0.3 * len(data), fit_intercept=False).fit(data[:, order[:4]], data[:, order[4]]).coef_
    np.testing.assert_allclose(found.weights[order[:4], order[4]], expected, atol=1e-10)
    loss = ((data - data @ found.weights) ** 2).sum() / (2 * len(data)) + 0.15 * (found.weights**2).sum()
    assert found.score == pytest.approx(loss)
    assert abs(problem.gradient(found)[allowed(order) > 0]).max() < 1e-10


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_fitting_the_nodes_between_equals_a_full_fit(move: str, ridge: float) -> None:
    problem = LeastSquares(gram_of(samples()), ridge)
    fitted = problem.fit(np.random.default_rng(2).permutation(7))
    scores = problem.evaluate(fitted, windows(7), move)
    for (first, last), score in zip(windows(7).tolist(), scores.tolist(), strict=True):
        order = moved(fitted.order, first, last, move)
        whole, part = problem.fit(order), problem.refit(fitted, order, first, last)
        np.testing.assert_allclose(part.weights, whole.weights, atol=1e-9)
        np.testing.assert_allclose(part.parts["factor"], whole.parts["factor"], atol=1e-9)
        assert part.score == pytest.approx(whole.score, rel=1e-12) and score == pytest.approx(whole.score, rel=1e-12)
        others = np.setdiff1d(np.arange(7), order[first : last + 1])
        assert np.array_equal(part.weights[:, others], fitted.weights[:, others])


def test_moves() -> None:
    order = np.array([4, 2, 0, 3, 1])
    assert moved(order, 1, 3).tolist() == [4, 3, 0, 2, 1]
    assert moved(moved(order, 1, 3), 1, 3).tolist() == order.tolist()
    assert moved(order, 1, 3, "insert-after").tolist() == [4, 0, 3, 2, 1]
    assert moved(order, 1, 3, "insert-before").tolist() == [4, 3, 2, 0, 1]
    assert moved(moved(order, 1, 3, "insert-before"), 1, 3, "insert-after").tolist() == order.tolist()


def test_swaps_whose_windows_do_not_overlap_commute_and_their_gains_add_up() -> None:
    problem = LeastSquares(gram_of(samples()))
    start = problem.fit(np.random.default_rng(3).permutation(7))
    ahead = problem.refit(start, moved(start.order, 0, 2), 0, 2)
    behind = problem.refit(start, moved(start.order, 3, 6), 3, 6)
    one = problem.refit(ahead, moved(ahead.order, 3, 6), 3, 6)
    other = problem.refit(behind, moved(behind.order, 0, 2), 0, 2)
    assert np.array_equal(one.order, other.order)
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-10)
    assert one.score - start.score == pytest.approx(ahead.score + behind.score - 2 * start.score)


def test_the_gradient_is_that_of_finite_differences() -> None:
    data = samples()
    problem = LeastSquares(gram_of(data))
    fitted = problem.fit(np.arange(7))
    found = problem.gradient(fitted)
    for i, j in ((5, 2), (6, 0), (1, 0)):
        step = np.zeros((7, 7))
        step[i, j] = 1e-5
        slope = [((data - data @ (fitted.weights + sign * step)) ** 2).sum() / (2 * len(data)) for sign in (1, -1)]
        assert (slope[0] - slope[1]) / 2e-5 == pytest.approx(found[i, j], rel=1e-6)
    assert abs(found[np.triu_indices(7, 1)]).max() < 1e-10


def test_constant_columns_stay_alone_and_dependent_ones_are_named() -> None:
    data = samples()
    constant = np.column_stack([data[:, :3], np.full(len(data), 0.1), data[:, 3:]])
    problem = LeastSquares(gram_of(constant))
    found = problem.fit(np.random.default_rng(4).permutation(8))
    assert not found.weights[3].any() and not found.weights[:, 3].any()
    rest = [n if n < 3 else n - 1 for n in found.order.tolist() if n != 3]
    assert found.score == pytest.approx(LeastSquares(gram_of(data)).fit(np.array(rest)).score)
    assert np.isfinite(problem.evaluate(found, windows(8), "swap")).all()
    double = np.column_stack([data, data[:, 0] - 2 * data[:, 1]])
    with pytest.raises(InputError, match="linear combinations"):
        LeastSquares(gram_of(double))
    assert np.isfinite(LeastSquares(gram_of(double), ridge=0.1).fit(np.arange(8)).score)
    with pytest.raises(InputError, match="fewer samples than columns"):
        LeastSquares(gram_of(data[:5]))


def test_simple_orders() -> None:
    generator = np.random.default_rng(5)
    x = generator.normal(size=4000)
    y = 2 * x + generator.normal(size=4000)
    z = 0.2 * y + 0.7 * generator.normal(size=4000)
    gram = gram_of(np.stack([y, z, x], 1))
    assert variance_order(gram).tolist() == [1, 2, 0]
    assert greedy_order(gram_of(np.stack([y, -y + x + generator.normal(size=4000), x], 1))).tolist()[0] == 2
    assert sorted(greedy_order(gram).tolist()) == [0, 1, 2]


def test_the_subgradient_of_least_norm() -> None:
    gradient = np.array([[0.3, -0.3], [0.05, -1.0]])
    weights = np.array([[0.0, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(least_norm(gradient, weights, 0.1), [[0.2, -0.2], [0.0, -0.9]])
    assert least_norm(gradient, weights, 0.0) is gradient
