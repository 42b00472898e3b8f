"""TOPO: NOTEARS objectives by topological swaps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field
from scipy.special import expit
from torch import Tensor

from limbeck.adapters.dag_files import write_dag
from limbeck.blocks.acyclicity import FloatArray
from limbeck.blocks.dag_estimator import at_least, one_of
from limbeck.blocks.dags import thresholded, topological_order
from limbeck.blocks.notears import Notears
from limbeck.blocks.order_estimator import OrderEstimator
from limbeck.blocks.order_search import LateSearch, OrderSearch
from limbeck.blocks.prefix_networks import NetworkPrefixes
from limbeck.blocks.prefix_penalised import LassoPrefixes, LogisticPrefixes, Regressions
from limbeck.blocks.prefix_problems import Fitted, Move, PrefixProblem
from limbeck.blocks.prefix_regression import LeastSquares, gram_of
from limbeck.core.batch import Batch
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.stage import Stage, Stepper
from limbeck.methods.structures.base import StructureMethod
from limbeck.tasks.causal import CausalSetup, CausalTask, load_causal
from limbeck.tasks.judging_dags import Contestant, contestant, dag_pictures, judge_orders, simple_orders


class TopoSwap(OrderEstimator):
    r"""Directed acyclic graphs by swaps in a topological order.

    Any order :math:`\pi` makes :math:`\min_W Q(W)` subject to acyclicity an ordinary regression of each node on those before it, with the solution
    :math:`W^*(\pi)`. The gradient of an acyclicity function h there, by default of :math:`-\log\det(I - |W|)`,

    .. math:: [\nabla h]_{ij} = [(I - |W|)^{-1}]_{ji},

    sums the walks from j to i: where it is small, the forbidden edge i → j would nearly close no cycle. Such pairs with :math:`[\nabla Q]_{ij} \neq 0` change places, and
    only the nodes between them are fitted again. Swaps that lower Q are made, several at once where their windows do not overlap, until none of the candidates helps. See
    :class:`limbeck.blocks.order_search.OrderSearch`. Q falls with every step.

    With ``loss="linear"``, :math:`Q = \frac{1}{2n} \|X - XW\|_F^2` (plus a ridge, or ``l1`` times :math:`|W|_1`); ``"logistic"``: for zeros and ones, the mean
    logistic loss plus ``l1`` times :math:`|W|_1`, where scikit-learn's C is :math:`1 / (\lambda n)` (C = 0.1 with 1,000 samples: ``l1 = 0.01``). Or give ``loss`` and ``regress`` of your own.

    After another algorithm: ``TopoSwap().fit(X, order_init=its_matrix)``.

    Without ``l1`` the Cholesky factor judges all pairs at once for little more than a few of them, so by default every step judges all (the paper: 100, and
    400 once). From 50 variables on that matters: the paper's neighbourhoods end in poor orders there.

    Raw simulated data gives its order away by its variances; on standardised data every method with equal noise variances loses its footing.

    Args:
        loss: linear, logistic, or (X, W) -> (Q, dQ/dW).
        regress: with a loss of your own: (parents (n, k), node (n,)) -> coefficients (k,), or a scikit-learn regressor.
        l1, ridge: weights of the penalties; a ridge goes with the linear loss without l1.
        size_small, size_large: candidates of the two neighbourhoods; None: all d(d-1)/2 pairs, but 100 in the small one where judging is not cheap.
        n_large: how often the large one may help.
        move: swap, insert-after (j behind i) or insert-before (i ahead of j).
        acyclicity: log-det, exponential or polynomial.
        xi: least gradient of Q at a candidate.
        threshold: least absolute weight of an edge in ``adjacency_``.
        fit_intercept: centre the columns first (linear and own losses).
        max_iter: steps at most.
        tol: least relative improvement of a step.
        n_jobs: threads that judge swaps, with a ``regress`` of your own.
        random_state: draws the initial order, and what a given graph leaves open.

    Source: "Optimizing NOTEARS Objectives via Topological Swaps" (2023).
    """

    def __init__(
        self,
        loss: str | Callable[..., Any] = "linear",
        regress: Any = None,
        *,
        l1: float = 0.0,
        ridge: float = 0.0,
        size_small: int | None = None,
        size_large: int | None = None,
        n_large: int = 1,
        move: Move = "swap",
        acyclicity: str = "log-det",
        xi: float = 0.0,
        threshold: float = 0.3,
        fit_intercept: bool = True,
        max_iter: int = 10_000,
        tol: float = 1e-9,
        n_jobs: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.loss = loss
        self.regress = regress
        self.l1 = l1
        self.ridge = ridge
        self.size_small = size_small
        self.size_large = size_large
        self.n_large = n_large
        self.move = move
        self.acyclicity = acyclicity
        self.xi = xi
        self.threshold = threshold
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.n_jobs = n_jobs
        self.random_state = random_state

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the loss of any samples without penalties: higher is better."""
        if self.loss == "linear":
            return super().score(X, y)
        explained = self.predict(X)
        checked = self._checked(X, reset=False)
        if callable(self.loss):
            return -float(self.loss(checked - self.center_, self.weights_)[0])
        chance = np.clip(explained, 1e-12, 1 - 1e-12)
        return float((checked * np.log(chance) + (1 - checked) * np.log1p(-chance)).sum()) / len(checked)

    def _check_settings(self) -> None:
        super()._check_settings()
        at_least("l1", self.l1, 0)
        at_least("ridge", self.ridge, 0)
        if not callable(self.loss):
            one_of("loss", self.loss, ("linear", "logistic"))
        if callable(self.loss) != (self.regress is not None):
            raise InputError("a loss of your own and regress go together: give both, or neither")
        if self.ridge > 0 and (self.l1 > 0 or self.loss != "linear"):
            raise InputError("a ridge goes with the linear loss without l1: set one of them to 0")

    def _center(self, checked: FloatArray) -> FloatArray:
        return np.zeros(checked.shape[1]) if self.loss == "logistic" else super()._center(checked)

    def _problem(self, data: FloatArray, generator: np.random.Generator) -> PrefixProblem:
        if callable(self.loss):
            return Regressions(data, self.regress, self.loss, self.n_jobs)
        if self.loss == "logistic":
            return LogisticPrefixes(data, self.l1)
        gram = gram_of(data, self.fit_intercept)
        return LassoPrefixes(gram, self.l1) if self.l1 > 0 else LeastSquares(gram, self.ridge)

    def _explained(self, checked: FloatArray) -> FloatArray:
        return expit(checked @ self.weights_) if self.loss == "logistic" else super()._explained(checked)


class TopoSwapMLP(OrderEstimator):
    r"""The same search for nonlinear models: node j is a small network of the nodes before it (:class:`limbeck.blocks.prefix_networks.NetworkPrefixes`).

    The weight of an edge is the norm of its input's first-layer weights. A swap keeps all weights and trains the networks between its ends alone; by default the first swap that
    helps is made. Networks have no biases: columns are centred, and should be of comparable scale.

    Args:
        hidden: units of each network.
        l1, l2: weights of the penalties on the first layer and on all weights.
        loss: squared, or log (d/2 times the logarithm of the mean squared error).
        size_small, size_large, n_large, move, acyclicity, xi, max_iter, random_state: see :class:`TopoSwap`.
        choose: first (swap that helps), or multi: all that help, as far as their windows do not overlap.
        threshold: least norm of an edge in ``adjacency_``.
        fit_intercept: centre the columns first.
        fit_tol, fit_iter: relative change of the loss at which one training stops, and its iterations at most.
        tol: least relative improvement of a step; well above ``fit_tol``, a swap must bring more than longer training would.

    Source: "Optimizing NOTEARS Objectives via Topological Swaps" (2023).
    """

    def __init__(
        self,
        hidden: int = 40,
        *,
        l1: float = 0.01,
        l2: float = 0.01,
        loss: str = "squared",
        size_small: int = 10,
        size_large: int | None = 40,
        n_large: int = 1,
        move: Move = "swap",
        choose: str = "first",
        acyclicity: str = "log-det",
        xi: float = 0.0,
        threshold: float = 0.5,
        fit_intercept: bool = True,
        fit_tol: float = 1e-5,
        fit_iter: int = 200,
        max_iter: int = 1000,
        tol: float = 1e-4,
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.l1 = l1
        self.l2 = l2
        self.loss = loss
        self.size_small = size_small
        self.size_large = size_large
        self.n_large = n_large
        self.move = move
        self.choose = choose
        self.acyclicity = acyclicity
        self.xi = xi
        self.threshold = threshold
        self.fit_intercept = fit_intercept
        self.fit_tol = fit_tol
        self.fit_iter = fit_iter
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _check_settings(self) -> None:
        super()._check_settings()
        for name, least in (("hidden", 1), ("l1", 0), ("l2", 0), ("fit_tol", 0), ("fit_iter", 1)):
            at_least(name, getattr(self, name), least)
        one_of("loss", self.loss, ("squared", "log"))
        one_of("choose", self.choose, ("first", "multi"))
        self._choose = self.choose  # type: ignore[assignment]

    def _problem(self, data: FloatArray, generator: np.random.Generator) -> PrefixProblem:
        return NetworkPrefixes(
            data,
            hidden=self.hidden,
            l1=self.l1,
            l2=self.l2,
            loss=self.loss,  # type: ignore[arg-type]
            tol=self.fit_tol,
            max_iter=self.fit_iter,
            seed=int(generator.integers(2**31)),
        )

    def _explained(self, checked: FloatArray) -> FloatArray:
        assert isinstance(self.problem_, NetworkPrefixes)
        return self.center_ + self.problem_.predict(self.fitted_, checked - self.center_)


class NotearsTopo(StructureMethod):
    """Runs :class:`TopoSwap` or :class:`TopoSwapMLP` by name, beside NOTEARS, in steps that resume.

    NOTEARS comes first, where it is wanted as the start or as what the result is compared with; then a stage of search steps (what is left of them once nothing
    helps any more does nothing). All results are judged alike: weights refitted along their order, cut at one threshold.

    Source: "Optimizing NOTEARS Objectives via Topological Swaps" (2023).
    """

    name = "notears-topo"
    NOTEARS_STEPS = 40

    class Config(StructureMethod.Config):
        model: Literal["linear", "logistic", "mlp"] = Field("linear", description="what is fitted along an order")
        start: Literal["random", "notears"] = Field(
            "random", description="a random order, or that of NOTEARS: the search then post-processes it"
        )
        baseline: bool = Field(True, description="run NOTEARS as well, and show both")
        steps: int = Field(100, ge=1, description="steps of the search at most")
        size_small: int | None = Field(
            None, ge=1, description="candidates at first; none: all pairs (linear), 100 (logistic), 10 (mlp)"
        )
        size_large: int | None = Field(None, ge=0, description="candidates later; none: all pairs, 40 (mlp)")
        n_large: int = Field(1, ge=0, description="how often the large one may help")
        move: Literal["swap", "insert-after", "insert-before"] = Field("swap", description="what is done with a pair")
        choose: Literal["first", "multi"] = Field("first", description="the first move that helps, or several (mlp)")
        acyclicity: Literal["log-det", "exponential", "polynomial"] = Field(
            "log-det", description="whose gradient proposes candidates"
        )
        l1: float | None = Field(None, ge=0, description="weight of the l1 penalty; none: 0 linear, 0.01 otherwise")
        threshold: float | None = Field(None, ge=0, description="least weight of an edge; none: 0.3, mlp 0.5")
        notears_l1: float = Field(0.1, ge=0, description="weight of the l1 penalty of NOTEARS")
        hidden: int = Field(40, ge=1, description="units of each network (mlp)")
        l2: float = Field(0.01, ge=0, description="weight of the l2 penalty (mlp)")
        mlp_loss: Literal["squared", "log"] = Field("squared", description="squared errors or their logarithm (mlp)")

        presets = {"paper": {"size_small": 100, "size_large": 400, "n_large": 1, "steps": 1000}}

    class Setup(CausalSetup):
        """What a run by name builds: the data."""

    order: Tensor
    weights: Tensor
    notears_weights: Tensor

    def __init__(self, task: CausalTask, config: Any = None, *, seed: int = 0, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.on, self.seed = task, seed
        self.train_samples: FloatArray = task.train.inputs.numpy()
        self.register_buffer("order", torch.arange(d := len(task.names)))
        self.register_buffer("weights", torch.zeros(d, d, dtype=torch.float64))
        self.register_buffer("notears_weights", torch.zeros(d, d, dtype=torch.float64))
        self.runs_notears = self.config.baseline or self.config.start == "notears"
        usual = 0.5 if self.config.model == "mlp" else 0.3
        self.threshold: float = usual if self.config.threshold is None else self.config.threshold
        self.estimator = self.make_estimator()
        self.estimator.begin(self.train_samples)  # samples that will not do are found before NOTEARS takes its time
        self.notears = Notears(gram_of(self.train_samples), self.config.notears_l1)
        self._search: OrderSearch | None = None

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, CausalTask]:
        task = load_causal(setup)
        return cls(task, config, seed=seed), task

    def make_estimator(self) -> OrderEstimator:
        """The estimator as configured, not fitted."""
        c = self.config
        l1 = (0.0 if c.model == "linear" else 0.01) if c.l1 is None else c.l1
        shared: dict[str, Any] = {
            name: getattr(c, name) for name in ("size_small", "size_large", "n_large", "move", "acyclicity")
        }
        seed = mix_seed(self.seed, 821) % 2**31
        shared |= {"l1": l1, "threshold": self.threshold, "max_iter": c.steps, "random_state": seed}
        if c.model != "mlp":
            return TopoSwap(c.model, **shared)
        shared |= {name: few for name, few in (("size_small", 10), ("size_large", 40)) if shared[name] is None}
        return TopoSwapMLP(c.hidden, l2=c.l2, loss=c.mlp_loss, choose=c.choose, **shared)

    # ---- running -----------------------------------------------------------------------------------------------------------

    @property
    def search(self) -> OrderSearch:
        """The search; it begins when it is asked for, since NOTEARS may have to run before."""
        if self._search is None:
            start = self.notears_graph() if self.config.start == "notears" else None
            self._search = self.estimator.begin(self.train_samples, start)
        return self._search

    def notears_graph(self) -> FloatArray:
        """The DAG (d, d) that NOTEARS found."""
        return thresholded(self.notears_weights.cpu().numpy(), 0.3)

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """NOTEARS, where it is wanted, and the search."""
        found = [
            Stage("swaps", self.config.steps, update=self._swap, state={"search": LateSearch(lambda: self.search)})
        ]
        if self.runs_notears:
            found.insert(
                0, Stage("notears", self.NOTEARS_STEPS, update=self._multiply, state={"notears": self.notears})
            )
        return found

    def _multiply(self, batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
        began = time.perf_counter()
        self.notears.step()
        self.counters["notears_milliseconds"] += round(1000 * (time.perf_counter() - began))
        self.notears_weights.copy_(torch.from_numpy(self.notears.weights))
        return {"acyclicity": torch.tensor(self.notears.h), "evaluations": torch.tensor(self.notears.evaluations * 1.0)}

    def _swap(self, batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
        began = time.perf_counter()
        (search := self.search).step()
        self.counters["topo_milliseconds"] += round(1000 * (time.perf_counter() - began))
        self.order.copy_(torch.from_numpy(search.fitted.order))
        self.weights.copy_(torch.from_numpy(search.fitted.weights))
        found = {"score": search.fitted.score, "moves": search.moves, "evaluations": search.evaluations}
        return {k: torch.tensor(float(v)) for k, v in found.items()}

    # ---- judging and keeping the result ------------------------------------------------------------------------------------

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """The result beside NOTEARS, NOTEARS with post-processing, the start, two simple orders and, where it is known, the true one."""
        samples = next(test.batches(len(test))).inputs.numpy()
        truth = self.on.truth
        contestants = self.contestants(samples)
        layout = contestants[0].order if truth is None else topological_order(truth)
        panels = [] if truth is None else [("true", truth)]
        panels.append((contestants[0].who, self.estimator.adjacency_))
        if self.runs_notears:
            panels.append(("notears", self.notears_graph()))
        return {
            "rows": judge_orders(contestants, self.threshold, truth),
            "pictures": dag_pictures(panels, self.on.names, layout, self.search.history),
            "converged": self.search.done,
            "moves": self.search.moves,
            "moves judged": self.search.evaluations,
        }

    def contestants(self, samples: FloatArray) -> list[Contestant]:
        """Everybody's order with weights fitted along it, and the losses on ``samples``; the result comes first."""
        estimator, train, config = self.estimator.finish(self.search), self.train_samples, self.config
        problem = estimator.problem_

        def one(who: str, fitted: Fitted, clock: str = "", graph: FloatArray | None = None) -> Contestant:
            spent = self.counters[clock] / 1000 if clock else None
            return contestant(who, estimator, fitted, samples, seconds=spent, graph=graph)

        from_notears = config.start == "notears"
        found = [one("notears + topo" if from_notears else "topo", estimator.fitted_, "topo_milliseconds")]
        if self.runs_notears:
            graph = self.notears_graph()
            found.append(one("notears", problem.fit(topological_order(graph)), "notears_milliseconds", graph))
            if not from_notears and config.model != "mlp":
                found.append(one("notears + topo", self.make_estimator().fit(train, order_init=graph).fitted_))
        if not from_notears:
            found.append(one("its random start", problem.fit(self.search.start)))
        return found + [one(who, problem.fit(order)) for who, order in simple_orders(train, self.on.truth).items()]

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The DAG as arrays and as GraphML."""
        found = self.estimator.finish(self.search)
        write_dag(folder, found.adjacency_, found.order_, self.on.names, found.weights_, description)
