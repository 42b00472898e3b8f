"""Quality against cost of several families of networks, in one picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence


def front_png(
    series: Mapping[str, Sequence[tuple[float, float]]], cost: str, quality: str, *, starred: Sequence[str] = ()
) -> str:
    """Points of each series, joined in order of cost, as a PNG in base64; the cost's axis is logarithmic.

    Args:
        series: (cost, quality in percent) of each network, by the name of the series.
        cost, quality: labels of the axes.
        starred: series whose points are stars without a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.8), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlabel=cost, ylabel=quality)
    for name, points in series.items():
        if not points:
            continue
        x, y = zip(*sorted(points), strict=True)
        if name in starred:
            axes.plot(x, y, "*", markersize=11, label=name, zorder=5, markeredgecolor="white")
        else:
            axes.plot(x, y, "o-", markersize=4, linewidth=1, alpha=0.85, label=name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
