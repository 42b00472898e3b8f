"""A search whose members have several scores, which are joined over all members that were judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from limbeck.blocks.evolution import make_search
from limbeck.blocks.search_spaces import Budget, Code, SearchSpace
from limbeck.core.config import Config
from limbeck.core.errors import InputError

Combination = Literal["sum", "zscore", "rank"]


def combine_scores(table: Mapping[Any, Mapping[str, float]], how: Combination = "zscore") -> dict[Any, float]:
    """One score for each member of a table, from several.

    Args:
        table: scores by name, for each member; all have the same names.
        how: ``sum``: plain; ``zscore``: each score less its mean, divided by its standard deviation over the members; ``rank``: the share of members
            that are worse (equal ones count half). Means and deviations leave out what is infinite.

    Returns:
        their sums; minus infinity where a score is.
    """
    members = list(table)
    if not members:
        return {}
    columns = torch.tensor([list(table[m].values()) for m in members], dtype=torch.float64)
    alive = torch.isfinite(columns).all(1)
    kept = columns[alive]
    if how == "zscore" and len(kept):
        deviation = kept.std(0, correction=0)
        kept = (kept - kept.mean(0)) / deviation.masked_fill(deviation <= 1e-12 * kept.abs().amax(0), math.inf)
    elif how == "rank":
        worse = (kept[:, None] > kept[None]).double() + 0.5 * (kept[:, None] == kept[None]).double()
        kept = (worse.sum(1) - 0.5) / max(1, len(kept) - 1)
    found = torch.full((len(members),), -math.inf, dtype=torch.float64)
    found[alive] = kept.sum(1)
    return dict(zip(members, found.tolist(), strict=True))


class ScoredSearchConfig(Config):
    """How a search with several scores goes."""

    candidates: int = Field(300, ge=1, description="how many members the search judges, equal ones included")
    algorithm: Literal["evolution", "random"] = Field("evolution", description="how members are proposed")
    population: int = Field(36, ge=1, description="members of the evolution that are alive")
    sample: int = Field(8, ge=1, description="drawn from them for each child")
    parents: int = Field(5, ge=1, description="best of the sample, one of which is the parent")
    combine: Combination = Field(
        "zscore", description="how several scores are joined: plain sum, sum of standardised scores, or of ranks"
    )
    repeats: int = Field(1, ge=1, description="batches and draws of weights that a candidate's scores are means of")
    recheck: int = Field(5, ge=0, description="how many of the best are judged again; 0: none")
    recheck_repeats: int = Field(4, ge=1, description="further batches and draws for those")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if not self.parents <= self.sample <= self.population:
            raise ValueError(
                f"an evolution needs parents <= sample <= population, not {self.parents}, {self.sample} and {self.population}"
            )
        return self

    @property
    def all_repeats(self) -> int:
        """How many batches and draws a member is judged on at most."""
        return self.repeats + (self.recheck_repeats if self.recheck else 0)


class ScoredSearch:
    """Judges what a searcher proposes, one member per step; at the end the best ones again, from other draws.

    Equal members are judged once. Since a joined score may depend on all members that were seen, the searcher's history is scored anew after every step. The
    second judgement of a finalist and its first are averaged, each counting as many times as it had repeats.

    Its state belongs in a checkpoint: :meth:`state_dict`, :meth:`load_state_dict`.

    Args:
        space, budget: what is searched, see :class:`~limbeck.blocks.evolution.RandomSearch`.
        judge: (code, repeats) -> scores by name, means over these repeats.
        config: see :class:`ScoredSearchConfig`.
        seed: of the proposals.

    Attributes:
        scores: for each judged member its scores by name.
        finalists: members that are judged again.
    """

    def __init__(
        self,
        space: SearchSpace,
        budget: Budget | None,
        judge: Callable[[Code, range], Mapping[str, float]],
        config: ScoredSearchConfig,
        *,
        seed: int = 0,
    ) -> None:
        sizes = {"population": config.population, "sample": config.sample, "parents": config.parents}
        self.searcher = make_search(config.algorithm, space, budget, config.candidates, seed=seed, **sizes)
        self.judge, self.config = judge, config
        self.scores: dict[Code, dict[str, float]] = {}
        self.finalists: list[Code] = []

    def __len__(self) -> int:
        """How many steps there are."""
        return self.config.candidates + self.config.recheck

    def step(self, number: int) -> float:
        """Step ``number``; gives the joined score of the member that was judged (minus infinity also where there was none)."""
        config = self.config
        code: Code | None = None
        if number < config.candidates:
            code = self.searcher.ask()
            if code not in self.scores:
                self.scores[code] = dict(self.judge(code, range(self.config.repeats)))
            self.searcher.tell(code, -math.inf)
        else:
            place = number - self.config.candidates
            if place == 0:
                self.finalists = [c for c, score in self.searcher.best(self.config.recheck) if score > -math.inf]
            if place < len(self.finalists):  # there may be fewer than were asked for
                code = self.finalists[place]
                again = self.judge(code, range(config.repeats, config.all_repeats))
                self.scores[code] = {
                    name: (config.repeats * first + config.recheck_repeats * again[name]) / config.all_repeats
                    for name, first in self.scores[code].items()
                }
        joined = self.joined()
        self.searcher.history = [(c, joined[c]) for c, _ in self.searcher.history]
        return -math.inf if code is None else joined[code]

    def joined(self) -> dict[Code, float]:
        """The joined score of each member that was judged."""
        return combine_scores(self.scores, self.config.combine)

    def best(self) -> Code:
        """The best finalist; of all members where there are no finalists.

        Raises:
            InputError: nothing was judged, or all scores are minus infinity.
        """
        joined = self.joined()
        among = self.finalists or list(joined)
        if not among:
            raise InputError("nothing was searched yet")
        code = max(among, key=joined.__getitem__)
        if joined[code] == -math.inf:
            raise InputError(
                f"none of {len(joined)} candidates says anything that differs between samples: can networks of the space "
                f"'{self.searcher.space.name}' learn?"
            )
        return code

    def state_dict(self) -> dict[str, Any]:
        return {
            "searcher": self.searcher.state_dict(),
            "scores": [(code, dict(scores)) for code, scores in self.scores.items()],
            "finalists": list(self.finalists),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.searcher.load_state_dict(state["searcher"])
        self.scores = {tuple(code): dict(scores) for code, scores in state["scores"]}
        self.finalists = [tuple(code) for code in state["finalists"]]
