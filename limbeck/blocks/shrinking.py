"""When the sub-networks of a super-network begin to be trained, how strongly, and which of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.core.errors import InputError

ORDER = ("kernel", "depth", "width")
"""In which order progressive shrinking opens the kinds of choices."""


@dataclass(frozen=True)
class Phase:
    """A part of progressive shrinking.

    Attributes:
        name: the kind of choice that opens, and how far.
        first, end: its steps.
        least: for each kind, the number of the smallest option that may be drawn.
    """

    name: str
    first: int
    end: int
    least: Mapping[Any, int]


@dataclass(frozen=True)
class ShrinkingPlan:
    r"""The course of one training, in steps.

    Up to ``begins`` only the full network is trained; from ``full_speed`` on, sub-networks have the full weight. In between their
    weight ramps so that their effective learning rate rises linearly from 0 to what the full network has at ``full_speed``: with the
    schedule :math:`\eta`, the ramp's steps :math:`b \le t < f` and the multiplier m,

    .. math:: \beta(t) = m \, \frac{\eta(f)}{\eta(t)} \cdot \frac{t - b}{f - b}, \qquad \beta(t) = m \text{ from } f \text{ on}

    Attributes:
        steps: of the whole training.
        begins, full_speed: see above.
        networks: passes of a step once sub-networks are trained, the full network's included where it takes part.
        teacher: a frozen teacher's pass comes on top of these.
        phases: of progressive shrinking; none: all sub-networks at once.

    Source: "DepS: Delayed ε-Shrinking for Faster Once-For-All Training" (2024); phases of "Once-for-All" (2020).
    """

    steps: int
    begins: int
    full_speed: int
    networks: int
    teacher: bool = False
    phases: tuple[Phase, ...] = ()

    @classmethod
    def of(
        cls,
        steps: int,
        *,
        start: float,
        ramp: float,
        networks: int,
        teacher: bool = False,
        options: Mapping[str, int] | None = None,
    ) -> ShrinkingPlan:
        """A plan by fractions of the training.

        Args:
            steps: of the whole training.
            start: where full-speed shrinking begins.
            ramp: how long before that the ramp begins.
            networks, teacher: see the class.
            options: for progressive shrinking: how many options there are of each kind.

        Raises:
            InputError: too few steps for that many phases.
        """
        full_speed = round(start * steps)
        if options is None:
            begins = max(0, full_speed - round(ramp * steps))
            return cls(steps, begins, full_speed, networks, teacher)
        opened = _openings(options)
        if steps - full_speed < len(opened) or full_speed < 1:
            raise InputError(
                f"progressive shrinking of {steps} steps needs a step for the full network and for each of {len(opened)} phases: "
                "train longer, or set start"
            )
        bounds = [full_speed + round(i * (steps - full_speed) / len(opened)) for i in range(len(opened) + 1)]
        phases = tuple(Phase(name, bounds[i], bounds[i + 1], least) for i, (name, least) in enumerate(opened))
        return cls(steps, full_speed, full_speed, networks, teacher, phases)

    def weight(self, step: int, rate: Callable[[int], float]) -> float:
        """The weight of sub-networks' losses at a step, for the multiplier 1.

        Args:
            step: from 0.
            rate: the full network's learning rate by step, up to a factor.
        """
        if step >= self.full_speed:
            return 1.0
        if step < self.begins:
            return 0.0
        now = rate(step)
        share = (step - self.begins) / (self.full_speed - self.begins)
        return share * rate(self.full_speed) / now if now > 0 else share

    def phase(self, step: int) -> Phase | None:
        """The phase of progressive shrinking that a step belongs to; beyond the end it is the last one."""
        found = [p for p in self.phases if p.first <= step]
        return found[-1] if found else None

    @property
    def passes(self) -> int:
        """Forward passes of the whole training, in batches, as the published cost counts them."""
        return self.begins + (self.steps - self.begins) * (self.networks + self.teacher)


def same_passes(passes: int, plan: Callable[[int], ShrinkingPlan], least: int = 1) -> int:
    """How many steps of another plan come to as many forward passes.

    Args:
        passes: to be matched.
        plan: steps -> plan.
        least: steps at least.
    """
    grid = 10_000  # fractions of training are alike at any length
    return max(least, round(passes * grid / plan(grid).passes))


def _openings(options: Mapping[str, int]) -> list[tuple[str, Mapping[str, int]]]:
    """Kernels at once, then depths and widths one option at a time; what is not yet open stays at its largest."""
    least = {kind: count - 1 for kind, count in options.items()}
    found: list[tuple[str, Mapping[str, int]]] = []
    for kind in ORDER:
        lows: Sequence[int] = range(options.get(kind, 1) - 2, -1, -1)
        for low in lows[-1:] if kind == "kernel" else lows:
            least = {**least, kind: low}
            found.append((kind if kind == "kernel" else f"{kind} {options[kind] - 1 - low}", least))
    return found
