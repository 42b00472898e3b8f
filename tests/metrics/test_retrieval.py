"""Retrieval measures against values worked out by hand and a loop."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.metrics.retrieval import mrr, ndcg, ranked_relevance, recall, retrieval_metrics, similarity

# Ranks of the right document: 1, 3, 2.
SCORES = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.1, 0.4], [0.1, 0.8, 0.3]])


def test_by_hand() -> None:
    assert mrr(SCORES) == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert mrr(SCORES, 2) == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert [recall(SCORES, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    gains = [1, 1 / math.log2(4), 1 / math.log2(3)]
    assert ndcg(SCORES) == pytest.approx(sum(gains) / 3)


def test_several_relevant_documents_and_grades() -> None:
    relevant = torch.tensor([[0.0, 2.0, 1.0]])
    scores = torch.tensor([[0.9, 0.1, 0.5]])  # the order is 0, 2, 1
    assert mrr(scores, 10, relevant) == pytest.approx(1 / 2)
    assert recall(scores, 2, relevant) == pytest.approx(1 / 2)
    best = 2 + 1 / math.log2(3)
    assert ndcg(scores, 3, relevant) == pytest.approx((1 / math.log2(3) + 2 / math.log2(4)) / best)


def test_many_against_a_loop() -> None:
    scores = torch.rand(30, 40, generator=torch.Generator().manual_seed(0))
    ranks = [1 + int((row > row[i]).sum()) for i, row in enumerate(scores)]
    assert mrr(scores, 10) == pytest.approx(sum(1 / r if r <= 10 else 0 for r in ranks) / 30)
    assert recall(scores, 5) == pytest.approx(sum(r <= 5 for r in ranks) / 30)


def test_ties_count_against_the_query() -> None:
    assert mrr(torch.zeros(5, 5), 10) == pytest.approx(1 / 5)
    assert recall(torch.zeros(5, 5), 1) == 0
    assert ranked_relevance(torch.zeros(2, 3)).tolist() == [[0, 0, 1], [0, 0, 1]]


def test_embeddings_are_compared_by_cosine() -> None:
    a = torch.eye(4, dtype=torch.bfloat16)
    torch.testing.assert_close(similarity(a * 3, a), torch.eye(4))
    assert similarity(a, a).dtype == torch.float32
    found = retrieval_metrics(torch.eye(4), torch.eye(4) * 7)
    assert found == {"mrr_at_10": 1.0, "recall_at_1": 1.0, "recall_at_10": 1.0, "ndcg_at_10": 1.0}


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: mrr(torch.rand(3, 2)), "3 queries but 2 documents"),
        (lambda: mrr(torch.rand(3)), "must be a matrix"),
        (lambda: mrr(torch.full((2, 2), float("nan"))), "NaN"),
        (lambda: mrr(torch.rand(2, 2), 0), "k must be at least 1"),
        (lambda: mrr(torch.rand(2, 2), 1, torch.rand(3, 2)), "does not fit"),
        (lambda: mrr(torch.rand(2, 2), 1, torch.zeros(2, 2)), "at least one relevant"),
        (lambda: mrr(torch.rand(2, 2), 1, -torch.ones(2, 2)), "negative"),
        (lambda: similarity(torch.rand(2, 3), torch.rand(2, 4)), "one width"),
        (lambda: retrieval_metrics(torch.rand(2, 2), ks=()), "at least one number"),
    ],
)
def test_bad_input(call, line) -> None:
    with pytest.raises(InputError, match=line):
        call()
