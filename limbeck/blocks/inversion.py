"""Images out of a trained classifier: the loss that pulls them, and the order in which classes and ids are worked off."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.bn_statistics import StatisticsDistance
from limbeck.blocks.views import RandomView
from limbeck.core.batch import call_model, logits_of
from limbeck.core.errors import InputError


class Inversion:
    r"""The terms of an inversion: a view of the images, classified by the teacher, with the feature statistics it causes.

    For every class batch x with labels y and view v:

    .. math:: \mathrm{CE}(f(v(x)), y) \quad\text{and}\quad R(v(x))

    with R the distance of :class:`~limbeck.blocks.bn_statistics.StatisticsDistance`. Gradients go to the images alone.

    Args:
        teacher: frozen and in evaluation mode.
        statistics: its feature statistics.
        view: crop, flip and shift.
    """

    def __init__(
        self, teacher: nn.Module | Callable[..., Any], statistics: StatisticsDistance, view: RandomView
    ) -> None:
        self.teacher, self.statistics, self.view = teacher, statistics, view

    def __call__(self, images: Tensor, labels: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of each of G class batches.

        Args:
            images: (G * B, C, H, W), one class batch after the other.
            labels: (G * B,) class indices.
            parameters: (G, 7), one view for each class batch.

        Returns:
            cross-entropies (G,), each a mean over its batch, and distances (G,).
        """
        groups = len(parameters)
        views = self.view.apply(images, parameters.repeat_interleave(len(images) // groups, 0))
        self.statistics.groups = groups
        with self.statistics:
            logits = logits_of(call_model(self.teacher, views)).float()
        ce = F.cross_entropy(logits, labels, reduction="none").view(groups, -1).mean(1)
        return ce, self.statistics.distances()


@dataclass(frozen=True)
class ClassBatch:
    """Images that share their statistics: one id of the classes ``first`` … ``last - 1``."""

    id: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


def class_batches(num_classes: int, ipc: int, size: int) -> list[ClassBatch]:
    """Every id of every class once, in batches of at most ``size`` different classes, cut as evenly as can be.

    Raises:
        InputError: fewer than two classes in a batch: the statistics of one class say nothing about those of all data.
    """
    if size < 2:
        raise InputError(f"a class batch needs at least two classes, better all of them (got {size})")
    parts = -(-num_classes // size)
    edges = [round(i * num_classes / parts) for i in range(parts + 1)]
    return [ClassBatch(k, a, b) for k in range(ipc) for a, b in itertools.pairwise(edges)]


def blocks_of(batches: Sequence[ClassBatch], most_images: int) -> list[list[ClassBatch]]:
    """Class batches that are optimised together: of equal size, with at most ``most_images`` images (at least one batch)."""
    blocks: list[list[ClassBatch]] = []
    for size in sorted({len(b) for b in batches}, reverse=True):
        same = [b for b in batches if len(b) == size]
        together = max(1, most_images // size)
        blocks += [same[i : i + together] for i in range(0, len(same), together)]
    return blocks


def block_rows(block: Sequence[ClassBatch], ipc: int) -> tuple[Tensor, Tensor]:
    """Where a block's images are in a set sorted by class, (n,), and their classes, (n,)."""
    classes = torch.cat([torch.arange(b.first, b.last) for b in block])
    ids = torch.tensor([b.id for b in block]).repeat_interleave(torch.tensor([len(b) for b in block]))
    return classes * ipc + ids, classes
