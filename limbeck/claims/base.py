"""What a claim is made of: arms that are trained, and checks that compare them.

Rules that the machinery keeps: every arm is measured on the same seeds; an arm with several candidate settings chooses among
them by its validation measure on separate tuning seeds, never by a test measure; test data is looked at once per trained
model. Rules that the author of a claim keeps: equal numbers of updates, as many candidates for a baseline as for the method,
at least three seeds, real data wherever there is any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Measures = Mapping[str, float]
TUNING_SEEDS = (1001, 1002)
MINUS = " - "
"""Between the names of two arms in a check: their difference, to be compared with another one."""


@dataclass(frozen=True)
class Outcome:
    """What one trained arm is worth: ``val`` for choosing among candidates, ``test`` for the record."""

    val: Measures
    test: Measures


@dataclass(frozen=True)
class Arm:
    """One way of doing it.

    Attributes:
        role: ``method``, ``baseline`` (what the paper compares with) or ``control`` (what tests the mechanism).
        description: one line for the reader.
        train: (settings, seed) -> outcome. Two arms that get the same seed start from the same weights and see the same order.
        candidates: settings to choose from on validation data.
    """

    role: Literal["method", "baseline", "control"]
    description: str
    train: Callable[[Mapping[str, Any], int], Outcome]
    candidates: Sequence[Mapping[str, Any]] = ({},)


@dataclass(frozen=True)
class Check:
    """One comparison: method - baseline, better by more than ``margin``.

    A negative margin asks for "no worse than by so much". Only headline checks make the verdict; the others are reported. In all
    but the first headline check ``method`` and ``baseline`` may be differences of two arms, as ``"late - early"``: then the check
    says whether an effect is larger in one place than in another.
    """

    statement: str
    method: str
    baseline: str
    metric: str
    margin: float = 0.0
    higher_is_better: bool = True
    headline: bool = True


@dataclass(frozen=True)
class Claim:
    """An experiment.

    Attributes:
        name: the method.
        arms: by name.
        checks: the first headline check gives the scoreboard's difference.
        data: what it ran on, for the record.
        seeds: how many by default.
        select: the validation measure by which candidates are chosen; the sign tells the direction ("-nll": lower is better).
        note: what a reader must know to judge the result, written from it: (result) -> text.
    """

    name: str
    arms: Mapping[str, Arm]
    checks: Sequence[Check]
    data: Mapping[str, Any]
    seeds: int = 5
    select: str = "accuracy"
    note: Callable[[Mapping[str, Any]], str] | str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
