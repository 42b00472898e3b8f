"""Small plots as inline SVG: values per seed as dots, means as ticks, intervals as bars.

Colours come from the page's style sheet, so that the plots follow its light and dark modes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from limbeck.report.numbers import digits

_WIDTH, _PAD, _ROW, _AXIS = 360, 14, 36, 26


@dataclass(frozen=True)
class Strip:
    """One row of a strip plot.

    Attributes:
        label: what it shows.
        values: one per seed.
        mean: marked by a tick; None marks none.
        low, high: an interval, or None.
        style: a class of the style sheet (``method``, ``baseline``, ``control``, ``holds``, ``fails``, ``undecided``).
    """

    label: str
    values: Sequence[float]
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    style: str = "method"


def strip_plot(
    rows: Sequence[Strip],
    title: str,
    *,
    axis: str = "",
    scale: float | None = 1,
    signed: bool = False,
    text: Callable[[float], str] = digits,
    seeds: Sequence[object] = (),
    marks: Sequence[float] = (),
) -> Markup:
    """Rows over one axis.

    Args:
        rows: from top to bottom.
        title: read out in place of the picture.
        axis: written under the axis.
        scale: tick labels are values times this (100 for percent); None writes them with ``text``.
        signed: whether tick labels carry their sign.
        text: how values are written.
        seeds: names of the seeds, for the dots' titles.
        marks: values with a vertical line, such as 0 or a margin.
    """
    numbers = [v for r in rows for v in (*r.values, r.mean, r.low, r.high) if v is not None and math.isfinite(v)]
    numbers += [m for m in marks if math.isfinite(m)]
    if not numbers:
        return Markup("")
    low, high = min(numbers), max(numbers)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    span = high - low
    low, high = low - 0.04 * span, high + 0.04 * span
    bottom = _ROW * len(rows) + 6
    height = bottom + _AXIS + (14 if axis else 0)

    def x(value: float) -> str:
        return f"{_PAD + (value - low) / (high - low) * (_WIDTH - 2 * _PAD):.2f}"

    parts = [
        Markup('<svg class="strip" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, height, title),
    ]
    ticks = nice_ticks(low, high)
    labels = [text(t) for t in ticks] if scale is None else tick_labels([scale * t for t in ticks], signed)
    for tick, label in zip(ticks, labels, strict=True):
        parts.append(Markup('<line class="grid" x1="{0}" x2="{0}" y1="4" y2="{1}"/>').format(x(tick), bottom))
        parts.append(Markup('<text class="tick" x="{}" y="{}">{}</text>').format(x(tick), bottom + 15, label))
    parts += [
        Markup('<line class="mark" x1="{0}" x2="{0}" y1="4" y2="{1}"/>').format(x(mark), bottom) for mark in marks
    ]
    for number, row in enumerate(rows):
        y = _ROW * number + 26
        parts.append(
            Markup('<g class="{}"><text class="label" x="{}" y="{}">{}</text>').format(
                row.style, _PAD, y - 11, row.label
            )
        )
        if row.low is not None and row.high is not None:
            parts.append(
                Markup(
                    '<line class="interval" x1="{}" x2="{}" y1="{y}" y2="{y}"><title>{} to {}</title></line>'
                ).format(x(row.low), x(row.high), text(row.low), text(row.high), y=y)
            )
        for position, value in enumerate(row.values):
            if math.isfinite(value):
                seed = seeds[position] if position < len(seeds) else position
                parts.append(
                    Markup('<circle cx="{}" cy="{}" r="3.6"><title>seed {}: {}</title></circle>').format(
                        x(value), y, seed, text(value)
                    )
                )
        if row.mean is not None:
            parts.append(
                Markup('<line class="mean" x1="{0}" x2="{0}" y1="{1}" y2="{2}"><title>mean {3}</title></line>').format(
                    x(row.mean), y - 8, y + 8, text(row.mean)
                )
            )
        parts.append(Markup("</g>"))
    if axis:
        parts.append(Markup('<text class="tick" x="{}" y="{}">{}</text>').format(_WIDTH / 2, height - 4, axis))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def small_interval(mean: float, low: float, high: float, verdict: str) -> Markup:
    """An interval beside zero, as small as a word. The scale is the row's own."""
    reach = max(abs(low), abs(high), abs(mean)) or 1.0

    def x(value: float) -> str:
        return f"{40 + value / reach * 37:.1f}"

    return Markup(
        '<svg class="small strip" viewBox="0 0 80 14" aria-hidden="true"><line class="mark" x1="40" x2="40" y1="0" y2="14"/>'
        '<g class="{}"><line class="interval" x1="{}" x2="{}" y1="7" y2="7"/><circle cx="{}" cy="7" r="3"/></g></svg>'
    ).format(escape(verdict), x(low), x(high), x(mean))


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values between ``low`` and ``high``, some ``about`` of them, steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
    first = math.ceil(low / step)
    return [0.0 if n == 0 else round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(ticks: Sequence[float], signed: bool = False) -> list[str]:
    """Tick values with just the decimals that tell them apart."""
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=abs(ticks[0]) if ticks else 0) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{t:{'+' if signed and t else ''},.{decimals}f}" for t in ticks]
