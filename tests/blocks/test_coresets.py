"""Counts, random selection, k-centre and herding against loops and exact references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from limbeck.blocks.coresets import (
    apportion,
    class_counts,
    coverage,
    covering_radius,
    herding,
    k_center,
    kept_count,
    per_class,
    random_selection,
)
from limbeck.core.errors import InputError

torch.set_num_threads(1)


def points(n: int, e: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, e, generator=torch.Generator().manual_seed(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_apportion_is_exact_in_sum_and_in_expectation():
    shares = torch.tensor([5.0, 3.0, 0.0, 1.0, 2.5])
    total = 7
    exact = shares * total / shares.sum()
    mean = torch.zeros(5)
    for seed in range(2000):
        counts = apportion(shares, total, generator(seed))
        assert int(counts.sum()) == total
        assert bool(((counts - exact).abs() < 1).all())
        mean += counts / 2000
    assert (mean - exact).abs().max() < 0.05
    assert apportion(torch.tensor([2, 4]), 3).tolist() == [1, 2]
    assert apportion(torch.zeros(2), 0).tolist() == [0, 0]
    with pytest.raises(InputError, match="all zero"):
        apportion(torch.zeros(2), 1)


def test_class_counts():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    assert class_counts(labels, ipc=20).tolist() == [20, 20, 20]
    assert class_counts(labels, ratio=0.1).tolist() == [5, 3, 2]
    assert int(class_counts(labels, ratio=0.173).sum()) == 17
    for bad, line in (
        ({"ipc": 21}, "class 2 has 20 samples, fewer than the 21"),
        ({"ipc": 0}, "at least 1"),
        ({"ipc": 1, "ratio": 0.1}, "either ipc"),
        ({"ratio": 0.0}, "above 0"),
        ({"ipc": 1, "num_classes": 4}, "class 3 has 0"),
    ):
        with pytest.raises(InputError, match=line):
            class_counts(labels, **bad)
    assert kept_count(1257, 0.02) == 25 and kept_count(5, 0.5) == 3


def test_random_selection_is_uniform_within_classes():
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1])
    hits = torch.zeros(8)
    for seed in range(2000):
        index = random_selection(labels, torch.tensor([1, 2]), generator(seed))
        assert torch.bincount(labels[index]).tolist() == [1, 2] and bool((index.diff() > 0).all())
        hits[index] += 1 / 2000
    expected = torch.where(labels == 0, 1 / 3, 2 / 5)
    assert (hits - expected).abs().max() < 0.05
    with pytest.raises(InputError, match="fewer samples than asked"):
        random_selection(labels, torch.tensor([4, 1]))
    with pytest.raises(InputError, match="count is lacking"):
        random_selection(labels, torch.tensor([1]))


def test_k_center_equals_the_loop():
    x = points(40).double()
    chosen = [int(((x - x.mean(0)) ** 2).sum(1).argmin())]
    while len(chosen) < 9:
        far = [min(float((a - x[c]).norm()) for c in chosen) if i not in chosen else -1.0 for i, a in enumerate(x)]
        chosen.append(int(np.argmax(far)))
    found = k_center(x, 9)
    assert found.tolist() == chosen
    assert torch.equal(k_center(x, 4), found[:4])
    assert int(k_center(x, 3, first=17)[0]) == 17


def test_k_center_is_a_two_approximation():
    x = points(11, 2, seed=4)
    best = min(covering_radius(x, torch.tensor(s)) for s in itertools.combinations(range(11), 3))
    for first in range(11):
        assert covering_radius(x, k_center(x, 3, first=first)) <= 2 * best + 1e-9


def test_coverage_is_the_mean_distance_to_the_nearest():
    x = points(20)
    expected = np.mean([min(float((a - x[i]).norm()) for i in (3, 8)) for a in x])
    assert coverage(x, x[[3, 8]], batch_size=6) == pytest.approx(expected, rel=1e-5)
    assert coverage(x, x) == pytest.approx(0, abs=1e-6)


def test_k_center_with_duplicates_repeats_nothing():
    x = torch.ones(6, 2)
    assert sorted(k_center(x, 6).tolist()) == list(range(6))


@pytest.mark.parametrize("rule", ["mean", "welling"])
def test_herding_equals_the_loop(rule):
    x = points(30, seed=5).double()
    mean = x.mean(0)
    chosen: list[int] = []
    weight = mean.clone()
    for t in range(12):
        left = [i for i in range(30) if i not in chosen]
        if rule == "mean":
            best = min(left, key=lambda i: float((mean - x[[*chosen, i]].mean(0)).norm()))
        else:
            best = max(left, key=lambda i: float(weight @ x[i]))
        chosen.append(best)
        weight = weight + mean - x[best]
        torch.testing.assert_close(weight, (t + 2) * mean - x[chosen].sum(0))
    assert herding(x, 12, rule).tolist() == chosen


def test_herding_rules_agree_on_the_sphere_and_beat_chance():
    x = torch.nn.functional.normalize(points(200, seed=6), dim=1)
    a = herding(x, 15)
    assert torch.equal(a, herding(x, 15, "welling"))
    draws = torch.stack([torch.randperm(200, generator=generator(s))[:15] for s in range(50)])
    chance = (x[draws].mean(1) - x.mean(0)).norm(dim=1)
    assert (x[a].mean(0) - x.mean(0)).norm() < chance.median() / 5
    assert sorted(herding(x, 200).tolist()) == list(range(200))


def test_per_class_keeps_counts_and_order():
    x, y = points(30), torch.arange(30) % 3
    index = per_class(y, torch.tensor([2, 0, 3]), lambda ids, k: k_center(x[ids], k))
    assert y[index].tolist() == [0, 0, 2, 2, 2]
    own = (y == 2).nonzero().flatten()
    assert torch.equal(index[2:], own[k_center(x[own], 3)])
    assert per_class(y, torch.zeros(3).long(), lambda ids, k: ids).tolist() == []


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (lambda: k_center(points(5), 6), "6 samples cannot be chosen from 5"),
        (lambda: k_center(points(5), 2, first=9), "no sample 9"),
        (lambda: herding(torch.zeros(5), 2), "one row per sample"),
        (lambda: herding(torch.full((3, 2), float("nan")), 2), "NaN"),
    ],
)
def test_bad_input_is_named(bad, line):
    with pytest.raises(InputError, match=line):
        bad()
