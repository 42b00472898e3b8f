"""Huffman codes: optimal, canonical, and read back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from limbeck.blocks.huffman import PIECE, Huffman
from limbeck.core.errors import RunError


def test_code_by_hand() -> None:
    """Counts 5, 2, 1, 1: lengths 1, 2, 3, 3; canonical codes 0, 10, 110, 111."""
    code = Huffman.from_counts(np.array([5, 2, 1, 1]))
    assert code.lengths.tolist() == [1, 2, 3, 3]
    data = code.encode(np.array([0, 1, 2, 3, 0], np.uint8))
    assert np.unpackbits(data)[:10].tolist() == [0, 1, 0, 1, 1, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("alphabet", [1, 2, 5, 64, 256])
@pytest.mark.parametrize("skew", [0.0, 1.0, 3.0])
def test_round_trip(alphabet: int, skew: float) -> None:
    rng = np.random.default_rng(alphabet)
    share = np.arange(1, alphabet + 1) ** -skew
    symbols = rng.choice(alphabet, 3000, p=share / share.sum()).astype(np.uint8)
    code = Huffman.of(symbols, alphabet)
    data = code.encode(symbols)
    assert np.array_equal(code.decode(data, len(symbols)), symbols)
    counts = np.bincount(symbols, minlength=alphabet)
    assert len(data) == -(-code.bits(counts) // 8)
    p = counts[counts > 0] / counts.sum()
    bound = -(p * np.log2(p)).sum()
    assert bound <= code.bits(counts) / len(symbols) <= bound + 1
    assert sum(2.0 ** -int(n) for n in code.lengths if n) <= 1


def test_no_prefix_code_is_shorter() -> None:
    """Brute force over all lengths that fulfil Kraft's inequality."""
    counts = np.array([7, 5, 2, 2, 1])
    best = min(
        int((np.array(lengths) * counts).sum())
        for lengths in itertools.product(range(1, 5), repeat=5)
        if sum(2.0**-n for n in lengths) <= 1
    )
    assert Huffman.from_counts(counts).bits(counts) == best


def test_deep_codes_are_read() -> None:
    """Counts like Fibonacci's numbers give the longest codes there are."""
    counts = [1, 1]
    while len(counts) < 24:
        counts.append(counts[-1] + counts[-2])
    symbols = np.repeat(np.arange(24), counts).astype(np.uint8)
    code = Huffman.of(symbols, 24)
    assert code.lengths.max() == 23
    assert np.array_equal(code.decode(code.encode(symbols), len(symbols)), symbols)


def test_long_texts_are_read_piece_by_piece() -> None:
    symbols = np.random.default_rng(0).binomial(15, 0.5, 100_000).astype(np.uint8)
    code = Huffman.of(symbols, 16)
    data = code.encode(symbols)
    assert len(data) * 8 > 4 * PIECE
    assert np.array_equal(code.decode(data, len(symbols)), symbols)
    with pytest.raises(RunError, match="ends too early"):
        code.decode(data[:-2], len(symbols))


def test_nothing_and_damage() -> None:
    symbols = np.array([0, 1, 2, 1], np.uint8)
    code = Huffman.of(symbols, 3)
    assert len(code.decode(np.zeros(0, np.uint8), 0)) == 0
    with pytest.raises(RunError, match="ends too early"):
        code.decode(code.encode(symbols), 20)
    with pytest.raises(RunError, match="no prefix code"):
        Huffman(np.array([1, 1, 1], np.uint8)).decode(np.zeros(4, np.uint8), 2)
