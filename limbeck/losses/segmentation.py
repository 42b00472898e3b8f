"""Losses for models that classify every pixel.

Shapes. Logits are (B, C, H, W), label maps (B, H, W) int64 with -100 at the pixels that do not count. Features are
(B, channels, H, W); student and teacher may differ in channels and size where a function says so.

Common rules. Half precision is cast to float32 first; float64 stays. Gradients flow into every floating-point argument, so
detach the teacher's side. Every loss is a scalar; one that counts no pixel is 0, with a graph.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.losses.features import full_precision, unit_vectors

IGNORED = -100
"""The label of pixels that do not count: padding, void, boundaries."""


def pixel_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, averaged over the pixels whose label is not -100.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) int64; also pseudo labels.
        label_smoothing: in [0, 1).

    Raises:
        InputError: sizes that do not fit, or labels that are no integers.
    """
    logits = _fitting(logits, labels)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
    return total / (labels != IGNORED).sum().clamp_min(1)


def ohem_cross_entropy(logits: Tensor, labels: Tensor, threshold: float = 0.7, min_kept: int = 0) -> Tensor:
    """Cross-entropy of the hard pixels (online hard example mining).

    A pixel is hard where the probability of its true class is at most ``threshold``. If these are fewer than ``min_kept``, the
    ``min_kept`` pixels of lowest probability count (with ties, all that equal the last of them).

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) int64, -100 where a pixel does not count.
        threshold: in (0, 1].
        min_kept: pixels of the whole batch that count at least; all of them where there are fewer.

    Returns:
        The mean over the pixels that count.

    Raises:
        InputError: sizes that do not fit, labels that are no integers, a threshold out of range.

    Source: "Training Region-based Object Detectors with Online Hard Example Mining" (2016), as it is used for pixels.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"the threshold of hard pixels must be in (0, 1], not {threshold}")
    logits = _fitting(logits, labels)
    each = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    loss = each[labels != IGNORED]
    if not loss.numel():
        return each.sum()
    known = torch.exp(-loss.detach())
    limit = known.new_tensor(threshold)
    if min_kept > 0:
        limit = torch.maximum(limit, known.kthvalue(min(min_kept, known.numel())).values)
    return loss[known <= limit].mean()


def self_similarity(features: Tensor, grid: int = 7, eps: float = 1e-6) -> Tensor:
    """Cosine similarity between the regions of a feature map.

    The map is averaged over a grid of ``grid`` x ``grid`` regions; entry (i, j) is the cosine between the channel vectors of
    regions i and j. The size of the result depends on neither the channels nor the map.

    Args:
        features: (B, channels, H, W).
        grid: regions along each side.
        eps: regions whose vector is no longer than this have similarity 0 with all others, and get no gradient.

    Returns:
        (B, grid**2, grid**2), in [-1, 1].

    Raises:
        InputError: features that are no maps.
    """
    if features.ndim != 4:
        raise InputError(f"regions need features of shape (B, channels, H, W), not {tuple(features.shape)}")
    regions = F.adaptive_avg_pool2d(full_precision(features), grid).flatten(2)
    directions = unit_vectors(regions, 1, eps)
    return directions.transpose(1, 2) @ directions


def self_similarity_loss(student: Tensor, teacher: Tensor, grid: int = 7) -> Tensor:
    """Mean squared difference of two maps' region similarities, over batch and pairs of regions.

    Args:
        student, teacher: (B, channels, H, W); channels and sizes may differ.
        grid: regions along each side.

    Raises:
        InputError: features that are no maps, or batches that differ.

    Source: "Multi-Granularity Distillation Scheme Towards Lightweight Semi-Supervised Semantic Segmentation" (2022).
    """
    with torch.autocast(student.device.type, enabled=False):
        own, other = self_similarity(student, grid), self_similarity(teacher, grid)
    if own.shape != other.shape:
        raise InputError(f"student and teacher features are of {len(own)} and {len(other)} images")
    return F.mse_loss(own, other.to(own.dtype))


def pooled_logit_l1(student: Tensor, teacher: Tensor, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Absolute difference of logits that are averaged over all positions first.

    Args:
        student, teacher: (B, C, H, W) logits; H and W may differ.
        reduction: ``sum`` over batch and classes, as published, or their ``mean``.

    Raises:
        InputError: other shapes, or batches or classes that differ.

    Source: "Multi-Granularity Distillation Scheme Towards Lightweight Semi-Supervised Semantic Segmentation" (2022).
    """
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[:2] != teacher.shape[:2]:
        raise InputError(
            f"logits of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared: "
            "they must be (B, C, H, W) with the same B and C"
        )
    difference = (full_precision(student).mean((2, 3)) - full_precision(teacher).mean((2, 3))).abs()
    return difference.sum() if reduction == "sum" else difference.mean()


def channel_divergence(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Channel-wise divergence: each channel's map is a distribution over positions.

    .. math:: \frac{\tau^2}{B\,C} \sum_{b,c} \mathrm{KL}\big(\mathrm{softmax}(t_{bc}/\tau)\,\|\,\mathrm{softmax}(s_{bc}/\tau)\big)

    with the softmax over the H x W positions.

    Args:
        student, teacher: (B, C, H, W) logits or features of one shape.
        temperature: :math:`\tau` above 0.

    Raises:
        InputError: shapes that differ, or a temperature that is not above 0.

    Source: "Channel-wise Knowledge Distillation for Dense Prediction" (2021).
    """
    if student.ndim != 4 or student.shape != teacher.shape:
        raise InputError(
            f"channels of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared: "
            "they must be (B, C, H, W) and equal"
        )
    if not temperature > 0:
        raise InputError(f"the temperature must be above 0 (got {temperature})")
    own, other = (F.log_softmax(full_precision(x).flatten(2) / temperature, -1) for x in (student, teacher))
    divergence = F.kl_div(own, other, log_target=True, reduction="sum")
    return temperature**2 * divergence / (student.shape[0] * student.shape[1])


def _fitting(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits in full precision, if they fit the label maps."""
    if logits.ndim != 4 or labels.ndim != 3 or logits.shape[0] != labels.shape[0]:
        raise InputError(
            f"logits {tuple(logits.shape)} and label maps {tuple(labels.shape)} do not fit: "
            "expected (B, C, H, W) and (B, H, W)"
        )
    if logits.shape[2:] != labels.shape[1:]:
        size, wanted = "x".join(map(str, logits.shape[2:])), "x".join(map(str, labels.shape[1:]))
        raise InputError(f"logits of {size} pixels for label maps of {wanted}: resize the logits to the input's size")
    if labels.is_floating_point():
        raise InputError(f"label maps are {labels.dtype}; class indices must be integers")
    return full_precision(logits)
