"""Degeneration, hubness and ranks against definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.metrics.degeneration import (
    Degeneration,
    degeneration,
    degeneration_score,
    hubness,
    mean_shift,
    nearest_similarity,
    occurrences,
    skewness,
    target_similarity,
)
from limbeck.metrics.ranks import first_ranks, rank_measures, search_ranks
from limbeck.metrics.retrieval import recall

torch.set_num_threads(1)


def rows(n: int, seed: int = 0, shift: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 5)) + shift


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    return unit[0] @ unit[1].T


def test_scores_of_a_gallery_are_those_of_its_matrix() -> None:
    g = rows(17)
    near = cosines(g, g)
    off = near[~np.eye(17, dtype=bool)]
    assert degeneration_score(g, block=(4, 4)) == pytest.approx(off.mean(), abs=1e-12)
    np.fill_diagonal(near, -2)
    assert nearest_similarity(g, block=(4, 4)) == pytest.approx(near.max(1).mean(), abs=1e-12)
    assert degeneration_score(np.ones((3, 2))) == pytest.approx(1)
    assert degeneration_score(np.eye(3)) == pytest.approx(0)
    assert nearest_similarity(np.stack([g[0], g[0], -g[0]])) == pytest.approx(1 / 3)  # a copy is another item


def test_hubness_is_the_skewness_of_the_occurrences() -> None:
    q, g = rows(40, 1), rows(12, 2)
    places = np.argsort(-cosines(q, g), axis=1)[:, :3]
    counts = np.bincount(places.ravel(), minlength=12)
    assert occurrences(q, g, 3, block=(7, 5)).tolist() == counts.tolist()
    centred = counts - counts.mean()
    assert hubness(q, g, 3) == pytest.approx((centred**3).mean() / (centred**2).mean() ** 1.5)
    assert skewness(torch.ones(4)) == 0
    assert hubness(q, g, k=50) == 0  # every item is among all of them


def test_help_is_expected_where_there_is_a_cone_or_a_hub() -> None:
    assert not Degeneration(0.02, 0.97, 0.5, 0.4).help_expected
    assert Degeneration(0.2, 0.5, 0.6, 0.4).help_expected
    assert Degeneration(0.02, 0.5, 0.6, 3.0).help_expected


def test_targets_and_shift() -> None:
    q, g = rows(6, 1), rows(6, 2)
    assert target_similarity(g, q) == pytest.approx(np.diag(cosines(q, g)).mean())
    ids = torch.tensor([5, 3, 3, 9, 1, 0])
    wanted = torch.tensor([3, 0, 9])
    mean = np.mean([cosines(q, g)[0, 1], cosines(q, g)[1, 5], cosines(q, g)[2, 3]])
    assert target_similarity(g, q[:3], ids, wanted, block=(2, 2)) == pytest.approx(mean)
    with pytest.raises(InputError, match="not in the gallery"):
        target_similarity(g, q[:1], ids, torch.tensor([4]))
    assert mean_shift(g, 2 * g) == pytest.approx(0, abs=1e-12)
    assert mean_shift(g, -g) == pytest.approx(2)
    assert degeneration(g, q).as_dict().keys() == {"mean_cosine", "nearest_similarity", "target_similarity", "hubness"}
    with pytest.raises(InputError, match="at least two"):
        degeneration_score(g[:1])


def test_ranks_count_ties_against_the_query() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.1], [0.3, 0.2, 0.1], [0.0, 0.0, 0.9]])
    assert first_ranks(scores).tolist() == [2, 2, 1]
    assert rank_measures(first_ranks(scores), (1,)) == pytest.approx(
        {"recall_at_1": 1 / 3, "median_rank": 2, "mean_rank": 5 / 3}
    )
    random = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    for k in (1, 5, 10):  # one document per query: recall as the retrieval metrics have it
        assert rank_measures(first_ranks(random), (k,))[f"recall_at_{k}"] == pytest.approx(recall(random, k))


def test_ranks_by_ids() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    # the best of the wanted items counts, and the other wanted ones are no rivals of it
    assert first_ranks(scores, torch.tensor([7]), torch.tensor([1, 7, 2, 7])).tolist() == [2]
    assert first_ranks(scores, torch.tensor([7]), torch.tensor([7, 7, 7, 2])).tolist() == [1]
    assert first_ranks(scores, torch.tensor([2])).tolist() == [3]
    many = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    ids, items = torch.arange(9) % 6, torch.arange(6)
    whole = first_ranks(many, ids, items)
    assert torch.equal(search_ranks(lambda a, b: many[a:b], 9, ids, items, block=4), whole)
    assert torch.equal(search_ranks(lambda a, b: many[a:b], 9, ids, None, block=4), whole)
    for query, item in ((torch.tensor([3]), torch.tensor([1, 7, 2, 7])), (torch.tensor([4]), None)):
        with pytest.raises(InputError, match="which no item of the gallery has"):
            first_ranks(scores, query, item)
    with pytest.raises(InputError, match="NaN"):
        first_ranks(scores * torch.nan)
