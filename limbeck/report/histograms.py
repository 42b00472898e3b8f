"""Histograms of quantities in [0, 1], side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np


def histogram_png(groups: Mapping[str, Sequence[float]], label: str, *, bins: int = 20) -> str:
    """Shares of each group's values per bin of [0, 1], as a PNG in base64. Groups without values are left out.

    Args:
        groups: values in [0, 1] by name.
        label: of the horizontal axis.
        bins: of equal width.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: np.asarray(values) for name, values in groups.items() if len(values)}
    figure = Figure(figsize=(5.5, 2.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(
        list(shown.values()),
        bins=np.linspace(0, 1, bins + 1).tolist(),
        weights=[np.full(len(v), 100 / len(v)) for v in shown.values()],
        label=[f"{name} ({len(v):,})" for name, v in shown.items()],
    )
    axes.set_xlabel(label)
    axes.set_ylabel("share, %")
    if shown:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
