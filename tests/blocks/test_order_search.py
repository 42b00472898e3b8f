from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.blocks.dags import kkt_violation
from limbeck.blocks.order_search import OrderSearch, candidates, disjoint
from limbeck.blocks.prefix_networks import NetworkPrefixes
from limbeck.blocks.prefix_penalised import LassoPrefixes, Regressions
from limbeck.blocks.prefix_problems import PrefixProblem, allowed
from limbeck.blocks.prefix_regression import LeastSquares, gram_of
from limbeck.core.errors import InputError
from limbeck.tasks.structural_models import random_dag, random_weights, simulate


def samples(nodes: int = 8, edges: int = 14, seed: int = 0, n: int = 300) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return simulate(random_weights(random_dag("er", nodes, edges, generator), generator), n, generator)


def problem(kind: str, data: np.ndarray) -> PrefixProblem:
    if kind == "lasso":
        return LassoPrefixes(gram_of(data), 0.8, tol=1e-8)
    if kind == "networks":
        return NetworkPrefixes((data - data.mean(0))[:60, :4], hidden=2, max_iter=10)
    return LeastSquares(gram_of(data))


@pytest.mark.parametrize(
    ("kind", "choose", "move"),
    [
        *itertools.product(["least squares", "lasso"], ["multi", "first"], ["swap", "insert-after", "insert-before"]),
        ("networks", "multi", "swap"),
        ("networks", "first", "insert-after"),
    ],
)
def test_the_score_falls_with_every_step(kind: str, choose: Any, move: Any) -> None:
    p = problem(kind, samples())
    search = OrderSearch(p, np.random.default_rng(1).permutation(p.size), size_small=6, choose=choose, move=move)
    while not search.done:
        before = search.fitted
        made = search.step()
        after = search.fitted
        assert (made > 0) == (after.score < before.score) and (made > 0 or after is before)
        assert sorted(after.order.tolist()) == list(range(p.size))
        assert not after.weights[allowed(after.order) == 0].any()
        if kind != "networks":  # those remember how they were trained
            assert p.fit(after.order).score == pytest.approx(after.score, rel=1e-7)
    assert (np.diff(search.history) < 0).all() and search.step() == 0
    assert search.evaluations >= search.moves >= len(search.history) - 1


@pytest.mark.parametrize("nodes", [4, 5])
def test_it_finds_the_best_of_all_orders(nodes: int) -> None:
    hits = 0
    for seed in range(20):
        p = LeastSquares(gram_of(samples(nodes, 2 * nodes - 3, seed)))
        best = min(p.fit(np.array(order)).score for order in itertools.permutations(range(nodes)))
        found = OrderSearch(p, np.random.default_rng(seed).permutation(nodes)).run()
        hits += found.score <= best * (1 + 1e-9)
    assert hits >= 18


@pytest.mark.parametrize("kind", ["least squares", "lasso"])
def test_it_ends_where_the_conditions_of_a_local_optimum_hold(kind: str) -> None:
    before = []
    for seed in range(4):
        p = problem(kind, samples(seed=seed))
        start = np.random.default_rng(seed).permutation(p.size)
        search = OrderSearch(p, start, size_small=1, n_large=0, tol=1e-12)
        before.append(kkt_violation(search.fitted.weights, p.gradient(search.fitted)))
        search.run()
        assert kkt_violation(search.fitted.weights, p.gradient(search.fitted)) < 1e-5
        assert len(search.history) > 1 or before[-1] < 1e-5
    assert kind == "least squares" or max(before) > 0.1


def test_candidates_are_those_that_nearly_close_no_cycle() -> None:
    p = problem("lasso", samples())
    fitted = p.fit(np.random.default_rng(2).permutation(8))
    gradient = p.gradient(fitted)
    everything = candidates(fitted, gradient, 1000)
    assert len(everything) == 28 and (everything[:, 0] < everything[:, 1]).all()
    inverse = np.linalg.inv(np.eye(8) - abs(fitted.weights))
    sums = [inverse[fitted.order[a], fitted.order[b]] for a, b in everything.tolist()]
    assert (np.diff(sums) >= -1e-9).all()
    pulls = [abs(gradient)[fitted.order[b], fitted.order[a]] for a, b in everything.tolist()]
    ties = [k for k in range(27) if abs(sums[k]) < 1e-12 and abs(sums[k + 1]) < 1e-12]
    assert ties and all(pulls[k] >= pulls[k + 1] for k in ties)
    assert np.array_equal(candidates(fitted, gradient, 5), everything[:5])
    strong = candidates(fitted, gradient, 1000, xi=0.5)
    assert 0 < len(strong) < 28
    assert all(abs(gradient)[fitted.order[b], fitted.order[a]] >= 0.5 for a, b in strong.tolist())


def test_windows_are_taken_best_first_and_never_overlap() -> None:
    pairs = np.array([[2, 5], [5, 6], [0, 1], [1, 2], [6, 9]])
    assert disjoint(pairs) == [[2, 5], [0, 1], [6, 9]]


def test_the_large_neighbourhood_helps_as_often_as_allowed() -> None:
    p = LeastSquares(gram_of(samples(12, 30)))
    start = np.random.default_rng(3).permutation(12)
    scores = {}
    for times in (0, 1, 50):
        search = OrderSearch(p, start, size_small=2, size_large=66, n_large=times)
        scores[times] = search.run().score
        assert search.used_large <= times
    assert scores[50] <= scores[1] <= scores[0] and scores[50] < scores[0]


def test_scores_that_are_no_sums_never_rise_either() -> None:
    data = samples(6, 9)

    def worst(x: np.ndarray, w: np.ndarray) -> tuple[float, np.ndarray]:
        errors = ((x - x @ w) ** 2).mean(0)
        return float(errors.max()), -x.T @ (x - x @ w) / len(x)

    p = Regressions(data - data.mean(0), lambda a, b: np.linalg.lstsq(a, b)[0], worst)
    search = OrderSearch(p, np.random.default_rng(4).permutation(6))
    search.run()
    assert (np.diff(search.history) < 0).all()


def test_small_graphs_and_wrong_sizes() -> None:
    one = OrderSearch(LeastSquares(np.eye(1)), np.zeros(1, dtype=int))
    assert one.done and one.run().score == 0.5
    with pytest.raises(InputError, match="at least 1"):
        OrderSearch(LeastSquares(np.eye(3)), np.arange(3), size_small=0)


@pytest.mark.parametrize("kind", ["least squares", "lasso", "networks"])
def test_a_search_goes_on_from_its_state(kind: str, tmp_path: Any) -> None:
    p = problem(kind, samples(seed=3))
    start = np.random.default_rng(5).permutation(p.size)
    whole = OrderSearch(p, start, size_small=5)
    whole.step()
    torch.save(whole.state_dict(), tmp_path / "state")
    other = OrderSearch(p, start[::-1].copy(), size_small=5)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    whole.run()
    other.run()
    assert other.history == whole.history and np.array_equal(other.fitted.weights, whole.fitted.weights)
    assert (other.evaluations, other.moves, other.done) == (whole.evaluations, whole.moves, True)
