"""A tokeniser that needs no training and no file: words split on case and underscores, hashed to a fixed number of ids.

The hash is BLAKE2, so ids are the same on every machine, in every process and in every version of Python.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.blocks.masked_tokens import SpecialTokens
from limbeck.core.errors import InputError

SPECIAL = SpecialTokens()
NAMELESS, FIRST = 4, 8
"""The id that stands for a masked name, and the lowest id of a word; ids between are reserved."""
MARK = "\u02d1"
"""A letter that no program uses: behind an identifier it marks it as local to its function, alone it is a masked name."""

_WORD = re.compile(r"[^\W\d]\w*|\d+")
_PIECE = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+|[^\W\d_A-Za-z]+")


def words_of(text: str) -> list[str]:
    """Identifiers, words and numbers of a text, in order; punctuation is left out."""
    return _WORD.findall(text)


@functools.lru_cache(maxsize=1 << 17)
def pieces(word: str) -> tuple[str, ...]:
    """A word split on underscores, case and digits, in lower case: ``getHTTPResponse_2`` is get, http, response, 2."""
    return tuple(piece.lower() for piece in _PIECE.findall(word))


@functools.lru_cache(maxsize=1 << 17)
def token_id(piece: str, vocabulary: int) -> int:
    """The id of a piece, from ``FIRST`` to ``vocabulary - 1``."""
    digest = hashlib.blake2b(piece.encode(), digest_size=8).digest()
    return FIRST + int.from_bytes(digest, "big") % (vocabulary - FIRST)


@dataclass(frozen=True)
class Encoded:
    """Texts as ids: (N, T), 0 is padding on the right; which tokens belong to local identifiers (N, T); how many were cut."""

    ids: Tensor
    local: Tensor
    truncated: int


@dataclass(frozen=True)
class HashTokenizer:
    """Text to ids.

    Attributes:
        vocabulary: number of ids, special ones included; more than 8.
        length: tokens of an encoded text.
    """

    vocabulary: int = 4096
    length: int = 64

    def __post_init__(self) -> None:
        if self.vocabulary <= FIRST or self.length < 1:
            raise InputError(
                f"a tokeniser needs more than {FIRST} ids and a length of at least 1 (got {self.vocabulary}, {self.length})"
            )

    def tokens(self, text: str) -> tuple[list[int], list[bool]]:
        """All ids of a text, and which belong to an identifier that is marked as local."""
        ids: list[int] = []
        local: list[bool] = []
        for word in words_of(text):
            if word == MARK:
                ids.append(NAMELESS)
                local.append(False)
                continue
            marked = word.endswith(MARK)
            found = [token_id(piece, self.vocabulary) for piece in pieces(word.rstrip(MARK))]
            ids += found
            local += [marked] * len(found)
        return ids, local

    def encode(self, texts: Iterable[str]) -> Encoded:
        """Texts, each truncated to ``length`` tokens.

        Raises:
            InputError: a text without a single word.
        """
        return self.pad([self.tokens(text) for text in texts])

    def pad(self, found: Sequence[tuple[list[int], list[bool]]]) -> Encoded:
        """What :meth:`tokens` gave, as tensors."""
        empty = next((n for n, (ids, _) in enumerate(found) if not ids), None)
        if empty is not None:
            raise InputError(f"text {empty} holds no word: every text needs at least one")
        cut = self.length
        rows = [ids[:cut] + [SPECIAL.pad] * (cut - len(ids)) for ids, _ in found]
        marks = [local[:cut] + [False] * (cut - len(local)) for _, local in found]
        return Encoded(
            torch.tensor(rows, dtype=torch.long).view(-1, cut),
            torch.tensor(marks, dtype=torch.bool).view(-1, cut),
            sum(len(ids) > cut for ids, _ in found),
        )
