"""A distilled data set of graphs: a few graphs or forests, how often each stands for something real, and its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.graphs import INT_BYTES, GraphData

Sampling = Literal["frequency", "class-frequency", "uniform"]


@dataclass
class DistilledGraphs:
    """Graphs that stand for a large data set of graphs.

    Attributes:
        graphs: the items, with their classes; forests of computation trees have a ``root_mask`` that readouts go over.
        num_classes: C.
        frequency: (N,) int64 how often each item was found, or None.
        sampling: how training draws items. ``frequency``: in proportion to their frequency, over all classes together.
            ``class-frequency``: in proportion within a class, and classes as ``class_counts`` says. ``uniform``: shuffled, each once.
        class_counts: (C,) real graphs of each class; for ``class-frequency``.
        hops: what trees show: networks of so many layers see no difference between a tree's root and the real node; None for whole graphs.
        class_names: one for each class.
        recipe: how to train on it, where it has a say (``lr``).

    Raises:
        InputError: frequencies that do not fit the items, or are missing where sampling needs them.
    """

    kind: ClassVar[str] = "graphs"
    soft: ClassVar[bool] = False

    graphs: GraphData
    num_classes: int
    frequency: Tensor | None = None
    sampling: Sampling = "uniform"
    class_counts: Sequence[int] = ()
    hops: int | None = None
    class_names: Sequence[str] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sampling != "uniform" and self.frequency is None:
            raise InputError(f"sampling by {self.sampling} needs the items' frequencies")
        if self.frequency is not None and (
            self.frequency.shape != self.graphs.y.shape or int(self.frequency.min()) < 1
        ):
            raise InputError(f"frequencies must be at least 1, one for each of the {len(self.graphs)} items")
        if self.sampling == "class-frequency" and len(self.class_counts) != self.num_classes:
            raise InputError(f"sampling by class-frequency needs the real graphs of each of {self.num_classes} classes")

    def __len__(self) -> int:
        return len(self.graphs)

    @property
    def labels(self) -> Tensor:
        """(N,) class indices."""
        return self.graphs.y

    @property
    def hard_labels(self) -> Tensor:
        """(N,) class indices."""
        return self.graphs.y

    def probabilities(self) -> Tensor | None:
        """(N,) float64 how likely training draws each item; None: it goes through all of them, shuffled."""
        if self.sampling == "uniform" or self.frequency is None:
            return None
        weights = self.frequency.double()
        if self.sampling == "class-frequency":
            total = torch.zeros(self.num_classes, dtype=torch.float64).index_add_(0, self.labels, weights)
            share = torch.tensor(list(self.class_counts), dtype=torch.float64) / total.clamp(min=1)
            weights = weights * share[self.labels]
        return weights / weights.sum()

    @property
    def nbytes(self) -> int:
        """Bytes that must be kept, before compression: the items (:meth:`limbeck.core.graphs.GraphData.bytes_each`; an edge of a tree is
        kept as its two ends), and four for each frequency, root weight, class count and number of a centroid.

        Which nodes are roots costs nothing: they are those that no edge leaves.
        """
        numbers = 0 if self.frequency is None else len(self)
        if self.graphs.node_weights is not None:
            roots = self.graphs.root_mask
            numbers += len(self.graphs.node_weights) if roots is None else int(roots.sum())
        if self.sampling == "class-frequency":
            numbers += self.num_classes
        if self.graphs.centroids is not None:
            numbers += self.graphs.centroids.numel()
        return int(self.graphs.bytes_each().sum()) + INT_BYTES * numbers

    def share_of(self, real: GraphData) -> float:
        """Its bytes as a share of those of real graphs, stored in the same way."""
        return self.nbytes / int(real.bytes_each().sum())
