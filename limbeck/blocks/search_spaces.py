"""Search spaces as products of choices, and budgets that say which of their members may be taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from limbeck.core.errors import InputError

Code = tuple[int, ...]
"""A member of a space: for each of its choices the number of the option taken."""


@dataclass(frozen=True)
class SearchSpace:
    """All combinations of one option for each choice, and how a combination becomes a network.

    ::

        space = SearchSpace("depths", {"first": (1, 3), "second": (1, 3, 5)}, lambda first, second: MyNet(first, second))
        code = space.sample(torch.Generator().manual_seed(0))
        network = space.build(code)

    Attributes:
        name: for messages and records.
        choices: options by the name of the choice.
        make: called with the chosen options by name; a network with fresh weights.
    """

    name: str
    choices: Mapping[str, Sequence[Any]]
    make: Callable[..., nn.Module]

    def __post_init__(self) -> None:
        empty = [name for name, options in self.choices.items() if not len(options)]
        if not self.choices or empty:
            what = f"choice '{empty[0]}' has no options" if empty else "there are no choices"
            raise InputError(f"nothing can be searched in the space '{self.name}': {what}")

    def __len__(self) -> int:
        return math.prod(map(len, self.choices.values()))

    def __iter__(self) -> Iterator[Code]:
        """All codes, in order."""
        return product(*(range(len(options)) for options in self.choices.values()))

    def sample(self, generator: torch.Generator) -> Code:
        """A member, uniformly."""
        return tuple(_draw(len(options), generator) for options in self.choices.values())

    def mutate(self, code: Code, generator: torch.Generator) -> Code:
        """A neighbour: one choice, uniformly among those with several options, takes another of its options, uniformly.

        Raises:
            InputError: the space has one member only.
        """
        sizes = [len(options) for options in self.choices.values()]
        free = [number for number, size in enumerate(sizes) if size > 1]
        if not free:
            raise InputError(f"the space '{self.name}' has one member: there is nothing to search")
        at = free[_draw(len(free), generator)]
        other = _draw(sizes[at] - 1, generator)
        return (*code[:at], other + (other >= code[at]), *code[at + 1 :])

    def options(self, code: Code) -> dict[str, Any]:
        """The options taken, by the names of their choices.

        Raises:
            InputError: no member of this space.
        """
        if len(code) != len(self.choices):
            raise InputError(f"{code} is no member of the space '{self.name}': it has {len(self.choices)} choices")
        for number, (name, options) in zip(code, self.choices.items(), strict=True):
            if not 0 <= number < len(options):
                raise InputError(f"choice '{name}' of the space '{self.name}' has no option {number}")
        return {name: options[n] for n, (name, options) in zip(code, self.choices.items(), strict=True)}

    def code(self, **options: Any) -> Code:
        """The member with these options.

        Raises:
            InputError: a choice is missing, unknown, or has no such option.
        """
        if set(options) != set(self.choices):
            raise InputError(
                f"the space '{self.name}' has the choices {', '.join(self.choices)}, not {', '.join(options)}"
            )
        for name, value in options.items():
            if value not in self.choices[name]:
                known = ", ".join(map(str, self.choices[name]))
                raise InputError(f"choice '{name}' of the space '{self.name}' is one of {known}, not {value}")
        return tuple(list(self.choices[name]).index(options[name]) for name in self.choices)

    def text(self, code: Code) -> str:
        """The options in short, joined by hyphens."""
        return "-".join(str(option) for option in self.options(code).values())

    def build(self, code: Code) -> nn.Module:
        """The network of a member, with fresh weights."""
        return self.make(**self.options(code))


@dataclass
class Budget:
    """Upper bounds on what a member may cost.

    Attributes:
        cost: code -> costs by name (``parameters``, ``flops``, ``latency`` …).
        most: the largest value allowed for each cost that is bounded.
        tries: draws before a space counts as having no member within the bounds.
    """

    cost: Callable[[Code], Mapping[str, float]]
    most: Mapping[str, float] = field(default_factory=dict)
    tries: int = 1000

    def __post_init__(self) -> None:
        for name, bound in self.most.items():
            if not bound > 0:
                raise InputError(f"a budget must be positive ({name} is {bound})")
        self._known: dict[Code, dict[str, float]] = {}

    def costs(self, code: Code) -> dict[str, float]:
        """The costs of a member; computed once."""
        if code not in self._known:
            self._known[code] = dict(self.cost(code))
        return self._known[code]

    def allows(self, code: Code) -> bool:
        """Whether a member is within all bounds."""
        if not self.most:
            return True
        costs = self.costs(code)
        return all(costs[name] <= bound for name, bound in self.most.items())

    def draw(self, propose: Callable[[], Code], what: str = "the search space") -> Code:
        """The first of the proposed members that is allowed.

        Raises:
            InputError: none of ``tries``; it names the bound and the least that was seen.
        """
        seen: dict[str, float] = {}
        for _ in range(self.tries):
            code = propose()
            if self.allows(code):
                return code
            costs = self.costs(code)
            seen = {name: min(seen.get(name, math.inf), costs[name]) for name in self.most}
        bounds = ", ".join(
            f"{name} <= {bound:g} (the least seen is {seen[name]:g})" for name, bound in self.most.items()
        )
        raise InputError(f"no member of {what} is within the budget in {self.tries} draws: {bounds}; allow more")


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
