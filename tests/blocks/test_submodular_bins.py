"""Bins partition, follow the recursion, and give samples of exact size."""

from __future__ import annotations

import pytest
import torch

from limbeck.blocks.similarity_kernels import similarity_kernel
from limbeck.blocks.submodular import GraphCut, greedy
from limbeck.blocks.submodular_bins import bin_sizes, dq_bins, dq_sample, quantise
from limbeck.core.errors import InputError, UnknownNameError

torch.set_num_threads(1)


def points(n: int, e: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, e, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_bins(x: torch.Tensor, n_bins: int) -> list[list[int]]:
    """The paper's algorithm box in loops, sums taken anew for every gain."""
    unit = x / x.norm(dim=1, keepdim=True)
    k = 0.5 + 0.5 * unit @ unit.T
    left = list(range(len(x)))
    bins = []
    for number in range(n_bins):
        size = round(len(x) / n_bins) if number < n_bins - 1 else len(left)
        ground, chosen = list(left), []
        for _ in range(size):
            gains = {
                v: sum(float(k[u, v]) for u in ground) - 2 * sum(float(k[s, v]) for s in chosen)
                for v in ground
                if v not in chosen
            }
            chosen.append(max(gains, key=lambda v: (gains[v], -v)))
        left = [v for v in left if v not in chosen]
        bins.append(chosen)
    return bins


@pytest.mark.parametrize("dense", [0, 10**6])
def test_bins_are_those_of_the_algorithm(dense):
    x = points(33)
    bins = dq_bins(x, 4, dense=dense)
    expected = reference_bins(x, 4)
    assert [bins.members(k).tolist() for k in range(4)] == expected
    assert [len(b) for b in expected] == [8, 8, 8, 9]
    assert bins.rank[torch.tensor([v for part in expected for v in part])].tolist() == list(range(33))


def test_sums_are_taken_anew_for_each_bin():
    """With the column sums of the whole set in every bin, the second bin would be another."""
    x = points(30)
    first, second = reference_bins(x, 2)
    stale = GraphCut(similarity_kernel(x))
    frozen = stale.gains()
    left = torch.tensor(sorted(second))
    part = GraphCut(similarity_kernel(x[left]))
    part._gains = frozen[left].clone()
    wrong = left[greedy(part, 5).order].tolist()
    assert dq_bins(x, 2).members(1).tolist()[:5] == second[:5] != wrong
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("n", "bins", "sizes"),
    [
        (100, 10, [10] * 10),
        (127, 10, [13] * 9 + [10]),
        (124, 10, [12] * 9 + [16]),
        (15, 10, [1] * 9 + [6]),
        (19, 10, [2] * 9 + [1]),
        (3, 10, [1, 1, 1]),
        (7, 1, [7]),
    ],
)
def test_bin_sizes(n, bins, sizes):
    assert bin_sizes(n, bins) == sizes and sum(sizes) == n
    with pytest.raises(InputError):
        bin_sizes(n, 0)


def test_bins_partition_each_class():
    x, y = points(90), torch.arange(90) % 3
    bins = dq_bins(x, 5, y)
    assert bins.sizes().tolist() == [[6] * 5] * 3
    for c in range(3):
        own = torch.cat([bins.members(k, c) for k in range(5)])
        assert torch.equal(own.sort().values, (y == c).nonzero().flatten())
        alone = dq_bins(x[y == c], 5)
        assert torch.equal(bins.bin[y == c], alone.bin) and torch.equal(bins.rank[y == c], alone.rank)
    assert bins.members(0).tolist() != dq_bins(x, 5).members(0).tolist()
    assert dq_bins(x, 5).sizes().tolist() == [[18] * 5]


def test_one_bin_read_from_the_front_is_plain_graph_cut():
    x = points(50)
    expected = greedy(GraphCut(similarity_kernel(x)), 5).order
    assert torch.equal(dq_sample(dq_bins(x, 1), 0.1, take="early"), expected.sort().values)
    first = dq_bins(x, 10)
    assert torch.equal(first.members(0), expected)


def test_a_bin_per_sample_is_uniform_sampling():
    bins = dq_bins(points(8), 8)
    counts = torch.zeros(8)
    pairs = torch.zeros(8, 8)
    for seed in range(2000):
        drawn = dq_sample(bins, 0.25, seed)
        counts[drawn] += 1
        pairs[drawn[0], drawn[1]] += 1
    # 2 of 8: each in a quarter of the draws, each of the 28 pairs equally often
    assert (counts / 2000 - 0.25).abs().max() < 0.04
    assert (pairs[pairs > 0] / 2000 - 1 / 28).abs().max() < 0.015 and int((pairs > 0).sum()) == 28


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.137, 0.2, 0.5, 1.0])
def test_samples_have_exactly_the_size_and_spread_over_bins(ratio):
    n = 217
    x, y = points(n), torch.arange(n) % 3
    bins = dq_bins(x, 10, y)
    index = dq_sample(bins, ratio, seed=3)
    assert len(index) == len(index.unique()) == int(ratio * n + 0.5)
    got = torch.bincount(y[index] * 10 + bins.bin[index], minlength=30).reshape(3, 10)
    per_class = got.sum(1, keepdim=True)
    assert int(per_class.max() - per_class.min()) <= 2
    exact = bins.sizes() * per_class / bins.sizes().sum(1, keepdim=True)
    assert bool(((got - exact).abs() < 1).all())
    assert torch.equal(index, dq_sample(bins, ratio, seed=3))
    if ratio < 1:
        assert not torch.equal(index, dq_sample(bins, ratio, seed=4))


def test_uneven_bins_favour_no_sample():
    bins = dq_bins(points(17), 5)  # 3, 3, 3, 3 and 5
    counts = torch.zeros(17)
    for seed in range(3000):
        counts[dq_sample(bins, 4 / 17, seed)] += 1
    assert (counts / 3000 - 4 / 17).abs().max() < 0.035


def test_images_per_class():
    x, y = points(60), torch.tensor([0] * 10 + [2] * 50)
    bins = dq_bins(x, 5, y)
    index = dq_sample(bins, ipc=4)
    assert torch.bincount(y[index]).tolist() == [4, 0, 4]
    with pytest.raises(InputError, match="fewer than the 11"):
        dq_sample(bins, ipc=11)
    with pytest.raises(InputError, match="either ratio, ipc"):
        dq_sample(bins)
    with pytest.raises(InputError, match="either ratio, ipc"):
        dq_sample(bins, 0.1, ipc=2)
    with pytest.raises(InputError, match="61 samples cannot be drawn from 60"):
        dq_sample(bins, count=61)
    assert torch.bincount(y[dq_sample(bins, count=12)]).tolist() == [2, 0, 10]
    with pytest.raises(InputError, match="ratio must be"):
        dq_sample(bins, 1.5)
    with pytest.raises(InputError, match="keeps none"):
        dq_sample(bins, 0.001)


def test_early_and_late_bins():
    bins = dq_bins(points(40), 4)
    assert dq_sample(bins, 0.25, take="early").tolist() == sorted(bins.members(0).tolist())
    assert dq_sample(bins, 0.25, take="late").tolist() == sorted(bins.members(3).tolist())
    with pytest.raises(UnknownNameError):
        dq_sample(bins, 0.25, take="middle")


def test_early_bins_are_central_and_late_ones_outlying():
    x = points(400, 3) * 0.4 + 1.0
    bins = dq_bins(x, 8)
    centrality = bins.profile(similarity_kernel(x).sums() / 400)
    # from about the middle on the order follows centrality; the first bins trade it against diversity
    assert centrality[0] > centrality[-2] > centrality[-1]
    gains = bins.profile()
    assert bool((gains.diff() < 0).all())


def test_bins_with_other_functions_and_settings():
    x = points(24)
    for name, settings in (
        ("facility-location", {}),
        ("log-det", {"ridge": 0.1}),
        ("graph-cut", {"representativeness": 0.5}),
    ):
        bins = dq_bins(x, 3, function=name, settings=settings)
        assert bins.sizes().tolist() == [[8, 8, 8]]
    lazy = quantise(similarity_kernel(x), 3, function="facility-location", optimiser="lazy")
    naive = quantise(similarity_kernel(x), 3, function="facility-location")
    assert all(torch.equal(a, b) for a, b in zip(lazy[:2], naive[:2], strict=True))
    with pytest.raises(UnknownNameError, match="graph-cut"):
        dq_bins(x, 3, function="graph-cuts")
    with pytest.raises(InputError, match="one class index per sample"):
        dq_bins(x, 3, torch.zeros(5).long())
    with pytest.raises(InputError, match="no bin 3"):
        dq_bins(x, 3).members(3)
