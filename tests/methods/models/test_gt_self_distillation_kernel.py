"""The kernel form as scikit-learn estimators: published numbers, scikit-learn's own checks, validation data, bad input."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.gaussian_process.kernels import RBF
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator

from limbeck import catalogue
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.methods.models import KernelSelfDistillation, KernelSelfDistillationClassifier

# The toy problem of the paper's code: noisy values of sin(2 pi x), judged against the sine itself.
TOY_X = np.linspace(0, 1, 11)[:, None]
TOY_Y = np.array(
    [
        0.38476636465198066,
        1.2333967683416893,
        1.33232242218057,
        0.6920159488889518,
        -0.29756145531871736,
        -0.24189291901377769,
        -0.7964485769175675,
        -0.9616480167034174,
        -0.49672509509916934,
        -0.3469066003991437,
        0.5589512650600734,
    ]
)
GRID = np.linspace(0, 1, 101)[:, None]
SINE = np.sin(2 * np.pi * GRID[:, 0])


def toy(**settings: Any) -> KernelSelfDistillation:
    return KernelSelfDistillation(**{"gamma": 80, "ridge": 0.2, "steps": 6, **settings})


def errors(model: KernelSelfDistillation) -> list[float]:
    return [float(((p - SINE) ** 2).mean()) for p in model.staged_predict(GRID)]


def problem(n: int = 60, q: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, 3))
    y = np.sin(x[:, :1] + x[:, 1:2]) + 0.3 * generator.normal(size=(n, q or 1))
    return x, y if q else y[:, 0]


# ---- the paper's numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "expected", "limit"),
    [
        (0.0, [0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251], 0.49505),
        (0.25, [0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011], 0.15250),
        (0.35, [0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948], 0.14959),
    ],
)
def test_toy_example(weight: float, expected: list[float], limit: float) -> None:
    np.testing.assert_allclose(errors(toy(gt_weight=weight).fit(TOY_X, TOY_Y)), expected, atol=5.1e-6)
    endless = toy(gt_weight=weight, steps=math.inf).fit(TOY_X, TOY_Y)
    np.testing.assert_allclose(errors(endless), [limit], atol=5.1e-6)
    if weight == 0:
        assert not endless.predict(GRID).any()
    else:
        other = KernelRidge(kernel="rbf", gamma=80, alpha=0.2 / weight).fit(TOY_X, TOY_Y)
        np.testing.assert_allclose(endless.predict(GRID), other.predict(GRID), atol=1e-10)


def test_toy_example_with_optimal_weights() -> None:
    model = toy(gt_weight="optimal", clip=False).fit(TOY_X, TOY_Y, GRID, SINE)
    np.testing.assert_allclose(model.gt_weights_, [1, -0.6218, 0.3304, 0.3348, 0.3358, 0.3360], atol=5.1e-5)
    expected = [0.16477, 0.14834, 0.14889, 0.14923, 0.14941, 0.14950]
    np.testing.assert_allclose(errors(model), expected, atol=5.1e-6)
    np.testing.assert_allclose(model.validation_losses_, expected, atol=5.1e-6)
    clipped = toy(gt_weight="optimal").fit(TOY_X, TOY_Y, GRID, SINE)
    assert clipped.gt_weights_[1] == 0 and clipped.unconstrained_gt_weights_[1] == pytest.approx(-0.6218, abs=5e-5)


# ---- as an estimator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [
        KernelSelfDistillation(),
        KernelSelfDistillation(gt_weight=0.5, steps=math.inf),
        KernelSelfDistillation(gt_weight=[1.0, 0.5, 0.2], steps=3, ridge=[1.0, 0.5, 0.5]),
        KernelSelfDistillation(landmarks=20),
        KernelSelfDistillationClassifier(),
        KernelSelfDistillationClassifier(gt_weight=0.2),
    ],
    ids=["optimal", "limit", "lists", "landmarks", "classifier", "classifier-constant"],
)
def test_scikit_learn_finds_nothing_wrong(estimator: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(estimator, on_skip=None)
    assert {f["check_name"] for f in found if f["status"] != "passed"} <= {"check_array_api_input"}  # needs a variable
    assert len(found) > 40


def test_first_stage_is_ridge_regression_and_the_last_is_the_prediction() -> None:
    x, y = problem()
    model = KernelSelfDistillation(gamma=0.3, ridge=0.5, gt_weight=0.4, steps=4).fit(x, y)
    stages = list(model.staged_predict(x[:7]))
    reference = KernelRidge(kernel="rbf", gamma=0.3, alpha=0.5).fit(x, y)
    np.testing.assert_allclose(stages[0], reference.predict(x[:7]), atol=1e-10)
    assert len(stages) == 4 and stages[0].shape == (7,)
    np.testing.assert_array_equal(stages[3], model.predict(x[:7]))
    # and every stage is a plain refit on mixed targets
    fitted = y
    for weight, stage in zip(model.gt_weights_, stages, strict=True):
        refit = KernelRidge(kernel="rbf", gamma=0.3, alpha=0.5).fit(x, weight * y + (1 - weight) * fitted)
        np.testing.assert_allclose(stage, refit.predict(x[:7]), atol=1e-9)
        fitted = refit.predict(x)


def test_several_outputs_share_the_weights_and_equal_single_ones_where_those_are_constant() -> None:
    x, y = problem(q=3)
    x_val, y_val = problem(q=3, seed=1)
    joint = KernelSelfDistillation(gt_weight=0.4).fit(x, y, x_val, y_val)
    assert joint.predict(x).shape == (60, 3)
    for k in range(3):
        alone = KernelSelfDistillation(gt_weight=0.4).fit(x, y[:, k])
        np.testing.assert_allclose(joint.predict(x)[:, k], alone.predict(x), atol=1e-10)
    best = KernelSelfDistillation().fit(x, y, x_val, y_val)
    assert best.gt_weights_.shape == (8,)
    assert best.validation_losses_[1] <= joint.validation_losses_[1] + 1e-12


def test_operators_tell_what_was_fitted() -> None:
    x, y = problem(30)
    for settings in (
        {"gt_weight": 0.4},
        {"gt_weight": 0.4, "steps": math.inf},
        {"random_state": 0},
        {"landmarks": 8, "gt_weight": 0.3},
    ):
        model = KernelSelfDistillation(gamma=0.3, ridge=0.5, **settings).fit(x, y)
        operators = model.operators()
        for step, stage in enumerate(model.staged_predict(model.X_fit_), 1):
            np.testing.assert_allclose(operators.fitted(model.targets_, step)[:, 0], stage, atol=1e-8)
        assert len(operators.diagonals) == len(model.coefficients_) + 1


def test_precomputed_kernels_equal_named_ones() -> None:
    x, y = problem(40)
    x_val, y_val = problem(15, seed=1)
    kernel = RBF(1.3)
    named: dict[str, Any] = {"gamma": 1 / (2 * 1.3**2), "ridge": 0.2}
    for settings in ({"gt_weight": 0.3}, {"gt_weight": "optimal"}):
        by_name = KernelSelfDistillation("rbf", **named, **settings).fit(x, y, x_val, y_val)
        given = KernelSelfDistillation("precomputed", ridge=0.2, **settings).fit(kernel(x), y, kernel(x_val, x), y_val)
        callable_ = KernelSelfDistillation(kernel, ridge=0.2, **settings).fit(x, y, x_val, y_val)
        np.testing.assert_allclose(given.gt_weights_, by_name.gt_weights_, atol=1e-9)
        np.testing.assert_allclose(given.predict(kernel(x_val, x)), by_name.predict(x_val), atol=1e-9)
        np.testing.assert_allclose(callable_.predict(x_val), by_name.predict(x_val), atol=1e-9)
    # with a part split off, predictions still take a column for every sample that fit was given
    split = KernelSelfDistillation("precomputed", ridge=0.2, random_state=3).fit(kernel(x), y)
    by_name = KernelSelfDistillation("rbf", **named, random_state=3).fit(x, y)
    assert len(split.coefficients_[0]) == 32
    np.testing.assert_allclose(split.predict(kernel(x_val, x)), by_name.predict(x_val), atol=1e-9)


def test_as_many_landmarks_as_samples_are_exact() -> None:
    x, y = problem(25)
    exact = KernelSelfDistillation("laplacian", gamma=0.3, gt_weight=0.3).fit(x, y)
    approximated = KernelSelfDistillation("laplacian", gamma=0.3, gt_weight=0.3, landmarks=25).fit(x, y)
    np.testing.assert_allclose(approximated.predict(x), exact.predict(x), atol=1e-6)
    few = KernelSelfDistillation("poly", degree=2, gt_weight=0.3, landmarks=5).fit(x, y)
    assert few.coefficients_.shape == (8, 5, 1)


def test_held_out_samples_are_not_fitted_and_weights_are_theirs() -> None:
    x, y = problem()
    model = KernelSelfDistillation(random_state=0).fit(x, y)
    again = clone(model).fit(x, y)
    np.testing.assert_array_equal(model.coefficients_, again.coefficients_)
    assert len(model.X_fit_) == 48 and not (model.X_fit_[:, None] == x[None]).all(-1).any(0).all()
    held = ~(model.X_fit_[:, None] == x[None]).all(-1).any(0)
    explicit = KernelSelfDistillation().fit(x[~held], y[~held], x[held], y[held])
    np.testing.assert_allclose(explicit.predict(x), model.predict(x), atol=1e-12)
    constant = KernelSelfDistillation(gt_weight=0.5).fit(x, y)
    assert len(constant.X_fit_) == 60 and constant.validation_losses_ is None


def test_it_can_be_searched_over() -> None:
    x, y = problem()
    search = GridSearchCV(KernelSelfDistillation(steps=3), {"gt_weight": [0.2, 0.8], "ridge": [0.1, 1.0]}, cv=3).fit(
        x, y
    )
    assert search.best_params_["gt_weight"] in (0.2, 0.8)


def test_classification_is_regression_on_one_hot_targets() -> None:
    x, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    model = KernelSelfDistillationClassifier(gt_weight=0.3, ridge=0.1).fit(x, names)
    regressor = KernelSelfDistillation(gt_weight=0.3, ridge=0.1).fit(x, np.eye(3)[y])
    np.testing.assert_allclose(model.decision_function(x), regressor.predict(x), atol=1e-12)
    assert model.score(x, names) > 0.95 and model.predict(x).dtype == names.dtype
    stages = list(model.staged_predict(x))
    assert len(stages) == 8 and (stages[-1] == model.predict(x)).all()


def test_digits_with_wrong_labels_gain_from_distillation_under_a_small_ridge() -> None:
    x, y = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    noisy = np.where(generator.random(len(y)) < 0.3, generator.integers(0, 10, len(y)), y)
    model = KernelSelfDistillationClassifier(gamma=0.05, ridge=0.05, random_state=0).fit(x[:600] / 16, noisy[:600])
    first, *_, last = model.staged_predict(x[600:] / 16)
    assert (last == y[600:]).mean() > (first == y[600:]).mean() + 0.02


# ---- where it is found --------------------------------------------------------------------------------------------------


def test_both_forms_are_on_one_card_and_the_kernel_form_needs_no_torch() -> None:
    card = catalogue.get("gt-self-distillation")
    assert list(card.classes()) == ["GTSelfDistillation", "KernelSelfDistillation", "KernelSelfDistillationClassifier"]
    assert card.implementation.endswith(":GTSelfDistillation") and catalogue.get("kd").also == ()
    script = "import sys; from limbeck.methods.models import KernelSelfDistillation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


# ---- bad input ----------------------------------------------------------------------------------------------------------

X, Y = problem(12)
BROKEN = np.where(np.arange(12)[:, None] == 3, np.nan, X)


@pytest.mark.parametrize(
    ("settings", "data", "line"),
    [
        ({"ridge": 0.0}, (X, Y), "ridge must be a number above 0"),
        ({"ridge": -1}, (X, Y), "ridge must be a number above 0"),
        ({"gt_weight": 1.2}, (X, Y), r"gt_weight must be 'optimal', a number in \[0, 1\]"),
        ({"gt_weight": [0.5, -0.5], "steps": 2}, (X, Y), "gt_weight must be"),
        ({"gt_weight": [0.5, 0.5], "steps": 3}, (X, Y), "2 weights for 3 steps"),
        ({"gt_weight": "best"}, (X, Y), "gt_weight must be 'optimal'"),
        ({"steps": 0}, (X, Y), "steps must be an integer of at least 1, or infinity"),
        ({"steps": -math.inf, "gt_weight": 0.5}, (X, Y), "steps must be"),
        ({"steps": True}, (X, Y), "steps must be"),
        ({"steps": math.inf}, (X, Y), "only for one constant gt_weight"),
        ({"steps": math.inf, "gt_weight": [0.5]}, (X, Y), "only for one constant gt_weight"),
        ({"steps": math.inf, "gt_weight": 0.5, "ridge": [1.0, 2.0]}, (X, Y), "one ridge"),
        ({"ridge": [1.0, 2.0], "steps": 3, "gt_weight": 0.5}, (X, Y), "2 ridges for 3 steps"),
        ({"validation_fraction": None}, (X, Y), "needs validation data"),
        ({"validation_fraction": 1.0}, (X, Y), "validation_fraction must be a number between 0 and 1"),
        ({"landmarks": 0}, (X, Y), "landmarks must be an integer of at least 1"),
        ({"landmarks": 3, "kernel": "precomputed"}, (X @ X.T, Y), "landmarks are samples"),
        ({"kernel": "precomputed", "gt_weight": 0.5}, (X, Y), "Precomputed|square"),
        ({"kernel": "sigmoid", "gt_weight": 0.5, "ridge": 1e-3, "gamma": 2.0}, (X, Y), "not positive definite"),
        ({}, (BROKEN, Y), "Input X contains NaN"),
        ({}, (X, np.where(np.arange(12) == 3, np.inf, Y)), "Input y contains infinity"),
        ({}, (X, Y[:5]), "inconsistent numbers of samples"),
        ({}, (X[:1], Y[:1]), "n_samples=1 cannot be split"),
        ({}, (X, Y, X), "give both X_val and y_val"),
        ({}, (X, Y, X[:, :2], Y), "X_val has 2 features, but X has 3"),
        ({}, (X, Y, X, Y[:, None]), r"y_val has shape \(12, 1\); expected \(12,\)"),
        ({}, (X, Y, BROKEN, Y), "X_val contains NaN"),
    ],
)
def test_bad_input_is_named_in_one_line(settings: dict[str, Any], data: tuple[Any, ...], line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        KernelSelfDistillation(**settings).fit(*data)
    assert "\n" not in str(caught.value)


def test_unknown_kernels_are_named_with_near_ones() -> None:
    for settings in ({}, {"landmarks": 3}):
        with pytest.raises(UnknownNameError, match="unknown kernel 'rbff'; did you mean rbf"):
            KernelSelfDistillation("rbff", **settings).fit(X, Y)


def test_unknown_validation_labels_are_refused() -> None:
    labels = (Y > 0).astype(int)
    with pytest.raises(InputError, match="of the classes that y has"):
        KernelSelfDistillationClassifier().fit(X, labels, X, labels + 1)
    with pytest.raises(InputError, match="contains NaN"):
        KernelSelfDistillationClassifier().fit(X, labels).predict(BROKEN)
