from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.blocks.prefix_networks import NetworkPrefixes, _error
from limbeck.blocks.prefix_problems import allowed, moved

ORDER = np.array([2, 0, 3, 1])


def problem(**settings: object) -> NetworkPrefixes:
    generator = np.random.default_rng(0)
    data = generator.normal(size=(60, 4))
    data[:, 1] += np.sin(2 * data[:, 0]) + data[:, 2]
    return NetworkPrefixes(data, **{"hidden": 3, "l1": 0.02, "l2": 0.03, **settings})  # type: ignore[arg-type]


def loss(p: NetworkPrefixes, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    x = torch.from_numpy(p.data)
    error = sum(
        ((torch.sigmoid(x @ a.T) @ b - x[:, j]) ** 2).mean() for j, (a, b) in enumerate(zip(first, second, strict=True))
    )
    fit = 0.5 * error if p.loss == "squared" else 0.5 * p.size * torch.log(error)
    return fit + p.l1 * first.abs().sum() + 0.5 * p.l2 * ((first**2).sum() + (second**2).sum())


@pytest.mark.parametrize("kind", ["squared", "log"])
def test_the_score_is_the_equation(kind: str) -> None:
    p = problem(loss=kind)
    fitted = p.fit(ORDER)
    first, second = (torch.from_numpy(fitted.parts[name]) for name in ("first", "second"))
    assert fitted.score == pytest.approx(float(loss(p, first, second)))
    np.testing.assert_allclose(fitted.weights, np.linalg.norm(fitted.parts["first"], axis=1).T)
    np.testing.assert_allclose(
        p.predict(fitted, p.data)[:, 1], (torch.sigmoid(torch.from_numpy(p.data) @ first[1].T) @ second[1]).numpy()
    )


def test_the_networks_gradients_are_autograds() -> None:
    generator = np.random.default_rng(1)
    x, y, first, second = (generator.normal(size=s) for s in ((20, 4), (20,), (3, 4), (3,)))
    a, b = torch.from_numpy(first).requires_grad_(), torch.from_numpy(second).requires_grad_()
    error = ((torch.sigmoid(torch.from_numpy(x) @ a.T) @ b - torch.from_numpy(y)) ** 2).mean()
    (0.5 * error).backward()
    found = _error(x, y, first, second)
    assert found[0] == pytest.approx(error.item())
    np.testing.assert_allclose(found[1], a.grad.numpy())  # type: ignore[union-attr]
    np.testing.assert_allclose(found[2], b.grad.numpy())  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["squared", "log"])
def test_candidates_see_the_gradient_of_least_norm(kind: str) -> None:
    p = problem(loss=kind)
    fitted = p.fit(ORDER)
    first = torch.from_numpy(fitted.parts["first"].copy()).requires_grad_()
    (loss(p, first, torch.from_numpy(fitted.parts["second"])) - p.l1 * first.abs().sum()).backward()
    smooth = first.grad.numpy()  # type: ignore[union-attr]
    shrunk = np.sign(smooth) * np.maximum(abs(smooth) - p.l1, 0)
    least = np.where(fitted.parts["first"] == 0, shrunk, smooth + p.l1 * np.sign(fitted.parts["first"]))
    expected = np.linalg.norm(least, axis=1).T * (1 - np.eye(4))
    np.testing.assert_allclose(p.gradient(fitted), expected, atol=1e-10)


@pytest.mark.parametrize("kind", ["squared", "log"])
def test_training_comes_to_rest_and_leaves_zeros(kind: str) -> None:
    p = problem(loss=kind, tol=1e-12, max_iter=3000, l1=0.1)
    fitted = p.fit(ORDER)
    assert p.gradient(fitted)[allowed(ORDER) > 0].max() < 2e-3
    assert not fitted.weights[allowed(ORDER) == 0].any()
    assert (fitted.parts["first"][1][:, ORDER[:3]] == 0).any()


@pytest.mark.parametrize("kind", ["squared", "log"])
def test_a_move_trains_the_networks_between_and_no_other(kind: str) -> None:
    p = problem(loss=kind)
    fitted = p.fit(ORDER)
    order = moved(ORDER, 1, 2)
    found = p.refit(fitted, order, 1, 2)
    for name in ("first", "second", "errors"):
        assert np.array_equal(found.parts[name][[1, 2]], fitted.parts[name][[1, 2]])
    assert not np.array_equal(found.parts["second"][[0, 3]], fitted.parts["second"][[0, 3]])
    assert not found.weights[allowed(order) == 0].any()
    again = p.refit(fitted, ORDER, 1, 2)
    assert again.score <= fitted.score + 1e-9


@pytest.mark.parametrize("kind", ["squared", "log"])
def test_a_network_without_inputs_wakes_up_when_a_useful_one_is_allowed(kind: str) -> None:
    p = problem(loss=kind)
    asleep = p.fit(np.array([1, 0, 2, 3]))  # node 1 has no parents here
    asleep.parts["second"][1] = 0.0  # from here every gradient of its network is zero, whatever is allowed
    order = np.array([0, 2, 1, 3])
    woken = p.refit(asleep, order, 0, 2)
    assert woken.weights[[0, 2], 1].min() > 0.1 and not woken.weights[[1, 3], 1].any()
    assert woken.parts["errors"][1] < 0.8 * asleep.parts["errors"][1]


def test_columns_of_zeros_have_no_edges() -> None:
    data = problem().data.copy()
    data[:, 3] = 0.0
    fitted = NetworkPrefixes(data, hidden=3, max_iter=2).fit(ORDER)
    assert fitted.weights.any() and not fitted.weights[3].any() and not fitted.weights[:, 3].any()
