"""Validation samples carved from training data, for methods that learn from both (bilevel ones); test data plays no part."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.tasks.base import stratified_order


class Part(Data):
    """Some samples of a data set. Batches keep the whole set's ids, so that a teacher cache of it still serves.

    Args:
        data: the whole set.
        ids: (n,) which samples.
        plain: never augment.
    """

    def __init__(self, data: Data, ids: Tensor, *, plain: bool = False) -> None:
        if len(ids) == 0:
            raise InputError("a part of a data set needs at least one sample")
        self.data, self.ids, self.plain = data, ids, plain
        self.replayable = data.replayable

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        return self.data.fetch(self.ids[index], None if self.plain else view)

    @property
    def augmented(self) -> bool:
        return self.data.augmented and not self.plain

    def labels_tensor(self) -> Tensor:
        return self.data.labels_tensor()[self.ids]


def hold_out(data: Data, fraction: float, seed: int) -> tuple[Part, Part]:
    """Two disjoint parts that together are the data: the rest, and ``fraction`` of the samples, held out and never augmented.

    With class indices as labels, both parts hold the classes in the same proportions, as nearly as can be.

    Args:
        data: with or without labels.
        fraction: in (0, 1); at least one sample goes to each part.
        seed: seeds the choice.

    Raises:
        InputError: a fraction out of range, or fewer than two samples.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the fraction that is held out must be between 0 and 1 (got {fraction:g})")
    if len(data) < 2:
        raise InputError("a data set of one sample cannot be divided: give more data")
    labelled = data.fetch(torch.arange(1), None).labels
    if labelled is not None and labelled.ndim == 1 and not labelled.is_floating_point():
        order = stratified_order(data.labels_tensor(), seed)
    else:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(mix_seed(seed, 7)))
    count = min(max(1, round(fraction * len(data))), len(data) - 1)
    return Part(data, order[count:].sort().values), Part(data, order[:count].sort().values, plain=True)
