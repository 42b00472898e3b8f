"""Inter-channel correlation and class correlation against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.losses.channels import class_correlation, inter_channel_correlation, semantic_similarity_loss


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix, axis=-1, keepdims=True)


def test_channels_by_numpy():
    student, teacher = normal(3, 4, 2, 5), normal(3, 4, 3, 3, seed=1)
    total = 0.0
    for a, b in zip(student.numpy(), teacher.numpy(), strict=True):
        a, b = a.reshape(4, -1), b.reshape(4, -1)
        total += ((rows(a @ a.T) - rows(b @ b.T)) ** 2).sum()
    assert inter_channel_correlation(student, teacher).item() == pytest.approx(total / (3 * 4), rel=1e-9)
    assert inter_channel_correlation(student, 1e-3 * student).item() == pytest.approx(0, abs=1e-12)


def test_gradients_of_classes_are_maps_with_one_position():
    student, teacher = normal(5, 7), normal(5, 7, seed=1)
    total = sum(
        ((rows(np.outer(a, a)) - rows(np.outer(b, b))) ** 2).sum()
        for a, b in zip(student.numpy(), teacher.numpy(), strict=True)
    )
    found = semantic_similarity_loss(student, teacher)
    assert found.item() == pytest.approx(total / (5 * 7), rel=1e-9)
    assert torch.equal(found, inter_channel_correlation(student[:, :, None, None], teacher[:, :, None, None]))


def test_classes_are_compared_where_widths_differ():
    student, teacher = normal(5, 7), normal(5, 3, seed=1)
    a, b = student.numpy(), teacher.numpy()
    expected = ((rows(a @ a.T) - rows(b @ b.T)) ** 2).sum() / 5
    assert class_correlation(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert torch.equal(semantic_similarity_loss(student, teacher), class_correlation(student, teacher))
    turned = student @ torch.linalg.qr(normal(7, 7, seed=2)).Q
    assert semantic_similarity_loss(student, turned, "classes").item() == pytest.approx(0, abs=1e-12)
    assert semantic_similarity_loss(student, turned).item() > 0.1


def test_zeros_are_numbers_with_finite_gradients():
    student = torch.zeros(2, 3, 4, requires_grad=True)
    loss = inter_channel_correlation(student, normal(2, 3, 4).float())
    loss.backward()
    assert loss.item() == pytest.approx(1.0) and bool(torch.isfinite(student.grad).all())


def test_a_class_with_a_negligible_gradient_says_nothing():
    student, teacher = normal(5, 7), normal(5, 7, seed=1)
    silent = torch.cat([1e-7 * teacher[:1], teacher[1:]])
    zeroed = torch.cat([torch.zeros(1, 7, dtype=torch.float64), teacher[1:]])
    assert semantic_similarity_loss(student, silent) == semantic_similarity_loss(student, zeroed)


def test_mistakes_are_named():
    with pytest.raises(InputError, match="project the student"):
        inter_channel_correlation(normal(2, 3, 4), normal(2, 5, 4))
    with pytest.raises(InputError, match="3 classes and the teacher 4"):
        semantic_similarity_loss(normal(3, 5), normal(4, 5))
    with pytest.raises(InputError, match="project"):
        semantic_similarity_loss(normal(3, 5), normal(3, 6), "channels")
