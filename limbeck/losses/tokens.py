"""Losses over tokens: which positions of a sequence have a label, and what is said there.

Labels (B, N) follow the convention of 🤗 transformers: -100 is no label, and labels of a causal model are the input's own tokens, so that the logits at a
place are compared with the label at the next one (``shift``). Labels (B,) of whole sequences, or (B, C) soft ones, are rows as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.losses.features import full_precision, squarehead

IGNORED = -100
"""The label of a position that counts nowhere."""


def labelled_rows(labels: Tensor, shift: bool = False) -> Tensor | None:
    """(B, N) bool: where logits are compared with a label; None for labels of whole sequences, which all count."""
    if labels.is_floating_point() or labels.ndim < 2:
        return None
    if not shift:
        return labels != IGNORED
    return F.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)


def token_rows(logits: Tensor, labels: Tensor, shift: bool = False) -> tuple[Tensor, Tensor]:
    """Logits (R, C) and labels (R,) of the positions that have a label.

    Args:
        logits: (B, N, C), or (B, C) for whole sequences.
        labels: (B, N), or (B,) class indices or (B, C) soft labels, which are given back as they are.
        shift: the logits at a place are about the label at the next one.

    Raises:
        InputError: shapes that do not fit each other.
    """
    chosen = labelled_rows(labels, shift)
    if logits.shape[:-1] != (labels.shape if chosen is not None else labels.shape[:1]):
        raise InputError(f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}")
    if chosen is None:
        return logits, labels
    aligned = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if shift else labels
    return logits[chosen], aligned[chosen]


def token_cross_entropy(logits: Tensor, labels: Tensor, shift: bool = False) -> Tensor:
    """Mean cross entropy over the positions that have a label, in nats; 0 (with a graph) where none has. Arguments as :func:`token_rows`."""
    rows, targets = token_rows(logits, labels, shift)
    if not len(rows):
        return logits.sum() * 0.0
    return F.cross_entropy(full_precision(rows), targets)


def feature_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error, mean over the positions of weight 1 and all channels; not relative to anything (see :func:`limbeck.losses.features.squarehead`).

    Args:
        student, teacher: (..., D) of one shape.
        mask: (...), weight of each position.

    Raises:
        InputError: the shapes differ.
    """
    if student.shape != teacher.shape or (mask is not None and mask.shape != student.shape[:-1]):
        shapes = [tuple(t.shape) for t in (student, teacher, mask) if t is not None]
        raise InputError(f"features of student and teacher and their mask do not fit each other: {shapes}")
    error = (full_precision(student) - full_precision(teacher)).square()
    if mask is None:
        return error.mean()
    weight = mask.to(error.dtype).unsqueeze(-1)
    return (error * weight).sum() / (weight.sum() * error.shape[-1]).clamp_min(torch.finfo(error.dtype).tiny)


def check_token_labels(logits: Tensor, labels: Tensor, shift: bool) -> None:
    """That there are labels, and that they are classes of the logits.

    Raises:
        InputError: all of them are -100, or one is out of range.
    """
    _, targets = token_rows(logits, labels, shift)
    if not len(targets):
        raise InputError("every label of the first batch is -100: nothing could be learnt from it")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= logits.shape[-1]:
        raise InputError(f"labels go from {low} to {high}, but the student has classes 0 to {logits.shape[-1] - 1}")


def block_error(student: Tensor, teacher: Tensor, mask: Tensor | None, eps: float | None) -> Tensor:
    """:func:`limbeck.losses.features.squarehead` of a block's outputs (B, N, D), or :func:`feature_mse` where ``eps`` is None.

    Raises:
        InputError: a mask of valid tokens that does not belong to these outputs.
    """
    if mask is not None and mask.shape != student.shape[:-1]:
        raise InputError(
            f"the mask of valid tokens is {tuple(mask.shape)}, but a block gives {tuple(student.shape)}: leave it out of the batch"
        )
    return feature_mse(student, teacher, mask) if eps is None else squarehead(student, teacher, mask, eps)
