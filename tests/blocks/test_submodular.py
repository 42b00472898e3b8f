"""Set functions against their definitions, greedy algorithms against each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from limbeck.blocks.similarity_kernels import EmbeddingKernel, MatrixKernel, similarity_kernel, unit_rows
from limbeck.blocks.submodular import FUNCTIONS, FacilityLocation, GraphCut, LogDeterminant, greedy
from limbeck.core.errors import InputError, UnknownNameError

torch.set_num_threads(1)


def points(n: int = 14, e: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, e, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_kernel(x: torch.Tensor) -> torch.Tensor:
    cos = torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in x]) for a in x])
    return 0.5 + 0.5 * cos


def test_kernel_held_and_by_columns_agree_with_the_definition():
    x = points()
    expected = naive_kernel(x)
    index = torch.tensor([3, 0, 7])
    for kernel in (similarity_kernel(x), similarity_kernel(x, dense=0), MatrixKernel(expected)):
        torch.testing.assert_close(kernel.columns(index), expected[:, index])
        torch.testing.assert_close(kernel.sums(), expected.sum(0))
        torch.testing.assert_close(kernel.diagonal(), torch.ones(14).double())
        part = kernel.restrict(index)
        torch.testing.assert_close(part.columns(torch.arange(3)), expected[index][:, index])
        torch.testing.assert_close(part.sums(), expected[index][:, index].sum(0))
        assert kernel.nonnegative and part.size == 3
    assert isinstance(similarity_kernel(x), MatrixKernel) and isinstance(similarity_kernel(x, dense=0), EmbeddingKernel)
    inner = similarity_kernel(x, "inner", dense=0)
    torch.testing.assert_close(inner.columns(index), 2 * expected[:, index] - 1)
    assert not inner.nonnegative


def test_zero_vectors_have_similarity_zero_before_scaling():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-3.0, -4.0]])
    for dense in (0, 100):
        k = similarity_kernel(x, dense=dense).columns(torch.arange(3))
        torch.testing.assert_close(k, torch.tensor([[0.5, 0.5, 0.5], [0.5, 1.0, 0.0], [0.5, 0.0, 1.0]]))
    tiny = torch.tensor([[1e-30, 0.0], [1e30, 1e30]])
    torch.testing.assert_close(unit_rows(tiny).norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (lambda: similarity_kernel(torch.zeros(3)), "one row per sample"),
        (lambda: similarity_kernel(torch.full((2, 2), math.nan)), "NaN or infinity"),
        (lambda: MatrixKernel(torch.ones(2, 3)), "square"),
        (lambda: MatrixKernel(torch.tensor([[1.0, 0.0], [0.5, 1.0]])), "not symmetric"),
        (lambda: GraphCut(similarity_kernel(points()), -1.0), "at least 0"),
        (lambda: LogDeterminant(similarity_kernel(points()), 0.0), "above 0"),
        (lambda: greedy(GraphCut(similarity_kernel(points())), 15), "14 are left"),
        (lambda: greedy(GraphCut(similarity_kernel(points(), "inner")), 2, "lazy"), "only fall"),
        (lambda: greedy(GraphCut(similarity_kernel(points())), 2, "stochastic", epsilon=0.0), "epsilon"),
    ],
)
def test_bad_input_is_named(bad, line):
    with pytest.raises(InputError, match=line):
        bad()


def test_unknown_optimiser():
    with pytest.raises(UnknownNameError, match="did you mean lazy"):
        greedy(GraphCut(similarity_kernel(points())), 2, "lasy")


def by_definition(name: str, k: torch.Tensor, s: list[int]) -> float:
    """The functions spelt out in loops."""
    n = len(k)
    if name == "graph-cut":
        first = sum(k[u, v] for u in range(n) for v in s)
        return float(first - sum(k[a, b] for a in s for b in s if a != b))
    if name == "facility-location":
        return float(sum(max([0.0, *(float(k[u, v]) for v in s)]) for u in range(n)))
    return float(torch.logdet(k[s][:, s] + 1e-2 * torch.eye(len(s), dtype=k.dtype))) if s else 0.0


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dense", [0, 10**6])
def test_gain_is_the_difference_of_values(name, dense):
    x = points()
    k = naive_kernel(x)
    function = FUNCTIONS[name](similarity_kernel(x, dense=dense))
    for s in ([], [4], [4, 9], [4, 9, 0]):
        if s:
            function.add(s[-1])
        assert function.value(s) == pytest.approx(by_definition(name, k, s), abs=1e-9)
        others = [v for v in range(14) if v not in s]
        gains = function.gains()
        for v in others:
            expected = by_definition(name, k, [*s, v]) - by_definition(name, k, s)
            assert float(gains[v]) == pytest.approx(expected, abs=1e-8)
        torch.testing.assert_close(function.gains(torch.tensor(others)), gains[others])


def test_log_det_factor_grows_beyond_its_first_size():
    function = LogDeterminant(similarity_kernel(points(40, 60)))
    chosen = greedy(function, 25)
    assert float(chosen.gains.sum()) == pytest.approx(function.value(chosen.order.tolist()), abs=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_lazy_chooses_as_naive_and_looks_less(name):
    x = points(60, 4, seed=1)
    x[7] = x[3]  # ties go to the first in both
    whole, lazy = (FUNCTIONS[name](similarity_kernel(x)) for _ in range(2))
    a, b = greedy(whole, 20), greedy(lazy, 20, "lazy")
    assert torch.equal(a.order, b.order)
    torch.testing.assert_close(a.gains, b.gains)
    assert lazy.evaluations <= whole.evaluations
    if name == "facility-location":
        assert lazy.evaluations < 0.8 * whole.evaluations
    assert float(a.gains.sum()) == pytest.approx(whole.value(a.order.tolist()), abs=1e-8)


def test_greedy_reaches_its_guarantee():
    k = similarity_kernel(points(10, 3, seed=2))
    function = FacilityLocation(k)
    reached = function.value(greedy(function, 3).order.tolist())
    best = max(FacilityLocation(k).value(s) for s in itertools.combinations(range(10), 3))
    assert (1 - 1 / math.e) * best <= reached <= best + 1e-12


def test_greedy_goes_on_from_what_is_held_and_repeats_nothing():
    x = points(30)
    whole = greedy(GraphCut(similarity_kernel(x)), 30).order
    assert whole.sort().values.tolist() == list(range(30))
    function = GraphCut(similarity_kernel(x))
    first = greedy(function, 10).order
    for optimiser in ("naive", "lazy"):
        again = GraphCut(similarity_kernel(x))
        for v in first.tolist():
            again.add(v)
        torch.testing.assert_close(torch.cat([first, greedy(again, 20, optimiser).order]), whole)
    assert greedy(function, 0).order.tolist() == []


def test_first_pick_is_the_medoid_and_large_weights_sort_by_centrality():
    x = points(20)
    k = naive_kernel(x)
    function = GraphCut(similarity_kernel(x))
    assert int(greedy(function, 1).order) == int(k.sum(0).argmax())
    heavy = greedy(GraphCut(similarity_kernel(x), 1e6), 20).order
    assert torch.equal(heavy, k.sum(0).argsort(descending=True))


def test_stochastic_comes_close_and_is_seeded():
    x = points(80, 4, seed=3)
    naive = FacilityLocation(similarity_kernel(x))
    best = naive.value(greedy(naive, 8).order.tolist())
    runs = []
    for seed in (0, 0, 1):
        function = FacilityLocation(similarity_kernel(x))
        order = greedy(function, 8, "stochastic", generator=torch.Generator().manual_seed(seed)).order
        runs.append(order.tolist())
        assert len(set(runs[-1])) == 8
        assert function.value(runs[-1]) > 0.95 * best
        assert function.evaluations < naive.evaluations / 3
    assert runs[0] == runs[1] != runs[2]
    # a part as large as the whole makes the same choice as the naive one
    function = FacilityLocation(similarity_kernel(x))
    order = greedy(function, 8, "stochastic", epsilon=1e-9).order
    again = FacilityLocation(similarity_kernel(x))
    assert torch.equal(order, greedy(again, 8).order)
