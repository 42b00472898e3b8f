"""Set functions over a ground set, and the greedy algorithms that maximise them.

::

    function = GraphCut(similarity_kernel(embeddings))
    chosen = greedy(function, 100)
    chosen.order, chosen.gains

A function holds the set chosen so far and what makes its gains cheap: running sums, maxima, a Cholesky factor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.blocks.similarity_kernels import BLOCK, Kernel
from limbeck.core.errors import InputError, UnknownNameError

Optimiser = Literal["naive", "lazy", "stochastic"]
_LAZY_BLOCK = 32  # stale bounds that are renewed at a time


class SetFunction(ABC):
    """A set function f with its chosen set S, which starts empty.

    Args:
        kernel: similarities of the ground set.

    Attributes:
        submodular: True if gains can only fall as S grows, which the lazy algorithm relies on.
        evaluations: how many gains were computed anew so far.
    """

    submodular: bool = True

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.chosen = kernel, list[int]()
        self.evaluations = 0

    @property
    def size(self) -> int:
        """n, the number of elements of the ground set."""
        return self.kernel.size

    @abstractmethod
    def gains(self, index: Tensor | None = None) -> Tensor:
        """f(S + v) - f(S) for the elements v in ``index`` (k,), or for all n; float64. Elements of S have no meaningful gain."""

    @abstractmethod
    def value(self, chosen: Sequence[int]) -> float:
        """f of any set, by its definition."""

    def add(self, element: int) -> None:
        """Put one element into S."""
        self._update(element)
        self.chosen.append(element)

    @abstractmethod
    def _update(self, element: int) -> None: ...

    def _column(self, element: int) -> Tensor:
        return self.kernel.columns(torch.tensor([element], device=self.kernel.device))[:, 0].double()

    def _block(self, chosen: Sequence[int]) -> Tensor:
        """K[:, chosen], (n, k) float64."""
        return self.kernel.columns(torch.tensor(list(chosen), dtype=torch.long, device=self.kernel.device)).double()


class GraphCut(SetFunction):
    """f(S) = λ Σ_{u in D, s in S} K(u, s) - Σ_{s, s' in S, s ≠ s'} K(s, s').

    The gain is λ Σ_{u in D} K(u, v) - 2 Σ_{s in S} K(s, v): how well v stands for the ground set D, less how much of it S has
    already. One column of K per element that is added keeps the gains of all elements up to date.

    Args:
        kernel: similarities; submodular if none is negative.
        representativeness: λ >= 0.

    Raises:
        InputError: λ below 0.

    Source: "Submodularity in Data Subset Selection and Active Learning" (2015); the gain as in "Dataset Quantization" (2023).
    """

    def __init__(self, kernel: Kernel, representativeness: float = 1.0) -> None:
        super().__init__(kernel)
        if not representativeness >= 0:
            raise InputError(f"the weight of representativeness must be at least 0 (got {representativeness})")
        self.representativeness, self.submodular = representativeness, kernel.nonnegative
        self._gains = representativeness * kernel.sums()
        self.evaluations = kernel.size

    def gains(self, index: Tensor | None = None) -> Tensor:
        return self._gains.clone() if index is None else self._gains[index]

    def _update(self, element: int) -> None:
        self._gains.sub_(self._column(element), alpha=2)

    def value(self, chosen: Sequence[int]) -> float:
        columns = self._block(chosen)
        own = columns[list(chosen)]
        return float(self.representativeness * columns.sum() - (own.sum() - own.diagonal().sum()))


class FacilityLocation(SetFunction):
    """f(S) = Σ_{u in D} max(0, max_{s in S} K(u, s)): how similar every element is to the nearest chosen one.

    Args:
        kernel: similarities.

    Source: "Submodularity in Data Subset Selection and Active Learning" (2015).
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._best = torch.zeros(kernel.size, dtype=torch.float64, device=kernel.device)

    def gains(self, index: Tensor | None = None) -> Tensor:
        index = torch.arange(self.size, device=self.kernel.device) if index is None else index
        self.evaluations += len(index)
        best = self._best[:, None]
        parts = [
            (self.kernel.columns(part).double() - best).clamp_min_(0).sum(0)
            for part in index.split(max(1, BLOCK // self.size))
        ]
        return torch.cat(parts)

    def _update(self, element: int) -> None:
        torch.maximum(self._best, self._column(element), out=self._best)

    def value(self, chosen: Sequence[int]) -> float:
        return float(self._block(chosen).amax(1).clamp_min(0).sum()) if len(chosen) else 0.0


class LogDeterminant(SetFunction):
    """f(S) = log det(K_S + r I): the volume that the chosen elements span, so their diversity.

    The gain of v is the logarithm of its variance given S, kept for all elements by one step of a Cholesky factorisation per
    element that is added (n (n + |S|) operations, n |S| numbers held).

    Args:
        kernel: similarities, positive semi-definite.
        ridge: r > 0.

    Raises:
        InputError: r not above 0.

    Source: "Fast Greedy MAP Inference for Determinantal Point Process to Improve Recommendation Diversity" (2018).
    """

    def __init__(self, kernel: Kernel, ridge: float = 1e-2) -> None:
        super().__init__(kernel)
        if not ridge > 0:
            raise InputError(f"the ridge must be above 0 (got {ridge})")
        self.ridge = ridge
        self._variance = kernel.diagonal() + ridge
        self._factor = self._variance.new_zeros(kernel.size, 16)  # rows of the Cholesky factor; grown by doubling
        self.evaluations = kernel.size

    def gains(self, index: Tensor | None = None) -> Tensor:
        variance = self._variance if index is None else self._variance[index]
        return variance.clamp_min(1e-300).log()  # what S determines has a variance of 0, up to rounding

    def _update(self, element: int) -> None:
        count = len(self.chosen)
        if count == self._factor.shape[1]:
            self._factor = torch.cat([self._factor, torch.zeros_like(self._factor)], 1)
        known = self._factor[:, :count]
        # K(v, v) + r appears on the diagonal alone; the element's own row is never asked for again.
        row = (self._column(element) - known @ known[element]) / self._variance[element].sqrt()
        self._factor[:, count] = row
        self._variance = (self._variance - row.square()).clamp_min(0)

    def value(self, chosen: Sequence[int]) -> float:
        own = self._block(chosen)[list(chosen)]
        return float(
            torch.linalg.slogdet(own + self.ridge * torch.eye(len(own), dtype=own.dtype, device=own.device))[1]
        )


FUNCTIONS: dict[str, type[SetFunction]] = {
    "graph-cut": GraphCut,
    "facility-location": FacilityLocation,
    "log-det": LogDeterminant,
}


@dataclass(frozen=True)
class Chosen:
    """What a greedy algorithm chose.

    Attributes:
        order: (k,) int64, elements in the order in which they were chosen.
        gains: (k,) float64, what each added when it was chosen.
    """

    order: Tensor
    gains: Tensor


def greedy(
    function: SetFunction,
    count: int,
    optimiser: Optimiser = "naive",
    *,
    epsilon: float = 0.1,
    generator: torch.Generator | None = None,
) -> Chosen:
    """Add ``count`` elements to a function's set, each the one of (nearly) the largest gain; of equal ones the first.

    Args:
        function: it is changed. What it holds already stays and is not chosen again.
        count: k, at most the elements that are left.
        optimiser: ``naive``: look at every gain each time. ``lazy``: the same choice, renewing only those gains that may be the
            largest; gains must only fall. ``stochastic``: the best of a random part of n / k · log(1 / epsilon) elements.
        epsilon: in (0, 1), for ``stochastic``.
        generator: draws the random parts, on the CPU; None: torch's global one.

    Raises:
        InputError: more elements asked for than are left; ``lazy`` with a function whose gains may rise; epsilon out of range.
        UnknownNameError: no such optimiser.

    Sources: "Accelerated greedy algorithms for maximizing submodular set functions" (1978) for lazy, "Lazier Than Lazy Greedy" (2015)
    for stochastic.
    """
    left = function.size - len(function.chosen)
    if not 0 <= count <= left:
        raise InputError(f"{count} elements cannot be chosen: {left} are left")
    if optimiser == "naive":
        return _naive(function, count)
    if optimiser == "lazy":
        if not function.submodular:
            raise InputError(
                f"the lazy algorithm needs gains that only fall, and those of {type(function).__name__} with negative similarities "
                "may rise: take the naive one, or the cosine kernel"
            )
        return _lazy(function, count)
    if optimiser == "stochastic":
        if not 0 < epsilon < 1:
            raise InputError(f"epsilon must lie between 0 and 1 (got {epsilon})")
        return _stochastic(function, count, epsilon, generator)
    raise UnknownNameError("optimiser", optimiser, ("naive", "lazy", "stochastic"))


def _naive(function: SetFunction, count: int) -> Chosen:
    taken = _taken(function)
    order, values = [], []
    for _ in range(count):
        gains = function.gains()
        best = int(gains.masked_fill_(taken, -math.inf).argmax())
        order.append(best)
        values.append(gains[best])
        taken[best] = True
        function.add(best)
    return _chosen(order, values)


def _lazy(function: SetFunction, count: int) -> Chosen:
    taken = _taken(function)
    bounds = function.gains().masked_fill_(taken, -math.inf)
    fresh = ~taken
    order, values = [], []
    for _ in range(count):
        best = int(bounds.argmax())
        while not fresh[best]:
            stale = bounds.masked_fill(fresh, -math.inf).topk(min(_LAZY_BLOCK, function.size)).indices
            stale = stale[~(fresh | taken)[stale]]
            bounds[stale] = function.gains(stale)
            fresh[stale] = True
            best = int(bounds.argmax())
        order.append(best)
        values.append(bounds[best].clone())
        function.add(best)
        taken[best] = True
        bounds[best] = -math.inf
        fresh.fill_(False)
    return _chosen(order, values)


def _stochastic(function: SetFunction, count: int, epsilon: float, generator: torch.Generator | None) -> Chosen:
    left = (~_taken(function)).nonzero().flatten().cpu()
    part = math.ceil(len(left) / max(1, count) * math.log(1 / epsilon))
    order, values = [], []
    for _ in range(count):
        drawn = torch.randperm(len(left), generator=generator)[:part].sort().values
        gains = function.gains(left[drawn].to(function.kernel.device))
        winner = int(gains.argmax())
        place = int(drawn[winner])
        best = int(left[place])
        order.append(best)
        values.append(gains[winner])
        function.add(best)
        left = torch.cat([left[:place], left[place + 1 :]])
    return _chosen(order, values)


def _taken(function: SetFunction) -> Tensor:
    taken = torch.zeros(function.size, dtype=torch.bool, device=function.kernel.device)
    taken[function.chosen] = True
    return taken


def _chosen(order: list[int], values: list[Tensor]) -> Chosen:
    gains = torch.stack(values).cpu() if values else torch.zeros(0, dtype=torch.float64)
    return Chosen(torch.tensor(order, dtype=torch.long), gains)
