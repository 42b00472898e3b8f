"""Real samples by class: which there are, and batches with the same number of every class."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.errors import InputError


class ClassIndex:
    """Where the samples of each class are.

    Args:
        labels: (N,) int64 class indices.
        num_classes: C; None: the largest index plus one.

    Attributes:
        order: (N,) sample ids sorted by class.
        starts, counts: (C,) where a class begins in it, and how many samples it has.

    Raises:
        InputError: labels that are no class indices, fewer than two classes, or a class without samples.
    """

    def __init__(self, labels: Tensor, num_classes: int | None = None) -> None:
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise InputError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}: dataset distillation needs one integer class for each sample"
            )
        labels = labels.long()
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (num_classes is not None and high >= num_classes):
            raise InputError(f"labels go from {low} to {high}: classes are numbered from 0")
        self.labels, self.num_classes = labels, high + 1 if num_classes is None else num_classes
        self.counts = torch.bincount(labels, minlength=self.num_classes)
        if self.num_classes < 2:
            raise InputError("there is one class only: a data set to be distilled has two or more")
        empty = (self.counts == 0).nonzero().flatten()
        if len(empty):
            raise InputError(f"class {int(empty[0])} has no samples: number the classes from 0 without gaps")
        self.order = labels.argsort(stable=True)
        self.starts = self.counts.cumsum(0) - self.counts

    def check(self, per_class: int, what: str = "ipc") -> None:
        """That every class has so many samples.

        Raises:
            InputError: one has fewer; the message names it.
        """
        fewest = int(self.counts.argmin())
        if per_class > int(self.counts[fewest]):
            raise InputError(
                f"{what} {per_class} is more than the {int(self.counts[fewest])} samples of class {fewest}: ask for fewer"
            )

    def ids(self, label: int) -> Tensor:
        """Sample ids of one class, in the order of the data."""
        start, count = int(self.starts[label]), int(self.counts[label])
        return self.order[start : start + count]

    def sample(self, per_class: int, generator: torch.Generator) -> Tensor:
        """(C, per_class) sample ids drawn in each class without replacement; a class with fewer repeats its own."""
        keys = torch.rand(len(self.labels), generator=generator, dtype=torch.float64) + self.labels
        shuffled = keys.argsort()  # sorted by class, in random order within
        place = torch.arange(per_class)[None] % self.counts[:, None]
        return shuffled[self.starts[:, None] + place]


class ClassStream(Stream):
    """Endless batches with ``per_class`` samples of every class, sorted by class; a function of (seed, step) alone.

    Args:
        data: real samples.
        index: their classes.
        per_class: samples of each class in a batch.
        seed: of the draws.
    """

    def __init__(
        self, data: Data, index: ClassIndex, per_class: int, *, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(data, per_class * index.num_classes, seed=seed, rank=rank, world=world)
        self.index, self.per_class = index, per_class

    def shard(self, rank: int, world: int) -> ClassStream:
        if self.per_class % world:
            raise InputError(f"{self.per_class} samples of each class cannot be divided among {world} processes")
        return ClassStream(self.data, self.index, self.per_class, seed=self.seed, rank=rank, world=world)

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, step, 2))
        ids = self.index.sample(self.per_class, generator)
        part = self.per_class // self.world
        return self.data.fetch(ids[:, self.rank * part : (self.rank + 1) * part].flatten(), None)
