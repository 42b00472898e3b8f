from __future__ import annotations

import pytest
import torch

from limbeck.core.hypergraphs import Hypergraph
from limbeck.metrics.hypergraphs import purity, topology_score

torch.set_num_threads(1)
EDGES = [[0, 1, 2], [2, 3], [4]]


def test_the_score_is_the_papers() -> None:
    graph, z = Hypergraph.of(EDGES, 5), torch.randn(5, 3)
    expected = []
    for held in EDGES:
        mean = z[held].mean(0)
        expected.append(float(sum((z[v] - mean).norm() for v in held)) / len(held))
    assert topology_score(z, graph) == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert topology_score(torch.ones(5, 2), graph) == 0
    assert topology_score(3 * z, graph) == pytest.approx(3 * topology_score(z, graph), rel=1e-5)


def test_purity_is_the_share_of_the_most_frequent_class() -> None:
    graph = Hypergraph.of(EDGES, 5)
    assert purity(graph, torch.tensor([0, 0, 1, 1, 1]), 2).tolist() == pytest.approx([2 / 3, 1, 1])
    assert purity(graph, torch.tensor([0, -1, -1, 1, -1]), 2).tolist() == pytest.approx([1 / 3, 0.5, 0])
