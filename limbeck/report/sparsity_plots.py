"""Pictures of sparse networks: how much of each layer is zero, losses over sparsity, and what is written."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any


def layer_bars_png(shares: Mapping[str, float]) -> str:
    """A bar for each layer: its share of zeros, in [0, 1]. A PNG in base64."""
    figure, axes = _figure(6.4, max(1.6, 0.9 + 0.2 * len(shares)))
    names = list(shares)
    axes.barh(range(len(names)), [100 * shares[n] for n in names], height=0.7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("zeros, %")
    axes.grid(axis="x", alpha=0.3)
    return _png(figure)


def sparsity_curves_png(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    label: str,
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """A measure over sparsity: curves by name, (sparsity, value) each, and single points with their names. A PNG in base64."""
    figure, axes = _figure(5.4, 3.2)
    for name, points in curves.items():
        ordered = sorted(points)
        axes.plot([100 * s for s, _ in ordered], [v for _, v in ordered], marker="o", markersize=4, label=name)
    for name, (sparsity, value) in (marks or {}).items():
        axes.plot([100 * sparsity], [value], marker="*", markersize=13, linestyle="none", label=name)
    axes.set_xlabel("zeros, %")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _png(figure)


def texts_png(texts: Mapping[str, tuple[str, str]], width: int = 96, lines: int = 12) -> str:
    """What several models write after the same beginning: by name (beginning, what follows), in a fixed-width face. A PNG in base64."""
    blocks = []
    for name, (prompt, text) in texts.items():
        whole = f"{prompt}▸{text}"
        wrapped = [
            part for line in whole.split("\n") for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]
        ]
        blocks.append((name, wrapped[:lines]))
    rows = sum(len(lines) + 2 for _, lines in blocks)
    figure, axes = _figure(8.2, 0.17 * rows + 0.2)
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(rows, 0)
    at = 0.5
    for name, wrapped in blocks:
        axes.text(0, at, name, fontsize=9, fontweight="bold", va="center")
        for number, line in enumerate(wrapped):
            shown = line.replace("$", r"\$")
            axes.text(0, at + 1 + number, shown, fontsize=8, family="monospace", va="center")
        at += len(wrapped) + 2
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
