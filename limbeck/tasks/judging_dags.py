"""Judging orders and graphs: measures that treat every algorithm alike, and pictures of their adjacency."""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.blocks.acyclicity import FloatArray, IntArray
from limbeck.blocks.dags import kkt_violation, thresholded, topological_order
from limbeck.blocks.order_estimator import OrderEstimator
from limbeck.blocks.prefix_networks import NetworkPrefixes
from limbeck.blocks.prefix_problems import Fitted
from limbeck.blocks.prefix_regression import gram_of, greedy_order, variance_order
from limbeck.metrics.dags import edge_errors, order_errors

MOST_NAMED = 30
"""Variables whose names are written beside a picture."""


@dataclass(frozen=True)
class Contestant:
    """One order and the weights that were fitted along it.

    Attributes:
        who: its name.
        order: (d,).
        weights: (d, d) fitted along the order.
        score: Q on the training samples.
        test_loss: the loss on test samples, without penalties.
        kkt_violation: see :func:`limbeck.blocks.dags.kkt_violation`.
        seconds: that finding the order took, where it was measured.
        graph: (d, d) the algorithm's own DAG, where it gives one itself.
    """

    who: str
    order: IntArray
    weights: FloatArray
    score: float
    test_loss: float
    kkt_violation: float
    seconds: float | None = None
    graph: FloatArray | None = None


def contestant(
    who: str,
    estimator: OrderEstimator,
    fitted: Fitted,
    samples: FloatArray,
    *,
    seconds: float | None = None,
    graph: FloatArray | None = None,
) -> Contestant:
    """A contestant out of what was fitted along its order.

    Args:
        who: its name.
        estimator: a fitted one, whose problem and loss are used.
        fitted: of that problem.
        samples: (n, d) to test on.
        seconds, graph: see :class:`Contestant`; of a graph given, the conditions of a local optimum are checked instead of the refitted weights, where weights are coefficients.
    """
    seen = copy.copy(estimator)
    seen.fitted_, seen.weights_ = fitted, fitted.weights
    own = fitted
    if graph is not None and not isinstance(estimator.problem_, NetworkPrefixes):
        own = Fitted(fitted.order, graph, 0.0)
    violation = kkt_violation(own.weights, estimator.problem_.gradient(own))
    return Contestant(who, fitted.order, fitted.weights, fitted.score, -seen.score(samples), violation, seconds, graph)


def simple_orders(train: FloatArray, truth: FloatArray | None = None) -> dict[str, IntArray]:
    """Orders that need no search: by variance (which gives away raw simulated data), greedy from the top down, and the true one where it is known."""
    gram = gram_of(train)
    found = {"by variance": variance_order(gram), "greedy, top-down": greedy_order(gram)}
    return found if truth is None else {**found, "true order": topological_order(truth)}


def judge_orders(
    contestants: Sequence[Contestant], threshold: float, truth: FloatArray | None = None
) -> list[dict[str, Any]]:
    """A row of measures each: everybody's weights are refitted along their order and cut at the same threshold.

    Where an algorithm gives a graph of its own, ``own_shd`` is that graph's distance.
    """
    rows = []
    for one in contestants:
        row: dict[str, Any] = {"who": one.who, "score": one.score, "test_loss": one.test_loss}
        found = thresholded(one.weights, threshold)
        if truth is None:
            row["edges"] = float((found != 0).sum())
        else:
            row |= {**edge_errors(found, truth), "edges_turned_round": order_errors(one.order, truth)}
            if one.graph is not None:
                row["own_shd"] = edge_errors(one.graph, truth)["shd"]
        row["kkt_violation"] = one.kkt_violation
        if one.seconds is not None:
            row["seconds"] = one.seconds
        rows.append(row)
    return rows


def dag_pictures(
    panels: Sequence[tuple[str, FloatArray]], names: Sequence[str], order: IntArray, history: Sequence[float]
) -> list[dict[str, str]]:
    """Adjacency matrices side by side, their rows and columns in one order, and the score over the steps.

    Args:
        panels: titles and weights (d, d).
        names: of the variables.
        order: (d,) how all matrices are laid out: a graph that agrees with it fills the upper triangle alone.
        history: Q at the start and after each step.
    """
    pictures = [
        {
            "title": "adjacency",
            "png": _matrices(panels, names, order),
            "caption": "Rows point to columns, laid out in one topological order: of the truth where it is known. What lies below the diagonal contradicts it.",
        }
    ]
    if len(history) > 1:
        pictures.append(
            {
                "title": "score after each step",
                "png": _curve(history),
                "caption": "Every step lowers it, or the search ends.",
            }
        )
    return pictures


def _matrices(panels: Sequence[tuple[str, FloatArray]], names: Sequence[str], order: IntArray) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(panels), 3.7), layout="constrained")
    largest = max(float(np.abs(weights).max(initial=0.0)) for _, weights in panels) or 1.0
    named = len(order) <= MOST_NAMED
    for number, (title, weights) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        shown = axes.imshow(weights[np.ix_(order, order)], cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.plot([-0.5, len(order) - 0.5], [-0.5, len(order) - 0.5], color="0.75", linewidth=0.6)
        axes.set_title(title, fontsize=10)
        labels = [names[i] for i in order.tolist()] if named else []
        ticks = range(len(order)) if named else []
        axes.set_xticks(ticks, labels, rotation=90, fontsize=5.5)
        axes.set_yticks(ticks, labels if number == 1 else [""] * len(labels), fontsize=5.5)
        if number == len(panels):
            figure.colorbar(shown, ax=axes, shrink=0.7, label="weight")
    return _png(figure)


def _curve(history: Sequence[float]) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(history, marker="o", markersize=3, linewidth=1.4)
    if min(history) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="score Q")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return _png(figure)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
