"""Self-distilled kernel ridge regression: the recursion, its spectral form, limits, singular kernels, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from limbeck.blocks.kernel_ridge import (
    FeatureRidge,
    KernelRidge,
    gram,
    limit_operators,
    self_distil,
    self_distilled_limit,
    spectral_operators,
)
from limbeck.core.errors import InputError, UnknownNameError

N, Q = 12, 2


def random_kernel(seed: int = 0, rank: int = N) -> np.ndarray:
    z = np.random.default_rng(seed).normal(size=(N, rank))
    return z @ z.T


def targets(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, Q))


def by_inverse(kernel: np.ndarray, ridge: float, y: np.ndarray, weights: list[float]) -> list[np.ndarray]:
    """Fitted values of every step, as the definition has them."""
    smoother = kernel @ np.linalg.inv(kernel + ridge * np.eye(len(kernel)))
    fitted = [y]
    for a in weights:
        fitted.append(smoother @ (a * y + (1 - a) * fitted[-1]))
    return fitted[1:]


# ---- the recursion and its operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[0.3] * 5, [0.0] * 5, [1.0] * 5, [0.9, 0.1, 0.8, 0.0, 0.5]])
def test_recursion_equals_the_definition_and_the_operators(weights: list[float]) -> None:
    kernel, y = random_kernel(), targets()
    problem = KernelRidge(kernel, 0.7)
    steps = self_distil(problem, y, steps=5, gt_weight=weights)
    operators = spectral_operators(kernel, 0.7, weights)
    rows = np.random.default_rng(2).normal(size=(4, N))
    for step, expected in enumerate(by_inverse(kernel, 0.7, y, weights), 1):
        coefficients = steps.coefficients[step - 1]
        np.testing.assert_allclose(problem.fitted(coefficients), expected, atol=1e-10)
        np.testing.assert_allclose(operators.fitted(y, step), expected, atol=1e-10)
        np.testing.assert_allclose(operators.matrix(step) @ y, expected, atol=1e-10)
        np.testing.assert_allclose(operators.predict(rows, y, step), rows @ coefficients, atol=1e-9)
    np.testing.assert_allclose(operators.matrix(0), np.eye(N), atol=1e-12)


def test_one_factorisation_serves_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    import limbeck.blocks.kernel_ridge as module

    real, calls = module.cho_factor, []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(module, "cho_factor", counted)
    self_distil(KernelRidge(random_kernel(), 0.5), targets(), steps=9, gt_weight=0.4)
    assert len(calls) == 1


def test_the_first_step_is_the_ordinary_fit_whatever_its_weight() -> None:
    problem, y = KernelRidge(random_kernel(), 0.5), targets()
    expected = np.linalg.solve(random_kernel() + 0.5 * np.eye(N), y)
    for weight in (0.0, 0.3, 1.0):
        steps = self_distil(problem, y, steps=2, gt_weight=weight)
        np.testing.assert_allclose(steps.coefficients[0], expected, atol=1e-10)
        assert steps.weights.tolist() == [1.0, weight]
    lists = [self_distil(problem, y, steps=3, gt_weight=[w, 0.2, 0.6]).coefficients for w in (0.0, 1.0)]
    np.testing.assert_array_equal(lists[0], lists[1])


def test_several_steps_on_ground_truth_alone_change_nothing() -> None:
    steps = self_distil(KernelRidge(random_kernel(), 0.5), targets(), steps=4, gt_weight=1.0)
    np.testing.assert_array_equal(steps.coefficients[3], steps.coefficients[0])


# ---- limits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.2, 0.5, 1.0])
def test_many_steps_come_to_a_ridge_that_is_divided_by_the_weight(weight: float) -> None:
    kernel, y = random_kernel(), targets()
    problem = KernelRidge(kernel, 0.7)
    far = self_distil(problem, y, steps=200, gt_weight=weight).coefficients[-1]
    limit = self_distilled_limit(problem, y, weight).coefficients[0]
    expected = np.linalg.solve(kernel + 0.7 / weight * np.eye(N), y)
    np.testing.assert_allclose(limit, expected, atol=1e-10)
    assert np.abs(kernel @ (far - expected)).max() < 1e-8
    operators = limit_operators(kernel, 0.7, weight)
    np.testing.assert_allclose(operators.fitted(y, 1), kernel @ expected, atol=1e-10)
    # alpha A (I - (1 - alpha) A)^-1, the other way of writing it
    a = operators.eigenvalues / (operators.eigenvalues + 0.7)
    np.testing.assert_allclose(operators.diagonals[1], weight * a / (1 - (1 - weight) * a), atol=1e-12)


def test_convergence_is_linear() -> None:
    operators = spectral_operators(random_kernel(), 0.7, [0.3] * 12)
    limit = limit_operators(random_kernel(), 0.7, 0.3).diagonals[1]
    rate = 0.7 * operators.eigenvalues / (operators.eigenvalues + 0.7)
    start = np.abs(operators.diagonals[1] - limit)
    for step in range(1, 13):
        assert (np.abs(operators.diagonals[step] - limit) <= start * rate ** (step - 1) + 1e-14).all()


def test_without_ground_truth_everything_shrinks_to_zero() -> None:
    kernel, y = random_kernel(), targets()
    problem = KernelRidge(kernel, 0.7)
    steps = self_distil(problem, y, steps=40, gt_weight=0.0)
    sizes = [np.linalg.norm(problem.fitted(c)) for c in steps.coefficients]
    assert (np.diff(sizes) < 0).all()
    operators = spectral_operators(kernel, 0.7, [0.0] * 3)
    a = operators.eigenvalues / (operators.eigenvalues + 0.7)
    np.testing.assert_allclose(operators.diagonals[3], a**3, atol=1e-12)
    assert not self_distilled_limit(problem, y, 0.0).coefficients.any()
    nothing = limit_operators(kernel, 0.7, 0.0)
    assert not nothing.diagonals[1].any() and not nothing.predict(kernel, y, 1).any()


def test_solutions_become_sparser_and_ground_truth_stops_it() -> None:
    kernel = random_kernel()
    pure = spectral_operators(kernel, 0.7, [0.0] * 30).diagonals[1:]
    ratios = pure[:, :-1] / pure[:, 1:]  # a larger eigenvalue's entry over a smaller one's
    assert (np.diff(ratios, axis=0) >= -1e-12).all() and ratios[-1].max() > 1e6

    guided = spectral_operators(kernel, 0.7, [0.4] * 30)
    limit, d = limit_operators(kernel, 0.7, 0.4).diagonals[1], guided.eigenvalues
    ratios = guided.diagonals[:, :-1] / guided.diagonals[:, 1:]
    assert (np.diff(ratios[:3], axis=0) > 0).all()
    np.testing.assert_allclose(ratios[-1], limit[:-1] / limit[1:], rtol=1e-6)
    # B = limit + ((1 - alpha) A)^tau (1 - limit), in every step
    for step, found in enumerate(guided.diagonals):
        np.testing.assert_allclose(found, limit + (0.6 * d / (d + 0.7)) ** step * (1 - limit), atol=1e-12)


# ---- optimal weights ----------------------------------------------------------------------------------------------------


def test_optimal_weights_are_the_best_of_a_grid_in_every_step() -> None:
    kernel, y = random_kernel(), targets()
    generator = np.random.default_rng(3)
    rows, wanted = generator.normal(size=(20, N)), generator.normal(size=(20, Q))
    problem = KernelRidge(kernel, 0.7)
    free = self_distil(problem, y, steps=4, gt_weight="optimal", validation=(rows, wanted), clip=False)
    clipped = self_distil(problem, y, steps=4, gt_weight="optimal", validation=(rows, wanted))
    assert ((clipped.weights >= 0) & (clipped.weights <= 1)).all()
    assert np.isnan(free.unconstrained[0]) and free.unconstrained[1:].tolist() == free.weights[1:].tolist()
    for step in range(1, 4):
        best = free.weights[step]
        grid = best + np.linspace(-0.1, 0.1, 1_001)
        before = problem.fitted(free.coefficients[step - 1])
        f, g = rows @ problem.coefficients(y), rows @ problem.coefficients(before)
        losses = [((wanted - a * f - (1 - a) * g) ** 2).mean() for a in grid]
        assert best == pytest.approx(grid[np.argmin(losses)], abs=1.1e-4)
        assert free.validation_losses is not None and free.validation_losses[step] == pytest.approx(
            min(losses), rel=1e-6
        )


def test_validation_losses_are_those_of_the_predictions() -> None:
    rows, wanted = np.random.default_rng(3).normal(size=(2, 5, N))[0], np.ones((5, Q))
    steps = self_distil(KernelRidge(random_kernel(), 1.0), targets(), steps=3, gt_weight=0.5, validation=(rows, wanted))
    expected = [((rows @ c - wanted) ** 2).mean() for c in steps.coefficients]
    assert steps.validation_losses is not None
    np.testing.assert_allclose(steps.validation_losses, expected)


# ---- singular kernels, several ridges, features -------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_singular_kernels_need_no_inverse(weight: float) -> None:
    kernel, y = random_kernel(rank=3), targets()
    assert np.linalg.matrix_rank(kernel) == 3
    weights = [weight] * 6
    steps = self_distil(KernelRidge(kernel, 1e-3), y, steps=6, gt_weight=weights)
    operators = spectral_operators(kernel, 1e-3, weights)
    assert np.isfinite(operators.solved).all() and (operators.eigenvalues >= 0).all()
    for step, expected in enumerate(by_inverse(kernel, 1e-3, y, weights), 1):
        np.testing.assert_allclose(kernel @ steps.coefficients[step - 1], expected, atol=1e-8)
        np.testing.assert_allclose(operators.predict(kernel, y, step), expected, atol=1e-8)
    zero = self_distil(KernelRidge(np.zeros((N, N)), 1.0), y, steps=3, gt_weight=weight)
    assert not KernelRidge(np.zeros((N, N)), 1.0).fitted(zero.coefficients[-1]).any()


def test_a_ridge_for_each_step() -> None:
    kernel, y, ridges, weights = random_kernel(), targets(), [0.5, 2.0, 0.1], [1.0, 0.3, 0.6]
    steps = self_distil(KernelRidge(kernel, ridges), y, steps=3, gt_weight=weights)
    fitted = y
    for step, (ridge, a) in enumerate(zip(ridges, weights, strict=True)):
        fitted = kernel @ np.linalg.solve(kernel + ridge * np.eye(N), a * y + (1 - a) * fitted)
        np.testing.assert_allclose(kernel @ steps.coefficients[step], fitted, atol=1e-9)
        np.testing.assert_allclose(spectral_operators(kernel, ridges, weights).fitted(y, step + 1), fitted, atol=1e-9)
    same = self_distil(KernelRidge(kernel, [0.7] * 3), y, steps=3, gt_weight=0.4)
    one = self_distil(KernelRidge(kernel, 0.7), y, steps=3, gt_weight=0.4)
    np.testing.assert_allclose(same.coefficients, one.coefficients, atol=1e-10)
    with pytest.raises(InputError, match="3 ridges for 4 steps"):
        self_distil(KernelRidge(kernel, ridges), y, steps=4, gt_weight=0.5)
    with pytest.raises(InputError, match="2 ridges for 3 steps"):
        spectral_operators(kernel, [1.0, 2.0], [1.0, 0.5, 0.5])


def test_features_are_the_same_problem() -> None:
    z, y = np.random.default_rng(4).normal(size=(N, 5)), targets()
    rows = np.random.default_rng(5).normal(size=(7, 5))
    validation = np.random.default_rng(6).normal(size=(7, Q))
    primal, dual = FeatureRidge(z, 0.6), KernelRidge(z @ z.T, 0.6)
    for weight in (0.3, "optimal"):
        small = self_distil(primal, y, steps=4, gt_weight=weight, validation=(rows, validation))
        large = self_distil(dual, y, steps=4, gt_weight=weight, validation=(rows @ z.T, validation))
        assert small.coefficients.shape == (4, 5, Q)
        np.testing.assert_allclose(small.weights, large.weights, atol=1e-9)
        np.testing.assert_allclose(rows @ small.coefficients, rows @ z.T @ large.coefficients, atol=1e-9)
    limits = [self_distilled_limit(p, y, 0.3) for p in (primal, dual)]
    np.testing.assert_allclose(rows @ limits[0].coefficients, rows @ z.T @ limits[1].coefficients, atol=1e-9)
    assert self_distilled_limit(primal, y, 0.0).coefficients.shape == (1, 5, Q)
    np.testing.assert_allclose(primal.kernel, dual.kernel)


# ---- kernels and bad input ----------------------------------------------------------------------------------------------


def test_gram_matrices() -> None:
    x, z = np.random.default_rng(0).normal(size=(2, 5, 3))
    expected = np.exp(-0.3 * ((x[:, None] - z[None]) ** 2).sum(-1))
    np.testing.assert_allclose(gram("rbf", x, z, gamma=0.3, degree=3), expected)
    np.testing.assert_allclose(gram("poly", x, gamma=0.5, degree=2, coef0=1.0), (0.5 * x @ x.T + 1) ** 2)
    np.testing.assert_allclose(gram(lambda a, b, scale=1.0: scale * a @ b, x, z, scale=2.0), 2 * x @ z.T)
    assert gram("precomputed", expected) is not None and gram("precomputed", expected.tolist()).dtype == np.float64
    with pytest.raises(UnknownNameError, match="unknown kernel 'rbff'; did you mean rbf"):
        gram("rbff", x)


@pytest.mark.parametrize(
    ("kernel", "ridge", "line"),
    [
        (np.ones((3, 2)), 1.0, r"must be square \(got shape \(3, 2\)\)"),
        (np.full((2, 2), np.nan), 1.0, "NaN or infinity"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), 1.0, "not symmetric"),
        (np.array([[1.0, 3.0], [3.0, 1.0]]), 1.0, "plus ridge 1 is not positive definite"),
        (np.array([[1.0, 3.0], [3.0, 1.0]]), [1.0, 2.0], "not positive semi-definite"),
        (np.eye(2), 0.0, "ridge must be a number above 0"),
        (np.eye(2), -1.0, r"ridge .*got -1\.0"),
        (np.eye(2), float("nan"), "ridge must be"),
        (np.eye(2), "big", "ridge must be .*'big'"),
        (np.eye(2), [1.0, 0.0], "ridge must be"),
        (np.eye(2), [], "ridge must be"),
    ],
)
def test_bad_kernels_and_ridges_are_named(kernel: np.ndarray, ridge: object, line: str) -> None:
    with pytest.raises(InputError, match=line):
        KernelRidge(kernel, ridge)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"gt_weight": 1.1}, r"in \[0, 1\].*got 1\.1"),
        ({"gt_weight": -0.1}, "gt_weight must be"),
        ({"gt_weight": float("nan")}, "gt_weight must be"),
        ({"gt_weight": [0.5, 2.0, 0.1]}, "gt_weight must be"),
        ({"gt_weight": [0.5, 0.5]}, "2 weights for 3 steps"),
        ({"gt_weight": "best"}, "gt_weight must be 'optimal'.*'best'"),
        ({"gt_weight": "optimal"}, "needs validation data"),
        ({"gt_weight": 0.5, "steps": 0}, "steps must be an integer of at least 1"),
        ({"gt_weight": 0.5, "steps": 2.5}, "steps must be an integer"),
    ],
)
def test_bad_weights_and_steps_are_named(settings: dict, line: str) -> None:
    with pytest.raises(InputError, match=line):
        self_distil(KernelRidge(random_kernel(), 1.0), targets(), **{"steps": 3, **settings})


def test_limits_need_one_weight_and_one_ridge() -> None:
    for problem, weight in (
        (KernelRidge(random_kernel(), 1.0), [0.5, 0.5]),
        (KernelRidge(random_kernel(), 1.0), "optimal"),
        (KernelRidge(random_kernel(), [1.0, 2.0]), 0.5),
    ):
        with pytest.raises(InputError, match="one constant weight and one ridge"):
            self_distilled_limit(problem, targets(), weight)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"gt_weight must be"):
        self_distilled_limit(KernelRidge(random_kernel(), 1.0), targets(), 1.5)
    with pytest.raises(InputError, match="predicts nothing"):
        spectral_operators(random_kernel(), 1.0, [1.0]).predict(random_kernel(), targets(), 0)


def test_a_kernel_in_single_precision_is_taken() -> None:
    kernel = random_kernel().astype(np.float32)
    kernel[0, 1] *= 1 + 1e-7
    problem = KernelRidge(kernel, 0.5)
    np.testing.assert_array_equal(problem.kernel, problem.kernel.T)
