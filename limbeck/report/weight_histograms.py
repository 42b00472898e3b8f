"""Weights of layers in scaled space, and the levels that they are rounded to."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

PANELS = 6
COLUMNS = 3


def level_histograms_png(layers: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], *, bins: int = 60) -> str:
    """A panel for each layer: the distribution of its scaled weights, and its levels as lines, as a PNG in base64.

    Args:
        layers: by name: scaled weights in [0, 1], and levels. Of more than :data:`PANELS` evenly chosen ones are shown.
        bins: of equal width.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(layers)
    shown = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(PANELS, len(names))).round().astype(int))]
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.3 * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for number, name in enumerate(shown):
        weights, levels = layers[name]
        axes: Any = figure.add_subplot(rows, columns, number + 1)
        low, high = min(0.0, float(levels.min())), max(1.0, float(levels.max()))
        axes.hist(weights, bins=np.linspace(low, high, bins + 1), color="#9db8d9")
        for level in levels:
            axes.axvline(level, color="#b3362b", linewidth=1.2)
        axes.set_title(f"{name}: {len(weights):,} weights, {len(levels)} levels", fontsize=8)
        axes.set_yticks([])
    figure.supxlabel("weight, scaled to [0, 1] within its bucket", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
