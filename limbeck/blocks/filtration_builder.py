"""From data sets to multifiltrations, as a scikit-learn transformer: clouds, series, graphs and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from limbeck.blocks.multifiltrations import (
    Floats,
    Multifiltration,
    function_rips,
    graph_lower_star,
    image_lower_star,
)
from limbeck.blocks.vertex_functions import Density, codensity, graph_function
from limbeck.core.errors import InputError, UnknownNameError

Kind = Literal["function-rips", "graph", "image"]
KINDS = ("function-rips", "graph", "image")


class FiltrationBuilder(TransformerMixin, BaseEstimator):
    """Data sets -> :class:`~limbeck.blocks.multifiltrations.Multifiltration`.

    What a sample is depends on ``filtration``:

    - ``function-rips``: a point cloud, filtered by scale and codensity. X is (samples, points, dimensions), or a list of (points,
      dimensions) arrays of any lengths. The rows of a plain table (samples, features) are taken as series, and each becomes the
      cloud of its delay vectors (:func:`delay_embedding`);
    - ``graph``: a graph, filtered by functions on its nodes. X is a :class:`~limbeck.core.graphs.GraphData`, or a list of objects with
      ``edge_index`` and ``num_nodes`` (torch_geometric's) or ``node_labels`` (:class:`~limbeck.core.graphs.Graph`);
    - ``image``: n channels, each a parameter. X is (samples, n, H, W);
    - a function: sample -> Multifiltration; X is any sequence.

    Args:
        filtration: see above.
        dimension: of the largest simplices: the largest homology degree wanted plus 1 (graphs: 1, unless cliques are to be filled).
        density: ``kde`` or ``dtm``.
        density_bandwidth: for ``kde`` in units of the clouds' diameter (median over the training set), for ``dtm`` a share of the points.
        threshold: the longest edge in units of the clouds' diameter; None: each cloud's enclosing radius.
        functions: for graphs, names (:func:`~limbeck.blocks.vertex_functions.graph_function`) or functions of a graph that return
            (nodes,); a name that the graph has as an attribute is read from there (a learned function, say).
        delay_dimension: entries of a delay vector.
        delay: steps between its entries.
        rescale: in units in which the training set's values fill [0, 1]^n, so that parameters are comparable.

    Attributes:
        diameter_: median diameter of the training clouds (1 for others).
        box_: (2, n) smallest and largest value of each parameter over the training set.
        n_features_in_: for tables only.

    Raises:
        InputError: X is not what ``filtration`` takes, or holds NaN.
    """

    def __init__(
        self,
        filtration: Kind | Callable[[Any], Multifiltration] = "function-rips",
        *,
        dimension: int = 2,
        density: Density = "kde",
        density_bandwidth: float = 0.05,
        threshold: float | None = 0.25,
        functions: Sequence[Any] = ("degree", "hks"),
        delay_dimension: int = 2,
        delay: int = 1,
        rescale: bool = True,
    ) -> None:
        self.filtration = filtration
        self.dimension = dimension
        self.density = density
        self.density_bandwidth = density_bandwidth
        self.threshold = threshold
        self.functions = functions
        self.delay_dimension = delay_dimension
        self.delay = delay
        self.rescale = rescale

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn the clouds' diameter and the range of the filtrations' values."""
        self._learn(X)
        return self

    def fit_transform(self, X: Any, y: Any = None) -> list[Multifiltration]:
        """As ``fit(X).transform(X)``, with every filtration built once."""
        return self._in_units(self._learn(X))

    def transform(self, X: Any) -> list[Multifiltration]:
        """A filtration for every sample."""
        check_is_fitted(self)
        found = [self._build(sample) for sample in self._samples(X, reset=False)]
        wrong = {f.parameters for f in found} - {self.box_.shape[1]}
        if wrong:
            raise InputError(f"a sample has {min(wrong)} parameters, the training set had {self.box_.shape[1]}")
        return self._in_units(found)

    def _learn(self, X: Any) -> list[Multifiltration]:
        samples = self._samples(X, reset=True)
        self.diameter_ = 1.0
        if self.filtration == "function-rips":
            diameters = np.array([_diameter(cloud) for cloud in samples])
            self.diameter_ = float(np.median(diameters)) or float(diameters.max()) or 1.0
        found = [self._build(sample) for sample in samples]
        if len({f.parameters for f in found}) > 1:
            raise InputError("the samples have different numbers of parameters: give the same functions for all")
        bounds = np.array([f.bounds() for f in found])
        low, high = bounds[:, 0].min(0), bounds[:, 1].max(0)
        self.box_ = np.array([low, np.where(high > low, high, low + 1.0)])
        return found

    def _in_units(self, found: list[Multifiltration]) -> list[Multifiltration]:
        return [f.rescaled(*self.box_) for f in found] if self.rescale else found

    def _build(self, sample: Any) -> Multifiltration:
        if callable(self.filtration):
            return self.filtration(sample)
        if self.filtration == "graph":
            nodes, edges = _graph(sample)
            values = np.column_stack([self._on_nodes(f, sample, nodes, edges) for f in self.functions])
            return graph_lower_star(nodes, edges, values, dimension=self.dimension if self.dimension > 1 else None)
        if self.filtration == "image":
            return image_lower_star(sample)
        unit = 1.0 if self.density == "dtm" else self.diameter_
        lonely = codensity(sample, self.density_bandwidth * unit, self.density)
        longest = None if self.threshold is None else self.threshold * self.diameter_
        return function_rips(sample, lonely, threshold=longest, dimension=self.dimension)

    def _on_nodes(self, function: Any, sample: Any, nodes: int, edges: Any) -> Floats:
        if callable(function):
            return np.asarray(function(sample), dtype=np.float64).reshape(nodes)
        given = getattr(sample, str(function), None)
        if given is not None and not callable(given) and np.size(given) == nodes:
            return np.asarray(given, dtype=np.float64).reshape(nodes)
        return graph_function(str(function), nodes, edges)

    def _samples(self, X: Any, *, reset: bool) -> list[Any]:
        if self.dimension < 1 or self.delay < 1 or self.delay_dimension < 1:
            raise InputError("dimension, delay and delay_dimension must be at least 1")
        if callable(self.filtration):
            return _not_empty(list(X))
        if self.filtration == "graph":
            if not self.functions:
                raise InputError("a graph needs at least one function on its nodes: functions=('degree', 'hks'), say")
            return _not_empty([X.graph(i) for i in range(len(X))] if hasattr(X, "graph") else list(X))
        if self.filtration == "image":
            images = np.asarray(X, dtype=np.float64)
            if images.ndim != 4:
                raise InputError(f"images must be (samples, parameters, height, width), not {images.shape}")
            return _not_empty(list(images))
        if self.filtration != "function-rips":
            raise UnknownNameError("filtration", str(self.filtration), KINDS)
        if getattr(X, "ndim", 0) == 3 or (isinstance(X, list | tuple) and len(X) and np.ndim(X[0]) == 2):
            return _not_empty([_cloud(cloud, number) for number, cloud in enumerate(X)])
        table = validate_data(self, X, reset=reset, dtype=np.float64)
        needed = (self.delay_dimension - 1) * self.delay + 1
        if table.shape[1] < needed:
            raise InputError(
                f"series of n_features={table.shape[1]} are too short for delay vectors that span {needed}: lower delay_dimension"
            )
        return [delay_embedding(row, self.delay_dimension, self.delay) for row in table]


def delay_embedding(series: NDArray[np.float64], dimension: int, delay: int = 1) -> NDArray[np.float64]:
    """The vectors (s_t, s_{t + delay}, …) of a series (T,): (T - (dimension - 1) delay, dimension)."""
    count = len(series) - (dimension - 1) * delay
    at = np.arange(count)[:, None] + delay * np.arange(dimension)
    found: NDArray[np.float64] = np.asarray(series)[at]
    return found


def _not_empty(samples: list[Any]) -> list[Any]:
    if not samples:
        raise InputError("there are 0 samples: give at least one")
    return samples


def _cloud(value: Any, number: int) -> NDArray[np.float64]:
    cloud = np.asarray(value, dtype=np.float64)
    if cloud.ndim != 2 or not cloud.size:
        raise InputError(f"cloud {number} must be (points, dimensions) with at least one point, not {cloud.shape}")
    if not np.isfinite(cloud).all():
        raise InputError(f"cloud {number} holds NaN or infinity: clean the data first")
    return cloud


def _diameter(cloud: NDArray[np.float64]) -> float:
    from scipy.spatial.distance import pdist

    return float(pdist(cloud).max()) if len(cloud) > 1 else 0.0


def _graph(sample: Any) -> tuple[int, Any]:
    edges = getattr(sample, "edge_index", None)
    nodes = getattr(sample, "num_nodes", None)
    if nodes is None and getattr(sample, "node_labels", None) is not None:
        nodes = len(sample.node_labels)
    if edges is None or nodes is None:
        raise InputError(f"a {type(sample).__name__} is no graph: it needs edge_index, and num_nodes or node_labels")
    return int(nodes), edges
