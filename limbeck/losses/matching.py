"""How far synthetic samples are from real ones, class by class."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.losses.features import full_precision


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C, D) means over the samples of each class; zeros for a class without any.

    Args:
        features: (B, ...), flattened to (B, D).
        labels: (B,) class indices.
        num_classes: C.
    """
    member = F.one_hot(labels, num_classes).to(features.dtype)
    return member.T @ features.flatten(1) / member.sum(0).clamp_min(1)[:, None]


def mean_matching(real: Tensor, real_labels: Tensor, synthetic: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""Squared distance of the class means, :math:`\sum_c \lVert \bar r_c - \bar s_c \rVert_2^2`, summed over classes.

    A class counts if both sides have samples of it; the sum over those is scaled to all classes, so that a part of them gives the
    same loss on average.

    Args:
        real: (B, ...) features of real samples; no gradient goes there.
        real_labels: (B,).
        synthetic: (S, ...) features of synthetic samples.
        labels: (S,).
        num_classes: C.

    Source: "Dataset Condensation with Distribution Matching" (2023).
    """
    a = class_means(full_precision(real.detach()), real_labels, num_classes)
    b = class_means(full_precision(synthetic), labels, num_classes)
    counts = (F.one_hot(t, num_classes).sum(0) > 0 for t in (real_labels, labels))
    present = next(counts) & next(counts)
    distances = (a - b).square().sum(1) * present
    return distances.sum() * (num_classes / present.sum().clamp_min(1))
