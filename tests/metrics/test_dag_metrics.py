from __future__ import annotations

import itertools

import numpy as np
import pytest

from limbeck.blocks.prefix_regression import LeastSquares, gram_of
from limbeck.core.errors import InputError
from limbeck.metrics.dags import edge_errors, order_errors, order_score


def graph(*edges: tuple[int, int], d: int = 4) -> np.ndarray:
    found = np.zeros((d, d))
    for i, j in edges:
        found[i, j] = 1.3
    return found


def test_edges_right_wrong_and_reversed() -> None:
    truth = graph((0, 1), (1, 2), (0, 3))
    found = graph((0, 1), (2, 1), (2, 3))
    assert edge_errors(found, truth) == pytest.approx({"shd": 3, "fdr": 2 / 3, "tpr": 1 / 3, "fpr": 2 / 3, "edges": 3})
    assert edge_errors(truth, truth)["shd"] == 0
    assert edge_errors(np.zeros((4, 4)), truth) == pytest.approx({"shd": 3, "fdr": 0, "tpr": 0, "fpr": 0, "edges": 0})
    assert edge_errors(truth, np.zeros((4, 4)))["shd"] == 3


def test_the_distance_counts_the_pairs_that_are_joined_differently() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = (np.triu(generator.random((5, 5)) < 0.5, 1) for _ in range(2))
        names = generator.permutation(5)
        b = b[np.ix_(names, names)]
        pairs = itertools.combinations(range(5), 2)
        expected = sum((a[i, j], a[j, i]) != (b[i, j], b[j, i]) for i, j in pairs)
        assert edge_errors(a.astype(float), b.astype(float))["shd"] == expected


def test_orders() -> None:
    truth = graph((0, 1), (1, 2), (0, 3))
    assert order_errors(np.array([0, 3, 1, 2]), truth) == 0
    assert order_errors(np.array([3, 2, 1, 0]), truth) == 1
    assert order_errors(np.array([1, 0, 2, 3]), truth) == pytest.approx(1 / 3)
    assert order_errors(np.array([1, 0]), np.zeros((2, 2))) == 0


def test_the_score_of_an_order_is_refitted_on_training_samples() -> None:
    generator = np.random.default_rng(1)
    train, test = (generator.normal(3, 1, (50, 4)) @ np.triu(np.ones((4, 4))) for _ in range(2))
    order = np.array([2, 0, 1, 3])
    assert order_score(order, train) == pytest.approx(LeastSquares(gram_of(train)).fit(order).score)
    weights = LeastSquares(gram_of(train)).fit(order).weights
    seen = test - train.mean(0)
    assert order_score(order, train, test) == pytest.approx(((seen - seen @ weights) ** 2).sum() / 100)


def test_graphs_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="different sizes"):
        edge_errors(np.zeros((3, 3)), np.zeros((4, 4)))
    with pytest.raises(InputError, match="remove the cycles"):
        edge_errors(graph((0, 1), (1, 0)), graph((0, 1)))
