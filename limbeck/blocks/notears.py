r"""NOTEARS: least squares under a smooth acyclicity constraint, by the augmented Lagrangian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from limbeck.blocks.acyclicity import FloatArray, squared


class Notears:
    r"""Minimises :math:`\frac{1}{2n} \|X - XW\|_F^2 + \lambda |W|_1` subject to :math:`h(W \circ W) = 0`.

    Each :meth:`step` minimises :math:`Q(W) + \lambda |W|_1 + \frac{\rho}{2} h^2 + \alpha h` by L-BFGS-B over :math:`W = W^+ - W^-` with both parts not negative, again
    with a tenfold :math:`\rho` until h is a quarter of what it was, and then adds :math:`\rho h` to :math:`\alpha`. It ends when h is below ``h_tol`` or :math:`\rho`
    at ``rho_max``. What comes out is close to a DAG; small weights must be cut to make it one.

    Source: "DAGs with NO TEARS: Continuous Optimization for Structure Learning" (2018).

    Args:
        gram: (d, d) :math:`X^T X / n` of the (centred) data; the loss needs no more of it.
        l1: the weight :math:`\lambda`.
        acyclicity: exponential (the paper's) or polynomial.
        h_tol, rho_max: when to end.

    Attributes:
        weights: (d, d) so far.
        h: their acyclicity.
        evaluations: of the objective.
        done: whether it has ended.
    """

    def __init__(
        self,
        gram: FloatArray,
        l1: float = 0.1,
        *,
        acyclicity: str = "exponential",
        h_tol: float = 1e-8,
        rho_max: float = 1e16,
    ) -> None:
        self.gram, self.l1, self.acyclicity = np.asarray(gram, dtype=np.float64), l1, acyclicity
        self.h_tol, self.rho_max = h_tol, rho_max
        self.size = len(gram)
        self.parts = np.zeros(2 * self.size**2)
        self.rho, self.alpha, self.h = 1.0, 0.0, float("inf")
        self.evaluations = 0
        self.done = False
        loops = np.eye(self.size, dtype=bool).ravel()
        self._bounds = [(0.0, 0.0) if loop else (0.0, None) for loop in (*loops, *loops)]

    @property
    def weights(self) -> FloatArray:
        positive, negative = self.parts.reshape(2, self.size, self.size)
        return positive - negative

    def objective(self, parts: FloatArray) -> tuple[float, FloatArray]:
        """The augmented Lagrangian of (W⁺, W⁻), flat, and its gradient."""
        self.evaluations += 1
        positive, negative = parts.reshape(2, self.size, self.size)
        weights = positive - negative
        short = np.eye(self.size) - weights
        through = self.gram @ short
        h, slope = squared(self.acyclicity, weights)
        value = 0.5 * float((short * through).sum()) + 0.5 * self.rho * h * h + self.alpha * h
        gradient = -through + (self.rho * h + self.alpha) * slope
        return value + self.l1 * float(parts.sum()), np.concatenate([gradient + self.l1, -gradient + self.l1]).ravel()

    def step(self) -> float:
        """One update of the multiplier; h after it."""
        if self.done:
            return self.h
        while True:
            with np.errstate(over="ignore", invalid="ignore"):
                found = minimize(self.objective, self.parts, jac=True, method="L-BFGS-B", bounds=self._bounds).x
            positive, negative = found.reshape(2, self.size, self.size)
            h = squared(self.acyclicity, positive - negative)[0]
            if h <= 0.25 * self.h or self.rho >= self.rho_max:
                break
            self.rho *= 10
        self.parts, self.h = found, h
        self.alpha += self.rho * h
        self.done = h <= self.h_tol or self.rho >= self.rho_max
        return h

    def run(self, max_steps: int = 100) -> FloatArray:
        """Steps until it has ended, or ``max_steps`` of them; the weights."""
        for _ in range(max_steps):
            self.step()
            if self.done:
                break
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """What is done so far."""
        numbers = {name: getattr(self, name) for name in ("rho", "alpha", "h", "evaluations", "done")}
        return {"parts": torch.from_numpy(self.parts.copy()), **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.parts = state["parts"].numpy().copy()
        for name in ("rho", "alpha", "h", "evaluations", "done"):
            setattr(self, name, state[name])
