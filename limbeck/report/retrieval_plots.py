"""Plots for retrieval: recall over a setting, and cosines before and after a change."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def recall_curves_png(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    level: tuple[str, float] | None = None,
) -> str:
    """Shares over a setting, in per cent, a line for each way.

    Args:
        x: values of the setting; they stand at equal distances, so that 0, 1/4, 1/2, 1, 2, … are all readable.
        curves: shares in [0, 1], one for each x, by name.
        level: name and share of what does not depend on the setting.

    Returns:
        a PNG in base64.
    """
    figure, axes = _axes()
    for name, values in curves.items():
        axes.plot(range(len(x)), 100 * np.asarray(values), marker="o", markersize=3.5, label=name)
    if level is not None:
        axes.axhline(100 * level[1], color="#888888", linestyle=":", linewidth=1.2, label=level[0])
    axes.set_xticks(range(len(x)), [f"{v:g}" for v in x])
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def cosine_histogram_png(groups: Mapping[str, Sequence[float]], label: str, *, bins: int = 50) -> str:
    """The density of each group's cosines, as outlines over one another; one range for all.

    Args:
        groups: cosines by name; groups without any are left out.

    Returns:
        a PNG in base64.
    """
    figure, axes = _axes()
    shown = {name: np.asarray(values) for name, values in groups.items() if len(values)}
    if shown:
        low, high = (f([f(values) for values in shown.values()]) for f in (np.min, np.max))
        edges = np.linspace(low, max(high, low + 1e-6), bins + 1).tolist()
        for name, values in shown.items():
            axes.hist(values, bins=edges, density=True, histtype="step", linewidth=1.5, label=name)
        axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel=label, ylabel="density")
    return _png(figure)


def _axes() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 2.8), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
