from __future__ import annotations

import subprocess
import sys
from collections import Counter

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.metrics.concentration import (
    Concentration,
    approximate_concentration,
    concentration_shift,
    topological_concentration,
)
from limbeck.metrics.correlations import pearson

torch.set_num_threads(1)


def random_links(nodes: int, count: int, seed: int = 0) -> Tensor:
    graph = nx.gnm_random_graph(nodes, count, seed=seed)
    return torch.tensor(list(graph.edges)).T


def brute(train: Tensor, nodes: int, pairs: Tensor | None, hops: int, beta: float | None = None) -> list[float]:
    """The definition, node by node, walk by walk."""
    around: list[set[int]] = [set() for _ in range(nodes)]
    for u, v in train.T.tolist():
        around[u].add(v)
        around[v].add(u)
    if pairs is None:
        other = around
    else:
        other = [set() for _ in range(nodes)]
        for u, v in pairs.T.tolist():
            other[u].add(v)
            other[v].add(u)
    beta = nodes / sum(map(len, around)) if beta is None else beta

    def trees(node: int) -> list[Counter[int]]:
        found, level = [], Counter({node: 1})
        for _ in range(hops):
            after: Counter[int] = Counter()
            for at, times in level.items():
                for near in around[at]:
                    after[near] += times
            found.append(after)
            level = after
        return found

    held = [trees(i) for i in range(nodes)]
    values = []
    for i in range(nodes):
        if len(around[i]) < (2 if pairs is None else 1) or not other[i]:
            values.append(0.0)
            continue
        ratios = []
        for j in other[i]:
            above = below = 0.0
            for k, mine in enumerate(held[i]):
                for m, theirs in enumerate(held[j]):
                    weight = beta ** (k + m)
                    above += weight * sum(times for end, times in mine.items() if end in theirs)
                    below += weight * (sum(mine.values()) - (pairs is None and k == m == 0))
            ratios.append(above / below)
        values.append(sum(ratios) / len(ratios))
    return values


@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("budget", [20_000_000, 400])
def test_counts_are_those_of_the_definition(hops: int, budget: int) -> None:
    links = random_links(18, 45, seed=hops)
    train, test = links[:, :30], links[:, 30:]
    for pairs in (None, test):
        found = topological_concentration(train, 18, pairs, hops=hops, budget=budget)
        assert found.values.tolist() == pytest.approx(brute(train, 18, pairs, hops))
    other = topological_concentration(train, 18, test, hops=hops, beta=0.3, budget=budget)
    assert other.values.tolist() == pytest.approx(brute(train, 18, test, hops, 0.3))


def test_at_one_hop_it_counts_common_neighbours() -> None:
    links = random_links(30, 120)
    train, test = links[:, :90], links[:, 90:]
    graph = nx.Graph(train.T.tolist())
    graph.add_nodes_from(range(30))
    found = topological_concentration(train, 30, test, hops=1).values
    for node in range(30):
        near = [v for pair in test.T.tolist() if node in pair for v in pair if v != node]
        if graph.degree(node) and near:
            common = [len(list(nx.common_neighbors(graph, node, v))) for v in near]
            assert float(found[node]) == pytest.approx(np.mean(common) / graph.degree(node))
    clustering = nx.clustering(graph)
    own = topological_concentration(train, 30, hops=1).values
    assert own.tolist() == pytest.approx([clustering[n] for n in range(30)])


def test_limits() -> None:
    clique = torch.tensor(list(nx.complete_graph(6).edges)).T
    assert topological_concentration(clique, 6, hops=1).values.tolist() == pytest.approx([1.0] * 6)
    ring = torch.tensor(list(nx.cycle_graph(8).edges)).T
    assert float(topological_concentration(ring, 8, hops=1).values.abs().max()) == 0
    sides = torch.tensor(list(nx.complete_bipartite_graph(3, 4).edges)).T
    assert float(topological_concentration(sides, 7, hops=1).values.abs().max()) == 0
    assert float(topological_concentration(sides, 7, hops=2).values.min()) > 0


def test_isolated_and_lonely_nodes_are_not_defined() -> None:
    train, test = torch.tensor([[0, 1, 0], [1, 2, 2]]), torch.tensor([[3, 0], [4, 4]])
    own, other = topological_concentration(train, 6), topological_concentration(train, 6, test)
    assert own.defined.tolist() == [True, True, True, False, False, False]
    assert other.defined.tolist() == [True, False, False, False, False, False]
    assert other.values.tolist() == [0.0] * 6  # node 4 has no tree to share
    assert topological_concentration(train[:, :0], 3).mean != topological_concentration(train[:, :0], 3).mean  # NaN


def test_directions_repetitions_and_self_loops_do_not_count() -> None:
    links = random_links(12, 30)
    train, test = links[:, :20], links[:, 20:]
    messy = torch.cat([train, train.flip(0), train[:, :3], torch.tensor([[5], [5]])], 1)
    expected = topological_concentration(train, 12, test)
    found = topological_concentration(messy, 12, torch.cat([test, test.flip(0)], 1))
    torch.testing.assert_close(found.values, expected.values)


def test_trees_never_see_links_of_another_part() -> None:
    links = random_links(20, 60, seed=3)
    train, test, more = links[:, :40], links[:, 40:55], links[:, 55:]
    before = topological_concentration(train, 20, test).values
    after = topological_concentration(train, 20, torch.cat([test, more], 1)).values
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[more.flatten()] = False
    torch.testing.assert_close(before[untouched], after[untouched])
    assert not torch.equal(before, after)


def test_weights_choose_among_neighbours() -> None:
    train, test = torch.tensor([[0, 0, 1, 3], [1, 2, 2, 4]]), torch.tensor([[1, 3], [0, 0]])  # into node 0
    even = topological_concentration(train, 5, test, hops=1, weights=torch.ones(2))
    torch.testing.assert_close(even.values[0], torch.tensor(0.25, dtype=torch.float64))  # half of node 1's 1/2, and 0
    only = topological_concentration(train, 5, test, hops=1, weights=torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(only.values[0], torch.tensor(0.5, dtype=torch.float64))
    both = torch.cat([train, train.flip(0)], 1)
    plain = topological_concentration(train, 5)
    torch.testing.assert_close(topological_concentration(both, 5, weights=torch.full((8,), 3.0)).values, plain.values)


def test_projections_come_near_with_their_number() -> None:
    links = random_links(120, 900, seed=1)
    train, test = links[:, :700], links[:, 700:]
    for pairs in (None, test):
        exact = topological_concentration(train, 120, pairs, hops=1)
        there = exact.defined
        found = [
            pearson(
                approximate_concentration(train, 120, pairs, hops=1, dim=d, draws=n, seed=5).values[there],
                exact.values[there],
            )
            for d, n in ((16, 1), (256, 1), (1024, 8))
        ]
        assert found[0] < found[1] < found[2] and found[2] > 0.97
    many = approximate_concentration(train, 120, test, hops=1, dim=4096, draws=4)
    exact = topological_concentration(train, 120, test, hops=1)
    assert float((many.values - exact.values).abs().mean()) < 0.03
    assert torch.equal(many.defined, exact.defined)


def test_two_hops_by_projection_count_common_ends_with_multiplicity() -> None:
    train = random_links(40, 150, seed=2)
    a = torch.zeros(40, 40, dtype=torch.float64)
    a[train[0], train[1]] = a[train[1], train[0]] = 1
    beta = 0.2
    walks = a + beta * (a @ a)
    degree = a.sum(1)
    ratio = (walks @ walks * a).sum(1) / degree.clamp_min(1) / ((degree + beta * (a @ degree)) * (1 + beta) - 1)
    expected = torch.where(degree > 1, ratio, 0)
    found = approximate_concentration(train, 40, hops=2, beta=beta, dim=8192, draws=2).values
    assert pearson(found, expected) > 0.99 and float((found - expected).abs().mean()) < 0.1
    rows = a / degree.clamp_min(1)[:, None]
    expected = (rows @ rows.T * a).sum(1) / degree.clamp_min(1)
    found = approximate_concentration(train, 40, hops=1, dim=8192, draws=2, norm="row").values
    assert float((found - torch.where(degree > 1, expected, 0)).abs().max()) < 0.05


def test_the_correction_removes_a_shift_that_is_not_there() -> None:
    """A random split of one graph has no shift; leaving the neighbour itself in the denominator makes one."""
    graph = nx.relaxed_caveman_graph(60, 8, 0.2, seed=0)
    links = torch.tensor(list(graph.edges)).T
    links = links[:, torch.randperm(links.shape[1], generator=torch.Generator().manual_seed(0))]
    cut = round(0.7 * links.shape[1])
    train, test = links[:, :cut], links[:, cut:]
    own, other = topological_concentration(train, 480, hops=1), topological_concentration(train, 480, test, hops=1)
    found = concentration_shift(own, other)
    assert abs(found["shift"]) < 0.03 and found["nodes"] > 300
    uncorrected = topological_concentration(train, 480, train, hops=1)
    assert concentration_shift(Concentration(uncorrected.values, own.defined), other)["shift"] < -0.05


def test_wrong_input_is_named() -> None:
    train = torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(InputError, match="edge 1 joins 1 and 2, but nodes are numbered 0 to 1"):
        topological_concentration(train, 2)
    with pytest.raises(InputError, match="1 hop or more"):
        topological_concentration(train, 3, hops=0)
    with pytest.raises(InputError, match="as many weights"):
        topological_concentration(train, 3, weights=torch.ones(3))
    with pytest.raises(InputError, match="as many weights"):
        topological_concentration(train, 3, weights=torch.tensor([1.0, float("nan")]))
    with pytest.raises(InputError, match="dimension of 1 or more"):
        approximate_concentration(train, 3, dim=0)
    with pytest.raises(InputError, match="as many alphas"):
        approximate_concentration(train, 3, hops=2, alphas=(1.0,))
    with pytest.raises(InputError, match="ratio or row"):
        approximate_concentration(train, 3, norm="both")  # type: ignore[arg-type]


LARGE = """
import resource, sys, torch
from limbeck.metrics.concentration import approximate_concentration, topological_concentration
from limbeck.methods.graphs.topological_concentration import TopologicalConcentration
from limbeck.tasks.links import LinkTask
torch.set_num_threads(1)
links = torch.randint(100_000, (2, 400_000), generator=torch.Generator().manual_seed(0))
task = LinkTask.from_edges(links, 100_000, features=torch.randn(100_000, 8))
near = approximate_concentration(task.train, 100_000, task.test, dim=64, draws=1)
exact = topological_concentration(task.train, 100_000, task.test, hops=1)
assert torch.equal(near.defined, exact.defined) and int(near.defined.sum()) > 70_000
method = TopologicalConcentration(task, hidden=16, alpha=1.0)
method(task.train[:, :2048].T).backward()
method.reweight()
assert method.scorer()(torch.arange(20)).shape == (20, 100_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def test_a_graph_of_100000_nodes_takes_little_memory() -> None:
    """Concentration, a training step, new weights and a ranking in a process of their own; dense, one matrix would take 40 GB."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    assert int(done.stdout) < 4 << 30
