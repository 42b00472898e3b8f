"""Samples of several samplers side by side at equal noise: images in a grid, or points in the plane."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limbeck.core.errors import InputError

_DPI = 110
_ACROSS = 4  # panels in a row of a scatter grid


def sample_grid(columns: Mapping[str, NDArray[np.uint8]], rows: Sequence[str] | None = None) -> str:
    """A PNG in base64 with one row for each noise and one column for each sampler.

    Args:
        columns: by the sampler's name, which becomes the column's head: (N, C, H, W) uint8 with C 1 or 3; image n of every column comes
            from the same noise and condition.
        rows: a label for each of the N rows (its condition, say); None: none.

    Raises:
        InputError: no images, other types or shapes, numbers that differ.
    """
    if not columns:
        raise InputError("a grid of samples needs one column at least")
    sizes = {name: len(images) for name, images in columns.items()}
    for name, images in columns.items():
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise InputError(
                f"'{name}' must be uint8 (N, C, H, W) with 1 or 3 channels, not {images.dtype} {images.shape}"
            )
    count = next(iter(sizes.values()))
    if count < 1 or set(sizes.values()) != {count} or (rows is not None and len(rows) != count):
        raise InputError(
            f"every column, and the rows' labels, must be as many (got {sizes}, {'no' if rows is None else len(rows)} labels)"
        )
    figure = _figure(0.95 * len(columns) + (0.5 if rows else 0.1), 0.8 * count + 0.5)
    for number, (name, images) in enumerate(columns.items()):
        axes = figure.add_subplot(1, len(columns), number + 1)
        strip = _strip(images)
        axes.imshow(strip, cmap="gray" if strip.ndim == 2 else None, vmin=0, vmax=255, aspect="equal")
        axes.set_title(textwrap.fill(name, 14), fontsize=8)
        axes.set_xticks([])
        height = strip.shape[0] / count
        shown = rows is not None and number == 0
        axes.set_yticks([(n + 0.5) * height - 0.5 for n in range(count)] if shown else [])
        if shown:
            axes.set_yticklabels(list(rows or ()), fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return _png(figure)


def scatter_grid(
    panels: Mapping[str, NDArray[Any]], data: NDArray[Any] | None = None, *, limit: float | None = None
) -> str:
    """A PNG in base64 with one panel for each sampler: its points (N, 2) over those of the data.

    Args:
        panels: by the sampler's name.
        data: (M, 2) points drawn in grey below them; None: none.
        limit: the axes go from minus this to this; None: what the data (else the samples) fill, with a margin. All panels share it;
            points outside are counted in the panel's head.

    Raises:
        InputError: no panels, other shapes.
    """
    if not panels:
        raise InputError("a grid of scatter plots needs one panel at least")
    for name, points in [*panels.items(), *([] if data is None else [("data", data)])]:
        if points.ndim != 2 or points.shape[1] != 2 or not len(points):
            raise InputError(f"'{name}' must be points (N, 2), not {points.shape}")
    if limit is None:
        everything = np.abs(np.concatenate(list(panels.values())) if data is None else data)
        limit = float(1.25 * everything[np.isfinite(everything)].max(initial=1e-6))
    across = min(_ACROSS, len(panels))
    down = -(-len(panels) // across)
    figure = _figure(2.1 * across, 2.35 * down)
    for number, (name, points) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, number + 1)
        if data is not None:
            axes.scatter(data[:, 0], data[:, 1], s=3, color="0.8", linewidths=0)
        inside = (np.abs(points) <= limit).all(1)
        axes.scatter(points[inside, 0], points[inside, 1], s=3, color="#1f5fbf", alpha=0.6, linewidths=0)
        outside = int((~inside).sum())
        axes.set_title(textwrap.fill(name, 26) + (f"\n{outside} outside" if outside else ""), fontsize=8)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    return _png(figure)


def _strip(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images below each other with a white line between: (N (H + gap), W[, 3]), gap at the end of each."""
    n, channels, height, width = images.shape
    gap = max(1, height // 16)
    strip = np.full((n, height + gap, width, channels), 255, dtype=np.uint8)
    strip[:, :height] = images.transpose(0, 2, 3, 1)
    joined = strip.reshape(n * (height + gap), width, channels)
    return joined[..., 0] if channels == 1 else joined


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
