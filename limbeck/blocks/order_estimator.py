"""Estimators that search over topological orders: where they start, and what they keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, Self

import numpy as np

from limbeck.blocks.acyclicity import VARIANTS, FloatArray, IntArray
from limbeck.blocks.dag_estimator import DAGEstimator, at_least, one_of
from limbeck.blocks.dags import kkt_violation, order_of, thresholded
from limbeck.blocks.order_search import OrderSearch
from limbeck.blocks.prefix_problems import Fitted, Move, PrefixProblem

FEW = 100
"""Candidates of the small neighbourhood, unless all are judged at little cost."""

MOVES = ("swap", "insert-after", "insert-before")


class OrderEstimator(DAGEstimator, ABC):
    """What both estimators share: a search that starts from a random order or from any DAG, and what is kept of it.

    Attributes:
        order_: (d,) the nodes from first to last.
        weights_: (d, d), zero wherever the order forbids an edge.
        adjacency_: (d, d) those above the threshold.
        score_: Q, the objective on the training samples.
        history_: Q at the start and after each step; it strictly falls.
        kkt_violation_: the largest gradient of Q among edges that would close no cycle; about 0 at a KKT point.
        n_iter_, n_moves_, n_evaluations_: steps, moves made, moves judged.
        converged_: whether no candidate helped any more.
    """

    order_: IntArray
    score_: float
    history_: list[float]
    kkt_violation_: float
    n_iter_: int
    n_moves_: int
    n_evaluations_: int
    converged_: bool
    fitted_: Fitted
    problem_: PrefixProblem
    size_small: int | None
    size_large: int | None
    n_large: int
    move: Move
    acyclicity: str
    xi: float
    tol: float
    threshold: float
    fit_intercept: bool
    max_iter: int
    _choose: Literal["multi", "first"] = "multi"

    def fit(self, X: Any, y: Any = None, *, order_init: Any = None) -> Self:
        """Learn the graph of samples (n, d); ``y`` is ignored.

        Args:
            X: the samples.
            order_init: where to start: an order, the matrix of a DAG or a networkx graph, as another algorithm found it; None: a random order.

        Raises:
            InputError: settings, samples or a start that will not do.
        """
        search = self.begin(X, order_init)
        search.run(self.max_iter)
        return self.finish(search)

    def begin(self, X: Any, order_init: Any = None) -> OrderSearch:
        """The search that :meth:`fit` runs, before its first step."""
        self._check_settings()
        checked = self._checked(X, reset=True)
        self.center_ = self._center(checked)
        generator = self._generator()
        names = getattr(self, "feature_names_in_", None)
        start = order_of(order_init, checked.shape[1], None if names is None else names.tolist(), generator)
        self.problem_ = self._problem(checked - self.center_, generator)
        pairs = checked.shape[1] * (checked.shape[1] - 1) // 2
        few = pairs if self.problem_.cheap_moves else min(pairs, FEW)
        return OrderSearch(
            self.problem_,
            start,
            size_small=max(1, few if self.size_small is None else min(pairs, self.size_small)),
            size_large=pairs if self.size_large is None else min(pairs, self.size_large),
            n_large=self.n_large,
            move=self.move,
            choose=self._choose,
            acyclicity=self.acyclicity,
            xi=self.xi,
            tol=self.tol,
        )

    def finish(self, search: OrderSearch) -> Self:
        """Keep what a search has found."""
        self.fitted_ = found = search.fitted
        self.order_, self.weights_, self.score_ = found.order, found.weights, found.score
        self.adjacency_ = thresholded(found.weights, self.threshold)
        self.history_ = list(search.history)
        self.kkt_violation_ = kkt_violation(found.weights, self.problem_.gradient(found))
        self.n_iter_, self.n_moves_, self.n_evaluations_ = len(search.history) - 1, search.moves, search.evaluations
        self.converged_ = search.done
        return self

    def _check_settings(self) -> None:
        at_least("threshold", self.threshold, 0)
        at_least("max_iter", self.max_iter, 0)
        for name, least in (("n_large", 0), ("xi", 0), ("tol", 0)):
            at_least(name, getattr(self, name), least)
        for name, least in (("size_small", 1), ("size_large", 0)):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), least)
        one_of("move", self.move, MOVES)
        one_of("acyclicity", self.acyclicity, tuple(VARIANTS))

    def _center(self, checked: FloatArray) -> FloatArray:
        """Means of the columns; of a constant one exactly its value, so that nothing is left of it."""
        if not self.fit_intercept:
            return np.zeros(checked.shape[1])
        found: FloatArray = np.where(np.ptp(checked, axis=0) == 0, checked[0], checked.mean(0))
        return found

    @abstractmethod
    def _problem(self, data: FloatArray, generator: np.random.Generator) -> PrefixProblem:
        """What fits and judges orders."""
