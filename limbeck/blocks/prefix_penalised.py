r"""Other regressions along an order: the Lasso, logistic regression with an l1 penalty, and whatever a user brings.

The first two are solved for many (node, allowed parents) at once: all nodes of all moves of a neighbourhood are the columns of one problem.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit

from limbeck.blocks.acyclicity import FloatArray, IntArray
from limbeck.blocks.prefix_problems import Fitted, Move, PrefixProblem, allowed, least_norm, moved
from limbeck.core.errors import InputError

MOST_COLUMNS = 2048
"""Regressions that are solved together at most; it bounds memory."""

Regress = Callable[[FloatArray, FloatArray], Any]
Score = Callable[[FloatArray, FloatArray], tuple[float, FloatArray]]


class Columnwise(PrefixProblem):
    """Base: Q is a sum over nodes, and each node's part a regression of its own on the nodes before it."""

    l1: float

    @abstractmethod
    def solve(self, nodes: IntArray, mask: FloatArray, start: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Regressions of ``nodes`` (k,) on what ``mask`` (d, k) allows, from ``start`` (d, k): the weights (d, k) and each one's part of Q (k,)."""

    @abstractmethod
    def smooth_gradient(self, weights: FloatArray) -> FloatArray:
        """(d, d), of Q without the penalty."""

    def fit(self, order: IntArray) -> Fitted:
        start = np.zeros((self.size, self.size))
        weights, scores = self.solve(np.arange(self.size), allowed(order), start)
        return Fitted(order, weights, float(scores.sum()), {"scores": scores})

    def refit(self, fitted: Fitted, order: IntArray, first: int, last: int) -> Fitted:
        nodes = order[first : last + 1]
        weights, scores = fitted.weights.copy(), fitted.parts["scores"].copy()
        mask = allowed(order, nodes)
        weights[:, nodes], scores[nodes] = self.solve(nodes, mask, weights[:, nodes] * mask)
        return Fitted(order, weights, float(scores.sum()), {"scores": scores})

    def gradient(self, fitted: Fitted) -> FloatArray:
        found = least_norm(self.smooth_gradient(fitted.weights), fitted.weights, self.l1)
        np.fill_diagonal(found, 0.0)
        return found

    def evaluate(self, fitted: Fitted, windows: IntArray, move: Move) -> FloatArray:
        found = np.full(len(windows), fitted.score)
        widths = windows[:, 1] - windows[:, 0] + 1
        part = np.cumsum(widths) // MOST_COLUMNS
        for number in np.unique(part).tolist():
            chosen = np.flatnonzero(part == number)
            orders = [moved(fitted.order, a, b, move) for a, b in windows[chosen].tolist()]
            groups = [order[a : b + 1] for order, (a, b) in zip(orders, windows[chosen].tolist(), strict=True)]
            nodes = np.concatenate(groups)
            mask = np.concatenate([allowed(o, g) for o, g in zip(orders, groups, strict=True)], 1)
            scores = self.solve(nodes, mask, fitted.weights[:, nodes] * mask)[1]
            gains = scores - fitted.parts["scores"][nodes]
            found[chosen] += np.add.reduceat(gains, np.cumsum(widths[chosen]) - widths[chosen])
        return found


class LassoPrefixes(Columnwise):
    r""":math:`\frac{1}{2n} \|X - XW\|_F^2 + \lambda |W|_1`, by coordinate descent on the Gram matrix.

    Args:
        gram: (d, d) :math:`X^T X / n` of the (centred) data.
        l1: the weight :math:`\lambda`.
        tol: largest change of a coefficient, in units of its column, at which the descent ends.
        max_sweeps: sweeps over the coefficients at most.
    """

    def __init__(self, gram: FloatArray, l1: float, tol: float = 1e-9, max_sweeps: int = 5000) -> None:
        self.gram, self.l1, self.tol, self.max_sweeps = np.asarray(gram, dtype=np.float64), l1, tol, max_sweeps
        self.size = len(gram)

    def solve(self, nodes: IntArray, mask: FloatArray, start: FloatArray) -> tuple[FloatArray, FloatArray]:
        weights = start * mask
        residual = self.gram[:, nodes] - self.gram @ weights
        scale = np.sqrt(np.diag(self.gram))
        tiny = np.finfo(np.float64).tiny
        active = np.arange(len(nodes))
        for _ in range(self.max_sweeps):
            largest = np.zeros(len(active))
            own, rest, open_rows = weights[:, active], residual[:, active], mask[:, active] > 0
            for i in np.flatnonzero(open_rows.any(1) & (scale**2 > tiny)).tolist():
                pull = rest[i] + self.gram[i, i] * own[i]
                new = np.sign(pull) * np.maximum(np.abs(pull) - self.l1, 0.0) / self.gram[i, i]
                change = np.where(open_rows[i], new - own[i], 0.0)
                own[i] += change
                rest -= self.gram[:, i, None] * change
                largest = np.maximum(largest, np.abs(change) * scale[i])
            weights[:, active], residual[:, active] = own, rest
            active = active[largest > self.tol * np.maximum(scale[nodes[active]], tiny)]
            if not len(active):
                break
        variance = np.diag(self.gram)[nodes]
        explained = (weights * (self.gram[:, nodes] + residual)).sum(0)
        return weights, 0.5 * (variance - explained) + self.l1 * np.abs(weights).sum(0)

    def smooth_gradient(self, weights: FloatArray) -> FloatArray:
        return self.gram @ weights - self.gram


class LogisticPrefixes(Columnwise):
    r""":math:`\sum_j \operatorname{mean}[\log(1 + e^{M_j}) - x_j M_j] + \lambda |W|_1`, with M = XW and X of zeros and ones, by accelerated proximal steps.

    Args:
        data: (n, d) of zeros and ones.
        l1: the weight :math:`\lambda`, positive, so that separable data has a solution.
        tol: largest change of a coefficient at which the steps end.
        max_steps: steps at most.

    Raises:
        InputError: other values, no penalty.
    """

    def __init__(self, data: FloatArray, l1: float, tol: float = 1e-7, max_steps: int = 5000) -> None:
        if not np.isin(data, (0.0, 1.0)).all():
            raise InputError("the logistic model needs columns of zeros and ones: recode them, or take loss='linear'")
        if l1 <= 0:
            raise InputError("the logistic model needs l1 > 0: without it separable data has no solution")
        self.data, self.l1, self.tol, self.max_steps = np.asarray(data, dtype=np.float64), l1, tol, max_steps
        self.size = self.data.shape[1]
        # The loss bends by at most a quarter of the squared inputs.
        self._rate = 4 * len(self.data) / max(float(np.linalg.eigvalsh(self.data.T @ self.data)[-1]), 1e-12)

    def solve(self, nodes: IntArray, mask: FloatArray, start: FloatArray) -> tuple[FloatArray, FloatArray]:
        weights, ahead = start * mask, start * mask
        momentum = np.ones(len(nodes))
        active = np.arange(len(nodes))
        for _ in range(self.max_steps):
            own, point, targets = weights[:, active], ahead[:, active], self.data[:, nodes[active]]
            slope = self.data.T @ (expit(self.data @ point) - targets) / len(self.data)
            new = point - self._rate * slope
            new = np.sign(new) * np.maximum(np.abs(new) - self._rate * self.l1, 0.0) * mask[:, active]
            # Each column forgets its momentum when that points uphill.
            uphill = ((point - new) * (new - own)).sum(0) > 0
            before = np.where(uphill, 1.0, momentum[active])
            after = 0.5 * (1 + np.sqrt(1 + 4 * before**2))
            ahead[:, active] = new + np.where(uphill, 0.0, (before - 1) / after) * (new - own)
            weights[:, active], momentum[active] = new, after
            active = active[np.abs(new - own).max(0) + np.abs(new - point).max(0) > self.tol]
            if not len(active):
                break
        logits = self.data @ weights
        losses = (np.logaddexp(0.0, logits) - self.data[:, nodes] * logits).mean(0)
        return weights, losses + self.l1 * np.abs(weights).sum(0)

    def smooth_gradient(self, weights: FloatArray) -> FloatArray:
        found: FloatArray = self.data.T @ (expit(self.data @ weights) - self.data) / len(self.data)
        return found


class Regressions(PrefixProblem):
    """A score and a regression of one's own.

    Args:
        data: (n, d).
        regress: (X of the allowed parents (n, k), x of the node (n,)) -> coefficients (k,); or a scikit-learn regressor with ``coef_``, which is
            cloned for every fit. It must minimise the node's part of the score.
        score: (data, weights) -> Q and dQ/dW (d, d).
        jobs: moves that are judged side by side, in threads; -1 takes all cores.
    """

    def __init__(self, data: FloatArray, regress: Regress | Any, score: Score, jobs: int | None = None) -> None:
        self.data, self.regress, self.score, self.jobs = np.asarray(data, dtype=np.float64), regress, score, jobs
        self.size = self.data.shape[1]

    def fit(self, order: IntArray) -> Fitted:
        return self._fitted(np.zeros((self.size, self.size)), order, 0, self.size - 1)

    def refit(self, fitted: Fitted, order: IntArray, first: int, last: int) -> Fitted:
        return self._fitted(fitted.weights.copy(), order, first, last)

    def _fitted(self, weights: FloatArray, order: IntArray, first: int, last: int) -> Fitted:
        for place in range(first, last + 1):
            node, parents = order[place], order[:place]
            weights[:, node] = 0.0
            if place:
                weights[parents, node] = self._coefficients(self.data[:, parents], self.data[:, node])
        value = float(self.score(self.data, weights)[0])
        if not np.isfinite(value):
            raise InputError(f"the score of a fit is {value}: it must be a finite number")
        return Fitted(order, weights, value)

    def _coefficients(self, inputs: FloatArray, target: FloatArray) -> FloatArray:
        if hasattr(self.regress, "fit"):
            from sklearn.base import clone

            found = np.asarray(clone(self.regress).fit(inputs, target).coef_, dtype=np.float64).ravel()
        else:
            found = np.asarray(self.regress(inputs, target), dtype=np.float64).ravel()
        if found.shape != (inputs.shape[1],) or not np.isfinite(found).all():
            raise InputError(
                f"regress gave {found.shape[0]} coefficients for {inputs.shape[1]} parents, or no finite ones"
            )
        return found

    def gradient(self, fitted: Fitted) -> FloatArray:
        found = np.array(self.score(self.data, fitted.weights)[1], dtype=np.float64)
        if found.shape != (self.size, self.size):
            raise InputError(f"score must give (Q, dQ/dW) with a gradient {(self.size, self.size)}, not {found.shape}")
        np.fill_diagonal(found, 0.0)
        return found

    def evaluate(self, fitted: Fitted, windows: IntArray, move: Move) -> FloatArray:
        if self.jobs in (None, 1):
            return super().evaluate(fitted, windows, move)
        from joblib import Parallel, delayed

        one = super().evaluate
        scores = Parallel(n_jobs=self.jobs, prefer="threads")(delayed(one)(fitted, w[None], move) for w in windows)
        return np.concatenate(scores)
