"""Frequent itemsets: which items occur together in at least so many transactions, exactly.

The miner is Eclat: the transactions of every item are a row of bits, the transactions of a set are the bitwise AND of its
items' rows, and sets are grown depth first, each by the items that follow its last one. It finds what FP-growth finds.

Source: "New Algorithms for Fast Discovery of Association Rules" (1997, Eclat); the problem: "Fast Algorithms for Mining Association
Rules" (1994).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from limbeck.core.errors import InputError

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


class TooManyItemsets(InputError):
    """The cap on the number of itemsets was reached: the support is too low for the data."""


class Itemset(NamedTuple):
    """Items in rising order, and the number of transactions that hold all of them."""

    items: tuple[int, ...]
    support: int


def frequent_itemsets(
    owners: Ints,
    items: Ints,
    support: int,
    *,
    max_len: int | None = None,
    limit: int | None = None,
) -> list[Itemset]:
    """All itemsets with at least ``support`` transactions.

    Args:
        owners: (N,) number of the transaction that each entry belongs to.
        items: (N,) the entry's item; repetitions within a transaction count once.
        support: absolute, at least 1.
        max_len: largest number of items in a set; None: no bound.
        limit: largest number of sets.

    Returns:
        the most frequent first; among equally frequent ones the smaller, then the lower in order.

    Raises:
        InputError: a support or length below 1.
        TooManyItemsets: there are more than ``limit``.
    """
    if support < 1 or (max_len is not None and max_len < 1):
        raise InputError(f"the support and the length of itemsets must be at least 1 (got {support} and {max_len})")
    names, bits = _rows_of_bits(owners, items, support)
    found: list[Itemset] = []
    for chosen, count, waiting in _grow(bits, support, max_len):
        found.append(Itemset(tuple(names[list(chosen)].tolist()), count))
        if limit is not None and len(found) + waiting > limit:
            raise TooManyItemsets(
                f"more than {limit} itemsets have a support of {support}: raise the support, or the cap, or lower max_len"
            )
    return sorted(found, key=lambda s: (-s.support, len(s.items), s.items))


def _rows_of_bits(owners: Ints, items: Ints, support: int) -> tuple[Ints, Words]:
    """The frequent items (n,) in rising order, and for each the bits (n, words) of the transactions that hold it."""
    transactions, owner = np.unique(owners, return_inverse=True)
    names, item = np.unique(items, return_inverse=True)
    width = max(1, len(transactions))
    pairs = np.unique(item.astype(np.int64) * width + owner)
    item, owner = np.divmod(pairs, width)
    keep = np.bincount(item, minlength=len(names)) >= support
    row = np.cumsum(keep) - 1
    chosen = keep[item]
    table = np.zeros((int(keep.sum()), -(-width // 64) * 64), dtype=bool)
    table[row[item[chosen]], owner[chosen]] = True
    return names[keep], np.packbits(table, axis=1).view(np.uint64)


def _counts(bits: Words) -> Ints:
    """(n,) number of ones in each row."""
    ones = (
        np.bitwise_count(bits) if hasattr(np, "bitwise_count") else _ONES[bits.view(np.uint8)]
    )  # the former is NumPy 2's
    found: Ints = ones.sum(1, dtype=np.int64)
    return found


def _grow(bits: Words, support: int, max_len: int | None) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """(rows of the set, its support, how many sets are sure to follow), depth first."""
    stack: list[tuple[tuple[int, ...], Ints, Words]] = [((), np.arange(len(bits)), bits)]
    waiting = len(bits)
    while stack:
        prefix, rows, sets = stack.pop()
        counts = _counts(sets)
        for at in range(len(rows)):
            chosen = (*prefix, int(rows[at]))
            waiting -= 1
            if (max_len is None or len(chosen) < max_len) and at + 1 < len(rows):
                both = sets[at + 1 :] & sets[at]
                frequent = _counts(both) >= support
                if frequent.any():
                    stack.append((chosen, rows[at + 1 :][frequent], both[frequent]))
                    waiting += len(stack[-1][1])
            yield chosen, int(counts[at]), waiting


class SupportSearch:
    """Bisection for the lowest relative support s in (0, 1] at which something fits, one trial at a time.

    Only those supports are tried at which an absolute threshold ``ceil(s r n)`` changes for one of the classes. Where fitting is not
    monotone in s, the result fits, but a lower one may too.

    Args:
        sizes: number of transactions n of each class.
        ratios: factors r of each class, in (0, 1]; None: 1 each.
    """

    def __init__(self, sizes: Sequence[int], ratios: Sequence[float] | None = None) -> None:
        self.supports = support_steps(sizes, ratios)
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._low, self._high = 0, len(self.supports)

    @property
    def trials(self) -> int:
        """How many trials are enough."""
        return len(self.supports).bit_length()

    @property
    def candidate(self) -> float | None:
        """The support to try next; None: the search has ended."""
        return None if self._low == self._high else self.supports[(self._low + self._high) // 2]

    def tell(self, fits: bool) -> None:
        """The outcome of the trial of :attr:`candidate`."""
        middle = (self._low + self._high) // 2
        if fits:
            self._high = middle
        else:
            self._low = middle + 1

    @property
    def found(self) -> float | None:
        """The lowest support that fits, as far as is known; None: no trial has fitted."""
        return self.supports[self._high] if self._high < len(self.supports) else None

    def state_dict(self) -> dict[str, int]:
        return {"low": self._low, "high": self._high}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._low, self._high = state["low"], state["high"]


def support_steps(sizes: Sequence[int], ratios: Sequence[float] | None = None) -> list[float]:
    """The relative supports ``k / (r n)`` up to 1 at which some class's threshold ``ceil(s r n)`` changes, in rising order, and 1."""
    scaled = [n if ratios is None else n * r for n, r in zip(sizes, ratios or sizes, strict=True)]
    return sorted({k / n for n in scaled for k in range(1, int(n) + 1)} | {1.0})


def absolute(support: float, size: int) -> int:
    """``ceil(s n)``, at least 1; a product that should be whole is not rounded up for its last bit."""
    return max(1, math.ceil(support * size - 1e-9))
