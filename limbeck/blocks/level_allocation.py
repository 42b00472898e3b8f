"""Sharing a budget of levels (or bits) among tensors by how strongly the loss depends on each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.core.seeding import preserved_random_state


def share_levels(wanted: Sequence[int], norms: Sequence[float], most: int = 256) -> list[int]:
    """Levels of each tensor: half of what it wanted, at least 2, and the rest of the budget in proportion to the gradient norms.

    Args:
        wanted: levels N_t of each tensor, >= 2; their sum is the budget, and is kept.
        norms: 2-norm of the loss's gradient with respect to each tensor.
        most: levels that a tensor can have.
    """
    return _share(wanted, norms, [max(2, n // 2) for n in wanted], most)


def share_bits(wanted: Sequence[int], norms: Sequence[float], most: int = 8) -> list[int]:
    """Bits of each tensor: one less than it wanted, at least 1, and the rest of the budget in proportion to the gradient norms."""
    return _share(wanted, norms, [max(1, n - 1) for n in wanted], most)


def gradient_norms(
    model: nn.Module, loss: Callable[[Any], Tensor], parameters: Sequence[nn.Parameter], batches: Iterable[Any]
) -> list[float]:
    """2-norm of the mean gradient of a loss at each parameter; buffers, gradients and random state are left as they were.

    Args:
        model: whose buffers a pass may move.
        loss: batch -> scalar.
        parameters: of the model, frozen or not.
        batches: at least one.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    given = [p.requires_grad for p in parameters]
    sums, count = [torch.zeros_like(p) for p in parameters], 0
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with preserved_random_state():
            for count, batch in enumerate(batches, 1):  # noqa: B007
                found = torch.autograd.grad(loss(batch), list(parameters))
                sums = [total + g for total, g in zip(sums, found, strict=True)]
    finally:
        for parameter, before in zip(parameters, given, strict=True):
            parameter.requires_grad_(before)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return [float(total.norm() / count) for total in sums]


def _share(wanted: Sequence[int], norms: Sequence[float], floor: Sequence[int], most: int) -> list[int]:
    """What rounding leaves over goes to the largest gradients, what it lacks comes from the smallest; whoever is full passes on."""
    strength = np.asarray(norms, dtype=np.float64)
    if len(strength) != len(wanted) or not np.isfinite(strength).all() or (strength < 0).any():
        raise InputError("a budget of levels is shared by one finite gradient norm for each tensor")
    weight = strength / strength.sum() if strength.sum() > 0 else np.full(len(wanted), 1 / len(wanted))
    budget, base = sum(wanted), np.asarray(floor)
    given = np.minimum(base + np.round((budget - base.sum()) * weight).astype(int), most)
    ascending = np.argsort(strength, kind="stable")
    while (left := budget - int(given.sum())) != 0:
        ready = [t for t in ascending if (given[t] < most if left > 0 else given[t] > base[t])]
        if not ready:
            break  # wanted more than there can be
        chosen = ready[-1] if left > 0 else ready[0]
        given[chosen] += 1 if left > 0 else -1
    return [int(n) for n in given]
