"""Complexes whose simplices appear at points of R^n: what multiparameter persistence starts from.

A :class:`Multifiltration` is plain arrays; no topology library is needed to make one. Builders: function-Rips of a point cloud
(scale and density), lower-star of functions on a graph's vertices, and of channels of an image. Functions to filter by are in
:mod:`limbeck.blocks.vertex_functions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.core.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Multifiltration:
    """A simplicial complex with a monotone map to R^n.

    Args:
        cells: by dimension k the simplices (m_k, k + 1), each with its vertices rising and all of its faces there; vertex i is
            ``cells[0][i] = [i]``.
        values: by dimension (m_k, n): where each simplex appears; never before one of its faces.
        clique_dimension: all cliques of the edges up to this dimension belong to it too, each appearing with the last of its edges
            (coordinate by coordinate); then ``cells`` holds vertices and edges only. None: ``cells`` is all there is.

    Raises:
        InputError: arrays that do not fit each other, a face that is missing or appears late, or a value that is not finite.
    """

    cells: tuple[Ints, ...]
    values: tuple[Floats, ...]
    clique_dimension: int | None = None

    def __post_init__(self) -> None:
        if not self.cells or len(self.cells) != len(self.values) or not len(self.cells[0]):
            raise InputError("a filtration needs at least one vertex, and values for the cells of every dimension")
        n = self.values[0].shape[-1]
        for k, (cells, values) in enumerate(zip(self.cells, self.values, strict=True)):
            if cells.ndim != 2 or cells.shape[1] != k + 1 or values.shape != (len(cells), n) or n < 1:
                raise InputError(f"{len(cells)} cells of dimension {k} and values of shape {values.shape} do not fit")
            if not np.isfinite(values).all():
                raise InputError(f"filtration values of dimension {k} hold NaN or infinity: clean the data first")
            if (
                k
                and len(cells)
                and (cells.min() < 0 or cells.max() >= len(self.cells[0]) or (np.diff(cells) < 1).any())
            ):
                raise InputError(f"cells of dimension {k} must list different vertices from 0, rising")
        if not np.array_equal(self.cells[0][:, 0], np.arange(len(self.cells[0]))):
            raise InputError("vertex number i must be the i-th cell of dimension 0")
        if self.clique_dimension is not None and len(self.cells) > 2:
            raise InputError("with cliques only vertices and edges are given: leave out clique_dimension, or the rest")
        for k in range(1, len(self.cells)):
            self._check_faces(k)

    def _check_faces(self, k: int) -> None:
        cells, faces = self.cells[k], self.cells[k - 1]
        count = len(self.cells[0])
        place = count ** np.arange(k, dtype=np.float64)
        if place[-1] * count > 2**53:
            raise InputError(f"too many vertices ({count}) for cells of dimension {k} to be checked")
        codes = faces @ place
        order = np.argsort(codes)
        codes = codes[order]
        for left_out in range(k + 1):
            wanted = np.delete(cells, left_out, axis=1) @ place
            found = np.searchsorted(codes, wanted).clip(0, max(len(codes) - 1, 0))
            if len(wanted) and (not len(codes) or (codes[found] != wanted).any()):
                raise InputError(f"a cell of dimension {k} lacks one of its faces: give all faces")
            if (self.values[k - 1][order[found]] > self.values[k] + 1e-12).any():
                raise InputError(f"a cell of dimension {k} appears before one of its faces: raise its value")

    @property
    def parameters(self) -> int:
        """n."""
        return int(self.values[0].shape[1])

    @property
    def top_dimension(self) -> int:
        """The largest dimension that a simplex may have."""
        return len(self.cells) - 1 if self.clique_dimension is None else self.clique_dimension

    def bounds(self) -> tuple[Floats, Floats]:
        """The smallest and the largest value of each parameter, (n,)."""
        every = np.concatenate(self.values)
        return every.min(0), every.max(0)

    def rescaled(self, low: Floats, high: Floats) -> Multifiltration:
        """With values in coordinates in which the box from ``low`` to ``high`` is [0, 1]^n."""
        scale = np.asarray(high) - np.asarray(low)
        if not (scale > 0).all():
            raise InputError(f"a box needs upper numbers above its lower ones, not {low} and {high}")
        values = tuple((v - low) / scale for v in self.values)
        return Multifiltration(self.cells, values, self.clique_dimension)


def function_rips(
    points: Any,
    function: Any,
    *,
    threshold: float | None = None,
    dimension: int = 2,
    distances: bool = False,
) -> Multifiltration:
    r"""Function-Rips: an edge (i, j) appears at :math:`(|x_i - x_j|, \max(c_i, c_j))`, a vertex at :math:`(0, c_i)`, cliques as they fill.

    Args:
        points: (N, d), or with ``distances=True`` a symmetric matrix (N, N).
        function: (N,) or (N, m): c, a codensity say; m further parameters.
        threshold: the longest edge; None: the enclosing radius :math:`\min_i \max_j |x_i - x_j|`, beyond which the Rips complex of
            all points is a cone.
        dimension: of the largest simplices: the largest homology degree wanted plus 1.

    Raises:
        InputError: wrong shapes, NaN, a threshold below 0.
    """
    table = _finite(points, "points", 2)
    heights = _finite(function, "function", None)
    heights = heights[:, None] if heights.ndim == 1 else heights
    if len(heights) != len(table):
        raise InputError(f"the function has {len(heights)} values for {len(table)} points: give one for each")
    apart = table if distances else _distances(table)
    if apart.shape != (len(apart), len(apart)) or not np.allclose(apart, apart.T) or (apart < 0).any():
        raise InputError(f"distances must be a symmetric matrix of numbers from 0, not {apart.shape}")
    longest = enclosing_radius(apart) if threshold is None else threshold
    if longest < 0:
        raise InputError(f"the threshold must be at least 0 (got {longest})")
    first, second = np.triu_indices(len(apart), 1)
    near = apart[first, second] <= longest
    first, second = first[near], second[near]
    edges = np.column_stack([apart[first, second], np.maximum(heights[first], heights[second])])
    vertices = np.column_stack([np.zeros(len(apart)), heights])
    cells = (np.arange(len(apart))[:, None], np.column_stack([first, second]))
    return Multifiltration(cells, (vertices, edges), dimension)


def graph_lower_star(nodes: int, edge_index: Any, functions: Any, *, dimension: int | None = None) -> Multifiltration:
    """Lower-star filtration of a graph: an edge appears where both of its ends have.

    Args:
        nodes: V; isolated ones count.
        edge_index: (2, E) integers from 0; either or both directions of an edge; loops are left out.
        functions: (V, n) or (V,) values at the nodes.
        dimension: also fill cliques up to this dimension; None: vertices and edges.

    Raises:
        InputError: an edge out of range, or functions that do not fit.
    """
    values = _finite(functions, "functions", None)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) != nodes or nodes < 1:
        raise InputError(f"functions of shape {values.shape} do not fit {nodes} nodes: give (nodes, parameters)")
    pairs = undirected(nodes, edge_index)
    cells = (np.arange(nodes)[:, None], pairs)
    return Multifiltration(cells, (values, np.maximum(values[pairs[:, 0]], values[pairs[:, 1]])), dimension)


def image_lower_star(channels: Any) -> Multifiltration:
    """Lower-star filtration of a grid of pixels by n channels, in the cubical complex that has the pixels as vertices.

    A square appears with the last of its corners; it is cut into two triangles, and their common edge appears with the square, so
    that every stage is the cubical complex up to homotopy (no way across a corner).

    Args:
        channels: (n, H, W).

    Raises:
        InputError: another shape, or NaN.
    """
    image = _finite(channels, "channels", 3)
    n, height, width = image.shape
    values = image.reshape(n, -1).T
    number = np.arange(height * width).reshape(height, width)
    sides = np.concatenate(
        [
            np.stack([number[:, :-1].ravel(), number[:, 1:].ravel()], 1),
            np.stack([number[:-1].ravel(), number[1:].ravel()], 1),
        ]
    )
    a, b, c, d = (part.ravel() for part in (number[:-1, :-1], number[:-1, 1:], number[1:, :-1], number[1:, 1:]))
    squares = np.maximum(np.maximum(values[a], values[b]), np.maximum(values[c], values[d]))
    edges = np.concatenate([sides, np.stack([a, d], 1)])
    at = np.concatenate([np.maximum(values[sides[:, 0]], values[sides[:, 1]]), squares])
    triangles = np.concatenate([np.stack([a, b, d], 1), np.stack([a, c, d], 1)])
    return Multifiltration(
        (np.arange(height * width)[:, None], edges, triangles), (values, at, np.concatenate([squares, squares]))
    )


def enclosing_radius(distances: Floats) -> float:
    """The smallest radius of a ball around one of the points that holds all of them."""
    return float(distances.max(1).min()) if len(distances) else 0.0


def undirected(nodes: int, edge_index: Any) -> Ints:
    """Each edge once, (E', 2) with the smaller end first, without loops.

    Raises:
        InputError: the index is no (2, E) array of integers from 0 to nodes - 1.
    """
    table = np.asarray(torch.as_tensor(edge_index))
    if table.size == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if table.ndim != 2 or table.shape[0] != 2 or table.dtype.kind not in "iu":
        raise InputError(f"edge_index must be integers of shape (2, edges), not {table.dtype} {table.shape}")
    if table.min() < 0 or table.max() >= nodes:
        raise InputError(f"edge_index goes from {table.min()} to {table.max()}, but there are {nodes} nodes from 0")
    pairs = np.sort(table.T.astype(np.int64), 1)
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)


def _distances(points: Floats) -> Floats:
    from scipy.spatial.distance import pdist, squareform

    found: Floats = squareform(pdist(points)) if len(points) > 1 else np.zeros((1, 1))
    return found


def _finite(value: Any, what: str, ndim: int | None) -> Floats:
    table = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, dtype=np.float64)
    if (ndim is not None and table.ndim != ndim) or table.size == 0:
        raise InputError(f"{what} must be an array with {ndim or 1} axes that is not empty, not {table.shape}")
    if not np.isfinite(table).all():
        raise InputError(f"{what} hold NaN or infinity: clean the data first")
    return table
