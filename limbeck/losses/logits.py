"""Losses that compare the class logits of a student and a teacher.

Shapes. Logits are (..., C), usually (B, C); every leading axis counts as rows (for token logits (B, N, C) there are B·N).

Common rules.

- p_s and p_t are softmax(logits / temperature) of student and teacher. KL(p||q) = sum_c p_c (log p_c - log q_c), in nats.
  Logits must be finite. float16 and bfloat16 are cast to float32.
- ``reduction``: ``"batchmean"`` sums over classes and averages over rows, ``"sum"`` sums over both, ``"none"`` gives one
  value per row, of shape (...). No function multiplies by temperature² unless its formula says so.
- ``mask``, of shape (...), weighs the rows (0 for padding, 1 for a valid token, or any non-negative weight). ``"batchmean"``
  is then sum(mask · row) / sum(mask), and 0 if no row is valid; ``"none"`` gives mask · row.
- Gradients flow into **both** arguments. Detach whichever network must not learn from the loss: mutual-learning methods rely
  on choosing this per term.
- Different numbers of classes, different leading shapes, a non-positive temperature or an unknown reduction raise
  :class:`~limbeck.core.errors.InputError` (the last: :class:`~limbeck.core.errors.UnknownNameError`).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.losses.features import full_precision, unit_vectors

Reduction = Literal["none", "batchmean", "sum"]

REVERSE_FLOOR = -20.0
"""Smallest log p_t that reverse KL sees."""


def forward_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    mask: Tensor | None = None,
) -> Tensor:
    """KL(p_t || p_s): the student must cover everything that the teacher considers possible.

    Args:
        student, teacher: logits (..., C).
        temperature: softens both distributions, > 0.
        reduction, mask: see the module.

    Returns:
        A scalar, or (...) for ``"none"``; at least 0. Without the factor temperature² (:func:`hinton` has it).
    """
    _check_pair(student, teacher)
    rows = _kl(_log_p(teacher, temperature), _log_p(student, temperature))
    return _reduce(rows, reduction, mask)


def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    mask: Tensor | None = None,
    floor: float = REVERSE_FLOOR,
) -> Tensor:
    """KL(p_s || p_t): the student must avoid what the teacher considers impossible.

    log p_t is clamped from below at ``floor``, because one class with p_t near 0 would dominate the batch. The clamp can make
    a row negative, by at most C · exp(floor - 1).

    Args:
        student, teacher: logits (..., C).
        temperature: softens both distributions, > 0.
        reduction, mask: see the module.
        floor: smallest log p_t; ``-math.inf`` gives the exact divergence. Where it bites, the teacher gets no gradient.

    Returns:
        A scalar, or (...) for ``"none"``.
    """
    _check_pair(student, teacher)
    rows = _kl(_log_p(student, temperature), _log_p(teacher, temperature).clamp_min(floor))
    return _reduce(rows, reduction, mask)


def symmetric_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    mask: Tensor | None = None,
    floor: float = REVERSE_FLOOR,
) -> Tensor:
    """The mean of :func:`forward_kl` and :func:`reverse_kl` (half of Jeffreys' divergence).

    Args and returns as in :func:`reverse_kl`.
    """
    _check_pair(student, teacher)
    log_s, log_t = _log_p(student, temperature), _log_p(teacher, temperature)
    return _reduce(0.5 * (_kl(log_t, log_s) + _kl(log_s, log_t.clamp_min(floor))), reduction, mask)


def js_divergence(
    student: Tensor,
    teacher: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    mask: Tensor | None = None,
    scaled: bool = False,
) -> Tensor:
    """Generalised Jensen-Shannon divergence.

        JSD_beta = beta · KL(p_t || m) + (1 - beta) · KL(p_s || m),    m = beta · p_t + (1 - beta) · p_s

    JSD_beta itself goes to 0 at both ends of beta; divided by the weight that vanishes it goes to a KL divergence:
    JSD_beta / beta -> KL(p_t || p_s) for beta -> 0 and JSD_beta / (1 - beta) -> KL(p_s || p_t) for beta -> 1. Therefore
    ``beta=0`` *is* :func:`forward_kl` and ``beta=1`` *is* :func:`reverse_kl`, by the usual convention. ``scaled=True`` divides
    by beta · (1 - beta), which makes the whole family continuous on [0, 1]; without it (the published form) the two end points
    are jumps. At ``beta=0.5`` the unscaled value is at most log 2.

    Args:
        student, teacher: logits (..., C).
        beta: weight of the teacher in the mixture, in [0, 1].
        temperature: softens both distributions, > 0.
        reduction, mask: see the module.
        scaled: divide by beta · (1 - beta).

    Source: "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (generalised JSD).

    Raises:
        InputError: ``beta`` outside [0, 1], and as in the module.
    """
    if not 0 <= beta <= 1:
        raise InputError(f"beta of the Jensen-Shannon divergence must be in [0, 1], not {beta}")
    if beta == 0:
        return forward_kl(student, teacher, temperature, reduction, mask)
    if beta == 1:
        return reverse_kl(student, teacher, temperature, reduction, mask)
    _check_pair(student, teacher)
    log_s, log_t = _log_p(student, temperature), _log_p(teacher, temperature)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    rows = beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)
    return _reduce(rows / (beta * (1 - beta)) if scaled else rows, reduction, mask)


def entropy(
    logits: Tensor, temperature: float = 1.0, reduction: Reduction = "none", mask: Tensor | None = None
) -> Tensor:
    """H(p) = -sum_c p_c log p_c of softmax(logits / temperature), in nats, in [0, log C]; per row by default.

    Args:
        logits: (..., C).
        temperature: > 0. Where entropies and divergences are compared, use one temperature for both.
        reduction, mask: see the module.
    """
    log_p = _log_p(logits, temperature)
    return _reduce(-(log_p.exp() * log_p).sum(-1), reduction, mask)


def soft_cross_entropy(
    student: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    mask: Tensor | None = None,
) -> Tensor:
    """-sum_c target_c log p_s,c. Equals KL(target || p_s) plus the target's entropy.

    Args:
        student: logits (..., C).
        target: probabilities (..., C), or any non-negative weights; used as they are.
        temperature: softens the student only, > 0.
        reduction, mask: see the module.
    """
    _check_pair(student, target, other="target probabilities")
    return _reduce(-(target * _log_p(student, temperature)).sum(-1), reduction, mask)


def hinton(student: Tensor, teacher: Tensor, temperature: float = 4.0, mask: Tensor | None = None) -> Tensor:
    """temperature² · KL(p_t || p_s), mean over rows.

    The factor keeps the size of the gradient independent of the temperature, to first order.

    Source: "Distilling the Knowledge in a Neural Network".
    """
    return temperature**2 * forward_kl(student, teacher, temperature, mask=mask)


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Reduction = "batchmean",
    mask: Tensor | None = None,
) -> Tensor:
    """Decoupled knowledge distillation: target-class and non-target-class knowledge weighted apart.

        temperature² · (alpha · TCKD + beta · NCKD)
        TCKD = KL( [p_t(y), 1 - p_t(y)] || [p_s(y), 1 - p_s(y)] )
        NCKD = KL( q_t || q_s ),   q = softmax over the classes other than y, at the same temperature

    With alpha = 1 and beta replaced by 1 - p_t(y) per row it is :func:`hinton`.

    Args:
        student, teacher: logits (..., C), C >= 2.
        labels: (...) class indices, or (..., C) soft labels whose largest entry is the target class.
        alpha, beta: weights of the two parts.
        temperature: > 0.
        reduction, mask: see the module.

    Source: "Decoupled Knowledge Distillation".

    Raises:
        InputError: labels of the wrong shape or outside [0, C), C < 2, and as in the module.
    """
    _check_pair(student, teacher)
    student_binary, student_rest = _split_target(student, labels, temperature)
    teacher_binary, teacher_rest = _split_target(teacher, labels, temperature)
    rows = alpha * _kl(teacher_binary, student_binary) + beta * _kl(teacher_rest, student_rest)
    return _reduce(temperature**2 * rows, reduction, mask)


def nkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    mask: Tensor | None = None,
) -> Tensor:
    """Normalised knowledge distillation: a teacher-weighted target term and a cross-entropy over the other classes.

        - p_t(y) · log p_s(y)  -  alpha · temperature² · sum_{c != y} q_t(c) log q_s(c)

    p at temperature 1; q = softmax over the classes other than y at ``temperature``. A cross-entropy, not a distance: it is
    not 0 where the two networks agree, and the first term keeps pushing p_s(y) up.

    Args:
        student, teacher: logits (..., C), C >= 2.
        labels: (...) class indices, or (..., C) soft labels whose largest entry is the target class.
        alpha: weight of the non-target part.
        temperature: > 0.
        reduction, mask: see the module.

    Source: "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss"; also the
    second stage of "Generic-to-Specific Distillation of Masked Autoencoders".

    Raises:
        InputError: labels of the wrong shape or outside [0, C), C < 2, and as in the module.
    """
    _check_pair(student, teacher)
    student_binary, _ = _split_target(student, labels, 1.0)
    teacher_binary, _ = _split_target(teacher, labels, 1.0)
    _, student_rest = _split_target(student, labels, temperature)
    _, teacher_rest = _split_target(teacher, labels, temperature)
    target = -teacher_binary[..., 0].exp() * student_binary[..., 0]
    rest = -(teacher_rest.exp() * student_rest).sum(-1)
    return _reduce(target + alpha * temperature**2 * rest, reduction, mask)


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """DIST: one minus Pearson's correlation of the predictions, along classes and along samples.

        temperature² · ( beta · mean_rows [1 - corr(p_s[i, :], p_t[i, :])] + gamma · mean_classes [1 - corr(p_s[:, c], p_t[:, c])] )

    A row or column that is constant in both networks contributes 0, in only one of them 1/2, and the constant one gets no
    gradient from it (so a zero-initialised classifier must be moved by another loss first).

    Args:
        student, teacher: logits (..., C); the leading axes together are the samples.
        beta, gamma: weights of the inter-class and the intra-class part.
        temperature: > 0.
        mask: weights of the rows, see the module; they also weigh the correlations along samples.

    Returns:
        A scalar in [0, 2 · (beta + gamma) · temperature²].

    Source: "Knowledge Distillation from A Stronger Teacher".
    """
    _check_pair(student, teacher)
    p_s, p_t = (_log_p(z, temperature).exp().flatten(0, -2) for z in (student, teacher))
    weight = p_s.new_ones(len(p_s)) if mask is None else _weights(mask, student.shape[:-1], p_s)
    total = weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
    share = (weight / total).unsqueeze(1)

    def along_classes(p: Tensor) -> Tensor:
        return unit_vectors(p - p.mean(1, keepdim=True), axis=1)

    def along_samples(p: Tensor) -> Tensor:
        return unit_vectors((p - (share * p).sum(0)) * share.sqrt(), axis=0)

    # For unit vectors 1 - <a, b> = |a - b|² / 2, which is exactly 0 where the networks agree.
    inter = 0.5 * ((along_classes(p_s) - along_classes(p_t)).square() * share).sum()
    intra = 0.5 * (along_samples(p_s) - along_samples(p_t)).square().sum(0).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def standardise(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Each row's logits with mean 0 and standard deviation (unbiased) 1, in place of a temperature; eps is added to it.

    The gradient flows through mean and deviation. The shift is invisible to a softmax, so this also serves methods that only
    divide by the deviation.

    Args:
        logits: (..., C), C >= 2.

    Source: "Logit Standardization in Knowledge Distillation".
    """
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise InputError(f"standardised logits need at least 2 classes, but their shape is {tuple(logits.shape)}")
    logits = full_precision(logits)
    deviation, mean = torch.std_mean(logits, dim=-1, keepdim=True)
    return (logits - mean) / (deviation + eps)


def chunked_forward_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    mask: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """:func:`forward_kl` in bounded memory, for very many classes (vocabularies).

    Works on ``chunk_rows`` rows at a time, forward and backward, and keeps only the logits between the two: the log-softmaxes
    of a chunk are the largest temporaries, and the gradients the only other tensors of full size. Costs a second evaluation of
    the softmaxes. Differentiable once.

    Args:
        student, teacher: logits (..., C).
        temperature: > 0.
        reduction, mask: see the module.
        chunk_rows: rows per chunk; None: about four million logits per chunk.

    Raises:
        InputError: ``chunk_rows`` below 1, and as in the module.
    """
    _check_pair(student, teacher)
    _check_temperature(temperature)
    classes = student.shape[-1]
    if chunk_rows is None:
        chunk_rows = max(1, 2**22 // classes)
    if chunk_rows < 1:
        raise InputError(f"chunk_rows must be at least 1, not {chunk_rows}")
    rows: Tensor = _ChunkedForwardKL.apply(
        student.reshape(-1, classes), teacher.reshape(-1, classes), temperature, chunk_rows
    )
    return _reduce(rows.view(student.shape[:-1]), reduction, mask)


def target_classes(labels: Tensor, shape: torch.Size) -> Tensor:
    """The target class of each row: class indices as they are, soft labels by their largest entry.

    Args:
        labels: (...) integers, or (..., C) probabilities.
        shape: the logits' shape (..., C).

    Returns:
        int64 (...).

    Raises:
        InputError: any other shape or type; indices outside [0, C) (checked on the CPU only, elsewhere it would stall the
            device, whose own index check then fails).
    """
    if labels.is_floating_point() and labels.shape == shape:
        return labels.argmax(-1)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != shape[:-1]:
        raise InputError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit logits of shape {tuple(shape)}; "
            f"give class indices {tuple(shape[:-1])} or soft labels {tuple(shape)}"
        )
    if labels.device.type == "cpu" and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= shape[-1]:
            raise InputError(
                f"labels run from {low} to {high}, but the logits have {shape[-1]} classes (0 to {shape[-1] - 1}); "
                "give rows without a label any valid class and mask them"
            )
    return labels.long()


class _ChunkedForwardKL(torch.autograd.Function):
    """Row-wise KL(p_t || p_s) of (N, C) logits; the softmaxes are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, chunk_rows: int) -> Tensor:
        chunks = zip(student.split(chunk_rows), teacher.split(chunk_rows), strict=True)
        rows = torch.cat([_kl(_log_p(t, temperature), _log_p(s, temperature)) for s, t in chunks])
        ctx.save_for_backward(student, teacher, rows)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        student, teacher, rows = ctx.saved_tensors
        student_grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        teacher_grad = torch.empty_like(teacher) if ctx.needs_input_grad[1] else None
        for start in range(0, len(student), ctx.chunk_rows):
            part = slice(start, start + ctx.chunk_rows)
            log_s, log_t = _log_p(student[part], ctx.temperature), _log_p(teacher[part], ctx.temperature)
            p_t = log_t.exp()
            scale = (upstream[part] / ctx.temperature).unsqueeze(1)
            if teacher_grad is not None:
                teacher_grad[part] = (log_t - log_s).sub_(rows[part].unsqueeze(1)).mul_(p_t).mul_(scale)
            if student_grad is not None:
                student_grad[part] = log_s.exp_().sub_(p_t).mul_(scale)
        return student_grad, teacher_grad, None, None


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row from log-probabilities (..., C)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_p(logits: Tensor, temperature: float) -> Tensor:
    _check_temperature(temperature)
    logits = full_precision(logits)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def _split_target(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log [p(y), 1 - p(y)] of shape (..., 2), and the log-softmax over the other classes (..., C - 1).

    The other classes are gathered rather than pushed down by a large negative number, so that log(1 - p(y)) keeps its digits
    where p(y) is close to 1.
    """
    classes = logits.shape[-1]
    if classes < 2:
        raise InputError(f"decoupling a target class needs at least 2 classes, but the logits have {classes}")
    _check_temperature(temperature)
    scaled = full_precision(logits) / temperature
    target = target_classes(labels, logits.shape).unsqueeze(-1)
    others = torch.arange(classes - 1, device=logits.device)
    rest = scaled.gather(-1, others + (others >= target))
    pair = torch.cat([scaled.gather(-1, target), rest.logsumexp(-1, keepdim=True)], dim=-1)
    return torch.log_softmax(pair, dim=-1), torch.log_softmax(rest, dim=-1)


def _reduce(rows: Tensor, reduction: str, mask: Tensor | None) -> Tensor:
    if mask is not None:
        mask = _weights(mask, rows.shape, rows).view(rows.shape)
        rows = rows * mask
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if reduction == "batchmean":
        return rows.mean() if mask is None else rows.sum() / mask.sum().clamp_min(torch.finfo(rows.dtype).tiny)
    raise UnknownNameError("reduction", str(reduction), ("none", "batchmean", "sum"))


def _weights(mask: Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    """The rows' weights, flat, with the type and device of ``like``."""
    if mask.shape != shape:
        raise InputError(f"the mask has shape {tuple(mask.shape)}, but the logits have rows {tuple(shape)}")
    return mask.to(like).flatten()


def _check_pair(student: Tensor, teacher: Tensor, other: str = "teacher logits") -> None:
    if student.ndim == 0 or teacher.ndim == 0:
        raise InputError("logits must have shape (..., C), not a single number")
    if student.shape[-1] != teacher.shape[-1]:
        raise InputError(
            f"the student logits have {student.shape[-1]} classes and the {other} {teacher.shape[-1]}; "
            "both must have the same label space"
        )
    if student.shape != teacher.shape:
        raise InputError(
            f"the student logits have shape {tuple(student.shape)} and the {other} {tuple(teacher.shape)}; "
            "both must come from the same rows"
        )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"the temperature must be positive, not {temperature}")
