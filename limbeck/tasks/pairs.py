"""Pairs of texts that belong together, as token ids: what a retrieval model is trained and judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.blocks.masked_tokens import SpecialTokens
from limbeck.core.batch import Batch
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.tasks.base import Task
from limbeck.tasks.tokens import FIRST, SPECIAL


@dataclass(frozen=True)
class CodeViews:
    """Other ways of writing the same code, on the level of tokens.

    ``rename`` gives every word of a local identifier another word, the same one throughout the function. ``replace`` puts a random
    word in the place of each frequent word with probability ``rate``. Both are functions of (key, sample), so views are replayable.

    Attributes:
        words: (P,) ids to draw from.
        frequent: (F,) ids that may be replaced.
        rate: probability, 0 to 1.
    """

    words: Tensor
    frequent: Tensor
    rate: float = 0.3

    def rename(self, ids: Tensor, local: Tensor, index: Tensor, key: int) -> Tensor:
        """(B, T) ids with the tokens where ``local`` (B, T) is true renamed; ``index`` (B,) are the samples' ids."""
        drawn = _hash(_hash(index[:, None] * 8191 + key) + ids)
        return torch.where(local, self.words[drawn % len(self.words)], ids)

    def replace(self, ids: Tensor, index: Tensor, key: int) -> Tensor:
        """(B, T) ids with frequent words replaced here and there."""
        place = torch.arange(ids.shape[1])[None, :]
        drawn = _hash(_hash(index[:, None] * 8191 + key) + place)
        chance = (drawn % (1 << 20)).double() / (1 << 20)
        chosen = torch.isin(ids, self.frequent) & (chance < self.rate)
        return torch.where(chosen, self.words[(drawn >> 20) % len(self.words)], ids)


class TextPairs(Data):
    """Pairs (query, document) of token ids.

    A batch has ``inputs = {"query": …, "document": …, "other": …}``, each ``{"input_ids": (B, T), "attention_mask": (B, T)}`` cut to
    the longest of the batch, and as labels the group (B,) of each pair: pairs with equal queries are in one group and are no
    negatives for each other. ``other`` is a second way of writing the document, there if ``views`` are given.

    Args:
        query, document: (N, T) and (N, T') ids; padding is 0.
        local: (N, T') bool, tokens of local identifiers in the document; None: none are.
        views: how code is written differently. The document of a numbered view has words replaced; ``other`` is renamed as well,
            also where no view is asked for (there it is the same at every look).
        repository: (N,) int64, where a document comes from; None: unknown.
        seed: seeds the views.

    Raises:
        InputError: no pairs, or parts of different length.
    """

    replayable = True

    def __init__(
        self,
        query: Tensor,
        document: Tensor,
        *,
        local: Tensor | None = None,
        views: CodeViews | None = None,
        repository: Tensor | None = None,
        seed: int = 0,
        special: SpecialTokens = SPECIAL,
    ) -> None:
        if len(query) == 0:
            raise InputError("the data set is empty: it needs at least one pair")
        if query.ndim != 2 or document.ndim != 2 or len(query) != len(document):
            raise InputError(
                f"queries and documents must be matrices of ids with as many rows, not {tuple(query.shape)} and {tuple(document.shape)}"
            )
        self.query, self.document = query.long(), document.long()
        self.local = torch.zeros_like(self.document, dtype=torch.bool) if local is None else local
        self.views, self.repository, self.seed, self.special = views, repository, seed, special
        self.groups = torch.unique(self.query, dim=0, return_inverse=True)[1]

    def __len__(self) -> int:
        return len(self.query)

    @property
    def augmented(self) -> bool:
        return self.views is not None

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        document = self.document[index]
        inputs = {"query": self._encoded(self.query[index])}
        if self.views is not None:
            key = mix_seed(self.seed, 0 if view is None else 1 + view) >> 8
            other = self.views.rename(document, self.local[index], index, key)
            inputs["other"] = self._encoded(self.views.replace(other, index, key + 1))
            if view is not None:
                document = self.views.replace(document, index, key + 2)
        inputs["document"] = self._encoded(document)
        return Batch(inputs, self.groups[index], index, view)

    def _encoded(self, ids: Tensor) -> dict[str, Tensor]:
        mask = ids != self.special.pad
        width = max(1, int(mask.any(0).nonzero().max()) + 1) if bool(mask.any()) else 1
        return {"input_ids": ids[:, :width], "attention_mask": mask[:, :width].long()}

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.query, self.document, self.local, self.repository):
            if part is not None:
                digest.update(part.contiguous().numpy().tobytes())
        rate = None if self.views is None else (self.views.rate, len(self.views.words), len(self.views.frequent))
        digest.update(repr((rate, self.seed if self.views else 0)).encode())
        return digest.hexdigest()[:16]

    def subset(self, index: Tensor) -> TextPairs:
        """The given pairs, with ids of their own."""
        return TextPairs(
            self.query[index],
            self.document[index],
            local=self.local[index],
            views=self.views,
            repository=None if self.repository is None else self.repository[index],
            seed=self.seed,
            special=self.special,
        )

    def prefixed(self, query: Sequence[int], document: Sequence[int]) -> TextPairs:
        """The pairs with ids put in front of every query and every document; what no longer fits is cut off at the end."""

        def with_prefix(rows: Tensor, prefix: Sequence[int], blank: bool = False) -> Tensor:
            front = torch.tensor(prefix, dtype=torch.long)
            front = torch.zeros(len(prefix), dtype=torch.bool) if blank else front
            return torch.cat([front.to(rows.dtype).expand(len(rows), -1), rows], 1)[:, : rows.shape[1]]

        if max(len(query), len(document)) >= min(self.query.shape[1], self.document.shape[1]):
            raise InputError("the instruction leaves no room for the text: make it shorter, or the window longer")
        return TextPairs(
            with_prefix(self.query, query),
            with_prefix(self.document, document),
            local=with_prefix(self.local, document, blank=True),
            views=self.views,
            repository=self.repository,
            seed=self.seed,
            special=self.special,
        )

    def contexts(self, window: int, seed: int = 0) -> Contexts:
        """Windows of joined documents for pre-training, see :class:`Contexts`."""
        return Contexts(self, window, seed)


class Contexts(Data):
    """Windows ``[SEP] a [SEP] b … [CLS]`` of documents joined until the window is full; labels say if all are from one repository.

    The first part is the sample's own document, cut to half of the window. With probability one half the others come from its
    repository (label 1), else from one other repository (label 0). Which, is drawn anew for every view, and replayable.

    Args:
        pairs: with repositories.
        window: tokens, at least 8.
        seed: seeds the draws.

    Raises:
        InputError: no repositories, fewer than two of them, or none with two documents.
    """

    PARTS = 8
    replayable, augmented = True, True

    def __init__(self, pairs: TextPairs, window: int, seed: int = 0) -> None:
        if pairs.repository is None:
            raise InputError(
                "pre-training tells repositories apart, and the data names none: give repository=… or pretrain_epochs=0"
            )
        if window < 8:
            raise InputError(f"a window of joined documents needs at least 8 tokens (got {window})")
        self.pairs, self.window, self.seed = pairs, window, seed
        self.order = pairs.repository.argsort(stable=True)
        _, inverse, counts = torch.unique(pairs.repository, return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        self.count, self.start = counts[inverse], starts[inverse]
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(pairs))
        self.place = place - self.start
        self.anchors = (self.count >= 2).nonzero().flatten()
        if len(counts) < 2 or not len(self.anchors):
            raise InputError("pre-training needs at least two repositories, one of them with two documents or more")
        self._drawn: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.anchors)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        anchor, drawn = self.anchors[index], self._draw(0 if view is None else view)[index]
        same = drawn[:, 0] < 0.5
        start, count = self.start[anchor], self.count[anchor]
        # Another document of the same repository, or any document of another one; then more from the repository of that one.
        own = start + (self.place[anchor] + 1 + (drawn[:, 1] * (count - 1)).long()) % count
        outside = (drawn[:, 1] * (len(self.order) - count)).long()
        outside = torch.where(outside < start, outside, outside + count)
        second = self.order[torch.where(same, own, outside)]
        more = self.start[second][:, None] + (drawn[:, 2:] * self.count[second][:, None]).long()
        parts = torch.cat([anchor[:, None], second[:, None], self.order[more]], 1)  # (B, PARTS)
        return Batch(self._join(self.pairs.document[parts]), same.long(), index, view)

    def _join(self, parts: Tensor) -> dict[str, Tensor]:
        special, size = self.pairs.special, len(parts)
        parts = parts.clone()
        parts[:, 0, max(1, (self.window - 3) // 2) :] = special.pad
        separated = torch.cat([torch.full_like(parts[..., :1], special.sep), parts], -1).flatten(1)
        there = separated != special.pad
        # Real tokens move to the front, in order; what does not fit goes.
        order = (~there).int().argsort(dim=1, stable=True)[:, : self.window - 1]
        rows = separated.gather(1, order)
        rows = torch.cat([rows, rows.new_full((size, 1), special.pad)], 1)
        last = there.sum(1).clamp_max(self.window - 1)
        rows[torch.arange(size), last] = special.cls
        return {"input_ids": rows, "attention_mask": (rows != special.pad).long()}

    def _draw(self, view: int) -> Tensor:
        if self._drawn is None or self._drawn[0] != view:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, 51, view))
            self._drawn = (view, torch.rand(len(self), self.PARTS, generator=generator))
        return self._drawn[1]


@dataclass
class PairTask(Task):
    """A retrieval task; ``num_classes`` is the number of token ids and ``in_shape`` the window ``(tokens,)``.

    Attributes:
        about: further facts for the record.
    """

    about: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        said = super().describe()
        said["vocabulary"] = said.pop("classes")
        return {**said, **self.about}

    def prefixed(self, query: Sequence[int], document: Sequence[int]) -> PairTask:
        """The same task with ids in front of every text."""
        parts: dict[str, Any] = {
            name: getattr(self, name).prefixed(query, document) for name in ("train", "val", "test")
        }
        return replace(self, **parts)


def frequent_words(document: Tensor, most: int = 64) -> tuple[Tensor, Tensor]:
    """All word ids of documents (P,), and the ``most`` frequent of them (F,), both in ascending order."""
    counts = torch.bincount(document.flatten())
    counts[:FIRST] = 0
    words = counts.nonzero().flatten()
    top = counts.argsort(descending=True, stable=True)[: min(most, len(words))]
    return words, top.sort().values


def _hash(x: Tensor) -> Tensor:
    """A 62-bit hash of int64 values, elementwise; multiplication wraps around."""
    x = (x ^ (x >> 31)) * 0x7FB5D329728EA185
    x = (x ^ (x >> 27)) * -0x7E25210B43D22BB3
    return (x ^ (x >> 33)) & ((1 << 62) - 1)
