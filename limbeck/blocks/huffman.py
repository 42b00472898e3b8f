"""Canonical Huffman codes of small alphabets: the table is one byte for each symbol, its code's length."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from limbeck.core.errors import RunError

PIECE = 1 << 16
"""Bits that are decoded at once."""
LONGEST = 56
"""Bits of the longest code that the decoder reads. Longer ones need more than 10^11 symbols."""


@dataclass(frozen=True)
class Huffman:
    """A prefix code.

    Attributes:
        lengths: (s,) uint8, bits of each symbol's code; 0 for a symbol that does not occur.
    """

    lengths: NDArray[np.uint8]

    @classmethod
    def of(cls, symbols: NDArray[np.uint8], alphabet: int) -> Self:
        """The shortest code for these symbols, each in [0, ``alphabet``). One symbol alone gets one bit."""
        return cls.from_counts(np.bincount(symbols, minlength=alphabet))

    @classmethod
    def from_counts(cls, counts: NDArray[np.int64]) -> Self:
        """The shortest code for symbols that occur so often."""
        lengths = np.zeros(len(counts), np.uint8)
        heap = [(int(count), symbol, [symbol]) for symbol, count in enumerate(counts) if count]
        if len(heap) == 1:
            lengths[heap[0][1]] = 1
            return cls(lengths)
        heapq.heapify(heap)
        while len(heap) > 1:
            (a, first, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
            lengths[left + right] += 1
            heapq.heappush(heap, (a + b, first, left + right))
        return cls(lengths)

    def bits(self, counts: NDArray[np.int64]) -> int:
        """Length of a text in which the symbols occur so often."""
        return int((self.lengths.astype(np.int64) * counts).sum())

    def codewords(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Symbols in canonical order (by length, then by number), and their codes as binary fractions of ``LONGEST`` bits, increasing.

        Raises:
            RunError: the lengths belong to no prefix code.
        """
        order = np.lexsort((np.arange(len(self.lengths)), self.lengths))
        order = order[self.lengths[order] > 0]
        lengths = self.lengths[order].astype(np.uint64)
        if not len(order) or int(lengths.max()) > LONGEST:
            raise RunError("a Huffman table is damaged: it has no codes, or codes that are too long")
        share = np.left_shift(np.uint64(1), np.uint64(LONGEST) - lengths)  # of the unit interval, in 2^-LONGEST
        if sum(map(int, share)) > 1 << LONGEST:
            raise RunError("a Huffman table is damaged: its lengths belong to no prefix code")
        return order, np.concatenate([np.zeros(1, np.uint64), np.cumsum(share)[:-1]])

    def encode(self, symbols: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The codes one after the other, most significant bit first, in whole bytes."""
        order, starts = self.codewords()
        left = np.zeros(len(self.lengths), np.uint64)
        left[order] = starts
        lengths = self.lengths[symbols].astype(np.int64)
        ends = np.cumsum(lengths)
        at, words = ends - lengths, left[symbols]
        bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
        for place in range(int(self.lengths.max())):
            there = lengths > place
            bits[at[there] + place] = (words[there] >> np.uint64(LONGEST - 1 - place)) & np.uint64(1)
        return np.packbits(bits)

    def decode(self, data: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
        """The first ``count`` symbols of an encoded text.

        Piece by piece, all bit positions are read at once as if a code began there; the chain of those where one does is then followed by doubling.

        Raises:
            RunError: the data ends too early.
        """
        order, starts = self.codewords()
        deepest = int(self.lengths.max())
        bits = np.concatenate([np.unpackbits(data), np.zeros(deepest, np.uint8)])
        found: list[NDArray[np.uint8]] = []
        at, missing, end = 0, count, 8 * len(data)
        while missing > 0 and at < end:
            length = min(PIECE, end - at)
            windows = np.zeros(length, np.uint64)
            for place in range(deepest):
                windows |= bits[at + place : at + place + length].astype(np.uint64) << np.uint64(LONGEST - 1 - place)
            symbols = order[np.searchsorted(starts, windows, side="right") - 1]
            after = np.arange(length) + self.lengths[symbols]  # may lie in the next piece
            jump, chain = np.append(np.minimum(after, length), length), np.zeros(1, np.int64)
            while chain[-1] < length:
                chain, jump = np.concatenate([chain, jump[chain]]), jump[jump]
            chain = chain[chain < length][:missing]
            found.append(symbols[chain].astype(np.uint8))
            missing -= len(chain)
            at += int(after[chain[-1]])
        if missing > 0 or at > end:
            raise RunError("a Huffman-coded tensor is damaged: it ends too early")
        return np.concatenate([np.zeros(0, np.uint8), *found])
