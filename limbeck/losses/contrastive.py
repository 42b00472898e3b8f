"""Contrastive losses between two batches of embeddings whose rows belong together pair by pair."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError

_NEVER = -1e4
"""Stands for minus infinity: its softmax is 0 in single precision, and unlike infinity it gives no NaN in a KL divergence."""


def info_nce(a: Tensor, b: Tensor, scale: float | Tensor = 10.0, groups: Tensor | None = None) -> Tensor:
    r"""Symmetric InfoNCE (the loss of CLIP) over a batch of N pairs.

    .. math:: S = \tau\, a b^\top, \qquad L = \tfrac12\big(\mathrm{CE}(S, \mathrm{diag}) + \mathrm{CE}(S^\top, \mathrm{diag})\big)

    Mean over rows. Logits are computed in single precision at least, also under autocast. With ``torch.distributed`` on, the rows
    of this process are compared with the rows of all processes, gradients included; the mean of the loss over processes is then
    the loss of the whole batch.

    Args:
        a, b: embeddings (N, d), of unit length where cosines are meant; rows with the same number belong together.
        scale: the logit scale tau, > 0.
        groups: (N,) integers; rows of one group are no negatives for each other (equal texts, say). None: all others are.

    Source: "Representation Learning with Contrastive Predictive Coding" (2018); symmetric: "Learning Transferable Visual Models
    From Natural Language Supervision" (2021).

    Raises:
        InputError: shapes that do not fit.
    """
    forth, back, target = similarity_logits(a, b, scale, groups)
    return 0.5 * (F.cross_entropy(forth, target) + F.cross_entropy(back, target))


def similarity_logits(
    a: Tensor, b: Tensor, scale: float | Tensor = 10.0, groups: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`info_nce` takes the cross-entropy of.

    Args:
        a, b, scale, groups: see there.

    Returns:
        logits (N, M) from ``a`` to the ``b`` of all processes, logits (N, M) from ``b`` to all ``a``, and the column (N,) of each
        row's own partner; M = N on a single process. Rows of the same group, other than the partner, have logits of -10,000.

    Raises:
        InputError: shapes that do not fit.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise InputError(
            f"pairs of embeddings must be two matrices of one shape, not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if groups is not None and groups.shape != a.shape[:1]:
        raise InputError(f"groups of shape {tuple(groups.shape)} do not fit {len(a)} pairs")
    with torch.autocast(a.device.type, enabled=False):
        kind = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(kind), b.to(kind)
        all_a, all_b, all_groups, first = a, b, groups, 0
        if _distributed():
            all_a, all_b = gather_rows(a), gather_rows(b)
            first = torch.distributed.get_rank() * len(a)
            all_groups = None if groups is None else gather_rows(groups)
        target = torch.arange(first, first + len(a), device=a.device)
        forth, back = scale * (a @ all_b.mT), scale * (b @ all_a.mT)
        if groups is not None and all_groups is not None:
            same = groups[:, None] == all_groups[None, :]
            same[torch.arange(len(a), device=a.device), target] = False
            forth, back = forth.masked_fill(same, _NEVER), back.masked_fill(same, _NEVER)
    return forth, back, target


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (N, ...) of all processes one after the other, (world * N, ...); gradients go back to the process of each row.

    Every process must have the same number of rows. Without ``torch.distributed`` the rows themselves.
    """
    if not _distributed():
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def _distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all processes, which works on every backend."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()  # all_reduce works in place, and another branch of the graph may hold the gradient too
        torch.distributed.all_reduce(total)
        start = torch.distributed.get_rank() * ctx.count
        return total[start : start + ctx.count]
