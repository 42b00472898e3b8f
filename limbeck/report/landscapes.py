"""Pictures of what lies between and around networks in weight space."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from limbeck.report.measures import measure


def landscape_picture(
    x: ArrayLike,
    y: ArrayLike,
    values: ArrayLike,
    points: Mapping[str, Sequence[float]],
    label: str,
    *,
    positions: ArrayLike = (),
    curves: Mapping[str, Sequence[float]] | None = None,
    ends: tuple[str, str] = ("start", "end"),
) -> str:
    """A loss over a plane of weight space, on a logarithmic colour scale, and beside it measures on the line of two networks.

    Args:
        x, y: coordinates of columns (W,) and rows (H,).
        values: (H, W); values of 0 and less are shown as the smallest positive one.
        points: coordinates of the networks, by name.
        label: what the values are.
        positions, curves: of the line: 0 is the first network, 1 the second; a curve per measure. No curves: no second panel.
        ends: names of the two networks.

    Returns:
        a PNG in base64.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    z = np.asarray(values, dtype=np.float64)
    positive = z[np.isfinite(z) & (z > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-12, 1.0)
    z = np.clip(np.nan_to_num(z, nan=high, posinf=high), low, high)
    figure = Figure(figsize=(8.4 if curves else 4.6, 3.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    plane: Any = figure.add_subplot(1, 2 if curves else 1, 1)
    mesh = plane.pcolormesh(
        x, y, z, shading="nearest", cmap="viridis_r", norm=LogNorm(low, max(high, low * (1 + 1e-9)))
    )
    figure.colorbar(mesh, ax=plane, label=label)
    for name, (a, b) in points.items():
        plane.plot(a, b, marker="o", color="#d62728", markersize=5)
        plane.annotate(name, (a, b), textcoords="offset points", xytext=(5, 5), fontsize=8)
    plane.set(xlabel="weights, first direction", ylabel="second direction")
    if curves:
        line: Any = figure.add_subplot(1, 2, 2)
        for name, found in curves.items():
            shown = measure(name)
            line.plot(
                positions, np.asarray(found) * (shown.scale or 1.0), marker="o", markersize=3.5, label=shown.axis()
            )
        for position, name in zip((0, 1), ends, strict=True):
            line.axvline(position, color="#888888", linewidth=0.8, linestyle=":")
            line.annotate(
                name,
                (position, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -10),
                textcoords="offset points",
                fontsize=8,
            )
        line.set(xlabel=f"position on the line from {ends[0]} to {ends[1]}")
        line.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
