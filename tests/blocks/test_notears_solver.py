from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from limbeck.blocks.notears import Notears
from limbeck.blocks.prefix_regression import gram_of


def gram() -> np.ndarray:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(500, 3))
    x[:, 0] += 1.5 * x[:, 2]
    x[:, 1] += -1.2 * x[:, 0]
    return gram_of(x)


@pytest.mark.parametrize("acyclicity", ["exponential", "polynomial"])
def test_the_gradient_of_the_augmented_lagrangian(acyclicity: str) -> None:
    solver = Notears(gram(), 0.1, acyclicity=acyclicity)
    solver.rho, solver.alpha = 3.0, 0.7
    parts = np.random.default_rng(1).uniform(0, 0.8, 18)
    _, gradient = solver.objective(parts)
    for k in range(18):
        step = np.zeros(18)
        step[k] = 1e-6
        slope = (solver.objective(parts + step)[0] - solver.objective(parts - step)[0]) / 2e-6
        assert slope == pytest.approx(gradient[k], rel=1e-5, abs=1e-6)


def test_the_objective_is_the_papers() -> None:
    from scipy.linalg import expm

    generator = np.random.default_rng(2)
    x = generator.normal(size=(40, 3))
    solver = Notears(x.T @ x / 40, 0.2)
    solver.rho, solver.alpha = 2.0, 0.5
    positive, negative = generator.uniform(0, 0.5, (2, 3, 3))
    w = positive - negative
    h = np.trace(expm(w * w)) - 3
    expected = ((x - x @ w) ** 2).sum() / 80 + h * h + 0.5 * h + 0.2 * (positive + negative).sum()
    assert solver.objective(np.stack([positive, negative]).ravel())[0] == pytest.approx(expected)


def test_it_finds_a_chain() -> None:
    solver = Notears(gram(), 0.05)
    found = solver.run()
    assert solver.done and solver.h <= 1e-8 and not np.diag(found).any()
    assert set(zip(*np.nonzero(abs(found) > 0.3), strict=True)) == {(2, 0), (0, 1)}
    assert solver.step() == solver.h


def test_it_goes_on_from_its_state(tmp_path: Any) -> None:
    whole, other = Notears(gram(), 0.1), Notears(gram(), 0.1)
    whole.step()
    whole.step()
    torch.save(whole.state_dict(), tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert np.array_equal(whole.run(), other.run()) and whole.evaluations == other.evaluations
