"""Where queries find what they look for: ranks, and recall, median and mean of them.

Scores that tie are counted against the query, as in :mod:`limbeck.metrics.retrieval`; unlike there, queries are scored in blocks, so that the
matrix of all scores is never held, and several queries may look for one item, or one query for several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from limbeck.core.errors import InputError


def first_ranks(scores: Tensor, query_ids: Tensor | None = None, gallery_ids: Tensor | None = None) -> Tensor:
    """The rank (Q,) int64, from 1, of the best item that each query looks for, among the items it does not look for.

    Args:
        scores: (Q, N), larger is closer.
        query_ids: (Q,) integers, what each query looks for; None: 0, 1, ….
        gallery_ids: (N,) integers; a query looks for the items with its id. None: item n has id n.

    Raises:
        InputError: shapes that do not fit, NaN, a query that no item answers.
    """
    if scores.ndim != 2 or 0 in scores.shape:
        raise InputError(f"scores must be a matrix (queries, items), not of shape {tuple(scores.shape)}")
    if bool(scores.isnan().any()):
        raise InputError("the scores hold NaN: the embeddings are broken")
    query_ids = torch.arange(len(scores)) if query_ids is None else query_ids
    if query_ids.shape != scores.shape[:1] or (gallery_ids is not None and gallery_ids.shape != scores.shape[1:]):
        raise InputError(f"the ids do not fit scores of shape {tuple(scores.shape)}: give one for each query and item")
    query_ids = query_ids.to(scores.device)
    if gallery_ids is None:
        lost = (query_ids < 0) | (query_ids >= scores.shape[1])
        _all_answered(~lost, query_ids)
        best = scores.gather(1, query_ids[:, None])
        return (scores >= best).sum(1)
    wanted = query_ids[:, None] == gallery_ids.to(scores.device)[None, :]
    _all_answered(wanted.any(1), query_ids)
    best = scores.masked_fill(~wanted, -torch.inf).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~wanted).sum(1)


def _all_answered(answered: Tensor, query_ids: Tensor) -> None:
    if not bool(answered.all()):
        lost = int((~answered).nonzero()[0])
        raise InputError(f"query {lost} looks for id {int(query_ids[lost])}, which no item of the gallery has")


def search_ranks(
    score: Callable[[int, int], Tensor],
    count: int,
    query_ids: Tensor | None,
    gallery_ids: Tensor | None,
    block: int = 1024,
) -> Tensor:
    """:func:`first_ranks` of ``count`` queries, of which ``score(start, stop)`` gives the scores (stop - start, N)."""
    ids = torch.arange(count) if query_ids is None else query_ids
    parts = []
    for start in range(0, count, block):
        stop = min(start + block, count)
        parts.append(first_ranks(score(start, stop), ids[start:stop], gallery_ids).cpu())
    return torch.cat(parts)


def rank_measures(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """``recall_at_<k>`` (share of queries whose rank is at most k), ``median_rank`` and ``mean_rank``.

    Raises:
        InputError: no ranks.
    """
    if ranks.numel() == 0:
        raise InputError("no query was ranked")
    values = ranks.double()
    return {
        **{f"recall_at_{k}": float((ranks <= k).double().mean()) for k in ks},
        "median_rank": float(values.quantile(0.5)),
        "mean_rank": float(values.mean()),
    }
