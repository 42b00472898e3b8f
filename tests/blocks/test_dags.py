from __future__ import annotations

import networkx
import numpy as np
import pytest

from limbeck.blocks.dags import is_dag, kkt_violation, order_of, thresholded, to_networkx, topological_order
from limbeck.core.errors import InputError


def chain() -> np.ndarray:
    """2 → 0 → 1, and 3 alone."""
    weights = np.zeros((4, 4))
    weights[2, 0], weights[0, 1] = 1.5, -0.7
    return weights


def test_edges_point_forwards_in_a_topological_order() -> None:
    generator = np.random.default_rng(0)
    names = generator.permutation(12)
    weights = np.triu(generator.random((12, 12)) < 0.3, 1)[np.ix_(names, names)].astype(float)
    for order in (topological_order(weights), topological_order(weights, generator)):
        assert sorted(order.tolist()) == list(range(12))
        assert not np.tril(weights[np.ix_(order, order)]).any()


def test_cycles_are_named() -> None:
    weights = chain()
    weights[1, 2] = 0.1
    assert not is_dag(weights) and is_dag(chain()) and not is_dag(np.eye(2))
    with pytest.raises(InputError, match="has a cycle .*nodes 0, 1, 2"):
        topological_order(weights)
    with pytest.raises(InputError, match="square matrix"):
        topological_order(np.zeros((2, 3)))


def test_the_threshold_cuts_the_fewest_edges_that_leave_a_dag() -> None:
    weights = chain()
    weights[1, 2], weights[3, 1] = 0.5, 0.4  # a cycle whose weakest edge is 0.5
    found = thresholded(weights, 0.3)
    assert is_dag(found) and set(zip(*np.nonzero(found), strict=True)) == {(2, 0), (0, 1)}
    assert (thresholded(chain(), 1.0) != 0).sum() == 1
    both = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert not thresholded(both, 0.1).any()
    assert not thresholded(np.eye(3), 0.5).any()


def test_orders_come_from_whatever_people_have() -> None:
    names = ["a", "b", "c", "d"]
    graph = networkx.DiGraph([("c", "a"), ("a", "b")])
    for start in (chain(), graph, networkx.DiGraph([(2, 0), (0, 1)])):
        order = order_of(start, 4, names, np.random.default_rng(0)).tolist()
        assert order.index(2) < order.index(0) < order.index(1) and sorted(order) == [0, 1, 2, 3]
    assert order_of(["d", "a", "c", "b"], 4, names).tolist() == [3, 0, 2, 1]
    assert order_of(np.array([1.0, 0.0]), 2).tolist() == [1, 0]
    assert sorted(order_of(None, 5).tolist()) == [0, 1, 2, 3, 4]
    for wrong, words in (
        ([0, 1, 1, 2], "each of the 4 columns once"),
        ([0, 1], "each of the 4 columns once"),
        (np.zeros((3, 3)), "has 4 columns"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.ones((4, 4)), "cycle"),
        (networkx.DiGraph([("c", "z")]), "'z' that is no column"),
    ):
        with pytest.raises(InputError, match=words):
            order_of(wrong, 4, names)


def test_graphs_keep_isolated_nodes_and_weights() -> None:
    graph = to_networkx(chain(), ["a", "b", "c", "d"])
    assert set(graph) == {"a", "b", "c", "d"} and graph["c"]["a"]["weight"] == 1.5 and graph.number_of_edges() == 2
    assert set(to_networkx(chain())) == {0, 1, 2, 3}


def test_the_kkt_conditions_ask_only_for_edges_that_close_no_cycle() -> None:
    gradient = np.zeros((4, 4))
    gradient[1, 2] = 5.0  # 1 → 2 would close a cycle
    assert kkt_violation(chain(), gradient) == 0
    gradient[3, 0] = -0.25
    assert kkt_violation(chain(), gradient) == 0.25
    gradient[0, 1] = 0.5
    assert kkt_violation(chain(), gradient) == 0.5
