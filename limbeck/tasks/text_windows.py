"""Texts as token ids, and windows of them as data."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.losses.tokens import IGNORED

UNKNOWN = "\ufffd"
ASCII = UNKNOWN + "\n" + "".join(map(chr, range(32, 127)))
"""The characters of source code: printable ASCII and the end of a line; the first one stands for everything else."""


class Characters:
    """Characters as ids.

    Args:
        alphabet: different characters; the first one stands for all that are not in it.
    """

    def __init__(self, alphabet: str = ASCII) -> None:
        self.alphabet = alphabet
        points = np.array([ord(c) for c in alphabet])
        self._ids = np.zeros(0x110000, dtype=np.int64)
        self._ids[points] = np.arange(len(alphabet))

    @classmethod
    def of(cls, text: str, most: int = 255) -> Characters:
        """The ``most`` most frequent characters of a text, in the order of their code points."""
        return cls(UNKNOWN + "".join(sorted(c for c, _ in Counter(text.replace(UNKNOWN, "")).most_common(most))))

    def __len__(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str) -> Tensor:
        """(length,) int64."""
        points = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)
        return torch.from_numpy(self._ids[points])

    def decode(self, ids: Tensor) -> str:
        return "".join(self.alphabet[i] for i in ids.tolist())


class TokenWindows(Data):
    """Windows of a long sequence of tokens: ``input_ids`` (B, T), and labels (B, T) as 🤗 transformers has them.

    Unaugmented, successive windows cover the whole sequence: every token but the first is predicted exactly once by a causal model, every one is labelled
    once for a tagger; the last window overlaps, with -100 where the label was seen before. Augmented views shift all windows by one random offset, so that
    over many epochs a token is seen at every place.

    Args:
        tokens: (L,) int64, L > T.
        window: T, at least 2.
        tags: (L,) int64 class of each token; None: the labels are the tokens (for causal models, whose loss shifts).
        augment: shift the windows when a view is asked for.
        seed: seeds the offsets.

    Raises:
        InputError: a sequence no longer than a window, or tags that are not as many.
    """

    def __init__(
        self, tokens: Tensor, window: int, *, tags: Tensor | None = None, augment: bool = False, seed: int = 0
    ) -> None:
        if window < 2 or len(tokens) <= window:
            raise InputError(f"{len(tokens)} tokens are too few for windows of {window}: it must be more, and T >= 2")
        if tags is not None and len(tags) != len(tokens):
            raise InputError(f"{len(tokens)} tokens but {len(tags)} tags: they must be as many")
        self.tokens, self.window, self.tags = tokens, window, tags
        self.augment, self.seed = augment, seed
        self.stride = window - 1 if tags is None else window
        # Shifted windows must fit in as well: then there is one less of them, at most.
        room = len(tokens) - window - (self.stride - 1 if augment else 0)
        self._count = max(1, room // self.stride + 1) if augment else -(-(len(tokens) - window) // self.stride) + 1

    def __len__(self) -> int:
        return self._count

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        offset = 0
        if view is not None and self.augment:
            most = min(self.stride - 1, len(self.tokens) - self.window - (self._count - 1) * self.stride)
            generator = torch.Generator().manual_seed(mix_seed(self.seed, view, 31))
            offset = int(torch.randint(most + 1, (1,), generator=generator))
        wanted = index * self.stride + offset
        starts = wanted.clamp_max(len(self.tokens) - self.window)
        places = starts[:, None] + torch.arange(self.window)
        labels = (self.tokens if self.tags is None else self.tags)[places]
        # What the window before has labelled: up to its last place, of which a causal model needs the token again.
        seen = wanted[:, None] + (1 if self.tags is None else 0)
        repeated = (wanted > starts)[:, None] & (places < seen)
        return Batch({"input_ids": self.tokens[places]}, labels.masked_fill(repeated, IGNORED), index, view)

    @property
    def augmented(self) -> bool:
        return self.augment

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.tokens.numpy().tobytes())
        if self.tags is not None:
            digest.update(self.tags.numpy().tobytes())
        about: Any = (self.window, self.augment, self.seed if self.augment else 0)
        digest.update(repr(about).encode())
        return digest.hexdigest()[:16]
