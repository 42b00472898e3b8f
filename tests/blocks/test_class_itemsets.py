"""Itemsets of classes: the discriminative filter and lowered supports, against a walk through all supports."""

from __future__ import annotations

import numpy as np
import pytest

from limbeck.blocks.class_itemsets import ClassMiner, fill, pack, unpack
from limbeck.blocks.frequent_itemsets import Itemset, TooManyItemsets, frequent_itemsets
from limbeck.core.errors import InputError


def entries(counts: dict[int, int], graphs: int) -> tuple[np.ndarray, np.ndarray]:
    """Item i is in the first ``counts[i]`` of the transactions."""
    pairs = [(t, item) for item, count in counts.items() for t in range(count)]
    assert max(counts.values()) <= graphs
    return np.array([t for t, _ in pairs]), np.array([i for _, i in pairs])


def miner(discriminative: bool, *counts: dict[int, int], **options: int | None) -> ClassMiner:
    settings = {"max_len": 1, "limit": 100, **options}
    return ClassMiner([entries(c, 10) for c in counts], discriminative=discriminative, **settings)


FIRST, SECOND = {1: 10, 2: 8, 3: 5}, {1: 9, 2: 2, 4: 7}


def test_the_filter_drops_what_is_frequent_in_another_class_too():
    kept, supports = miner(False, FIRST, SECOND).mine_all({0: 5, 1: 5})
    assert [s.items for s in kept[0]] == [(1,), (2,), (3,)] and [s.items for s in kept[1]] == [(1,), (4,)]
    assert supports == {0: 5, 1: 5}
    kept, _ = miner(True, FIRST, SECOND).mine_all({0: 5, 1: 5})
    assert kept == {0: [((2,), 8), ((3,), 5)], 1: [((4,), 7)]}
    # item 2 is in the second class as well, but there below its support
    kept, _ = miner(True, FIRST, SECOND).mine_all({0: 5, 1: 2})
    assert kept == {0: [((3,), 5)], 1: [((4,), 7)]}
    # the same items for a set of any size: {1, 2} is frequent in the first class alone
    kept, _ = miner(True, FIRST, SECOND, max_len=None).mine_all({0: 8, 1: 9})
    assert kept[0] == [((2,), 8), ((1, 2), 8)]


def test_with_three_classes_one_other_is_enough():
    kept, _ = miner(True, {1: 9, 2: 9, 5: 6}, {1: 9, 3: 9}, {2: 9, 4: 9}).mine_all({0: 6, 1: 6, 2: 6})
    assert kept == {0: [((5,), 6)], 1: [((3,), 9)], 2: [((4,), 9)]}


def test_an_empty_class_alone_gets_a_lower_support():
    kept, supports = miner(False, FIRST, {7: 3, 8: 2}).mine_all({0: 6, 1: 6})
    assert kept[1] == [((7,), 3)] and supports == {0: 6, 1: 3} and len(kept[0]) == 2
    # class 1 has nothing of its own at 6; the first class keeps what it had
    kept, supports = miner(True, FIRST, {1: 10, 4: 4, 5: 4}).mine_all({0: 6, 1: 6})
    assert kept[1] == [((4,), 4), ((5,), 4)] and supports == {0: 6, 1: 4}
    assert kept[0] == [((2,), 8)]


@pytest.mark.parametrize("seed", range(8))
def test_the_lowered_support_is_the_highest_that_leaves_something(seed):
    generator = np.random.default_rng(seed)
    table = generator.random((2, 20, 6)) < generator.random((2, 1, 6))
    table[1, :, 0] = table[0, :, 0] = True
    transactions = [tuple(np.nonzero(t)) for t in table]
    made = ClassMiner(transactions, max_len=2, limit=1000, discriminative=True)
    supports = {0: 20, 1: 20}
    kept, final = made.mine_all(supports)
    raw = {c: {s.items: s.support for s in frequent_itemsets(*transactions[c], 20, max_len=2)} for c in (0, 1)}
    for c in (0, 1):
        for support in range(20, 0, -1):
            now = frequent_itemsets(*transactions[c], support, max_len=2)
            left = [s for s in now if s.items not in raw[1 - c]]
            if left:
                break
        assert (kept[c], final[c]) == (left, support)


def test_what_cannot_be_is_said():
    with pytest.raises(InputError, match="class 1 has no frequent itemset that is not frequent in another class"):
        miner(True, FIRST, {1: 10}).mine_all({0: 5, 1: 5})
    empty = (np.zeros(0, dtype=int), np.zeros(0, dtype=int))
    alone = ClassMiner([entries(FIRST, 10), empty], max_len=1, limit=9, discriminative=False)
    with pytest.raises(InputError, match="class 1 has no frequent itemset at all"):
        alone.mine_all({0: 5, 1: 5})
    with pytest.raises(TooManyItemsets):
        miner(False, FIRST, SECOND, limit=2).mine_all({0: 5, 1: 5})
    # lowering ends where the next lower support leaves too many: 3 at once is over the cap of 2
    with pytest.raises(TooManyItemsets):
        miner(False, FIRST, {7: 3, 8: 3, 9: 3}, limit=2).mine_all({0: 8, 1: 6})


def test_room_is_filled_one_of_each_class_in_turn():
    def sets(*items: int) -> list[Itemset]:
        return [Itemset((i,), 9) for i in items]

    kept = {0: [Itemset((1,), 12)], 1: []}
    more = {0: sets(1, 2, 3, 4), 1: sets(5, 6)}
    assert fill(kept, more, lambda s: 1, 3) == {0: [Itemset((1,), 12), *sets(2, 3)], 1: sets(5)}
    assert fill(kept, more, lambda s: 1, 99) == {0: [Itemset((1,), 12), *sets(2, 3, 4)], 1: sets(5, 6)}
    assert fill(kept, more, lambda s: 1, 0) == kept
    prices = {2: 7, 3: 1, 4: 1, 5: 2, 6: 5}  # what does not fit is passed over
    assert fill(kept, more, lambda s: prices[s.items[0]], 4) == {0: [Itemset((1,), 12), *sets(3, 4)], 1: sets(5)}
    assert fill({}, {1: [Itemset((1, 2), 3), Itemset((7,), 3)]}, lambda s: 1, 2)[1][0].items == (7,)


def test_packed_itemsets_come_back():
    for mined, supports in (({}, {}), ({0: [], 1: [Itemset((3, 8), 5), Itemset((2,), 4)]}, {0: 7, 1: 4, 2: 1})):
        assert unpack(pack(mined, supports)) == (mined, supports)
