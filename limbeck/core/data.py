"""Data that can be replayed: every batch is a function of (seed, step), so resuming means asking for the next step.

A :class:`Data` answers ``fetch(index, view)``. A :class:`Stream` turns a data set into an endless sequence of batches by
step number; it keeps no state at all. Random augmentation is replayable when it is a function of (view, sample id):
:class:`TensorData` draws the parameters of a whole view at once from a seeded generator and looks them up by id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from limbeck.core.batch import Batch
from limbeck.core.errors import InputError


class Augmentation(Protocol):
    """A replayable augmentation: parameters are drawn for all samples of a view, then applied to any subset.

    Where labels are maps (B, H, W), they must move with the image: an augmentation for such data also has
    ``apply_labels(labels, parameters)``, label maps in, label maps out, under the same parameters.
    """

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Parameters (n, k) for all ``n`` samples of one view."""

    def apply(self, inputs: Tensor, parameters: Tensor) -> Tensor:
        """Inputs (B, ...) in, augmented (B, ...) out; ``parameters`` (B, k) belong to these samples."""


class Data:
    """A finite data set that is read by sample id."""

    replayable: bool = True
    """True if ``fetch(index, view)`` always gives the same tensors. A teacher cache needs it."""

    def __len__(self) -> int:
        raise NotImplementedError

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        """The samples with ids ``index`` (B,), as they look in augmentation view ``view`` (None: unaugmented)."""
        raise NotImplementedError

    @property
    def augmented(self) -> bool:
        """True if different views of a sample differ."""
        return not self.replayable

    def fingerprint(self) -> str | None:
        """A hash of the content (hex, 16 digits), or None where it cannot be known."""
        return None

    def batches(self, batch_size: int = 512) -> Iterator[Batch]:
        """Every sample once, in order, without augmentation."""
        for start in range(0, len(self), batch_size):
            yield self.fetch(torch.arange(start, min(start + batch_size, len(self))), None)

    def labels_tensor(self) -> Tensor:
        """All labels (N,), in order.

        Raises:
            InputError: the data has none.
        """
        found = [b.labels for b in self.batches()]
        if any(x is None for x in found):
            raise InputError("the data has no labels")
        return torch.cat([x for x in found if x is not None])


class TensorData(Data):
    """Samples held in memory.

    Args:
        inputs: (N, ...) tensor; uint8 images are scaled to [0, 1] when fetched, and then normalised.
        labels: (N,) int64 class indices, (N, C) soft labels, (N, H, W) int64 label maps, or None.
        mean, std: per-channel statistics (C,) for the normalisation; None leaves the values as they are.
        augment: a replayable augmentation, applied before the normalisation when a view is asked for.
        seed: seeds the views.

    Raises:
        InputError: empty data, lengths that differ, NaN or infinity in the inputs, label maps with an augmentation that does
            not move them.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        if len(inputs) == 0:
            raise InputError("the data set is empty: it needs at least one sample")
        if labels is not None and len(labels) != len(inputs):
            raise InputError(f"{len(inputs)} inputs but {len(labels)} labels: they must be as many")
        if inputs.is_floating_point() and not torch.isfinite(inputs).all():
            bad = int((~torch.isfinite(inputs)).flatten(1).any(1).nonzero()[0])
            raise InputError(f"the inputs hold NaN or infinity (first in sample {bad}): clean the data first")
        if labels is not None and labels.ndim > 2 and augment is not None and not hasattr(augment, "apply_labels"):
            raise InputError(
                f"{type(augment).__name__} moves images and leaves their label maps where they are: "
                "give an augmentation with apply_labels"
            )
        self.inputs, self.labels, self.augment, self.seed = inputs, labels, augment, seed
        view = (1, -1) + (1,) * (inputs.ndim - 2)
        self._mean = None if mean is None else torch.tensor(mean, dtype=torch.float32).view(view)
        self._std = None if std is None else torch.tensor(std, dtype=torch.float32).view(view)
        self.mean, self.std = mean, std
        self._drawn: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        x = self.inputs[index]
        if x.dtype == torch.uint8:
            x = x.float().div_(255)
        labels = None if self.labels is None else self.labels[index]
        if self.augment is not None and view is not None:
            parameters = self._parameters(view)[index]
            x = self.augment.apply(x, parameters)
            move = getattr(self.augment, "apply_labels", None)
            if labels is not None and move is not None:
                labels = move(labels, parameters)
        if self._mean is not None and self._std is not None:
            x = (x - self._mean) / self._std
        return Batch(x, labels, index, view)

    @property
    def augmented(self) -> bool:
        return self.augment is not None

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.inputs, self.labels):
            if part is not None:
                digest.update(part.contiguous().numpy().tobytes())
        augment = None if self.augment is None else (type(self.augment).__name__, sorted(vars(self.augment).items()))
        digest.update(repr((self.mean, self.std, augment, self.seed if augment else 0)).encode())
        return digest.hexdigest()[:16]

    def _parameters(self, view: int) -> Tensor:
        if self._drawn is None or self._drawn[0] != view:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, view))
            assert self.augment is not None
            self._drawn = (view, self.augment.draw(len(self), generator))
        return self._drawn[1]

    def labels_tensor(self) -> Tensor:
        if self.labels is None:
            raise InputError("the data has no labels")
        return self.labels

    def subset(self, index: Tensor) -> TensorData:
        """A data set of the given samples, with ids of its own."""
        return TensorData(
            self.inputs[index],
            None if self.labels is None else self.labels[index],
            mean=self.mean,
            std=self.std,
            augment=self.augment,
            seed=self.seed,
        )

    def with_labels(self, labels: Tensor) -> TensorData:
        return TensorData(self.inputs, labels, mean=self.mean, std=self.std, augment=self.augment, seed=self.seed)


class MapData(Data):
    """Any map-style data set (``__len__`` and ``__getitem__``), collated by torch's default.

    What its own transforms draw comes from the global random state, so a run is reproducible and resumes exactly, but an
    augmented sample cannot be drawn again: ``replayable`` says so unless the caller knows better.

    Args:
        dataset: items are ``(x, y)``, ``x`` or mappings, as :meth:`Batch.of` takes them.
        collate: joins a list of items; torch's ``default_collate`` if None.
        replayable: True if an item never changes between two reads.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any] | None = None, replayable: bool = False
    ) -> None:
        if len(dataset) == 0:
            raise InputError("the data set is empty: it needs at least one sample")
        self.dataset, self.collate, self.replayable = dataset, collate or default_collate, replayable

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        ids = index.tolist()
        many = getattr(self.dataset, "__getitems__", None)
        items = many(ids) if many is not None else [self.dataset[i] for i in ids]
        batch = Batch.of(self.collate(items))
        return replace(batch, index=index, view=view)


def as_data(value: Any) -> Data:
    """Turn what users have into :class:`Data`: tensors or arrays ``(x, y)``, a list of graphs, a data set, or a ``DataLoader``.

    Of a loader its data set and collate function are used; order and batch size are the engine's, so that a run can resume.

    Raises:
        InputError: nothing of the kind.
    """
    if isinstance(value, Data):
        return value
    if isinstance(value, Tensor | np.ndarray):
        return TensorData(torch.as_tensor(value))
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, Tensor | np.ndarray) for v in value):
        return TensorData(torch.as_tensor(value[0]), torch.as_tensor(value[1]))
    if isinstance(value, tuple | list) and value and hasattr(value[0], "edge_index"):
        from limbeck.core.graphs import GraphData

        return GraphData.of(value)
    if isinstance(value, torch.utils.data.DataLoader):
        if isinstance(value.dataset, torch.utils.data.IterableDataset):
            raise InputError(
                "an iterable data set cannot be resumed: give a map-style one (with __len__ and __getitem__)"
            )
        return MapData(value.dataset, value.collate_fn)
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        return MapData(value)
    raise InputError(
        f"data must be tensors (x, y), a map-style data set, a DataLoader or a task's split, not {type(value).__name__}"
    )


class Stream:
    """An endless, stateless sequence of shuffled batches: ``batch(step)`` depends on the arguments and nothing else.

    Args:
        data: where samples come from.
        batch_size: over all processes together; a data set that is smaller gives batches of its own size.
        seed: seeds the order of every epoch.
        views: how many augmentation views there are; epoch ``e`` shows view ``e % views``. None: a new view each epoch.
        rank, world: this process takes the ``rank``-th of ``world`` equal parts of each batch.

    Raises:
        InputError: the batch cannot be divided by the number of processes.
    """

    def __init__(
        self, data: Data, batch_size: int, *, seed: int = 0, views: int | None = None, rank: int = 0, world: int = 1
    ) -> None:
        self.data, self.batch_size = data, min(batch_size, len(data))
        if self.batch_size % world:
            raise InputError(f"batch size {self.batch_size} cannot be divided among {world} processes: take a multiple")
        # Without augmentation all views are the same one, and a teacher cache should know it.
        self.views = views if data.augmented else 1
        self.seed, self.rank, self.world = seed, rank, world
        self.steps_per_epoch = len(data) // self.batch_size
        self._order: tuple[int, Tensor] | None = None

    def shard(self, rank: int, world: int) -> Stream:
        """The same stream as seen by one of several processes."""
        return Stream(self.data, self.batch_size, seed=self.seed, views=self.views, rank=rank, world=world)

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def batch(self, step: int) -> Batch:
        """Batch number ``step`` (from 0)."""
        return self._at(step, self.steps_per_epoch)

    def _at(self, step: int, steps_per_epoch: int) -> Batch:
        epoch, position = divmod(step, steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch, 1))
            self._order = (epoch, torch.randperm(len(self.data), generator=generator))
        part = self.batch_size // self.world
        start = position * self.batch_size + self.rank * part
        view = epoch if self.views is None else epoch % self.views
        return self.data.fetch(self._order[1][start : start + part], view)


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that neighbouring seeds give unrelated streams."""
    return int(np.random.SeedSequence([n & 0xFFFFFFFFFFFFFFFF for n in numbers]).generate_state(1, np.uint64)[0] >> 1)
