r"""Nonlinear regressions along an order: one small network per node, on the nodes before it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from limbeck.blocks.acyclicity import FloatArray, IntArray
from limbeck.blocks.prefix_problems import Fitted, PrefixProblem, least_norm
from limbeck.core.errors import InputError

Inputs = tuple[IntArray, FloatArray]


class NetworkPrefixes(PrefixProblem):
    r"""Node j is :math:`f_j(x) = b_j^T \sigma(A_j x)`, with :math:`A_j` (h, d) zero in the columns of what does not come before j, and

    .. math:: Q = \tfrac12 E \quad\text{or}\quad \tfrac d2 \log E, \qquad E = \tfrac1n \sum_j \|x_j - f_j(x)\|^2, \qquad
              \ldots + \lambda_1 \sum_j |A_j|_1 + \tfrac{\lambda_2}{2} \sum_j (\|A_j\|^2 + \|b_j\|^2).

    The weight of the edge i → j is the norm of the i-th column of :math:`A_j`. With the squared loss every network is trained by itself; with its logarithm those
    of one move together. Training is L-BFGS-B, with the positive and negative parts of :math:`A_j` apart, so that the l1 penalty leaves exact zeros; a move keeps
    all weights (forbidden ones become zero, newly allowed ones start there) and trains the networks between its ends alone. Where all inputs of a
    network are zero, no gradient can wake it once its last layer is zero too; it is trained from its first random weights as well, and the better result is kept.
    Columns of zeros have no edges: they start without weights, and no gradient gives them any.

    Args:
        data: (n, d), columns of comparable scale.
        hidden: units h of each network.
        l1, l2: weights of the penalties.
        loss: squared, or its logarithm.
        tol: relative change of the loss at which training stops.
        max_iter: iterations of one training at most.
        seed: draws where training starts.
    """

    def __init__(
        self,
        data: FloatArray,
        *,
        hidden: int = 40,
        l1: float = 0.01,
        l2: float = 0.01,
        loss: Literal["squared", "log"] = "squared",
        tol: float = 1e-4,
        max_iter: int = 100,
        seed: int = 0,
    ) -> None:
        self.data, self.hidden, self.l1, self.l2 = np.asarray(data, dtype=np.float64), hidden, l1, l2
        self.loss, self.tol, self.max_iter = loss, tol, max_iter
        self.size = self.data.shape[1]
        generator = np.random.default_rng(seed)
        self._first = generator.uniform(-1, 1, (self.size, hidden, self.size)) / np.sqrt(self.size)
        self._second = generator.uniform(-1, 1, (self.size, hidden)) / np.sqrt(hidden)
        empty = ~self.data.any(0)
        self._first[empty], self._second[empty], self._first[:, :, empty] = 0.0, 0.0, 0.0

    # ---- the inner problem -------------------------------------------------------------------------------------------------

    def fit(self, order: IntArray) -> Fitted:
        return self._trained(order, 0, self.size - 1, self._first, self._second, np.zeros(self.size))

    def refit(self, fitted: Fitted, order: IntArray, first: int, last: int) -> Fitted:
        parts = fitted.parts
        return self._trained(order, first, last, parts["first"], parts["second"], parts["errors"])

    def gradient(self, fitted: Fitted) -> FloatArray:
        """(d, d): norms over the hidden units of the gradients of least norm in each column of the first layers."""
        found = np.zeros((self.size, self.size))
        factor = self._factor(float(fitted.parts["errors"].sum()))
        for node in range(self.size):
            first, second = fitted.parts["first"][node], fitted.parts["second"][node]
            slope = factor * _error(self.data, self.data[:, node], first, second)[1] + self.l2 * first
            found[:, node] = np.linalg.norm(least_norm(slope, first, self.l1), axis=0)
        np.fill_diagonal(found, 0.0)
        return found

    def predict(self, fitted: Fitted, data: FloatArray) -> FloatArray:
        """(n, d): what every network makes of the samples."""
        columns = zip(fitted.parts["first"], fitted.parts["second"], strict=True)
        return np.stack([expit(data @ first.T) @ second for first, second in columns], 1)

    # ---- training ----------------------------------------------------------------------------------------------------------

    def _trained(
        self, order: IntArray, start: int, end: int, first: FloatArray, second: FloatArray, errors: FloatArray
    ) -> Fitted:
        first, second, errors = first.copy(), second.copy(), errors.copy()
        places = [[place] for place in range(start, end + 1)]
        if self.loss == "log":
            places = [[place for group in places for place in group]]
        for group in places:
            nodes = order[group]
            rest = float(np.delete(errors, nodes).sum())
            inputs = [(order[:place], np.ascontiguousarray(self.data[:, order[:place]])) for place in group]
            _, found = min(
                (self._minimise(nodes, inputs, *start, rest) for start in self._starts(nodes, inputs, first, second)),
                key=lambda result: result[0],
            )
            for node, (parents, seen), (own_first, own_second) in zip(nodes.tolist(), inputs, found, strict=True):
                first[node], second[node] = 0.0, own_second
                first[node][:, parents] = own_first
                errors[node] = _error(seen, self.data[:, node], own_first, own_second)[0]
        score = self._value(float(errors.sum())) + self._penalty(first, second)
        if not np.isfinite(score):
            raise InputError("training a network gave no finite loss: standardise the columns")
        weights = np.linalg.norm(first, axis=1).T
        return Fitted(order, weights, score, {"first": first, "second": second, "errors": errors})

    def _starts(
        self, nodes: IntArray, inputs: list[Inputs], first: FloatArray, second: FloatArray
    ) -> list[tuple[FloatArray, FloatArray]]:
        """Where training begins: with the weights given, and where some networks sleep also with those woken up."""
        pairs = zip(nodes.tolist(), inputs, strict=True)
        asleep = [node for node, (parents, _) in pairs if len(parents) and not first[node][:, parents].any()]
        if not asleep:
            return [(first, second)]
        woken = first.copy(), second.copy()
        woken[0][asleep], woken[1][asleep] = self._first[asleep], self._second[asleep]
        return [(first, second), woken]

    def _minimise(
        self, nodes: IntArray, inputs: list[Inputs], first: FloatArray, second: FloatArray, rest: float
    ) -> tuple[float, list[tuple[FloatArray, FloatArray]]]:
        """The objective, first layers (h, k) and second layers (h,) of some nodes, trained together; ``rest`` is the error of all others."""
        h, start, bounds = self.hidden, [], []
        for node, (parents, _) in zip(nodes.tolist(), inputs, strict=True):
            own = first[node][:, parents].ravel()
            start += [own.clip(0), (-own).clip(0), second[node]]
            bounds += [(0.0, None)] * (2 * own.size) + [(None, None)] * h

        def split(flat: FloatArray) -> list[tuple[FloatArray, FloatArray, FloatArray]]:
            found, position = [], 0
            for parents, _ in inputs:
                k = h * len(parents)
                plus, minus = flat[position : position + 2 * k].reshape(2, h, len(parents))
                found.append((plus, minus, flat[position + 2 * k : position + 2 * k + h]))
                position += 2 * k + h
            return found

        def objective(flat: FloatArray) -> tuple[float, FloatArray]:
            pieces, total, penalty, slopes = split(flat), rest, 0.0, []
            for node, (_, seen), (plus, minus, outer) in zip(nodes.tolist(), inputs, pieces, strict=True):
                inner = plus - minus
                error, *slope = _error(seen, self.data[:, node], inner, outer)
                total += error
                penalty += self.l1 * float(plus.sum() + minus.sum()) + self._l2(inner, outer)
                slopes.append(slope)
            factor, flat_slopes = self._factor(total), []
            for (plus, minus, outer), (to_inner, to_outer) in zip(pieces, slopes, strict=True):
                inner_slope = factor * to_inner + self.l2 * (plus - minus)
                outer_slope = factor * to_outer + self.l2 * outer
                flat_slopes += [(inner_slope + self.l1).ravel(), (self.l1 - inner_slope).ravel(), outer_slope]
            return self._value(total) + penalty, np.concatenate(flat_slopes)

        options = {"maxiter": self.max_iter, "ftol": self.tol}
        with np.errstate(over="ignore"):
            found = minimize(
                objective, np.concatenate(start), jac=True, method="L-BFGS-B", bounds=bounds, options=options
            )
        return float(found.fun), [(plus - minus, outer) for plus, minus, outer in split(found.x)]

    def _value(self, error: float) -> float:
        return 0.5 * error if self.loss == "squared" else 0.5 * self.size * float(np.log(error))

    def _factor(self, error: float) -> float:
        """Derivative of the loss in half the error."""
        return 1.0 if self.loss == "squared" else self.size / error

    def _penalty(self, first: FloatArray, second: FloatArray) -> float:
        return self.l1 * float(np.abs(first).sum()) + self._l2(first, second)

    def _l2(self, first: FloatArray, second: FloatArray) -> float:
        return 0.5 * self.l2 * float((first * first).sum() + (second * second).sum())


def _error(
    inputs: FloatArray, target: FloatArray, first: FloatArray, second: FloatArray
) -> tuple[float, FloatArray, FloatArray]:
    """The mean squared error of one network, and the gradients of half of it in both layers."""
    active = expit(inputs @ first.T)
    left = active @ second - target
    back = left[:, None] * active
    to_second = back.mean(0)
    back *= (1 - active) * second
    return float(left @ left) / len(left), back.T @ inputs / len(left), to_second
