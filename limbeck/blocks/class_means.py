"""What a frozen teacher says on average about the samples of each class."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ClassMeans(nn.Module):
    """Mean probabilities (C, C) by class, measured once and kept in checkpoints: row c belongs to the samples with label c.

    Until :meth:`measure` has been called, the means of the batch at hand serve.

    Args:
        num_classes: C.
    """

    means: Tensor
    measured: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("means", torch.zeros(num_classes, num_classes))
        self.register_buffer("measured", torch.zeros((), dtype=torch.bool))

    def truth(self, labels: Tensor) -> Tensor:
        """(B, C) one-hot rows of class indices (B,); soft labels (B, C) as they are. Type and device of the means."""
        return (labels if labels.ndim == 2 else F.one_hot(labels, self.num_classes)).to(self.means)

    def forward(self, probabilities: Tensor, truth: Tensor) -> Tensor:
        """(B, C) the mean of each sample's class; a soft label mixes those of its classes.

        Args:
            probabilities: (B, C) of the teacher on the batch.
            truth: (B, C), see :meth:`truth`.
        """
        own = (truth.T @ probabilities) / truth.sum(0).clamp_min(1e-12)[:, None]
        return truth @ torch.where(self.measured, self.means, own)

    @torch.no_grad()
    def measure(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fix the means. A class without samples gets the mean over all samples.

        Args:
            batches: pairs of probabilities (B, C) and labels.
        """
        sums = torch.zeros_like(self.means)
        counts = sums.new_zeros(self.num_classes)
        for probabilities, labels in batches:
            truth = self.truth(labels)
            sums += truth.T @ probabilities.to(sums)
            counts += truth.sum(0)
        overall = (sums.sum(0) / counts.sum()).expand_as(sums)
        self.means.copy_(torch.where(counts[:, None] > 0, sums / counts.clamp_min(1e-12)[:, None], overall))
        self.measured.fill_(True)
