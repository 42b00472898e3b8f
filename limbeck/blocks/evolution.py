"""Evolutionary and random search under a budget, in resumable steps: ask for a member, tell its score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from limbeck.blocks.search_spaces import Budget, Code, SearchSpace
from limbeck.core.errors import InputError


class RandomSearch:
    """Members of a space drawn at random within a budget; the best of all that were told counts.

    ::

        search = RandomSearch(space, budget, seed=0)
        for _ in range(100):
            code = search.ask()
            search.tell(code, score(code))
        best, value = search.best()

    Its state is a checkpoint's business: :meth:`state_dict`, :meth:`load_state_dict`.

    Args:
        space: what is searched.
        budget: which members are allowed; None: all.
        seed: of the draws.

    Attributes:
        history: all (code, score) told so far, in order; higher scores are better.
    """

    def __init__(self, space: SearchSpace, budget: Budget | None = None, *, seed: int = 0) -> None:
        self.space = space
        self.budget = budget or Budget(lambda _: {})
        self.history: list[tuple[Code, float]] = []
        self.generator = torch.Generator().manual_seed(seed)

    def ask(self) -> Code:
        """The next member to judge."""
        return self._random()

    def tell(self, code: Code, score: float) -> None:
        """What a member is worth; NaN counts as worse than anything."""
        self.history.append((tuple(code), float("-inf") if score != score else float(score)))

    def best(self, count: int = 1) -> list[tuple[Code, float]]:
        """The best different members of the whole history with their best scores, best first; of equals the earlier.

        Raises:
            InputError: nothing was told yet.
        """
        if not self.history:
            raise InputError("nothing was searched yet: call ask and tell first")
        scores: dict[Code, float] = {}
        for code, score in self.history:
            scores[code] = max(score, scores.get(code, float("-inf")))
        return sorted(scores.items(), key=lambda item: -item[1])[:count]

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [(tuple(code), float(score)) for code, score in state["history"]]
        self.generator.set_state(state["generator"])

    def _random(self) -> Code:
        return self.budget.draw(lambda: self.space.sample(self.generator), f"the space '{self.space.name}'")


class Evolution(RandomSearch):
    """Regularised (ageing) evolution: the youngest members are the population, a child of one of the best of a sample joins it.

    The first ``population`` members are random. Then each time ``sample`` members of the population are drawn without replacement, one of the ``parents``
    best among them is the parent, uniformly, and its mutation is the child; children over budget are drawn anew. The oldest member leaves when a new one comes.

    Args:
        space, budget, seed: see :class:`RandomSearch`.
        population: members alive.
        sample: drawn for each child.
        parents: best of the sample that may be the parent.
        crossover: chance that a child mixes two parents, choice by choice, before it mutates.

    Source: "Regularized Evolution for Image Classifier Architecture Search" (2019); several parents as in "DisWOT" (2023).

    Raises:
        InputError: ``1 <= parents <= sample <= population`` or a chance in [0, 1] is violated.
    """

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget | None = None,
        *,
        population: int = 36,
        sample: int = 8,
        parents: int = 5,
        crossover: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(space, budget, seed=seed)
        if not 1 <= parents <= sample <= population:
            raise InputError(
                f"evolution needs 1 <= parents <= sample <= population, not parents={parents}, sample={sample}, population={population}"
            )
        if not 0 <= crossover <= 1:
            raise InputError(f"the chance of crossover must be in [0, 1] (got {crossover})")
        self.population, self.sample, self.parents, self.crossover = population, sample, parents, crossover

    def ask(self) -> Code:
        if len(self.history) < self.population:
            return self._random()
        return self.budget.draw(self._child, f"the space '{self.space.name}'")

    def _child(self) -> Code:
        alive = self.history[-self.population :]
        drawn = torch.randperm(len(alive), generator=self.generator)[: self.sample].tolist()
        ranked = sorted((alive[n] for n in drawn), key=lambda member: -member[1])[: self.parents]
        code = ranked[self._draw(len(ranked))][0]
        if self.crossover and float(torch.rand((), generator=self.generator)) < self.crossover:
            other = ranked[self._draw(len(ranked))][0]
            code = tuple((a, b)[self._draw(2)] for a, b in zip(code, other, strict=True))
        return self.space.mutate(code, self.generator)

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))


def make_search(
    algorithm: Literal["evolution", "random"],
    space: SearchSpace,
    budget: Budget | None,
    candidates: int,
    *,
    population: int = 36,
    sample: int = 8,
    parents: int = 5,
    seed: int = 0,
) -> RandomSearch:
    """A search by the name of its algorithm; the sizes of an evolution that gets few candidates are cut to their number."""
    if algorithm == "random":
        return RandomSearch(space, budget, seed=seed)
    population = min(population, candidates)
    sample = min(sample, population)
    return Evolution(space, budget, population=population, sample=sample, parents=min(parents, sample), seed=seed)


def run_search(search: RandomSearch, score: Callable[[Code], float], count: int) -> list[tuple[Code, float]]:
    """Judge ``count`` members one after the other; equal members are judged once. Gives the best ones, best first."""
    known: dict[Code, float] = dict(search.history)
    for _ in range(count):
        code = search.ask()
        if code not in known:
            known[code] = score(code)
        search.tell(code, known[code])
    return search.best(len(known))
