"""Figures by matplotlib, as inline SVG that follows the page's colours, and matrices as PNG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from limbeck.report.numbers import finite

MAX_POINTS = 600
SERIES = 8
_LOG_FROM = 50.0  # ratio of largest to smallest value from which a positive curve is easier to read on a log axis

# Placeholder colours: each stands for a variable of the style sheet and is replaced in the SVG.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_LINES = [f"#0000f{n}" for n in range(1, SERIES + 1)]
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", **{c: f"s{n}" for n, c in enumerate(_LINES, 1)}}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "limbeck",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "lines.linewidth": 1.7,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)))


@dataclass(frozen=True)
class Curve:
    """One line of a figure; points that are not finite are left out."""

    label: str
    steps: Sequence[float]
    values: Sequence[Any]
    color: int = 1


def line_figure(curves: Sequence[Curve], label: str, *, x_label: str = "step", wide: bool = False) -> Markup:
    """Curves over steps.

    More than :data:`MAX_POINTS` points are averaged in bins. The vertical axis is logarithmic where the values are positive and
    spread over more than a factor of 50.

    Args:
        curves: what to draw; ``color`` picks one of the page's 8 series colours, with dashes from the ninth on.
        label: read out in place of the picture.
        x_label: written under the axis.
        wide: a figure of the page's full width.

    Returns:
        an ``<svg>``, or an empty string where there is no finite value.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = [(curve, *thinned(curve.steps, curve.values)) for curve in curves]
    drawn = [item for item in drawn if len(item[1])]
    if not drawn:
        return Markup("")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.2) if wide else (4.7, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for curve, x, y in drawn:
            position = curve.color - 1
            axes.plot(
                x,
                y,
                color=_LINES[position % SERIES],
                linestyle=_DASHES[position // SERIES % len(_DASHES)],
                marker="o" if len(x) <= 16 else "",
                markersize=3.2,
            )
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        everything = np.concatenate([y for _, _, y in drawn])
        if everything.min() > 0 and everything.max() / everything.min() > _LOG_FROM:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        return inline_svg(figure, label)


def reliability_figure(bins: Sequence[Mapping[str, Any]], label: str) -> Markup:
    """Accuracy over confidence, one bar per bin that holds samples, beside the diagonal of perfect calibration."""
    import matplotlib
    from matplotlib.figure import Figure

    full = [b for b in bins if b.get("count") and finite(b.get("accuracy")) is not None]
    if not full:
        return Markup("")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.7, 3.3), layout="constrained")
        axes = figure.add_subplot()
        left = np.array([b["lower"] for b in full])
        width = np.array([b["upper"] for b in full]) - left
        axes.bar(left, [b["accuracy"] for b in full], width, align="edge", color=_LINES[0], alpha=0.45)
        axes.plot([0, 1], [0, 1], color=_MUTED, linestyle=(0, (3, 2)), linewidth=1)
        points = [(b["confidence"], b["accuracy"]) for b in full if finite(b.get("confidence")) is not None]
        axes.plot(*np.array(points).T, color=_LINES[1], marker="o", markersize=4)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
        return inline_svg(figure, label)


def thinned(steps: Sequence[float], values: Sequence[Any], most: int = MAX_POINTS) -> tuple[NDArray[Any], NDArray[Any]]:
    """Finite points, averaged in equal bins if there are more than ``most``."""
    pairs = [(s, v) for s, v in zip(steps, (finite(v) for v in values), strict=True) if v is not None]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    if len(table) > most:
        edges = np.linspace(0, len(table), most + 1).astype(int)
        table = np.add.reduceat(table, edges[:-1], axis=0) / np.diff(edges)[:, None]
    return table[:, 0], table[:, 1]


def inline_svg(figure: Any, label: str) -> Markup:
    """A matplotlib figure as an ``<svg>`` element: no header, ids of its own, the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    own = f"f{abs(hash_text(label + text)):08x}-"
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = text.replace('href="#', f'href="#{own}').replace("url(#", f"url(#{own}")
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    head = Markup('<svg class="chart" role="img" aria-label="{}" {}>').format(label, Markup(box.group()))
    body = re.sub(r">\s+<", "><", text[text.index(">") + 1 :].strip())
    return head + Markup(body)


def hash_text(text: str) -> int:
    """A checksum that is the same in every process."""
    import zlib

    return zlib.crc32(text.encode())


def matrix_png(matrix: NDArray[Any]) -> str:
    """A square matrix of shares in [0, 1] as the base64 of a PNG: the diagonal blue, the rest red, strength as opacity."""
    from matplotlib.image import imsave

    shares = np.sqrt(np.clip(matrix, 0, 1))  # the square root makes rare confusions visible
    pixels = np.zeros((*shares.shape, 4))
    pixels[..., :3] = np.array([0.80, 0.27, 0.20])
    pixels[np.eye(len(shares), dtype=bool), :3] = np.array([0.18, 0.47, 0.72])
    pixels[..., 3] = shares
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def last_value(curve: Curve) -> float | None:
    """The last finite value."""
    found = [v for v in map(finite, curve.values) if v is not None]
    return found[-1] if found else None
