"""Frequent itemsets: against counting every subset, bounds, caps, and the search for a support."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from limbeck.blocks.frequent_itemsets import (
    SupportSearch,
    TooManyItemsets,
    absolute,
    frequent_itemsets,
    support_steps,
)
from limbeck.core.errors import InputError


def transactions(seed: int, count: int = 25, items: int = 7) -> list[set[int]]:
    generator = np.random.default_rng(seed)
    share = np.linspace(0.2, 0.9, items)
    return [{10 * i + 3 for i in range(items) if generator.random() < share[i]} for _ in range(count)]


def flat(sets: list[set[int]]) -> tuple[np.ndarray, np.ndarray]:
    owners = [t for t, items in enumerate(sets) for _ in items]
    return np.array(owners, dtype=np.int64), np.array([i for items in sets for i in items], dtype=np.int64)


def by_counting(sets: list[set[int]], support: int, max_len: int | None) -> dict[tuple[int, ...], int]:
    items = sorted(set().union(*sets))
    longest = len(items) if max_len is None else max_len
    found = {}
    for size in range(1, longest + 1):
        for chosen in itertools.combinations(items, size):
            count = sum(set(chosen) <= t for t in sets)
            if count >= support:
                found[chosen] = count
    return found


@pytest.mark.parametrize("max_len", [None, 1, 2, 3])
@pytest.mark.parametrize("support", [1, 4, 12, 25, 26])
@pytest.mark.parametrize("seed", range(3))
def test_sets_and_supports_equal_counting_every_subset(seed, support, max_len):
    sets = transactions(seed)
    found = frequent_itemsets(*flat(sets), support, max_len=max_len)
    assert dict(found) == by_counting(sets, support, max_len)
    assert len(dict(found)) == len(found)
    assert found == sorted(found, key=lambda s: (-s.support, len(s.items), s.items))


def test_repetitions_in_a_transaction_count_once_and_order_does_not_matter():
    owners, items = np.array([5, 5, 5, 9, 9]), np.array([1, 1, 2, 2, 1])
    assert frequent_itemsets(owners, items, 2) == [((1,), 2), ((2,), 2), ((1, 2), 2)]
    order = np.array([4, 0, 3, 2, 1])
    assert frequent_itemsets(owners[order], items[order], 2) == frequent_itemsets(owners, items, 2)
    assert frequent_itemsets(np.zeros(0, dtype=int), np.zeros(0, dtype=int), 1) == []


def test_many_sets_are_capped():
    owners, items = np.repeat(np.arange(3), 12), np.tile(np.arange(12), 3)
    assert len(frequent_itemsets(owners, items, 3, limit=4095)) == 4095
    with pytest.raises(TooManyItemsets, match="more than 100 itemsets have a support of 3"):
        frequent_itemsets(owners, items, 3, limit=100)
    for wrong in ({"support": 0}, {"support": 1, "max_len": 0}):
        with pytest.raises(InputError, match="at least 1"):
            frequent_itemsets(owners, items, **wrong)


@pytest.mark.parametrize("threshold", [0.0, 0.05, 1 / 7, 0.3, 0.5, 0.99, 1.0])
def test_the_search_finds_the_lowest_support_that_fits(threshold):
    search = SupportSearch([7, 12])
    tried = []
    while (candidate := search.candidate) is not None:
        tried.append(candidate)
        search.tell(candidate >= threshold)
        again = SupportSearch([7, 12])
        again.load_state_dict(search.state_dict())
        assert (again.candidate, again.found) == (search.candidate, search.found)
    assert search.found == min(s for s in support_steps([7, 12]) if s >= threshold)
    assert len(tried) <= search.trials and len(set(tried)) == len(tried)


def test_a_search_in_which_nothing_fits_says_so():
    search = SupportSearch([4])
    while search.candidate is not None:
        search.tell(False)
    assert search.found is None


def test_thresholds_change_at_every_step_and_nowhere_else():
    steps = support_steps([7, 12])
    assert steps[-1] == 1.0 and steps == sorted(set(steps))
    for n in (7, 12):
        assert [absolute(k / n, n) for k in range(1, n + 1)] == list(range(1, n + 1))
    scaled = support_steps([10, 4], [0.5, 1.0])
    assert scaled == sorted({k / 5 for k in range(1, 6)} | {k / 4 for k in range(1, 5)})
    assert support_steps([3], [0.5]) == [2 / 3, 1.0]
    assert absolute(0.3, 10) == 3 and absolute(0.31, 10) == 4 and absolute(1e-6, 10) == 1
