"""A sheet of samples with the images that represent them below."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def representation_sheet(
    images: NDArray[np.float64], titles: Sequence[str], rows: Sequence[str], clouds: Sequence[Any] | None = None
) -> str:
    """A PNG in base64: a column for each sample, a row for each of its images.

    Args:
        images: (samples, len(rows), r_1, r_2); the first index goes to the right, the second up. Every row has one scale of colours.
        titles: one for each sample.
        rows: what each image of a sample is called.
        clouds: (points, dimensions) of each sample, drawn above its images in the first two coordinates; None: no such row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, above = len(images), int(clouds is not None)
    figure = Figure(figsize=(1.15 * count, 1.3 * (len(rows) + above)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows) + above, count, squeeze=False)
    for column, title in enumerate(titles):
        if clouds is not None:
            cloud = np.asarray(clouds[column])
            second = cloud[:, 1] if cloud.shape[1] > 1 else np.zeros(len(cloud))
            grid[0, column].scatter(cloud[:, 0], second, s=1.5, color="0.25")
            grid[0, column].set_aspect("equal")
        for row, name in enumerate(rows):
            axes = grid[row + above, column]
            top = float(images[:, row].max()) or 1.0
            axes.imshow(images[column, row].T, origin="lower", cmap="viridis", vmin=0, vmax=top)
            if column == 0:
                axes.set_ylabel(name, fontsize=8)
        grid[0, column].set_title(title, fontsize=8)
    for axes in grid.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
