r"""Least squares along an order, out of the Gram matrix alone.

With :math:`S = X^T X / n + \gamma I` written along the order, the factor :math:`R^T R = S` (upper triangular) holds every regression on a prefix at once:
:math:`R_{kk}^2` is the k-th node's residual variance given all before it, and the coefficients are the columns of :math:`I - R^{-1} \operatorname{diag}(R)`.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import qr, solve_triangular

from limbeck.blocks.acyclicity import FloatArray, IntArray
from limbeck.blocks.prefix_problems import Fitted, Move, PrefixProblem
from limbeck.core.errors import InputError

LEAST_SHARE = 1e-10
"""A node whose residual variance is a smaller share of its own is a combination of others."""


class LeastSquares(PrefixProblem):
    r"""Each node on all nodes before it, :math:`Q(W) = \frac{1}{2n} \|X - XW\|_F^2 + \frac{\gamma}{2} \|W\|_F^2`.

    After a move between positions a < b only rows a … b of the factor change; they are triangularised again by a QR decomposition of that block.
    Scores of moves need no factor of their own. Without the node u at position a, the rest of the block has the factor :math:`V = KU`, where
    :math:`K^T K = I + pp^T` with :math:`U^T p = R_{a,a+1:}` is known in closed form, and the new residual variances are ratios of sums of squares of V: all
    moves from one position cost :math:`O(d^2)` together.

    Constant columns have no edges and no part in the score.

    Args:
        gram: (d, d) :math:`X^T X / n` of the (centred) data.
        ridge: the weight :math:`\gamma`.

    Raises:
        InputError: columns that depend on each other linearly, without a ridge.
    """

    cheap_moves = True

    def __init__(self, gram: FloatArray, ridge: float = 0.0) -> None:
        gram = np.asarray(gram, dtype=np.float64)
        self.gram, self.ridge, self.size = gram, ridge, len(gram)
        variances = np.diag(gram)
        self.constant = variances <= np.finfo(np.float64).tiny
        # A constant column gets a variance of its own here, so that the factor exists, and loses it again in the score.
        self._own = gram + np.diag(np.where(self.constant, 1.0, ridge))
        self._offset = float(np.where(self.constant, 1.0, ridge).sum())
        if ridge == 0:
            self._independent(variances)

    def _independent(self, variances: FloatArray) -> None:
        lengths = np.sqrt(np.where(self.constant, 1.0, variances))
        correlation = self._own / np.outer(lengths, lengths)
        if np.linalg.eigvalsh(correlation)[0] < LEAST_SHARE:
            raise InputError(
                "some columns are linear combinations of others (or there are fewer samples than columns): drop them, or give ridge > 0"
            )

    def fit(self, order: IntArray) -> Fitted:
        factor = np.linalg.cholesky(self._own[np.ix_(order, order)]).T
        along = np.eye(self.size) - _inverse(factor) * np.diag(factor)
        weights = np.zeros_like(along)
        weights[np.ix_(order, order)] = np.triu(along, 1)
        return self._fitted(order, weights, factor)

    def refit(self, fitted: Fitted, order: IntArray, first: int, last: int) -> Fitted:
        factor, window = fitted.parts["factor"].copy(), slice(first, last + 1)
        before = np.empty(self.size, dtype=np.int64)
        before[fitted.order] = np.arange(self.size)
        columns = before[order[window]]
        factor[:first, window] = fitted.parts["factor"][:first, columns]
        block = np.concatenate([fitted.parts["factor"][window, columns], factor[window, last + 1 :]], 1)
        (upper,) = qr(block, mode="r", check_finite=False)
        upper = upper * np.where(np.diag(upper) < 0, -1.0, 1.0)[:, None]
        factor[window, window], factor[window, last + 1 :] = (
            np.triu(upper[:, : last + 1 - first]),
            upper[:, last + 1 - first :],
        )
        units = np.zeros((last + 1, last + 1 - first))
        units[np.arange(first, last + 1), np.arange(last + 1 - first)] = np.diag(factor)[window]
        found = -solve_triangular(factor[: last + 1, : last + 1], units, check_finite=False)
        weights = fitted.weights.copy()
        weights[:, order[window]] = 0.0
        weights[np.ix_(order[: last + 1], order[window])] = np.triu(found, 1 - first)
        return self._fitted(order, weights, factor)

    def _fitted(self, order: IntArray, weights: FloatArray, factor: FloatArray) -> Fitted:
        weights[self.constant] = 0.0
        weights[:, self.constant] = 0.0
        score = 0.5 * (float((np.diag(factor) ** 2).sum()) - self._offset)
        return Fitted(order, weights, score, {"factor": factor})

    def gradient(self, fitted: Fitted) -> FloatArray:
        r""":math:`-S(I - W)` + :math:`\gamma W`, zero on the diagonal."""
        found = self.gram @ fitted.weights - self.gram + self.ridge * fitted.weights
        np.fill_diagonal(found, 0.0)
        return found

    def evaluate(self, fitted: Fitted, windows: IntArray, move: Move) -> FloatArray:
        factor = fitted.parts["factor"]
        old = np.concatenate([[0.0], np.cumsum(np.diag(factor) ** 2)])
        found = np.empty(len(windows))
        for first in np.unique(windows[:, 0]).tolist():
            chosen = windows[:, 0] == first
            ends = windows[chosen, 1]
            block = slice(first, int(ends.max()) + 1)
            new = _window_variances(factor[block, block], move)[ends - first]
            found[chosen] = fitted.score + 0.5 * (new - (old[ends + 1] - old[first]))
        return found


def _window_variances(block: FloatArray, move: Move) -> FloatArray:
    """Residual variances summed over the window from 0 to each end, after the move.

    Args:
        block: (q, q) the factor given all nodes before the window.

    Returns:
        (q,), entry b for the move between positions 0 and b.
    """
    if move == "insert-before":
        return _first_goes_last(block)
    row, rest = block[0, 1:], block[1:, 1:]
    p = solve_triangular(rest, row, trans="T", check_finite=False)
    s = np.concatenate([[1.0], 1.0 + np.cumsum(p * p)])
    weighted = p[:, None] * rest
    after = np.cumsum(weighted[::-1], 0)[::-1] - weighted
    without = np.sqrt(s[1:] / s[:-1])[:, None] * rest + (p / np.sqrt(s[1:] * s[:-1]))[:, None] * after
    moved_last = block[0, 0] ** 2 / s[1:]
    others = np.cumsum(np.diag(without) ** 2) if move == "insert-after" else _first_goes_last(without)
    return np.concatenate([[block[0, 0] ** 2], others + moved_last])


def _first_goes_last(factor: FloatArray) -> FloatArray:
    """(q,): residual variances summed over positions 0 … b once node b was put before node 0."""
    left = np.cumsum((np.triu(factor) ** 2)[::-1], 0)[::-1]  # (k, b): node b's variance given the nodes before k
    ratio = np.divide(left[1:], left[:-1], out=np.zeros_like(left[1:]), where=left[:-1] > 0)
    others = (np.triu(ratio, 1) * (np.diag(factor)[:-1] ** 2)[:, None]).sum(0) if len(factor) > 1 else 0.0
    found: FloatArray = left[0] + others
    return found


def _inverse(upper: FloatArray) -> FloatArray:
    return np.asarray(solve_triangular(upper, np.eye(len(upper)), check_finite=False))


def gram_of(data: FloatArray, centred: bool = True) -> FloatArray:
    """(d, d) second moments of the data, about its mean or about zero; those of a constant column are exactly zero about the mean."""
    if centred:
        constant = np.ptp(data, axis=0) == 0
        data = data - data.mean(0)
        data[:, constant] = 0.0
    found: FloatArray = data.T @ data / len(data)
    return found


def greedy_order(gram: FloatArray) -> IntArray:
    """From first to last, always the node whose residual variance given those before it is least (the top-down search for equal noise variances)."""
    left = np.array(gram, dtype=np.float64)
    open_nodes = np.arange(len(left))
    found = []
    while len(open_nodes):
        nearest = int(np.diag(left).argmin())
        found.append(int(open_nodes[nearest]))
        keep = np.arange(len(left)) != nearest
        pivot = max(left[nearest, nearest], np.finfo(np.float64).tiny)
        left = left[np.ix_(keep, keep)] - np.outer(left[keep, nearest], left[nearest, keep] / pivot)
        open_nodes = open_nodes[keep]
    return np.array(found, dtype=np.int64)


def variance_order(gram: FloatArray) -> IntArray:
    """By growing variance: what the scale of raw simulated data gives away by itself."""
    return np.argsort(np.diag(gram), kind="stable").astype(np.int64)
