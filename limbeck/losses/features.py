"""Losses that compare feature tensors of a student and a teacher.

Shapes. Features are (B, C), token maps (B, N, D) or feature maps (B, C, H, W) / (B, C, D, H, W). Where a loss works along
the channels, the channel axis is the last one of two- and three-dimensional tensors and axis 1 of larger ones
(:func:`channel_axis`); a 1-D convolution's (B, C, L) therefore needs ``axis=1`` spelt out.

Common rules. Both tensors have the same shape unless a function says otherwise. float16 and bfloat16 are cast to float32
first, because squares and norms of features overflow or lose digits in half precision; float64 stays. Gradients flow into
**both** arguments; detach the teacher's features unless it is to learn too. Every loss is a scalar.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError

HALF_TYPES = (torch.float16, torch.bfloat16)


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32 if it is half precision, else as it is."""
    return x.float() if x.dtype in HALF_TYPES else x


def channel_axis(x: Tensor) -> int:
    """The axis of the channels: the last of (B, C) and (B, N, D), axis 1 of (B, C, H, W) and larger.

    Raises:
        InputError: ``x`` has fewer than two dimensions.
    """
    if x.ndim < 2:
        raise InputError(
            f"features of shape {tuple(x.shape)} have no channel axis; give (B, C), (B, N, D) or (B, C, H, W)"
        )
    return x.ndim - 1 if x.ndim <= 3 else 1


def unit_vectors(x: Tensor, axis: int, eps: float = 1e-8) -> Tensor:
    """``x`` divided by its Euclidean norm along ``axis``.

    A vector no longer than ``eps`` has no direction: it becomes the zero vector and receives no gradient. (Dividing by a
    clamped norm instead would send it a gradient of size 1/eps.)
    """
    norm = torch.linalg.vector_norm(x, dim=axis, keepdim=True)
    return x / norm.masked_fill(norm <= eps, torch.inf)


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all elements.

    Source: "FitNets: Hints for Thin Deep Nets".

    Raises:
        InputError: the shapes differ.
    """
    student, teacher = _pair(student, teacher)
    return F.mse_loss(student, teacher)


def normalized_l1(student: Tensor, teacher: Tensor, axis: int | None = None) -> Tensor:
    """Mean absolute difference of features whose channel vectors have been scaled to length 1.

    Args:
        student, teacher: features of one shape.
        axis: the channel axis; None: see :func:`channel_axis`.

    Returns:
        The mean over all elements, in [0, 2].

    Raises:
        InputError: the shapes differ.
    """
    student, teacher = _directions(student, teacher, axis)
    return F.l1_loss(student, teacher)


def normalized_l2(student: Tensor, teacher: Tensor, axis: int | None = None) -> Tensor:
    """Mean squared difference of features whose channel vectors have been scaled to length 1.

    With C channels this is 2/C times :func:`cosine_distance`.

    Args:
        student, teacher: features of one shape.
        axis: the channel axis; None: see :func:`channel_axis`.

    Returns:
        The mean over all elements, in [0, 4/C].

    Raises:
        InputError: the shapes differ.
    """
    student, teacher = _directions(student, teacher, axis)
    return F.mse_loss(student, teacher)


def cosine_distance(student: Tensor, teacher: Tensor, axis: int | None = None) -> Tensor:
    """One minus the cosine of the channel vectors, mean over all positions.

    Computed as half the squared distance of the unit vectors, which is the same number without the cancellation near 0.
    Two zero vectors are at distance 0, a zero and a non-zero vector at 1/2.

    Args:
        student, teacher: features of one shape.
        axis: the channel axis; None: see :func:`channel_axis`.

    Returns:
        A scalar in [0, 2].

    Raises:
        InputError: the shapes differ.
    """
    axis = channel_axis(student) if axis is None else axis
    student, teacher = _directions(student, teacher, axis)
    return 0.5 * (student - teacher).square().sum(axis).mean()


def whiten(x: Tensor, axis: int | None = None, eps: float = 1e-6) -> Tensor:
    """Zero mean and unit (biased) variance along the channels: a LayerNorm without affine parameters.

    Args:
        x: features.
        axis: the channel axis; None: see :func:`channel_axis`.
        eps: added to the variance.
    """
    x = full_precision(x)
    axis = channel_axis(x) if axis is None else axis
    variance, mean = torch.var_mean(x, dim=axis, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + eps)


def smooth_l1_whitened(
    student: Tensor, teacher: Tensor, beta: float = 2.0, eps: float = 1e-6, axis: int | None = None
) -> Tensor:
    """Smooth L1 distance of the student's features to the teacher's *whitened* features, mean over all elements.

    Only the target is whitened, so the loss is 0 where ``student == whiten(teacher)``. With ``d`` the difference an element
    costs d²/(2·beta) while |d| < beta and |d| - beta/2 beyond.

    Source: "Generic-to-Specific Distillation of Masked Autoencoders" (beta=2, eps=1e-6).

    Raises:
        InputError: the shapes differ, or ``beta`` is not positive.
    """
    if beta <= 0:
        raise InputError(f"beta of the smooth L1 loss must be positive, not {beta}")
    student, teacher = _pair(student, teacher)
    return F.smooth_l1_loss(student, whiten(teacher, axis, eps), beta=beta)


def attention_map(features: Tensor, power: float = 2.0, axis: int | None = None) -> Tensor:
    """Where the activation is: mean over channels of |x|^power, flattened and scaled to length 1.

    Args:
        features: (B, C, *space) or (B, N, D).
        power: exponent, at least 1.
        axis: the channel axis; None: see :func:`channel_axis`.

    Returns:
        (B, positions).
    """
    features = full_precision(features)
    axis = channel_axis(features) if axis is None else axis
    return unit_vectors(features.abs().pow(power).mean(axis).flatten(1), axis=1)


def attention_transfer(student: Tensor, teacher: Tensor, power: float = 2.0, axis: int | None = None) -> Tensor:
    """Mean squared difference of the spatial attention maps (:func:`attention_map`), over samples and positions.

    The numbers of channels may differ; batch and positions must agree.

    Source: "Paying More Attention to Attention", in the form of its released code.

    Raises:
        InputError: the positions differ, there are none, or ``power`` is below 1 (infinite slope at 0).
    """
    if power < 1:
        raise InputError(f"power of the attention map must be at least 1, not {power}")
    student_axis, teacher_axis = (channel_axis(x) if axis is None else axis % x.ndim for x in (student, teacher))
    student_grid, teacher_grid = _without(student, student_axis), _without(teacher, teacher_axis)
    if student.ndim < 3 or student_grid != teacher_grid:
        raise InputError(
            f"attention transfer needs equal batch and positions, but the student's features are {tuple(student.shape)} and "
            f"the teacher's {tuple(teacher.shape)}; tap features of one resolution or use make_projector"
        )
    return F.mse_loss(attention_map(student, power, student_axis), attention_map(teacher, power, teacher_axis))


def squarehead(student: Tensor, teacher: Tensor, mask: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Squared error relative to the power of the teacher's features.

        mean (s - t)² / (mean t² + eps),   both means over the valid positions and all channels of the whole batch

    Args:
        student, teacher: (B, N, D) or any (..., D) of one shape.
        mask: (B, N), or all axes but the last: weight of each position (0 for padding, 1 for a valid token).
        eps: keeps a dead layer finite.

    Source: "Sparse Finetuning for Inference Acceleration of Large Language Models" (one layer's term).

    Raises:
        InputError: the shapes differ.
    """
    student, teacher = _pair(student, teacher)
    error, power = (student - teacher).square(), teacher.square()
    if mask is None:
        return error.mean() / (power.mean() + eps)
    if mask.shape != student.shape[:-1]:
        raise InputError(f"the mask has shape {tuple(mask.shape)}, but the positions are {tuple(student.shape[:-1])}")
    weight = mask.to(error.dtype).unsqueeze(-1)
    count = (weight.sum() * error.shape[-1]).clamp_min(torch.finfo(error.dtype).tiny)
    return ((error * weight).sum() / count) / ((power * weight).sum() / count + eps)


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise InputError(
            f"the student's features have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; "
            "put a projector between them (make_projector)"
        )
    return full_precision(student), full_precision(teacher)


def _directions(student: Tensor, teacher: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    student, teacher = _pair(student, teacher)
    axis = channel_axis(student) if axis is None else axis
    return unit_vectors(student, axis), unit_vectors(teacher, axis)


def _without(x: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(x.shape[:axis]) + tuple(x.shape[axis + 1 :])
