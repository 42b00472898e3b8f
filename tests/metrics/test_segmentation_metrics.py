"""Overlap of class maps, against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from limbeck.core.errors import InputError
from limbeck.metrics.segmentation import class_iou, pixel_confusion, segmentation_metrics


def drawn(seed: int) -> torch.Tensor:
    return torch.randint(0, 4, (3, 6, 7), generator=torch.Generator().manual_seed(seed))


def test_equal_to_scikit_learn_on_the_counted_pixels() -> None:
    predicted, labels = drawn(0), drawn(1)
    labels[1, :, :2] = -100
    counted = labels != -100
    truth, said = labels[counted].numpy(), predicted[counted].numpy()
    matrix = pixel_confusion(predicted, labels, 4)
    np.testing.assert_array_equal(matrix.numpy(), metrics.confusion_matrix(truth, said, labels=range(4)))
    expected = metrics.jaccard_score(truth, said, average=None)
    np.testing.assert_allclose(class_iou(matrix).numpy(), expected)
    found = segmentation_metrics(matrix)
    assert found["miou"] == pytest.approx(expected.mean())
    assert found["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(truth, said))


def test_matrices_of_batches_add_up() -> None:
    predicted, labels = drawn(0), drawn(1)
    parts = sum(pixel_confusion(p[None], y[None], 4) for p, y in zip(predicted, labels, strict=True))
    assert torch.equal(parts, pixel_confusion(predicted, labels, 4))


def test_a_class_that_nobody_names_does_not_count() -> None:
    matrix = pixel_confusion(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 3)
    shares = class_iou(matrix).tolist()
    assert shares[:2] == pytest.approx([1 / 2, 2 / 3]) and math.isnan(shares[2])
    assert segmentation_metrics(matrix)["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: pixel_confusion(drawn(0)[:2], drawn(1), 4), "do not fit labels"),
        (lambda: pixel_confusion(drawn(0).float(), drawn(1), 4), "must be integers"),
        (lambda: pixel_confusion(drawn(0), torch.full((3, 6, 7), 255), 4), "labels go from 255 to 255, outside"),
        (lambda: segmentation_metrics(torch.zeros(4, 4)), "every pixel is ignored"),
    ],
)
def test_mistakes(call, line) -> None:
    with pytest.raises(InputError, match=line):
        call()
