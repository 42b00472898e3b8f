from __future__ import annotations

import numpy as np
import pytest

from limbeck.blocks.dags import is_dag
from limbeck.core.errors import InputError
from limbeck.tasks.structural_models import random_dag, random_weights, simulate


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", ["er", "sf", "bipartite"])
def test_graphs_are_dags_with_as_many_edges_as_asked(kind: str) -> None:
    dag = random_dag(kind, 20, 40, generator())  # type: ignore[arg-type]
    assert is_dag(dag) and set(np.unique(dag)) == {0.0, 1.0}
    assert int(dag.sum()) == (2 * 20 - 3 if kind == "sf" else 40)
    assert not np.array_equal(dag, np.triu(dag))  # nodes are numbered at random
    if kind == "bipartite":
        tails = dag.any(1)
        assert tails.sum() <= 4 and not dag[:, tails].any()
    with pytest.raises(InputError, match="room for 6 edges"):
        random_dag("er", 4, 7, generator())


def test_scale_free_graphs_have_hubs() -> None:
    sf = [random_dag("sf", 100, 100, generator(s)).sum(1).max() for s in range(5)]
    er = [random_dag("er", 100, 100, generator(s)).sum(1).max() for s in range(5)]
    assert np.mean(sf) > 1.5 * np.mean(er)


def test_weights_are_of_both_signs_and_in_range() -> None:
    dag = random_dag("er", 20, 60, generator())
    weights = random_weights(dag, generator(1))
    sizes = abs(weights[dag > 0])
    assert ((sizes >= 0.5) & (sizes <= 2)).all() and not weights[dag == 0].any()
    assert (weights < 0).any() and (weights > 0).any()


@pytest.mark.parametrize(
    ("noise", "variance", "mean"), [("gaussian", 4, 0), ("exponential", 4, 2), ("gumbel", 4 * np.pi**2 / 6, 2 * 0.5772)]
)
def test_linear_models_have_the_covariance_of_their_equations(noise: str, variance: float, mean: float) -> None:
    weights = np.zeros((3, 3))
    weights[2, 0], weights[0, 1], weights[2, 1] = 1.5, -1.0, 0.5
    data = simulate(weights, 200_000, generator(), noise=noise, scale=2.0)  # type: ignore[arg-type]
    through = np.linalg.inv(np.eye(3) - weights)
    np.testing.assert_allclose(np.cov(data.T), variance * through.T @ through, rtol=0.05, atol=0.1)
    np.testing.assert_allclose(data.mean(0), mean * through.sum(0), atol=0.05)


def test_logistic_models_are_zeros_and_ones_with_the_right_chances() -> None:
    weights = np.array([[0.0, 2.0], [0.0, 0.0]])
    data = simulate(weights, 50_000, generator(), mechanism="logistic")
    assert set(np.unique(data)) == {0.0, 1.0}
    assert data[:, 0].mean() == pytest.approx(0.5, abs=0.01)
    assert data[data[:, 0] == 1, 1].mean() == pytest.approx(1 / (1 + np.exp(-2)), abs=0.01)


@pytest.mark.parametrize("mechanism", ["mlp", "mim", "gp"])
def test_nonlinear_children_depend_on_their_parents_alone(mechanism: str) -> None:
    weights = np.zeros((3, 3))
    weights[0, 1] = 1.0
    data = simulate(weights, 600, generator(), mechanism=mechanism)  # type: ignore[arg-type]
    bins = np.argsort(data[:, 0]).reshape(20, 30)
    shares = data[bins].mean(1).var(0) / data.var(0)
    assert shares[1] > 0.12 and shares[2] < 0.08
    again = simulate(weights, 600, generator(), mechanism=mechanism)  # type: ignore[arg-type]
    assert np.array_equal(data, again)


def test_models_that_explode_are_refused() -> None:
    with pytest.raises(InputError, match="grow beyond all bounds"):
        simulate(np.triu(np.full((60, 60), 1e4), 1), 10, generator())
    with pytest.raises(InputError, match="cycle"):
        simulate(np.ones((2, 2)), 10, generator())
