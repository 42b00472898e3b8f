"""Frequent itemsets of classes: mined class by class, those that do not tell classes apart dropped, no class left empty.

Source: "Mirage: Model-Agnostic Graph Distillation for Graph Classification" (2024). Our decisions: with more than two classes an
itemset is dropped that is frequent in any other class; a class that this empties is filtered against the others' itemsets as they were
at the first supports.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from limbeck.blocks.frequent_itemsets import Itemset, TooManyItemsets, frequent_itemsets
from limbeck.core.errors import InputError

Ints = NDArray[np.int64]
Mined = dict[int, list[Itemset]]


class ClassMiner:
    """Mines the transactions of several classes.

    Args:
        transactions: for each class the transaction (N,) and the item (N,) of every entry.
        max_len: most items in a set; None: any number.
        limit: most itemsets of a class.
        discriminative: drop itemsets that are frequent in another class as well.
    """

    def __init__(
        self, transactions: Sequence[tuple[Ints, Ints]], *, max_len: int | None, limit: int, discriminative: bool
    ) -> None:
        self.transactions, self.max_len, self.limit = transactions, max_len, limit
        self.discriminative = discriminative

    def mine(self, label: int, support: int) -> list[Itemset]:
        """The itemsets of one class in at least ``support`` transactions, most frequent first, unfiltered.

        Raises:
            TooManyItemsets: more than ``limit``.
        """
        owners, items = self.transactions[label]
        return frequent_itemsets(owners, items, support, max_len=self.max_len, limit=self.limit)

    def mine_all(self, supports: Mapping[int, int]) -> tuple[Mined, dict[int, int]]:
        """:meth:`complete` of all classes at the given supports."""
        return self.complete({label: self.mine(label, support) for label, support in supports.items()}, supports)

    def complete(self, mined: Mined, supports: Mapping[int, int]) -> tuple[Mined, dict[int, int]]:
        """The itemsets that are kept, and the supports that they have in the end: filtered, and a class that would be left without
        any gets its own support lowered to the highest that leaves it some.

        Raises:
            InputError: a class has no itemset at any support.
            TooManyItemsets: the highest support that leaves a class some leaves it too many.
        """
        kept = {label: self._filtered(label, found, mined) for label, found in mined.items()}
        final = dict(supports)
        for label in [label for label, found in kept.items() if not found]:
            kept[label], final[label] = self._lowered(label, mined, final[label])
        return kept, final

    def _filtered(self, label: int, found: list[Itemset], mined: Mined) -> list[Itemset]:
        if not self.discriminative:
            return found
        others = {s.items for other, sets in mined.items() if other != label for s in sets}
        return [s for s in found if s.items not in others]

    def _lowered(self, label: int, mined: Mined, support: int) -> tuple[list[Itemset], int]:
        """The itemsets of a class at the highest support below ``support`` that leaves any, by bisection."""
        low, high = 0, support
        best: list[Itemset] = []
        overfull: TooManyItemsets | None = None
        while high - low > 1:
            middle = (low + high) // 2
            try:
                found = self._filtered(label, self.mine(label, middle), mined)
            except TooManyItemsets as error:  # low enough, and maybe too low
                low, best, overfull = middle, [], error
                continue
            if found:
                low, best, overfull = middle, found, None
            else:
                high = middle
        if overfull is not None:
            raise overfull
        if not best:
            why = (
                "that is not frequent in another class too: mine without the filter"
                if self.discriminative
                else "at all"
            )
            raise InputError(f"class {label} has no frequent itemset {why} (or its graphs have no edges)")
        return best, low


def fill(kept: Mined, more: Mined, price: Callable[[Itemset], int], room: int) -> Mined:
    """What is kept, and as many of ``more`` as there is room for: one of each class in turn, in the given order; what does not fit is
    passed over.

    Args:
        kept: itemsets by class.
        more: further ones; those of the same items as a kept one of the class are left out.
        price: what an itemset takes of the room.
        room: how much there is.

    Returns:
        all of them, the most frequent first, then those of fewer items.
    """
    known = {label: {s.items for s in sets} for label, sets in kept.items()}
    fresh = {label: [s for s in sets if s.items not in known.get(label, ())] for label, sets in more.items()}
    found = {label: list(kept.get(label, [])) for label in dict.fromkeys([*kept, *more])}
    for turn in itertools.zip_longest(*([(label, s) for s in sets] for label, sets in fresh.items())):
        for label, itemset in filter(None, turn):
            cost = price(itemset)
            if cost <= room:
                found[label].append(itemset)
                room -= cost
    return {label: sorted(sets, key=lambda s: (-s.support, len(s.items), s.items)) for label, sets in found.items()}


def pack(mined: Mined, supports: Mapping[int, int]) -> list[int]:
    """Itemsets and supports as plain numbers, for a checkpoint."""
    numbers = [len(supports)]
    for label, support in supports.items():
        numbers += [label, support]
    for label, sets in mined.items():
        numbers += [label, len(sets)]
        for itemset in sets:
            numbers += [itemset.support, len(itemset.items), *itemset.items]
    return numbers


def unpack(numbers: Sequence[int]) -> tuple[Mined, dict[int, int]]:
    """What :func:`pack` took."""
    rest = iter(numbers)
    supports = {next(rest): next(rest) for _ in range(next(rest))}
    mined: Mined = {}
    for label in rest:
        mined[label] = []
        for _ in range(next(rest)):
            support, length = next(rest), next(rest)
            mined[label].append(Itemset(tuple(next(rest) for _ in range(length)), support))
    return mined, supports
