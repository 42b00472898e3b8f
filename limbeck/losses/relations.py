"""Losses that compare relations between the samples of a batch, instead of the samples themselves.

Features are (B, ...) and are flattened to (B, D). Student and teacher must have the same B; their widths D may differ, so no
projector is needed. float16 and bfloat16 are cast to float32. Gradients flow into **both** arguments; detach the teacher
unless it is to learn too. Every loss is a scalar. A batch too small for a relation (one sample; two for angles) has none to
compare and gives 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.losses.features import full_precision, unit_vectors


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Pairwise Euclidean distances, each divided by the network's mean positive distance, compared by smooth L1 (beta=1).

    Mean over all B² ordered pairs including the B zeros of a sample with itself, as in the released code.

    Source: "Relational Knowledge Distillation" (RKD-D; usual weight 25).

    Raises:
        InputError: the batch sizes differ.
    """
    student, teacher = _flat_pair(student, teacher)
    difference = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher), reduction="sum")
    return 2 * difference / len(student) ** 2


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosines of the angles at sample i between samples j and k, compared by smooth L1 (beta=1), mean over all B³ triplets.

    Needs B³ numbers per network, and B²·D for the differences. Coinciding samples have no direction and count as cosine 0.

    Source: "Relational Knowledge Distillation" (RKD-A; usual weight 50).

    Raises:
        InputError: the batch sizes differ.
    """
    student, teacher = _flat_pair(student, teacher)
    return F.smooth_l1_loss(_angles(student), _angles(teacher))


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """|| G_t - G_s ||_F² / B², where G = F Fᵀ with rows scaled to length 1.

    Source: "Similarity-Preserving Knowledge Distillation" (usual weight 3000).

    Raises:
        InputError: the batch sizes differ.
    """
    student, teacher = _flat_pair(student, teacher)
    return F.mse_loss(unit_vectors(student @ student.T, axis=1), unit_vectors(teacher @ teacher.T, axis=1))


def correlation_congruence(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int | None = 2) -> Tensor:
    """|| K_t - K_s ||_F² / B², where K is a Gaussian kernel between the samples.

    On features f scaled to length 1 the kernel exp(-gamma |f_i - f_j|²) equals exp(-2 gamma) · exp(2 gamma <f_i, f_j>). The
    paper's form, used here, expands the second factor into its Taylor series up to ``order``:

        K_ij = exp(-2 gamma) · sum_{p=0..order} (2 gamma <f_i, f_j>)^p / p!

    Args:
        student, teacher: (B, ...).
        gamma: inverse squared width of the kernel, > 0.
        order: last power of the series, >= 1; None: the exact kernel.

    Source: "Correlation Congruence for Knowledge Distillation" (the relation term, P=2, gamma=0.4).

    Raises:
        InputError: the batch sizes differ; ``gamma`` or ``order`` out of range.
    """
    if not gamma > 0 or (order is not None and order < 1):
        raise InputError(
            f"correlation congruence needs gamma > 0 and order >= 1 (or None), not gamma={gamma}, order={order}"
        )
    student, teacher = _flat_pair(student, teacher)
    return F.mse_loss(_gaussian_kernel(student, gamma, order), _gaussian_kernel(teacher, gamma, order))


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Probabilistic knowledge transfer: KL(P_t || P_s) of the samples' neighbourhoods, sum over neighbours, mean over samples.

    P_ij = S_ij / sum_j S_ij with S = (1 + cosine) / 2, the sample itself included. The released code averages over the
    neighbours too, so its weights must be divided by B here.

    Args:
        student, teacher: (B, ...).
        eps: added to both probabilities inside the logarithm.

    Source: "Learning Deep Representations with Probabilistic Knowledge Transfer".

    Raises:
        InputError: the batch sizes differ.
    """
    student, teacher = _flat_pair(student, teacher)
    p_s, p_t = _neighbours(student), _neighbours(teacher)
    return (p_t * ((p_t + eps).log() - (p_s + eps).log())).sum(1).mean()


def _flat_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise InputError(
            f"relations need features (B, ...) of the same samples, but the student's have shape {tuple(student.shape)} and "
            f"the teacher's {tuple(teacher.shape)}"
        )
    return full_precision(student).flatten(1), full_precision(teacher).flatten(1)


def _relative_distances(x: Tensor) -> Tensor:
    distances = F.pdist(x)  # each pair once; exact zeros for duplicates, whose subgradient is 0
    mean = distances.sum() / (distances > 0).sum().clamp_min(1)
    return distances / mean.clamp_min(torch.finfo(x.dtype).tiny)


def _angles(x: Tensor) -> Tensor:
    directions = unit_vectors(x.unsqueeze(0) - x.unsqueeze(1), axis=2)
    return directions @ directions.transpose(1, 2)


def _gaussian_kernel(x: Tensor, gamma: float, order: int | None) -> Tensor:
    unit = unit_vectors(x, axis=1)
    exponent = 2 * gamma * (unit @ unit.T)
    if order is None:
        return (exponent - 2 * gamma).exp()
    series = torch.ones_like(exponent)
    for power in range(order, 0, -1):  # Horner's scheme
        series = 1 + exponent * series / power
    return math.exp(-2 * gamma) * series


def _neighbours(x: Tensor) -> Tensor:
    unit = unit_vectors(x, axis=1)
    similarity = (1 + unit @ unit.T) / 2
    return similarity / similarity.sum(1, keepdim=True)
