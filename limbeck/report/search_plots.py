"""Pictures of a search: scores against worth, the course of the search, and what a network costs against what it is worth."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

Marks = Mapping[str, tuple[float, float]]


def score_scatter_png(
    scores: Mapping[str, Sequence[float]],
    worth: Sequence[float],
    *,
    worth_label: str = "accuracy",
    notes: Mapping[str, str] | None = None,
    colours: Sequence[float] | None = None,
    colour_label: str = "",
    marks: Mapping[str, int] | None = None,
) -> str:
    """One panel for each score: the score across, the worth up; as a PNG in base64. What is not finite is left out.

    Args:
        scores: (n,) by name.
        worth: (n,).
        worth_label: what it is.
        notes: a line under a score's name, its rank correlation say.
        colours: (n,) of the points, such as numbers of parameters.
        colour_label: what they are.
        marks: numbers of points to be named.
    """
    figure, axes = _panels(len(scores), sharey=True)
    for panel, (name, values) in zip(axes, scores.items(), strict=True):
        kept = [n for n, (s, w) in enumerate(zip(values, worth, strict=True)) if math.isfinite(s) and math.isfinite(w)]
        shade = {} if colours is None else {"c": [colours[n] for n in kept], "cmap": "viridis"}
        across, up = [values[n] for n in kept], [worth[n] for n in kept]
        drawn = panel.scatter(across, up, s=14, linewidths=0, alpha=0.8, **shade)
        note = (notes or {}).get(name)
        panel.set_title(name if note is None else f"{name}\n{note}", fontsize=9)
        panel.set_xlabel("score")
        panel.locator_params(axis="x", nbins=4)
        _name(panel, {who: (values[n], worth[n]) for who, n in (marks or {}).items()})
    axes[0].set_ylabel(worth_label)
    if colours is not None:
        figure.colorbar(drawn, ax=axes, label=colour_label)
    return _png(figure)


def history_png(scores: Sequence[float], *, again_from: int | None = None) -> str:
    """The scores of all candidates in the order in which they were judged, and the best so far; as a PNG in base64.

    Args:
        scores: (n,); minus infinity for candidates that say nothing, which are left out.
        again_from: number of the candidate from which on children instead of random members were judged.
    """
    figure, (axes,) = _panels(1, width=7.0)
    kept = [(n, s) for n, s in enumerate(scores, 1) if math.isfinite(s)]
    best: list[float] = []
    for _, score in kept:
        best.append(max(score, best[-1]) if best else score)
    axes.scatter([n for n, _ in kept], [s for _, s in kept], s=9, linewidths=0, alpha=0.6, label="candidate")
    axes.step([n for n, _ in kept], best, where="post", color="C1", label="best so far")
    if again_from is not None and again_from < len(scores):
        axes.axvline(again_from + 0.5, color="grey", linewidth=0.8, linestyle=":", label="children from here")
    axes.set(xlabel="candidate", ylabel="score")
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def front_png(
    costs: Sequence[float],
    worth: Sequence[float],
    *,
    cost_label: str = "parameters",
    worth_label: str = "accuracy",
    marks: Marks | None = None,
    limit: float | None = None,
) -> str:
    """Cost across (logarithmic), worth up, and the line through the members than which none is both cheaper and better; as a PNG in base64.

    Args:
        costs, worth: (n,); points whose worth is not finite are left out.
        marks: named points (cost, worth) beside them.
        limit: a bound on the cost, drawn as a line.
    """
    figure, (axes,) = _panels(1, width=7.0)
    kept = [(c, w) for c, w in zip(costs, worth, strict=True) if math.isfinite(w) and c > 0]
    if kept:
        axes.scatter([c for c, _ in kept], [w for _, w in kept], s=12, linewidths=0, alpha=0.6)
        front = cost_front([c for c, _ in kept], [w for _, w in kept])
        axes.step([kept[n][0] for n in front], [kept[n][1] for n in front], where="post", color="C1", label="front")
    if limit is not None:
        axes.axvline(limit, color="grey", linewidth=0.8, linestyle=":", label="budget")
    axes.set_xscale("log")
    axes.set(xlabel=cost_label, ylabel=worth_label)
    _name(axes, marks or {})
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def cost_front(costs: Sequence[float], worth: Sequence[float]) -> list[int]:
    """Numbers of the members than which none is both at most as costly and better, cheapest first."""
    front: list[int] = []
    for number in sorted(range(len(costs)), key=lambda n: (costs[n], -worth[n])):
        if not front or worth[number] > worth[front[-1]]:
            front.append(number)
    return front


def _panels(count: int, width: float = 3.4, **options: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, 3.3), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False, **options)[0]
    for panel in axes:
        panel.margins(0.1)
    return figure, axes


def _name(axes: Any, marks: Marks) -> None:
    for number, (who, (x, y)) in enumerate(marks.items()):
        if math.isfinite(x) and math.isfinite(y):
            axes.scatter([x], [y], s=70, facecolors="none", edgecolors=f"C{number + 2}", linewidths=1.6)
            axes.annotate(who, (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
