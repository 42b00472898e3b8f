"""Contact sheets: small pictures in a grid, each with a line of text."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def picture_sheet(images: NDArray[np.uint8], lines: Sequence[str], *, columns: int = 5) -> str:
    """A grid of images as a PNG in base64.

    Args:
        images: (N, C, H, W) uint8 with C 1 or 3, N >= 1.
        lines: one for each image, written above it.
        columns: images in a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.0 * columns, 1.25 * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for number, (image, line) in enumerate(zip(images, lines, strict=True)):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray" if image.shape[0] == 1 else None, vmin=0, vmax=255)
        axes.set_title(line, fontsize=8)
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
