"""Losses that compare how the channels of a student and of a teacher go together.

float16 and bfloat16 are cast to float32. Gradients flow into **both** arguments; detach the teacher unless it is to learn too. A channel
that is zero throughout correlates with none: its row is zeros. So is, as in the published code, a row no longer than 1e-12 before it is scaled: a class whose gradient is
negligible says nothing.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.losses.features import full_precision, unit_vectors

Semantics = Literal["auto", "channels", "classes"]


def inter_channel_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """|| E_t - E_s ||_F² / C, mean over the batch, where E = F Fᵀ (C, C) of a sample's channels F (C, positions), rows scaled to length 1.

    In other words the mean squared distance of a channel's correlations, in [0, 4].

    Args:
        student, teacher: (B, C, ...) of the same samples and as many channels; positions may differ. (B, C) has one position.

    Source: "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation" (ICKD-C; usual weight 2.5).

    Raises:
        InputError: the batch sizes or widths differ.
    """
    if student.ndim < 2 or student.shape[:2] != teacher.shape[:2]:
        raise InputError(
            f"channels are compared one by one, but the student's features have shape {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}: project the student to the teacher's width"
        )
    return (_correlations(teacher) - _correlations(student)).square().sum((1, 2)).mean() / student.shape[1]


def class_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """|| E_t - E_s ||_F² / N, where E = g gᵀ (N, N) of the rows of g (N, C), its rows scaled to length 1; widths C may differ. In [0, 4].

    The same measure as :func:`inter_channel_correlation` with classes in the place of channels: what goes together are the classes.

    Raises:
        InputError: different numbers of classes.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise InputError(
            f"classes are compared one by one, but there are {len(student)} of the student and {len(teacher)} of the teacher"
        )
    return (_correlations(teacher[None]) - _correlations(student[None])).square().sum() / len(student)


def semantic_similarity_loss(student: Tensor, teacher: Tensor, compare: Semantics = "auto") -> Tensor:
    """Distance of the gradients (N, C) of two last linear layers' weights: which channels speak for each class.

    Args:
        student, teacher: gradients of the cross-entropy of the same labels.
        compare: ``channels``: :func:`inter_channel_correlation`, every class being a sample with one position; ``classes``:
            :func:`class_correlation`; ``auto``: channels where the widths are equal, else classes.

    Source: "DisWOT" (2023); the form for different widths is ours.

    Raises:
        InputError: different numbers of classes; channels asked for and different widths.
    """
    if len(student) != len(teacher):
        raise InputError(
            f"the student has {len(student)} classes and the teacher {len(teacher)}: they must be the same"
        )
    by_channel = student.shape == teacher.shape if compare == "auto" else compare == "channels"
    return inter_channel_correlation(student, teacher) if by_channel else class_correlation(student, teacher)


def _correlations(features: Tensor) -> Tensor:
    """(B, C, C), rows of length 1."""
    rows = full_precision(features).flatten(2) if features.ndim > 2 else full_precision(features)[..., None]
    return unit_vectors(rows @ rows.transpose(1, 2), axis=2, eps=1e-12)
