r"""Search over topological orders: the gradient of an acyclicity constraint proposes moves, an ordinary solver judges them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch

from limbeck.blocks.acyclicity import FloatArray, IntArray, walks
from limbeck.blocks.prefix_problems import Fitted, Move, PrefixProblem, moved
from limbeck.core.errors import InputError


def candidates(
    fitted: Fitted, gradient: FloatArray, limit: int, *, acyclicity: str = "log-det", xi: float = 0.0
) -> IntArray:
    r"""The forbidden pairs that an exchange would pay for soonest.

    .. math:: Y = \{(i, j) : j \text{ before } i,\ [\nabla h]_{ij} \le \tau,\ |[\nabla Q]_{ij}| \ge \xi\},

    with :math:`\tau` such that there are ``limit`` of them: pairs in the order of :math:`[\nabla h]_{ij}`, equal ones by falling :math:`|[\nabla Q]_{ij}|`. Where
    :math:`[\nabla h]_{ij} = 0` and :math:`[\nabla Q]_{ij} \neq 0` the solution is no KKT point: the edge i → j closes no cycle and lowers Q.
    At :math:`\xi = 0` every pair is a candidate, as in the authors' code: under an l1 penalty a turned edge may well be one whose gradient vanishes.

    Returns:
        (c, 2) positions (of j, of i), best first.
    """
    order = fitted.order
    first, last = np.triu_indices(len(order), 1)
    closed = walks(np.abs(fitted.weights), order, acyclicity)[first, last]
    pull = np.abs(gradient)[order[last], order[first]]
    ranked = np.lexsort((-pull, closed))
    ranked = ranked[pull[ranked] >= xi][:limit]
    return np.stack([first[ranked], last[ranked]], 1)


KKT_TOLERANCE = 1e-6
"""A gradient at or below it counts as zero."""


class OrderSearch:
    r"""Topological swaps with a small and a large neighbourhood.

    One :meth:`step`: all ``size_small`` first candidates are judged. If some lower Q, they are applied best first, each unless its window of
    positions overlaps one that was used already (``choose="multi"``), or the first that helps is applied alone (``choose="first"``). If none does, the
    candidates up to ``size_large`` are judged in the same way, which may help ``n_large`` times; where nothing helps, and there is no
    forbidden edge left that closes no cycle and would lower Q (:math:`[\nabla h]_{ij} = 0`, :math:`[\nabla Q]_{ij} \neq 0`), the search is over. Such an edge gets room: j is carried
    behind i with its descendants, which loses no edge; so what is found satisfies the conditions of Karush, Kuhn and Tucker as far as ``tol`` lets it. (A plain
    exchange of sparse solutions may lose more than it wins; that the search ends with this move is our decision.)

    Q strictly decreases with every step, by more than ``tol`` times its size; so the search ends. Windows that do not overlap change the scores of different nodes,
    so their gains add up; where Q is no sum over nodes and several moves together help less than the best of them, that one is taken alone.

    Args:
        problem: fits and judges.
        order: (d,) where to start.
        size_small, size_large: numbers of candidates; at most d(d-1)/2 count.
        n_large: how often the large neighbourhood may help.
        move: what is done with a pair: see :func:`limbeck.blocks.prefix_problems.moved`.
        choose: several moves at once, or the first that helps.
        acyclicity: whose gradient proposes: log-det, exponential, polynomial.
        xi: least absolute gradient of Q at a candidate.
        tol: least relative improvement.

    Attributes:
        history: Q at the start and after each step.
        evaluations: how many moves were judged.
        moves: how many were made.
        done: whether the search has ended.
    """

    def __init__(
        self,
        problem: PrefixProblem,
        order: IntArray,
        *,
        size_small: int = 100,
        size_large: int = 400,
        n_large: int = 1,
        move: Move = "swap",
        choose: Literal["multi", "first"] = "multi",
        acyclicity: str = "log-det",
        xi: float = 0.0,
        tol: float = 1e-9,
    ) -> None:
        if size_small < 1 or size_large < 0 or n_large < 0:
            raise InputError("size_small must be at least 1, size_large and n_large at least 0")
        self.problem, self.move, self.choose = problem, move, choose
        self.size_small, self.size_large, self.n_large = size_small, max(size_small, size_large), n_large
        self.acyclicity, self.xi, self.tol = acyclicity, xi, tol
        self.start = np.asarray(order, dtype=np.int64)
        self.history: list[float] = []
        self._fitted: Fitted | None = None
        self.evaluations = self.moves = self.used_large = 0
        self.done = len(order) < 2

    @property
    def fitted(self) -> Fitted:
        """The solution so far; the first fit is made when it is asked for."""
        if self._fitted is None:
            self._fitted = self.problem.fit(self.start)
            self.history = [self._fitted.score]
        return self._fitted

    def step(self) -> int:
        """One improvement; the number of moves that it made, 0 if the search has ended."""
        if self.done:
            return 0
        gradient = self.problem.gradient(self.fitted)
        pairs = candidates(self.fitted, gradient, self.size_large, acyclicity=self.acyclicity, xi=self.xi)
        made = self._improve(pairs[: self.size_small])
        if not made and self.used_large < self.n_large:
            made = self._improve(pairs[self.size_small :])
            self.used_large += made > 0
        if not made:
            made = self._carry(gradient)
        if made:
            self.moves += made
            self.history.append(self.fitted.score)
        self.done = not made
        return made

    def run(self, max_steps: int = 10_000) -> Fitted:
        """Steps until the search has ended, or ``max_steps`` of them."""
        for _ in range(max_steps):
            if not self.step():
                break
        return self.fitted

    def _improve(self, pairs: IntArray) -> int:
        if not len(pairs):
            return 0
        bar = self._bar()
        if self.choose == "first":
            for pair in pairs.tolist():
                self.evaluations += 1
                found = self._after([pair])
                if found.score < bar:
                    self._fitted = found
                    return 1
            return 0
        scores = self.problem.evaluate(self.fitted, pairs, self.move)
        self.evaluations += len(pairs)
        better = np.argsort(scores, kind="stable")
        better = better[scores[better] < bar]
        if not len(better):
            return 0
        chosen = disjoint(pairs[better])
        for picked in (chosen, chosen[:1]) if len(chosen) > 1 else (chosen,):
            found = self._after(picked)
            if found.score < bar and (len(picked) == 1 or found.score <= scores[better[0]]):
                self._fitted = found
                return len(picked)
        return 0

    def _carry(self, gradient: FloatArray) -> int:
        """Make room for an edge that closes no cycle: j goes behind i with all its descendants between them, so that no edge is lost."""
        order = self.fitted.order
        reached = walks(np.abs(self.fitted.weights), order)
        first, last = np.triu_indices(len(order), 1)
        pull = np.where(reached[first, last] == 0, np.abs(gradient)[order[last], order[first]], 0.0)
        for pair in np.argsort(-pull, kind="stable")[: self.size_small].tolist():
            if pull[pair] <= max(self.xi, KKT_TOLERANCE):
                break
            a, b = int(first[pair]), int(last[pair])
            window, carried = order[a : b + 1], reached[a, a : b + 1] > 0
            changed = order.copy()
            changed[a : b + 1] = np.concatenate([window[~carried], window[carried]])
            self.evaluations += 1
            found = self.problem.refit(self.fitted, changed, a, b)
            if found.score < self._bar():
                self._fitted = found
                return 1
        return 0

    def _bar(self) -> float:
        return self.fitted.score - self.tol * max(1.0, abs(self.fitted.score))

    def _after(self, pairs: list[list[int]]) -> Fitted:
        found = self.fitted
        for first, last in pairs:
            found = self.problem.refit(found, moved(found.order, first, last, self.move), first, last)
        return found

    # ---- resuming ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is done so far, in tensors and plain values."""
        arrays = {"order": self.fitted.order, "weights": self.fitted.weights, **self.fitted.parts}
        return {
            "arrays": {name: torch.from_numpy(value.copy()) for name, value in arrays.items()},
            "history": list(self.history),
            "counts": [self.evaluations, self.moves, self.used_large],
            "done": self.done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        arrays = {name: value.numpy().copy() for name, value in state["arrays"].items()}
        order, weights = arrays.pop("order"), arrays.pop("weights")
        self.history = list(state["history"])
        self._fitted = Fitted(order, weights, self.history[-1], arrays)
        self.evaluations, self.moves, self.used_large = state["counts"]
        self.done = state["done"]


class LateSearch:
    """A search in a checkpoint that is made when it is asked for: what it starts from may not be known before."""

    def __init__(self, search: Callable[[], OrderSearch]) -> None:
        self.search = search

    def state_dict(self) -> dict[str, Any]:
        return self.search().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.search().load_state_dict(state)


def disjoint(pairs: IntArray) -> list[list[int]]:
    """Those pairs of positions, in the order given, whose windows overlap none that was taken before them."""
    taken: list[list[int]] = []
    for first, last in pairs.tolist():
        if all(last < a or b < first for a, b in taken):
            taken.append([first, last])
    return taken
