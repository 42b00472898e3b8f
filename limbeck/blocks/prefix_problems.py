r"""The inner problem of a search over orders: the best weights that an order allows, and how they change when two nodes move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from limbeck.blocks.acyclicity import FloatArray, IntArray

Move = Literal["swap", "insert-after", "insert-before"]


@dataclass(frozen=True)
class Fitted:
    """The solution for one order.

    Attributes:
        order: (d,) the nodes from first to last.
        weights: (d, d), entry (i, j) for the edge i → j; zero where i does not come before j.
        score: Q of the weights.
        parts: what the problem itself wants to keep, by name.
    """

    order: IntArray
    weights: FloatArray
    score: float
    parts: Mapping[str, FloatArray] = field(default_factory=dict)


class PrefixProblem(ABC):
    r"""Base of :math:`\min_W Q(W)` subject to :math:`W_{ij} = 0` wherever i does not come before j.

    Attributes:
        size: the number d of variables.
        cheap_moves: whether judging all moves costs little more than judging a few.
    """

    size: int
    cheap_moves: bool = False

    @abstractmethod
    def fit(self, order: IntArray) -> Fitted:
        """The solution for an order."""

    @abstractmethod
    def refit(self, fitted: Fitted, order: IntArray, first: int, last: int) -> Fitted:
        """The solution for an order that differs from ``fitted.order`` at positions ``first`` … ``last`` alone: only those nodes are fitted again."""

    @abstractmethod
    def gradient(self, fitted: Fitted) -> FloatArray:
        """dQ/dW (d, d); where Q has a kink, its subgradient of least norm."""

    def evaluate(self, fitted: Fitted, windows: IntArray, move: Move) -> FloatArray:
        """Scores (c,) after each of several moves, given as pairs (c, 2) of positions."""
        return np.array([self.refit(fitted, moved(fitted.order, a, b, move), a, b).score for a, b in windows.tolist()])


def moved(order: IntArray, first: int, last: int, move: Move = "swap") -> IntArray:
    """The order after one move; only positions ``first`` … ``last`` change.

    ``swap`` exchanges the nodes at both ends, ``insert-after`` puts the first one behind the last, ``insert-before`` the last one before the first.
    """
    found = order.copy()
    if move == "swap":
        found[first], found[last] = order[last], order[first]
    elif move == "insert-after":
        found[first : last + 1] = np.roll(order[first : last + 1], -1)
    else:
        found[first : last + 1] = np.roll(order[first : last + 1], 1)
    return found


def allowed(order: IntArray, nodes: Sequence[int] | IntArray | None = None) -> FloatArray:
    """(d, k) one where the row's node comes before the column's node, else zero; the columns are ``nodes``, or all in their numbers' order."""
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    columns = place if nodes is None else place[np.asarray(nodes)]
    return (place[:, None] < columns[None, :]).astype(np.float64)


def least_norm(gradient: FloatArray, weights: FloatArray, l1: float) -> FloatArray:
    r"""The subgradient of least norm of a smooth function plus :math:`\lambda |W|_1`, from the smooth part's gradient."""
    if l1 == 0:
        return gradient
    shrunk = np.sign(gradient) * np.maximum(np.abs(gradient) - l1, 0.0)
    return np.where(weights == 0, shrunk, gradient + l1 * np.sign(weights))
