from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression

from limbeck.blocks.prefix_penalised import Columnwise, LassoPrefixes, LogisticPrefixes, Regressions
from limbeck.blocks.prefix_problems import allowed, moved
from limbeck.blocks.prefix_regression import LeastSquares, gram_of
from limbeck.core.errors import InputError

ORDER = np.array([3, 0, 4, 1, 2])


def samples(binary: bool = False, n: int = 80) -> np.ndarray:
    generator = np.random.default_rng(0)
    mixed = generator.normal(size=(n, 5)) @ (np.eye(5) + 0.4 * generator.normal(size=(5, 5)))
    return (mixed > 0).astype(float) if binary else mixed - mixed.mean(0)


def problems() -> dict[str, Columnwise]:
    return {"lasso": LassoPrefixes(gram_of(samples()), 0.6), "logistic": LogisticPrefixes(samples(True), 0.02)}


def test_the_lasso_is_sklearns_on_every_prefix() -> None:
    data, found = samples(), problems()["lasso"].fit(ORDER)
    for place in range(1, 5):
        parents, node = ORDER[:place], ORDER[place]
        expected = Lasso(0.6, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(data[:, parents], data[:, node])
        np.testing.assert_allclose(found.weights[parents, node], expected.coef_, atol=1e-6)
    loss = ((data - data @ found.weights) ** 2).sum() / (2 * len(data)) + 0.6 * abs(found.weights).sum()
    assert found.score == pytest.approx(loss)
    assert (found.weights[allowed(ORDER) > 0] == 0).any()


def test_the_logistic_model_is_sklearns_on_every_prefix() -> None:
    data, found = samples(True), problems()["logistic"].fit(ORDER)
    for place in range(1, 5):
        parents, node = ORDER[:place], ORDER[place]
        expected = LogisticRegression(
            C=1 / (0.02 * len(data)), l1_ratio=1, solver="liblinear", fit_intercept=False, tol=1e-10, max_iter=10_000
        ).fit(data[:, parents], data[:, node])
        np.testing.assert_allclose(found.weights[parents, node], expected.coef_[0], atol=1e-4)
    logits = data @ found.weights
    loss = (np.logaddexp(0, logits) - data * logits).mean(0).sum() + 0.02 * abs(found.weights).sum()
    assert found.score == pytest.approx(loss)


@pytest.mark.parametrize("name", ["lasso", "logistic"])
@pytest.mark.parametrize("move", ["swap", "insert-after"])
def test_fitting_the_nodes_between_equals_a_full_fit(name: str, move: str) -> None:
    problem = problems()[name]
    fitted = problem.fit(ORDER)
    windows = np.stack(np.triu_indices(5, 1), 1)
    scores = problem.evaluate(fitted, windows, move)
    for (a, b), score in zip(windows.tolist(), scores.tolist(), strict=True):
        order = moved(ORDER, a, b, move)
        whole, part = problem.fit(order), problem.refit(fitted, order, a, b)
        assert part.score == pytest.approx(whole.score, rel=1e-7) and score == pytest.approx(whole.score, rel=1e-7)
        assert not part.weights[allowed(order) == 0].any()
        others = np.setdiff1d(np.arange(5), order[a : b + 1])
        assert np.array_equal(part.weights[:, others], fitted.weights[:, others])


def test_many_moves_are_judged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems()["lasso"]
    fitted, windows = problem.fit(ORDER), np.stack(np.triu_indices(5, 1), 1)
    whole = problem.evaluate(fitted, windows, "swap")
    monkeypatch.setattr("limbeck.blocks.prefix_penalised.MOST_COLUMNS", 4)
    np.testing.assert_allclose(problem.evaluate(fitted, windows, "swap"), whole, rtol=1e-9)


@pytest.mark.parametrize("name", ["lasso", "logistic"])
def test_the_gradient_vanishes_where_edges_are_allowed(name: str) -> None:
    problem = problems()[name]
    fitted = problem.fit(ORDER)
    found = problem.gradient(fitted)
    assert abs(found[allowed(ORDER) > 0]).max() < 1e-5 and abs(found).max() > 0.01
    assert not np.diag(found).any()


def test_constant_columns_get_no_edges() -> None:
    data = np.column_stack([samples(), np.full(80, 3.0)])
    found = LassoPrefixes(gram_of(data), 0.1).fit(np.arange(6))
    assert not found.weights[5].any() and not found.weights[:, 5].any() and np.isfinite(found.score)


def test_the_logistic_model_says_what_it_needs() -> None:
    with pytest.raises(InputError, match="zeros and ones"):
        LogisticPrefixes(samples(), 0.1)
    with pytest.raises(InputError, match="l1 > 0"):
        LogisticPrefixes(samples(True), 0.0)


def least_squares_score(data: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    short = data - data @ weights
    return 0.5 * float((short**2).sum()) / len(data), -data.T @ short / len(data)


@pytest.mark.parametrize("jobs", [None, 2])
@pytest.mark.parametrize("regress", [LinearRegression(fit_intercept=False), lambda a, b: np.linalg.lstsq(a, b)[0]])
def test_regressions_of_ones_own_agree_with_the_built_in_ones(regress: object, jobs: int | None) -> None:
    data = samples()
    own, built_in = Regressions(data, regress, least_squares_score, jobs), LeastSquares(gram_of(data))
    a, b = own.fit(ORDER), built_in.fit(ORDER)
    np.testing.assert_allclose(a.weights, b.weights, atol=1e-9)
    windows = np.stack(np.triu_indices(5, 1), 1)
    np.testing.assert_allclose(own.evaluate(a, windows, "swap"), built_in.evaluate(b, windows, "swap"))
    np.testing.assert_allclose(own.gradient(a), built_in.gradient(b), atol=1e-9)


def test_regressions_of_ones_own_are_checked() -> None:
    data = samples()
    with pytest.raises(InputError, match="regress gave 3 coefficients for 1 parents"):
        Regressions(data, lambda a, b: np.zeros(3), least_squares_score).fit(ORDER)
    with pytest.raises(InputError, match="must be a finite number"):
        Regressions(data, lambda a, b: np.zeros(a.shape[1]), lambda x, w: (np.nan, w)).fit(ORDER)
    wrong = Regressions(data, lambda a, b: np.zeros(a.shape[1]), lambda x, w: (0.0, w[:2]))
    with pytest.raises(InputError, match="dQ/dW"):
        wrong.gradient(wrong.fit(ORDER))
