from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.metrics import link_ranking
from limbeck.metrics.link_ranking import hits_among, rank_nodes

torch.set_num_threads(1)


def by_hand(scores: Tensor, positives: Tensor, known: Tensor, k: int, sides: Tensor | None = None) -> dict[int, dict]:
    """Node by node; equal scores count against the positives."""
    n = len(scores)
    wanted: dict[int, set[int]] = {}
    hidden: dict[int, set[int]] = {}
    for links, held in ((positives, wanted), (known, hidden)):
        for u, v in links.T.tolist():
            held.setdefault(u, set()).add(v)
            held.setdefault(v, set()).add(u)
    found = {}
    for node, good in wanted.items():
        candidates = [v for v in range(n) if v != node and v not in hidden.get(node, set())]
        if sides is not None:
            candidates = [v for v in candidates if sides[v] != sides[node]]
        order = sorted(candidates, key=lambda v: (-float(scores[node, v]), v in good))
        ranks = [place for place, v in enumerate(order, 1) if v in good]
        right = sum(r <= k for r in ranks)
        precision, recall = right / k, right / len(good)
        gain = sum(1 / math.log2(1 + r) for r in ranks if r <= k)
        best = sum(1 / math.log2(1 + r) for r in range(1, min(k, len(good)) + 1))
        found[node] = {
            f"hits_at_{k}": float(right > 0),
            f"recall_at_{k}": recall,
            f"precision_at_{k}": precision,
            f"f1_at_{k}": 2 * precision * recall / (precision + recall) if right else 0.0,
            f"ndcg_at_{k}": gain / best,
            "mrr": 1 / ranks[0],
        }
    return found


def some_links(seed: int, nodes: int = 20, count: int = 60) -> Tensor:
    keys = torch.randperm(nodes * nodes, generator=torch.Generator().manual_seed(seed))
    u, v = keys // nodes, keys % nodes
    return torch.stack([u, v])[:, u < v][:, :count]


@pytest.mark.parametrize("entries", [4_000_000, 60])
@pytest.mark.parametrize("levels", [0, 4])
def test_measures_are_those_of_a_ranking_by_hand(entries: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_ranking, "_ENTRIES", entries)
    links = some_links(1)
    positives, known = links[:, :15], links[:, 15:]
    scores = torch.randn(20, 20, generator=torch.Generator().manual_seed(2))
    if levels:
        scores = (scores * levels).round() / levels  # ties
    for k in (1, 3, 10):
        found = rank_nodes(lambda nodes: scores[nodes], 20, positives, known, ks=(k,))
        expected = by_hand(scores, positives, known, k)
        assert found.nodes.tolist() == sorted(expected)
        for name, values in found.measures.items():
            assert values.tolist() == pytest.approx([expected[n][name] for n in sorted(expected)]), name


def test_users_rank_items_only() -> None:
    sides = torch.tensor([0] * 8 + [1] * 12)
    links = some_links(3)
    links = links[:, sides[links[0]] != sides[links[1]]]
    positives, known = links[:, :8], links[:, 8:]
    scores = torch.randn(20, 20, generator=torch.Generator().manual_seed(2))
    found = rank_nodes(lambda nodes: scores[nodes], 20, positives, known, ks=(3,), sides=sides)
    expected = by_hand(scores, positives, known, 3, sides)
    assert found.measures["mrr"].tolist() == pytest.approx([expected[n]["mrr"] for n in sorted(expected)])


def test_a_perfect_and_a_constant_score() -> None:
    links = some_links(1)
    positives, known = links[:, :15], links[:, 15:]
    truth = torch.zeros(20, 20)
    truth[positives[0], positives[1]] = truth[positives[1], positives[0]] = 1
    best = rank_nodes(lambda nodes: truth[nodes], 20, positives, known, ks=(100,)).means()
    assert best["recall_at_100"] == best["ndcg_at_100"] == best["mrr"] == 1
    nothing = rank_nodes(lambda nodes: torch.zeros(len(nodes), 20), 20, positives, known, ks=(1,)).means()
    assert nothing["recall_at_1"] == 0


def test_some_of_the_nodes_can_stand_for_all() -> None:
    links = some_links(1)
    scores = torch.randn(20, 20, generator=torch.Generator().manual_seed(2))
    every = rank_nodes(lambda nodes: scores[nodes], 20, links[:, :15], links[:, 15:], ks=(3,))
    some = rank_nodes(lambda nodes: scores[nodes], 20, links[:, :15], links[:, 15:], ks=(3,), most=5, seed=1)
    assert len(some.nodes) == 5
    torch.testing.assert_close(some.measures["mrr"], every.measures["mrr"][torch.isin(every.nodes, some.nodes)])


def test_hits_among_unlinked_pairs() -> None:
    negative = torch.tensor([0.1, 0.5, 0.9, 0.3])
    assert (
        hits_among(torch.tensor([0.6, 0.5, 0.95, 0.2]), negative, 2) == 0.5
    )  # equal to the second highest is not above
    with pytest.raises(InputError, match="need positives and 5 negatives"):
        hits_among(torch.ones(2), negative, 5)


def test_wrong_input_is_named() -> None:
    links = some_links(1)

    def score(nodes: Tensor) -> Tensor:
        return torch.zeros(len(nodes), 20)

    with pytest.raises(InputError, match="known already: parts of the links must be disjoint"):
        rank_nodes(score, 20, links[:, :5], links[:, 4:].flip(0))
    with pytest.raises(InputError, match="no links to be ranked"):
        rank_nodes(score, 20, links[:, :0])
    with pytest.raises(InputError, match=r"have \(8, 20\) scores, not \(8, 19\)"):
        rank_nodes(lambda nodes: torch.zeros(len(nodes), 19), 20, links[:, :5])
    with pytest.raises(InputError, match="hold NaN"):
        rank_nodes(lambda nodes: torch.full((len(nodes), 20), torch.nan), 20, links[:, :5])
    with pytest.raises(InputError, match="cut at 1 or more"):
        rank_nodes(score, 20, links, ks=(0,))
    with pytest.raises(InputError, match="numbered 0 to 9"):
        rank_nodes(score, 10, links)
