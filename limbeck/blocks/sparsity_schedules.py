"""How sparsity grows while training goes on: at once, linearly, cubically, or in stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from limbeck.core.errors import InputError

Growth = Literal["constant", "linear", "cubic"]


@dataclass(frozen=True)
class SparsitySchedule:
    """Sparsity over the course of training.

        constant: s(p) = target
        linear:   s(p) = start + (target - start) q
        cubic:    s(p) = target + (start - target) (1 - q)³,    q = clip(p / end, 0, 1)

    with p the fraction of training that is done.

    Attributes:
        target: in [0, 1).
        growth: how it is reached.
        start: sparsity at the beginning, at most the target.
        end: fraction of training at which the target is reached, in (0, 1].

    Source of the cubic one: "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression" (2017).

    Raises:
        InputError: values out of range.
    """

    target: float
    growth: Growth = "constant"
    start: float = 0.0
    end: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.target < 1:
            raise InputError(
                f"sparsity goes from a start to a target, 0 <= start <= target < 1 (got {self.start:g} and {self.target:g})"
            )
        if not 0 < self.end <= 1:
            raise InputError(f"the target is reached at a fraction of training in (0, 1] (got {self.end:g})")

    def at(self, done: float) -> float:
        """The sparsity when a fraction ``done`` of training is over."""
        if self.growth == "constant":
            return self.target
        q = min(max(done / self.end, 0.0), 1.0)
        if self.growth == "linear":
            return self.start + (self.target - self.start) * q
        return self.target + (self.start - self.target) * (1 - q) ** 3

    def events(self, steps: int, count: int) -> dict[int, float]:
        """At which steps (0: before the first one) weights are pruned, and to what sparsity; the last reaches the target.

        Args:
            steps: of training.
            count: prunings, evenly spread up to ``end``; one for constant sparsity. Fewer where there are not so many steps.
        """
        if self.growth == "constant":
            return {0: self.target}
        if count < 2:
            raise InputError(f"sparsity that grows needs at least 2 prunings (got {count})")
        last = min(max(1, round(self.end * steps)), steps)
        # The first pruning is the end of the first of `count` equal parts of the growth, put at its beginning.
        return {round(last * n / count): self.at(self.end * (n + 1) / count) for n in range(count)}


def stages(targets: Sequence[float]) -> tuple[float, ...]:
    """Sparsities of successive cycles of pruning and training.

    Raises:
        InputError: none, one out of [0, 1), or one that is not above the one before it.
    """
    found = tuple(float(t) for t in targets)
    if not found or not all(0 <= t < 1 for t in found) or any(b <= a for a, b in itertools.pairwise(found)):
        raise InputError(f"sparsities of successive cycles must rise and lie in [0, 1) (got {list(found)})")
    return found
