r"""Acyclicity functions of a weighted graph: zero exactly where it has no cycle, differentiable everywhere.

They take the matrix :math:`A \ge 0` of the edges' strengths, :math:`A_{ij}` belonging to the edge i → j, and give :math:`h(A)` with its gradient.
All of them count closed walks, and the gradient counts open ones: :math:`[\nabla h]_{ij}` is a sum, with positive factors, over the directed
walks from j to i. On a DAG it is zero exactly where i cannot be reached from j, that is, where the edge i → j would close no cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import expm, solve_triangular

from limbeck.core.errors import InputError, UnknownNameError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Valued = tuple[float, FloatArray]


def log_det(strengths: FloatArray, s: float = 1.0) -> Valued:
    r""":math:`-\log\det(sI - A) + d \log s` and :math:`((sI - A)^{-1})^T`.

    Args:
        strengths: (d, d), not negative.
        s: above the spectral radius of ``strengths``; a DAG's is 0.

    Raises:
        InputError: the spectral radius is not below ``s``.
    """
    d = len(strengths)
    shifted = s * np.eye(d) - strengths
    sign, logarithm = np.linalg.slogdet(shifted)
    inverse = np.linalg.inv(shifted) if sign > 0 else None
    # For A >= 0 the inverse of sI - A is not negative exactly where the spectral radius is below s.
    if inverse is None or inverse.min() < -1e-9 * abs(inverse).max():
        raise InputError(f"the log-determinant needs a spectral radius below s = {s:g}: raise s, or shrink the weights")
    return float(d * np.log(s) - logarithm), np.asarray(inverse.T, dtype=np.float64)


def exponential(strengths: FloatArray) -> Valued:
    r""":math:`\operatorname{tr} e^A - d` and :math:`(e^A)^T`."""
    power = expm(strengths)
    return float(np.trace(power) - len(strengths)), power.T


def polynomial(strengths: FloatArray) -> Valued:
    r""":math:`\operatorname{tr}(I + A/d)^d - d` and :math:`((I + A/d)^{d-1})^T`."""
    d = len(strengths)
    base = np.eye(d) + strengths / d
    power = np.linalg.matrix_power(base, d - 1)
    return float((power * base.T).sum() - d), power.T


VARIANTS: Mapping[str, Callable[[FloatArray], Valued]] = {
    "log-det": log_det,
    "exponential": exponential,
    "polynomial": polynomial,
}


def variant(name: str) -> Callable[[FloatArray], Valued]:
    """An acyclicity function by name.

    Raises:
        UnknownNameError: none such.
    """
    if name not in VARIANTS:
        raise UnknownNameError("acyclicity function", name, VARIANTS, hint=f"Known: {', '.join(VARIANTS)}.")
    return VARIANTS[name]


def squared(name: str, weights: FloatArray) -> Valued:
    r""":math:`h(W \circ W)` and its gradient in W, :math:`2 W \circ \nabla h(W \circ W)`: smooth, but flat at every edge that is absent.

    ``squared("exponential", weights)`` is the constraint of NOTEARS.
    """
    value, gradient = variant(name)(weights * weights)
    return value, 2 * weights * gradient


def walks(strengths: FloatArray, order: IntArray, name: str = "log-det") -> FloatArray:
    """The weighted walks of a DAG along an order: entry (a, b) is the gradient of h for the edge from ``order[b]`` to ``order[a]``.

    Entries are exactly zero where there is no walk: inverting a triangular matrix of this kind only ever adds and multiplies numbers that are not
    negative, and the other functions take their zeros from there. Sums too large for a float are infinite.

    Args:
        strengths: (d, d), not negative, zero wherever the order forbids an edge.
        order: (d,), a permutation.
        name: which acyclicity function.

    Returns:
        (d, d) over positions, upper triangular.
    """
    variant(name)
    along = np.triu(strengths[np.ix_(order, order)], 1)
    with np.errstate(over="ignore", invalid="ignore"):
        found = solve_triangular(np.eye(len(along)) - along, np.eye(len(along)), unit_diagonal=True, check_finite=False)
        found = np.triu(np.nan_to_num(found, nan=np.inf, posinf=np.inf))
        if name == "log-det":
            return found
        other = variant(name)(along)[1].T
        return np.where(found > 0, np.nan_to_num(other, nan=np.inf, posinf=np.inf).clip(0), 0.0)
