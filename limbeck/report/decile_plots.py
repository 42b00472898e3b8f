"""How a measure goes with several indicators: its means over groups of samples, from the smallest indicator to the largest."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any


def decile_png(panels: Mapping[str, Sequence[tuple[float, float, int]]], label: str) -> str:
    """A panel for each indicator, with a common vertical axis, as a PNG in base64.

    Args:
        panels: by title: mean indicator, mean measure and size of each group, in order.
        label: of the measure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.9 * max(1, len(panels)), 2.8), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    first: Any = None
    for number, (title, groups) in enumerate(panels.items()):
        axes: Any = figure.add_subplot(1, len(panels), number + 1, sharey=first)
        first = first or axes
        axes.plot([g[0] for g in groups], [g[1] for g in groups], marker="o", markersize=4)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        if axes is first:
            axes.set_ylabel(label)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
