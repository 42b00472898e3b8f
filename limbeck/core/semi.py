"""Data of which only a part has labels, and batches that bring both parts."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch, join
from limbeck.core.data import Data, Stream, TensorData, as_data, mix_seed
from limbeck.core.errors import InputError


class SemiSupervisedData(Data):
    """Labelled and unlabelled samples.

    As a data set it is its labelled part, so that whatever needs labels takes it as it is; methods that learn from unlabelled
    samples read :attr:`unlabelled`, or :meth:`everything`.

    Args:
        labelled: samples with labels (anything that :func:`limbeck.core.data.as_data` takes).
        unlabelled: samples whose labels, if they have any, are never looked at.

    Raises:
        InputError: one part is empty, or the first has no labels.
    """

    def __init__(self, labelled: Any, unlabelled: Any) -> None:
        if unlabelled is None or (hasattr(unlabelled, "__len__") and not len(unlabelled)):
            raise InputError("the unlabelled set is empty: give samples without labels, or a method that needs none")
        self.labelled, self.unlabelled = as_data(labelled), Unlabelled(as_data(unlabelled))
        if self.labelled.fetch(torch.arange(1), None).labels is None:
            raise InputError("the labelled part has no labels: give it as (inputs, labels)")
        self.replayable = self.labelled.replayable and self.unlabelled.replayable

    def __len__(self) -> int:
        return len(self.labelled)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        return self.labelled.fetch(index, view)

    @property
    def augmented(self) -> bool:
        return self.labelled.augmented or self.unlabelled.augmented

    def fingerprint(self) -> str | None:
        parts = self.labelled.fingerprint(), self.unlabelled.fingerprint()
        if None in parts:
            return None
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def labels_tensor(self) -> Tensor:
        return self.labelled.labels_tensor()

    def everything(self) -> Data:
        """All samples, labelled ones first, without labels."""
        return Joined(Unlabelled(self.labelled), self.unlabelled)


class Unlabelled(Data):
    """A data set whose labels are not shown."""

    def __init__(self, data: Data) -> None:
        self.data: Data = data.data if isinstance(data, Unlabelled) else data
        self.replayable = self.data.replayable

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        batch = self.data.fetch(index, view)
        return Batch(batch.inputs, None, batch.index, batch.view, batch.teacher_inputs)

    @property
    def augmented(self) -> bool:
        return self.data.augmented

    def fingerprint(self) -> str | None:
        return self.data.fingerprint()


class Joined(Data):
    """Two data sets of the same kind one after the other, without labels."""

    def __init__(self, first: Data, second: Data) -> None:
        self.first, self.second = first, second
        self.replayable = first.replayable and second.replayable

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        late = index >= len(self.first)
        parts = [
            data.fetch(ids, view)
            for data, ids in ((self.first, index[~late]), (self.second, index[late] - len(self.first)))
            if len(ids)
        ]
        inputs = parts[0].inputs if len(parts) == 1 else join(parts[0].inputs, parts[1].inputs)
        if len(parts) == 2:
            order = torch.empty_like(index)
            order[torch.cat([(~late).nonzero().flatten(), late.nonzero().flatten()])] = torch.arange(len(index))
            inputs = Batch(inputs).map(lambda t: t[order]).inputs
        return Batch(inputs, None, index, view)

    @property
    def augmented(self) -> bool:
        return self.first.augmented or self.second.augmented

    def fingerprint(self) -> str | None:
        parts = self.first.fingerprint(), self.second.fingerprint()
        return None if None in parts else hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class SemiSupervisedStream(Stream):
    """Labelled batches that bring unlabelled ones along: ``batch(step).unlabelled`` is a tuple of ``copies`` input batches.

    Each part is shuffled and repeated by itself; an epoch is over when the part with more batches has been seen once.

    Args:
        data: both parts.
        batch_size: labelled samples per batch.
        unlabelled_batch_size: samples in each unlabelled batch; None: as many.
        copies: how many independent unlabelled batches come along.
        seed, views, rank, world: see :class:`~limbeck.core.data.Stream`.

    Raises:
        InputError: the data has no unlabelled part.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        unlabelled_batch_size: int | None = None,
        copies: int = 1,
        *,
        seed: int = 0,
        views: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not isinstance(data, SemiSupervisedData):
            raise InputError(
                "this method learns from unlabelled samples too: give SemiSupervisedData(labelled, unlabelled), "
                "limbeck.fit(…, unlabelled=…), or a task with --labelled"
            )
        super().__init__(data.labelled, batch_size, seed=seed, views=views, rank=rank, world=world)
        self.both, self.copies, self.free_views = data, copies, views
        size = unlabelled_batch_size or batch_size
        self.others = [
            Stream(data.unlabelled, size, seed=mix_seed(seed, 17, n), views=views, rank=rank, world=world)
            for n in range(copies)
        ]
        self._own = self.steps_per_epoch
        self.steps_per_epoch = max([self._own, *(s.steps_per_epoch for s in self.others)])

    def shard(self, rank: int, world: int) -> SemiSupervisedStream:
        return SemiSupervisedStream(
            self.both,
            self.batch_size,
            self.others[0].batch_size if self.others else None,
            self.copies,
            seed=self.seed,
            views=self.free_views,
            rank=rank,
            world=world,
        )

    def batch(self, step: int) -> Batch:
        labelled = self._at(step, self._own)
        return labelled.with_unlabelled(tuple(s.batch(step).inputs for s in self.others))


def keep_labels(data: TensorData, chosen: Tensor) -> SemiSupervisedData:
    """``data`` with the labels of the samples ``chosen`` (ids) only; the rest becomes the unlabelled part.

    Raises:
        InputError: no sample is left without a label.
    """
    rest = torch.ones(len(data), dtype=torch.bool)
    rest[chosen] = False
    if not bool(rest.any()):
        raise InputError(
            f"all {len(data)} training samples keep their labels, so the unlabelled set is empty: ask for fewer"
        )
    return SemiSupervisedData(data.subset(chosen), data.subset(rest.nonzero().flatten()))
