"""How well queries find their documents: reciprocal rank, recall and discounted gain among the first k.

Scores that tie are counted against the query: a document of no relevance stands before a relevant one with the same score,
so constant embeddings find nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError


def similarity(queries: Tensor, documents: Tensor) -> Tensor:
    """Cosine similarities (Q, D) of embeddings (Q, d) and (D, d), in single precision at least.

    Raises:
        InputError: the embeddings are not two matrices of one width.
    """
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise InputError(
            f"embeddings must be matrices of one width, not of shapes {tuple(queries.shape)} and {tuple(documents.shape)}"
        )
    kind = torch.promote_types(torch.promote_types(queries.dtype, documents.dtype), torch.float32)
    return F.normalize(queries.to(kind), dim=-1) @ F.normalize(documents.to(kind), dim=-1).mT


def ranked_relevance(scores: Tensor, relevant: Tensor | None = None) -> Tensor:
    """Relevance (Q, D) of the documents in the order in which each query ranks them, best first.

    Args:
        scores: (Q, D), larger is closer.
        relevant: (Q, D), above 0 where the document answers the query (grades are allowed); None: query ``i`` looks for document
            ``i`` only.

    Raises:
        InputError: shapes that do not fit, scores that are NaN, a negative grade, or a query that no document answers.
    """
    if scores.ndim != 2 or 0 in scores.shape:
        raise InputError(f"scores must be a matrix (queries, documents), not of shape {tuple(scores.shape)}")
    if bool(torch.isnan(scores).any()):
        raise InputError("the scores hold NaN: the embeddings are broken")
    if relevant is None:
        if scores.shape[1] < scores.shape[0]:
            raise InputError(
                f"{scores.shape[0]} queries but {scores.shape[1]} documents: query i looks for document i, so give relevant=…"
            )
        relevant = torch.eye(*scores.shape, device=scores.device)
    if relevant.shape != scores.shape:
        raise InputError(
            f"relevance of shape {tuple(relevant.shape)} does not fit scores of shape {tuple(scores.shape)}"
        )
    relevant = relevant.to(torch.float64)
    if bool((relevant < 0).any()):
        raise InputError("relevance must not be negative")
    if not bool((relevant > 0).any(1).all()):
        raise InputError("every query needs at least one relevant document")
    worst_first = relevant.argsort(dim=1, stable=True)
    order = scores.gather(1, worst_first).argsort(dim=1, descending=True, stable=True)
    return relevant.gather(1, worst_first.gather(1, order))


def mrr(scores: Tensor, k: int = 10, relevant: Tensor | None = None) -> float:
    """Mean over queries of 1 / rank of the first relevant document, 0 where it is not among the first ``k``; in [0, 1]."""
    hit = ranked_relevance(scores, relevant)[:, : _positive(k)] > 0
    return float((hit.any(1) / (hit.int().argmax(1) + 1)).double().mean())


def recall(scores: Tensor, k: int = 10, relevant: Tensor | None = None) -> float:
    """Mean over queries of the share of relevant documents that are among the first ``k``; in [0, 1]."""
    hit = ranked_relevance(scores, relevant) > 0
    return float((hit[:, : _positive(k)].sum(1) / hit.sum(1)).double().mean())


def ndcg(scores: Tensor, k: int = 10, relevant: Tensor | None = None) -> float:
    """Mean over queries of the normalised discounted cumulative gain of the first ``k``; in [0, 1].

    The gain is the relevance itself and the discount log2(1 + rank), as in scikit-learn, which does the sum.
    """
    from sklearn.metrics import ndcg_score

    ranked = ranked_relevance(scores, relevant)
    if ranked.shape[1] == 1:  # scikit-learn refuses a ranking of one document, which is perfect
        return 1.0
    # The order is settled, ties included, so the places stand for the scores.
    places = torch.arange(ranked.shape[1], 0, -1, dtype=torch.float64).expand_as(ranked)
    return float(ndcg_score(ranked.cpu().numpy(), places.numpy(), k=_positive(k), ignore_ties=True))


def retrieval_metrics(
    queries: Tensor, documents: Tensor | None = None, relevant: Tensor | None = None, ks: Sequence[int] = (1, 10)
) -> dict[str, float]:
    """``recall_at_<k>`` for every ``k``, and ``mrr_at_<k>`` and ``ndcg_at_<k>`` for the largest.

    Args:
        queries: embeddings (Q, d); or, without ``documents``, scores (Q, D).
        documents: embeddings (D, d).
        relevant: (Q, D); None: query ``i`` looks for document ``i``.
        ks: how many first documents count.

    Raises:
        InputError: see :func:`similarity` and :func:`ranked_relevance`; no ``k``, or one below 1.
    """
    if not ks:
        raise InputError("ks must name at least one number of first documents")
    scores = queries if documents is None else similarity(queries, documents)
    most = max(ks)
    return {
        f"mrr_at_{most}": mrr(scores, most, relevant),
        **{f"recall_at_{k}": recall(scores, k, relevant) for k in ks},
        f"ndcg_at_{most}": ndcg(scores, most, relevant),
    }


def _positive(k: int) -> int:
    if k < 1:
        raise InputError(f"k must be at least 1 (got {k})")
    return k
