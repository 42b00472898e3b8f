"""Sheets of rooted trees: small drawings in a grid, roots on top, nodes coloured and numbered by their labels."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from limbeck.core.graphs import GraphData


@dataclass(frozen=True)
class DrawnForest:
    """One drawing.

    Attributes:
        labels: (n,) what each node says, and what its colour follows.
        parent: (n,) each node's parent, -1 for a root; a parent comes before its children.
        line: written above.
    """

    labels: NDArray[np.int64]
    parent: NDArray[np.int64]
    line: str


def drawn_forest(items: GraphData, number: int, line: str) -> DrawnForest:
    """One of some forests as it is drawn; a node says its label, or the number of its tuple of labels among all that there could be.

    Args:
        items: forests whose edges go from child to parent, parents before their children.
        number: which one.
        line: written above.
    """
    forest = items.graph(number)
    columns = forest.node_labels.numpy()
    label = columns[:, 0].copy()
    for column, count in enumerate(items.label_counts[1:], 1):
        label = label * count + columns[:, column]
    parent = np.full(len(label), -1, dtype=np.int64)
    parent[forest.edge_index[0].numpy()] = forest.edge_index[1].numpy()
    return DrawnForest(label, parent, line)


def layout(parent: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, 2) places of the nodes of rooted trees: leaves side by side from 0, a parent over the middle of its children, depth
    downwards."""
    n = len(parent)
    depth = np.zeros(n)
    children: list[list[int]] = [[] for _ in range(n)]
    for node, above in enumerate(parent.tolist()):
        if above >= 0:
            children[above].append(node)
            depth[node] = depth[above] + 1
    x = np.zeros(n)
    free = 0.0
    stack = [(root, False) for root in reversed(np.nonzero(parent < 0)[0].tolist())]
    while stack:
        node, done = stack.pop()
        if done:
            x[node] = (x[children[node][0]] + x[children[node][-1]]) / 2
        elif children[node]:
            stack += [(node, True), *((c, False) for c in reversed(children[node]))]
        else:
            x[node], free = free, free + 1
    return np.stack([x, -depth], 1)


def tree_sheet(forests: Sequence[DrawnForest], *, columns: int = 3) -> str:
    """A grid of forests as a PNG in base64.

    Args:
        forests: at least one.
        columns: drawings in a row.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    columns = min(columns, len(forests))
    rows = math.ceil(len(forests) / columns)
    figure = Figure(figsize=(3.0 * columns, 1.5 * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    colours = colormaps["tab20"]
    for number, forest in enumerate(forests):
        axes = figure.add_subplot(rows, columns, number + 1)
        places = layout(forest.parent)
        below = np.nonzero(forest.parent >= 0)[0]
        lines = np.stack([places[below], places[forest.parent[below]]], 1)
        axes.add_collection(LineCollection(list(lines), colors="0.6", linewidths=0.8, zorder=1))
        size = float(np.clip(1500 / (np.ptp(places[:, 0]) + 4), 20, 110))
        axes.scatter(places[:, 0], places[:, 1], s=size, c=colours(forest.labels % 20), zorder=2)
        if size > 45:
            for (x, y), label in zip(places, forest.labels.tolist(), strict=True):
                axes.text(x, y, str(label), ha="center", va="center", fontsize=6, zorder=3)
        axes.set_title(forest.line, fontsize=8)
        axes.set_ylim(float(places[:, 1].min()) - 0.5, 0.5)
        axes.margins(x=0.08)
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
