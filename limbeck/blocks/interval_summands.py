"""Families of interval modules over R^n, each given by the corners where it begins and ends.

An interval summand I with birth corners B and death corners D has the support

.. math:: \\mathrm{supp}(I) = \\bigcup_{b \\in B,\\, d \\in D} [b, d],

a union of axis-parallel boxes; in one parameter it is a bar. A family of them is a candidate decomposition of a persistence
module. Corners of all summands lie in two flat tensors, so that everything about them is an operation on arrays, and gradients
go through to the corners.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.core.errors import InputError

Box = tuple[Any, Any]
"""Lower and upper corner, n numbers each."""


class CornerPairs(NamedTuple):
    """Boxes [b, d] that have an interior: one row for each.

    Attributes:
        births, deaths: (P, n).
        owner: (P,) int64, the summand that each belongs to, not falling.
    """

    births: Tensor
    deaths: Tensor
    owner: Tensor


@dataclass(frozen=True)
class IntervalSummands:
    """A candidate decomposition.

    Args:
        births: (B, n) birth corners, summand after summand; float64; -inf is allowed.
        deaths: (D, n) death corners; inf is allowed.
        birth_ptr: (S + 1,) int64: summand s has the birth corners ``birth_ptr[s] … birth_ptr[s + 1] - 1``.
        death_ptr: (S + 1,) int64, the same for death corners.
        degrees: (S,) int64 homology degree of each summand.

    Raises:
        InputError: shapes that do not fit, NaN, or a summand without corners.
    """

    births: Tensor
    deaths: Tensor
    birth_ptr: Tensor
    death_ptr: Tensor
    degrees: Tensor

    def __post_init__(self) -> None:
        count = len(self.degrees)
        for name, corners, ptr in (
            ("birth", self.births, self.birth_ptr),
            ("death", self.deaths, self.death_ptr),
        ):
            if corners.ndim != 2 or corners.shape[1] < 1 or not corners.is_floating_point():
                raise InputError(f"{name} corners must be floats of shape (corners, parameters), not {corners.shape}")
            if len(ptr) != count + 1 or int(ptr[0]) or int(ptr[-1]) != len(corners):
                raise InputError(f"{name}_ptr must go from 0 to {len(corners)} in {count + 1} numbers")
            if bool((ptr.diff() < 1).any()):
                raise InputError(f"summand {int((ptr.diff() < 1).nonzero()[0])} has no {name} corner")
            if bool(torch.isnan(corners).any()):
                raise InputError(f"{name} corners hold NaN: clean the filtration first")
        if self.births.shape[1] != self.deaths.shape[1]:
            raise InputError(
                f"birth corners have {self.births.shape[1]} parameters, death corners {self.deaths.shape[1]}"
            )

    # ---- making it -------------------------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls, corners: Iterable[tuple[Any, Any]], degrees: Sequence[int] | None = None, parameters: int = 2
    ) -> IntervalSummands:
        """From a list of (birth corners, death corners), each (·, n) or a single corner.

        Args:
            corners: by summand.
            degrees: of each summand; None: 0.
            parameters: n, for an empty list.
        """
        births: list[Tensor] = []
        deaths: list[Tensor] = []
        for birth, death in corners:
            for into, value in ((births, birth), (deaths, death)):
                found = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
                into.append(found[None] if found.ndim == 1 else found)
        if not births:
            return cls.empty(parameters)
        return cls(
            torch.cat(births),
            torch.cat(deaths),
            _pointer([len(b) for b in births]),
            _pointer([len(d) for d in deaths]),
            torch.zeros(len(births), dtype=torch.int64) if degrees is None else torch.tensor(list(degrees)),
        )

    @classmethod
    def empty(cls, parameters: int) -> IntervalSummands:
        """No summands: the zero module."""
        none, zero = torch.zeros(0, parameters, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
        return cls(none, none, zero, zero, torch.zeros(0, dtype=torch.int64))

    @classmethod
    def bars(cls, bars: Any, degree: int = 0) -> IntervalSummands:
        """A one-parameter barcode (S, 2) of births and deaths."""
        table = torch.as_tensor(bars, dtype=torch.float64).reshape(-1, 2)
        ptr = torch.arange(len(table) + 1)
        return cls(table[:, :1], table[:, 1:], ptr, ptr, torch.full((len(table),), degree))

    # ---- what it is ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.degrees)

    @property
    def parameters(self) -> int:
        """n."""
        return self.births.shape[1]

    def corners(self, number: int) -> tuple[Tensor, Tensor]:
        """Birth corners (·, n) and death corners (·, n) of one summand."""
        births = slice(int(self.birth_ptr[number]), int(self.birth_ptr[number + 1]))
        deaths = slice(int(self.death_ptr[number]), int(self.death_ptr[number + 1]))
        return self.births[births], self.deaths[deaths]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest finite coordinate of the corners, by parameter (n,); NaN where there is none."""
        both = torch.cat([self.births, self.deaths]).detach()
        finite = torch.isfinite(both)
        low = (
            torch.where(finite, both, torch.inf).amin(0) if len(both) else both.new_full((self.parameters,), torch.inf)
        )
        high = torch.where(finite, both, -torch.inf).amax(0) if len(both) else -low
        missing = ~torch.isfinite(low)
        return low.masked_fill(missing, torch.nan), high.masked_fill(missing, torch.nan)

    def pairs(self) -> CornerPairs:
        """All boxes [b, d] of each summand that have an interior; their union is the closure of its support's interior."""
        left, right = self.birth_ptr.diff(), self.death_ptr.diff()
        counts = left * right
        owner = torch.repeat_interleave(torch.arange(len(self)), counts)
        within = torch.arange(len(owner)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        births = self.births[self.birth_ptr[owner] + within // right[owner]]
        deaths = self.deaths[self.death_ptr[owner] + within % right[owner]]
        kept = (deaths > births).all(1)
        return CornerPairs(births[kept], deaths[kept], owner[kept])

    def lengths(self, box: Box | None = None) -> Tensor:
        r"""(S,) the length of each summand's longest diagonal bar, twice its interleaving distance to 0.

        .. math:: w(I) = \max_{b, d} \min_k \big(\min(d_k, \mathrm{box}_k) - \max(b_k, \mathrm{box}_k)\big)_+

        Args:
            box: what lies outside of it does not count; None: everything counts, and w may be infinite.
        """
        pairs = (self if box is None else self.clipped(box)).pairs()
        return largest_by_owner((pairs.deaths - pairs.births).amin(1), pairs.owner, len(self))

    # ---- changing it -----------------------------------------------------------------------------------------------------

    def of_degree(self, degree: int) -> IntervalSummands:
        """The summands of one homology degree."""
        return self.chosen((self.degrees == degree).nonzero()[:, 0])

    def chosen(self, index: Tensor) -> IntervalSummands:
        """The summands with the numbers ``index``."""
        parts = []
        for corners, ptr in ((self.births, self.birth_ptr), (self.deaths, self.death_ptr)):
            counts = ptr.diff()[index]
            ends = counts.cumsum(0)
            rows = torch.arange(int(counts.sum())) + torch.repeat_interleave(ptr[index] - (ends - counts), counts)
            parts.append((corners[rows], torch.cat([ends.new_zeros(1), ends])))
        (births, birth_ptr), (deaths, death_ptr) = parts
        return IntervalSummands(births, deaths, birth_ptr, death_ptr, self.degrees[index])

    def clipped(self, box: Box) -> IntervalSummands:
        """Birth corners are raised to the box's lower corner, death corners lowered to its upper one."""
        low, high = (torch.as_tensor(side, dtype=self.births.dtype) for side in box)
        return replace(self, births=torch.maximum(self.births, low), deaths=torch.minimum(self.deaths, high))

    def rescaled(self, box: Box) -> IntervalSummands:
        """In coordinates in which ``box`` is [0, 1]^n."""
        low, high = (torch.as_tensor(side, dtype=self.births.dtype) for side in box)
        if not bool((high > low).all()):
            raise InputError(f"a box needs upper numbers above its lower ones, not {low.tolist()} and {high.tolist()}")
        scale = high - low
        return replace(self, births=(self.births - low) / scale, deaths=(self.deaths - low) / scale)

    # ---- keeping it ------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Flat tensors by name, from which :meth:`from_tensors` makes it again."""
        return {name: getattr(self, name).detach() for name in _NAMES}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> IntervalSummands:
        """What :meth:`tensors` gave (or the same as arrays).

        Raises:
            InputError: something is missing or does not fit.
        """
        missing = [name for name in _NAMES if name not in tensors]
        if missing:
            raise InputError(f"a decomposition needs {', '.join(_NAMES)}: {missing[0]} is missing")
        return cls(**{name: torch.as_tensor(tensors[name]) for name in _NAMES})


_NAMES = ("births", "deaths", "birth_ptr", "death_ptr", "degrees")


def _pointer(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def largest_by_owner(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """The largest of the ``values`` (P, …) with each owner, and 0 for owners of none: (count, …)."""
    found = values.new_zeros((count, *values.shape[1:]))
    index = owner.reshape(-1, *[1] * (values.ndim - 1)).expand_as(values)
    return found.scatter_reduce(0, index, values, "amax")
