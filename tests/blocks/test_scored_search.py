"""Joined scores, and searches over members that have several."""

from __future__ import annotations

import copy
import math

import pytest
from torch import nn

from limbeck.blocks.scored_search import ScoredSearch, ScoredSearchConfig, combine_scores
from limbeck.blocks.search_spaces import SearchSpace
from limbeck.core.errors import InputError

SPACE = SearchSpace("bits", {f"b{n}": (0, 1) for n in range(8)}, lambda **_: nn.Identity())
TABLE = {"a": {"x": 1.0, "y": 100.0}, "b": {"x": 2.0, "y": 300.0}, "c": {"x": 6.0, "y": 200.0}}


def test_joined_scores_by_hand():
    assert combine_scores(TABLE, "sum") == {"a": 101.0, "b": 302.0, "c": 206.0}
    assert combine_scores(TABLE, "rank") == {"a": 0.0, "b": 1.5, "c": 1.5}
    deviations = math.sqrt(14 / 3), math.sqrt(20000 / 3)
    expected = {"a": -2 / deviations[0] - 100 / deviations[1], "b": -1 / deviations[0] + 100 / deviations[1]}
    found = combine_scores(TABLE, "zscore")
    assert found["a"] == pytest.approx(expected["a"]) and found["b"] == pytest.approx(expected["b"])


@pytest.mark.parametrize("how", ["sum", "zscore", "rank"])
def test_what_says_nothing_comes_last_and_changes_nothing(how):
    dead = {"x": -math.inf, "y": -math.inf}
    found = combine_scores({"dead": dead, **TABLE}, how)
    assert found.pop("dead") == -math.inf
    assert found == pytest.approx(combine_scores(TABLE, how))
    assert combine_scores({"dead": dead}, how) == {"dead": -math.inf}


def test_a_constant_score_counts_for_nothing():
    table = {n: {"x": 0.1, "y": float(n)} for n in range(3)}
    found = combine_scores(table, "zscore")
    assert found[1] == 0 and found[2] == pytest.approx(math.sqrt(1.5))


def judge(code, repeats):
    return {"ones": float(sum(code)), "first": code[0] + 0.5 * len(repeats)}


def run(seed=0, judge=judge, **settings) -> ScoredSearch:
    config = {
        "candidates": 40,
        "population": 10,
        "sample": 5,
        "parents": 2,
        "recheck": 3,
        "recheck_repeats": 2,
        **settings,
    }
    search = ScoredSearch(SPACE, None, judge, ScoredSearchConfig(**config), seed=seed)
    for number in range(len(search)):
        search.step(number)
    return search


def test_equal_members_are_judged_once_and_the_best_again():
    asked: list[tuple[tuple[int, ...], range]] = []

    def noting(code, repeats):
        asked.append((code, repeats))
        return judge(code, repeats)

    search = run(judge=noting)
    first = [code for code, repeats in asked if repeats == range(1)]
    again = [code for code, repeats in asked if repeats == range(1, 3)]
    assert len(first) == len(set(first)) == len(search.scores)
    assert again == search.finalists and len(again) == 3
    code = again[0]
    assert search.scores[code]["first"] == pytest.approx((code[0] + 0.5 + 2 * (code[0] + 1.0)) / 3)
    assert search.best() in again and len(search.searcher.history) == 40


def test_the_best_of_the_whole_history_wins():
    search = run(combine="sum", recheck=0)
    joined = search.joined()
    assert joined[search.best()] == max(joined.values())


def test_a_search_resumes_exactly_at_any_step():
    whole = run()
    for stop in (0, 4, 25, 41):
        search = ScoredSearch(SPACE, None, judge, whole.config, seed=0)
        for number in range(stop):
            search.step(number)
        other = ScoredSearch(SPACE, None, judge, whole.config, seed=77)
        other.load_state_dict(copy.deepcopy(search.state_dict()))
        for number in range(stop, len(other)):
            other.step(number)
        assert other.scores == whole.scores and other.finalists == whole.finalists
        assert other.searcher.history == whole.searcher.history and other.best() == whole.best()


def test_mistakes_are_named():
    with pytest.raises(InputError, match="nothing was searched"):
        ScoredSearch(SPACE, None, judge, ScoredSearchConfig()).best()
    nothing = run(judge=lambda code, repeats: {"x": -math.inf})
    with pytest.raises(InputError, match="none of .* candidates says anything"):
        nothing.best()
    with pytest.raises(InputError, match="parents <= sample <= population, not 5, 4 and 36"):
        ScoredSearchConfig.make(sample=4)
