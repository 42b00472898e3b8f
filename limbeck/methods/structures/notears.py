"""NOTEARS as a scikit-learn estimator: what topological search is compared with, and post-processes."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from limbeck.blocks.acyclicity import FloatArray, IntArray
from limbeck.blocks.dag_estimator import DAGEstimator, at_least, one_of
from limbeck.blocks.dags import thresholded, topological_order
from limbeck.blocks.notears import Notears
from limbeck.blocks.prefix_regression import gram_of


class NOTEARS(DAGEstimator):
    r"""Linear structure learning by continuous optimisation.

    .. math:: \min_W \tfrac{1}{2n} \|X - XW\|_F^2 + \lambda |W|_1 \quad\text{subject to}\quad \operatorname{tr} e^{W \circ W} - d = 0,

    by the augmented Lagrangian (:class:`limbeck.blocks.notears.Notears`). Weights below the threshold are cut; should cycles be left, the weakest edges go until none is.

    Args:
        l1: weight λ of the penalty.
        threshold: least absolute weight of an edge.
        acyclicity: exponential (the paper's) or polynomial.
        h_tol: acyclicity at which it ends.
        rho_max: weight of the constraint at which it ends.
        max_iter: updates of the multiplier at most.
        fit_intercept: centre the columns first.

    Attributes:
        weights_: (d, d) as they come out of the optimisation, nearly a DAG.
        adjacency_: (d, d) the DAG.
        order_: (d,) a topological order of it.
        h_: acyclicity of ``weights_``.
        n_iter_: updates of the multiplier.

    Source: "DAGs with NO TEARS: Continuous Optimization for Structure Learning" (2018).
    """

    order_: IntArray
    h_: float
    n_iter_: int

    def __init__(
        self,
        l1: float = 0.1,
        *,
        threshold: float = 0.3,
        acyclicity: str = "exponential",
        h_tol: float = 1e-8,
        rho_max: float = 1e16,
        max_iter: int = 100,
        fit_intercept: bool = True,
    ) -> None:
        self.l1 = l1
        self.threshold = threshold
        self.acyclicity = acyclicity
        self.h_tol = h_tol
        self.rho_max = rho_max
        self.max_iter = max_iter
        self.fit_intercept = fit_intercept

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn the graph of samples (n, d); ``y`` is ignored.

        Raises:
            InputError: settings or samples that will not do.
        """
        at_least("l1", self.l1, 0)
        at_least("threshold", self.threshold, 0)
        at_least("max_iter", self.max_iter, 1)
        one_of("acyclicity", self.acyclicity, ("exponential", "polynomial"))
        checked = self._checked(X, reset=True)
        self.center_ = checked.mean(0) if self.fit_intercept else np.zeros(checked.shape[1])
        solver = Notears(
            gram_of(checked, self.fit_intercept),
            self.l1,
            acyclicity=self.acyclicity,
            h_tol=self.h_tol,
            rho_max=self.rho_max,
        )
        self.n_iter_ = 0
        while not solver.done and self.n_iter_ < self.max_iter:
            solver.step()
            self.n_iter_ += 1
        self.weights_: FloatArray = solver.weights
        self.h_ = solver.h
        self.adjacency_ = thresholded(self.weights_, self.threshold)
        self.order_ = topological_order(self.adjacency_)
        return self
