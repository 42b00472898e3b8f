"""Points of several classes in the plane, one panel for each model."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def principal_plane(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 2) the two principal components of points (N, D), D of 2 or more."""
    centred = points - points.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    found: NDArray[np.float64] = centred @ axes.T
    return found


def scatter_png(
    panels: Mapping[str, NDArray[np.float64]], labels: NDArray[np.int64], names: Sequence[str], *, most: int = 1500
) -> str:
    """Panels side by side, points coloured by class, as a PNG in base64.

    Args:
        panels: points (N, D) by title; more than two dimensions are shown by their principal plane.
        labels: (N,) classes of the points.
        names: of the classes.
        most: points shown, the first ones.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    colours = colormaps["tab10" if len(names) <= 10 else "tab20"]
    for number, (title, points) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1, title=title, xticks=[], yticks=[])
        plane = principal_plane(points) if points.shape[1] > 2 else points
        for k, name in enumerate(names):
            chosen = np.flatnonzero(labels[:most] == k)
            axes.scatter(
                plane[chosen, 0], plane[chosen, 1], s=6, color=colours(k % colours.N), label=name, linewidths=0
            )
    if len(names) <= 20:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7, frameon=False
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
