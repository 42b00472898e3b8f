"""How well pixels are classified: everything is read off one confusion matrix, which can be summed over batches."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.losses.segmentation import IGNORED


def pixel_confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts of pixels by true class (rows) and predicted class (columns).

    Args:
        predicted: integer class maps, any shape.
        labels: integer class maps of the same shape; pixels of label -100 are left out.
        num_classes: C.

    Returns:
        (C, C) int64. Matrices of several batches add up.

    Raises:
        InputError: shapes that differ, maps that are not integers, classes outside [0, C).
    """
    if predicted.shape != labels.shape:
        raise InputError(f"predictions of shape {tuple(predicted.shape)} do not fit labels {tuple(labels.shape)}")
    for name, value in (("predictions", predicted), ("labels", labels)):
        if value.is_floating_point() or value.is_complex():
            raise InputError(f"{name} are {value.dtype}; class maps must be integers")
    counted = labels != IGNORED
    truth, said = labels[counted].long(), predicted[counted].long()
    for name, value in (("labels", truth), ("predictions", said)):
        if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < num_classes:
            raise InputError(
                f"{name} go from {int(value.min())} to {int(value.max())}, outside the classes 0 to {num_classes - 1}"
            )
    return torch.bincount(truth * num_classes + said, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(matrix: Tensor) -> Tensor:
    """Intersection over union of each class.

    Args:
        matrix: (C, C) of :func:`pixel_confusion`.

    Returns:
        (C,) float64 in [0, 1]; NaN for a class that neither the labels nor the predictions hold.
    """
    matrix = matrix.double()
    both = matrix.diagonal()
    return both / (matrix.sum(0) + matrix.sum(1) - both)


def segmentation_metrics(matrix: Tensor) -> dict[str, float]:
    """``miou``, the mean of the classes' intersection over union, and ``pixel_accuracy``; both in [0, 1].

    The mean goes over the classes that occur in labels or predictions of the whole data set, not image by image.

    Args:
        matrix: (C, C) of :func:`pixel_confusion`, summed over all batches.

    Raises:
        InputError: no pixel was counted.
    """
    total = int(matrix.sum())
    if total == 0:
        raise InputError("every pixel is ignored (-100): there is nothing to measure")
    return {
        "miou": float(class_iou(matrix).nanmean()),
        "pixel_accuracy": float(matrix.diagonal().sum()) / total,
    }
