"""Spaces are products of choices; searches stay within budgets and resume exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limbeck.blocks.evolution import Evolution, RandomSearch, run_search
from limbeck.blocks.search_spaces import Budget, SearchSpace
from limbeck.core.errors import InputError

SPACE = SearchSpace(
    "layers",
    {"depth": (1, 2, 3), "width": (4, 8), "bias": (True, False), "kind": ("linear",)},
    lambda **_: nn.Identity(),
)


def test_codes_and_options_are_the_same_thing() -> None:
    assert len(SPACE) == 12 == len(set(SPACE))
    for code in SPACE:
        assert SPACE.code(**SPACE.options(code)) == code
    assert SPACE.text((2, 0, 1, 0)) == "3-4-False-linear"


def test_draws_are_uniform_and_mutations_change_one_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [SPACE.sample(generator) for _ in range(6000)]
    counts = torch.tensor([drawn.count(code) for code in SPACE]).double()
    assert float(((counts - 500) ** 2 / 500).sum()) < 31.3  # chi-squared, 11 degrees of freedom, p = .001
    changed = [SPACE.mutate((1, 0, 0, 0), generator) for _ in range(3000)]
    differences = [sum(a != b for a, b in zip(code, (1, 0, 0, 0), strict=True)) for code in changed]
    assert set(differences) == {1}
    share = sum(code[1] == 1 for code in changed) / len(changed)
    assert abs(share - 1 / 3) < 0.04  # choices, not options, are drawn uniformly


def test_nothing_over_budget_is_proposed() -> None:
    budget = Budget(lambda code: {"size": code[0] + code[1]}, {"size": 2})
    search = Evolution(SPACE, budget, population=6, sample=3, parents=2, seed=1)
    for _ in range(60):
        code = search.ask()
        assert code[0] + code[1] <= 2
        search.tell(code, float(sum(code)))


def test_evolution_finds_what_is_best_and_random_search_remembers_it() -> None:
    space = SearchSpace("bits", {f"b{n}": (0, 1) for n in range(16)}, lambda **_: nn.Identity())
    found = run_search(Evolution(space, population=20, sample=8, parents=2, seed=0), sum, 400)
    chance = run_search(RandomSearch(space, seed=0), sum, 400)
    assert found[0][1] >= 15 > chance[0][1]
    assert [score for _, score in chance] == sorted((score for _, score in chance), reverse=True)


def test_parents_are_the_best_of_the_young() -> None:
    search = Evolution(SPACE, population=4, sample=4, parents=1, seed=0)
    for code, score in (((0, 0, 0, 0), 9.0), *(((2, n % 2, 1, 0), float(n)) for n in range(4))):
        search.tell(code, score)
    for _ in range(20):  # the best of all is too old; the child descends from the best of the last four
        child = search.ask()
        assert sum(a != b for a, b in zip(child, (2, 1, 1, 0), strict=True)) == 1


def test_a_search_resumes_exactly() -> None:
    search = Evolution(SPACE, population=5, sample=3, parents=2, crossover=0.5, seed=3)
    for _ in range(9):
        code = search.ask()
        search.tell(code, float(sum(code)))
    state = copy.deepcopy(search.state_dict())
    onward = [search.ask() for _ in range(1)]
    search.tell(onward[0], 1.0)
    onward.append(search.ask())
    again = Evolution(SPACE, population=5, sample=3, parents=2, crossover=0.5, seed=99)
    again.load_state_dict(state)
    first = again.ask()
    again.tell(first, 1.0)
    assert [first, again.ask()] == onward


def test_a_score_that_is_no_number_never_wins() -> None:
    search = RandomSearch(SPACE)
    search.tell((0, 0, 0, 0), float("nan"))
    search.tell((1, 0, 0, 0), -1e9)
    assert search.best() == [((1, 0, 0, 0), -1e9)]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (lambda: SearchSpace("empty", {"a": ()}, nn.Identity), "no options"),
        (lambda: SPACE.options((0, 0)), "4 choices"),
        (lambda: SPACE.options((7, 0, 0, 0)), "no option 7"),
        (lambda: SPACE.code(depth=9, width=4, bias=True, kind="linear"), "one of 1, 2, 3"),
        (lambda: Budget(lambda _: {}, {"size": 0}), "positive"),
        (
            lambda: RandomSearch(SPACE, Budget(lambda c: {"size": 5 + c[0]}, {"size": 4}, tries=40)).ask(),
            r"least seen is 5",
        ),
        (lambda: RandomSearch(SPACE).best(), "nothing was searched"),
        (lambda: Evolution(SPACE, population=2, sample=3), "parents <= sample"),
    ],
    ids=["empty", "short", "range", "option", "budget", "impossible", "nothing", "sizes"],
)
def test_mistakes_are_named(mistake: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        mistake()  # type: ignore[operator]
