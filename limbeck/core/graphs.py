"""Many graphs as flat tensors, without a graph library: one graph, a batch of graphs, a data set of graphs.

Edges are directed and say where messages go: column (u, v) of ``edge_index`` carries a message from u to v. An undirected
graph holds both directions of every edge. Node labels are discrete: one column for a plain label, several for a tuple such as
an atom's properties. Everything is numbered from 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.data import Data
from limbeck.core.errors import InputError

INT_BYTES = 4  # what a stored integer or float counts


class GraphBatch(NamedTuple):
    """Graphs joined into one: what graph networks take.

    A batch of graphs cannot be cut into micro-batches (:meth:`limbeck.core.batch.Batch.chunks`).

    Attributes:
        sizes: (G,) int64 nodes of each graph; the nodes of a graph lie together, in the order of the graphs.
        node_labels: (V, F) int64.
        edge_index: (2, E) int64, source and destination, numbered over the whole batch.
        edge_labels: (E,) int64, or None.
        root_mask: (V,) bool, the nodes that a readout goes over; None: all of them.
        node_weights: (V,) float32, the nodes' weights in a readout; None: 1 each.
        degrees: (V,) int64, incoming edges of the node in the graph it was taken from; None: as in this graph.
        features: (V, D) float32 continuous features, or None.
    """

    sizes: Tensor
    node_labels: Tensor
    edge_index: Tensor
    edge_labels: Tensor | None = None
    root_mask: Tensor | None = None
    node_weights: Tensor | None = None
    degrees: Tensor | None = None
    features: Tensor | None = None

    @property
    def graph(self) -> Tensor:
        """(V,) the number of the graph that each node belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.sizes), device=self.sizes.device), self.sizes)


NODE_FIELDS = ("root_mask", "node_weights", "degrees", "features")


@dataclass(frozen=True)
class Graph:
    """One graph.

    Attributes:
        node_labels: (V,) or (V, F) integers; None (with ``features`` or alone): every node has label 0.
        edge_index: (2, E), source and destination of each edge.
        y: the class, or None.
        edge_labels: (E,) integers, or None.
        root_mask, node_weights, degrees, features: see :class:`GraphBatch`.
    """

    node_labels: Any
    edge_index: Any
    y: int | None = None
    edge_labels: Any = None
    root_mask: Any = None
    node_weights: Any = None
    degrees: Any = None
    features: Any = None


class GraphData(Data):
    """A data set of graphs, held in memory as flat tensors.

    Args:
        y: (G,) int64 classes.
        node_labels: (V, F) int64, at least 0.
        node_ptr: (G + 1,) int64: graph g has the nodes ``node_ptr[g] … node_ptr[g + 1] - 1``.
        edge_index: (2, E) int64, numbered within each graph.
        edge_ptr: (G + 1,) int64, the same for the columns of ``edge_index``.
        edge_labels: (E,) int64, at least 0, or None.
        label_counts: how many values each column of ``node_labels`` has; None: as many as the data shows. Networks need it, and
            the parts of one data set must agree on it.
        edge_label_count: how many edge labels there are; None: as many as the data shows.
        root_mask, node_weights, degrees, features: by node, see :class:`GraphBatch`.
        centroids: (K, D), where the last label column is the number of the nearest of them (quantised features).

    Raises:
        InputError: lengths, types or numbers that do not fit each other; the line names the first graph that is wrong.
    """

    def __init__(
        self,
        y: Tensor,
        node_labels: Tensor,
        node_ptr: Tensor,
        edge_index: Tensor,
        edge_ptr: Tensor,
        edge_labels: Tensor | None = None,
        *,
        label_counts: Sequence[int] | None = None,
        edge_label_count: int | None = None,
        root_mask: Tensor | None = None,
        node_weights: Tensor | None = None,
        degrees: Tensor | None = None,
        features: Tensor | None = None,
        centroids: Tensor | None = None,
    ) -> None:
        self.y, self.node_labels, self.node_ptr = y, node_labels, node_ptr
        self.edge_index, self.edge_ptr, self.edge_labels = edge_index, edge_ptr, edge_labels
        self.root_mask, self.node_weights, self.degrees, self.features = root_mask, node_weights, degrees, features
        self.centroids = centroids
        self._check()
        seen = (node_labels.max(0).values + 1).tolist()
        self.label_counts = tuple(seen if label_counts is None else map(int, label_counts))
        if len(self.label_counts) != len(seen) or any(a > b for a, b in zip(seen, self.label_counts, strict=True)):
            raise InputError(f"node labels take {seen} values by column, more than label_counts {self.label_counts}")
        shown = 0 if edge_labels is None else int(edge_labels.max()) + 1 if len(edge_labels) else 1
        self.edge_label_count = shown if edge_label_count is None else int(edge_label_count)
        if shown > self.edge_label_count:
            raise InputError(f"edge labels go up to {shown - 1}, but edge_label_count is {self.edge_label_count}")

    def _check(self) -> None:
        graphs, nodes, edges = len(self.y), len(self.node_labels), self.edge_index.shape[-1]
        if graphs == 0:
            raise InputError("the data set is empty: it needs at least one graph")
        if self.y.ndim != 1 or self.y.is_floating_point() or int(self.y.min()) < 0:
            raise InputError(
                f"classes y must be integers from 0 of shape ({graphs},), not {self.y.dtype} {tuple(self.y.shape)}"
            )
        if self.node_labels.ndim != 2 or self.node_labels.dtype != torch.int64:
            raise InputError(
                f"node labels must be int64 of shape (nodes, columns), not {self.node_labels.dtype} "
                f"{tuple(self.node_labels.shape)}: quantise continuous features or give them as features=…"
            )
        if self.edge_index.ndim != 2 or self.edge_index.shape[0] != 2 or self.edge_index.dtype != torch.int64:
            raise InputError(
                f"edge_index must be int64 of shape (2, edges), not {self.edge_index.dtype} {tuple(self.edge_index.shape)}"
            )
        for name, ptr, total in (("node_ptr", self.node_ptr, nodes), ("edge_ptr", self.edge_ptr, edges)):
            if len(ptr) != graphs + 1 or int(ptr[0]) or int(ptr[-1]) != total or bool((ptr.diff() < 0).any()):
                raise InputError(f"{name} must rise from 0 to {total} in {graphs + 1} numbers, one more than graphs")
        if bool((self.node_ptr.diff() == 0).any()):
            raise InputError(f"graph {int((self.node_ptr.diff() == 0).nonzero()[0])} has no nodes: leave it out")
        sizes = torch.repeat_interleave(self.node_ptr.diff(), self.edge_ptr.diff())
        wrong = ((self.edge_index < 0) | (self.edge_index >= sizes)).any(0).nonzero()
        if len(wrong):
            at = int(torch.searchsorted(self.edge_ptr, wrong[0, 0], right=True)) - 1
            pair = self.edge_index[:, int(wrong[0, 0])].tolist()
            raise InputError(f"graph {at} has an edge {pair} but only {int(self.node_ptr.diff()[at])} nodes (from 0)")
        if int(self.node_labels.min()) < 0:
            raise InputError("node labels must be at least 0")
        if self.edge_labels is not None and (
            self.edge_labels.shape != (edges,)
            or self.edge_labels.is_floating_point()
            or (edges and int(self.edge_labels.min()) < 0)
        ):
            raise InputError(f"edge labels must be integers from 0, one for each of the {edges} edges")
        for name in NODE_FIELDS:
            value = getattr(self, name)
            if value is not None and len(value) != nodes:
                raise InputError(f"{name} has {len(value)} rows for {nodes} nodes: it needs one for each")
        if self.features is not None and not bool(torch.isfinite(self.features).all()):
            raise InputError("node features hold NaN or infinity: clean the data first")

    # ---- making it -----------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, graphs: Sequence[Graph], **options: Any) -> GraphData:
        """A data set of :class:`Graph` objects.

        Args:
            graphs: each with a class ``y``; what one has (edge labels, features …) all must have.
            options: ``label_counts``, ``edge_label_count``, ``centroids``.

        Raises:
            InputError: no graphs, no class, or graphs that differ in what they have.
        """
        if not len(graphs):
            raise InputError("the data set is empty: it needs at least one graph")
        columns: dict[str, list[Tensor]] = {}
        for number, graph in enumerate(graphs):
            if not isinstance(graph, Graph):
                raise InputError(
                    f"item {number} is a {type(graph).__name__}, not a limbeck.core.graphs.Graph "
                    "(torch_geometric's go through limbeck.adapters.graphs.from_pyg)"
                )
            if graph.y is None:
                raise InputError(f"graph {number} has no class: give Graph(…, y=…)")
            for name, value in _tensors(graph, number).items():
                columns.setdefault(name, []).append(value)
        for name, values in columns.items():
            if len(values) != len(graphs):
                raise InputError(f"{name} is given for {len(values)} of {len(graphs)} graphs: give it for all or none")
            if len({v.shape[1:] if name != "edge_index" else v.shape[:1] for v in values}) > 1:
                raise InputError(f"{name} has another number of columns in some graphs than in others")
        joined: dict[str, Any] = {
            name: torch.cat(values, -1 if name == "edge_index" else 0) for name, values in columns.items()
        }
        return cls(
            torch.tensor([int(g.y) for g in graphs if g.y is not None]),
            node_ptr=_ptr(torch.tensor([len(v) for v in columns["node_labels"]])),
            edge_ptr=_ptr(torch.tensor([v.shape[1] for v in columns["edge_index"]])),
            **joined,
            **options,
        )

    # ---- reading it ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.y)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        part, sizes, nodes, edges = self._gather(index)
        starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, self.edge_ptr.diff()[index])
        graphs = GraphBatch(
            sizes,
            self.node_labels[nodes],
            self.edge_index[:, edges] + starts,
            None if self.edge_labels is None else self.edge_labels[edges],
            **part,
        )
        return Batch(graphs, self.y[index], index, view)

    def whole(self) -> GraphBatch:
        """All graphs in one batch."""
        return self.fetch(torch.arange(len(self)), None).inputs

    def graph(self, number: int) -> Graph:
        """One graph, tensors shared with the data set."""
        nodes = slice(int(self.node_ptr[number]), int(self.node_ptr[number + 1]))
        edges = slice(int(self.edge_ptr[number]), int(self.edge_ptr[number + 1]))
        part = {name: v[nodes] for name in NODE_FIELDS if (v := getattr(self, name)) is not None}
        labels = None if self.edge_labels is None else self.edge_labels[edges]
        return Graph(self.node_labels[nodes], self.edge_index[:, edges], int(self.y[number]), labels, **part)

    def subset(self, index: Tensor) -> GraphData:
        """A data set of the given graphs, with ids of its own. It keeps the label counts of the whole."""
        part, sizes, nodes, edges = self._gather(index)
        return GraphData(
            self.y[index],
            self.node_labels[nodes],
            _ptr(sizes),
            self.edge_index[:, edges],
            _ptr(self.edge_ptr.diff()[index]),
            None if self.edge_labels is None else self.edge_labels[edges],
            label_counts=self.label_counts,
            edge_label_count=self.edge_label_count,
            centroids=self.centroids,
            **part,
        )

    def _gather(self, index: Tensor) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
        """By-node fields of some graphs, their sizes, and where their nodes and edges are."""
        nodes, edges = _positions(self.node_ptr, index), _positions(self.edge_ptr, index)
        part = {name: v[nodes] for name in NODE_FIELDS if (v := getattr(self, name)) is not None}
        return part, self.node_ptr.diff()[index], nodes, edges

    def with_labels(self, y: Tensor) -> GraphData:
        """The same graphs with other classes."""
        return self._changed(y=y)

    def with_columns(self, node_labels: Tensor, label_counts: Sequence[int], **changes: Any) -> GraphData:
        """The same graphs with other node labels (V, F); ``changes`` are further arguments of the constructor."""
        return self._changed(node_labels=node_labels, label_counts=label_counts, **changes)

    def _changed(self, **changes: Any) -> GraphData:
        names = ("y", "node_labels", "node_ptr", "edge_index", "edge_ptr", "edge_labels", *NODE_FIELDS)
        kept = {n: getattr(self, n) for n in (*names, "label_counts", "edge_label_count", "centroids")}
        return GraphData(**{**kept, **changes})

    def labels_tensor(self) -> Tensor:
        return self.y

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in ("y", "node_labels", "node_ptr", "edge_index", "edge_ptr", "edge_labels", *NODE_FIELDS):
            value = getattr(self, name)
            if value is not None:
                digest.update(name.encode() + value.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    # ---- what it is ----------------------------------------------------------------------------------------------------

    def single_edges(self) -> Tensor:
        """(G,) int64: how many edges each graph must store: an edge that is there in both directions with the same label counts
        once, a loop and an edge in one direction once each."""
        graph = torch.repeat_interleave(torch.arange(len(self)), self.edge_ptr.diff())
        labels = torch.zeros_like(graph) if self.edge_labels is None else self.edge_labels
        low, high = self.edge_index.min(0).values, self.edge_index.max(0).values
        forth = self.edge_index[0] <= self.edge_index[1]
        # Copies of a pair with one label: as many must be stored as the busier of its two directions has.
        _, number = torch.unique(torch.stack([graph, low, high, labels]), dim=1, return_inverse=True)
        pairs = int(number.max()) + 1 if len(number) else 0
        counts = torch.stack([torch.bincount(number[side], minlength=pairs) for side in (forth, ~forth)]).amax(0)
        owner = torch.zeros(pairs, dtype=torch.int64).scatter_(0, number, graph)
        return torch.zeros(len(self), dtype=torch.int64).index_add_(0, owner, counts)

    def bytes_each(self) -> Tensor:
        """(G,) int64 bytes that each graph takes: the class, the numbers of nodes and edges, each node's labels (and features and
        degree), two ends and the label of each edge; four bytes a number.
        """
        sizes, edges = self.node_ptr.diff(), self.single_edges()
        by_node = self.node_labels.shape[1] + (self.degrees is not None)
        by_node += 0 if self.features is None else self.features.shape[1]
        return INT_BYTES * (3 + by_node * sizes + (2 + (self.edge_labels is not None)) * edges)


def _tensors(graph: Graph, number: int) -> dict[str, Tensor]:
    """What a graph has, as tensors of the right shape."""
    edges = torch.as_tensor(graph.edge_index)
    if edges.numel() == 0:
        edges = edges.reshape(2, 0)
    found = {"edge_index": edges.long()}
    if graph.features is not None:
        features = torch.as_tensor(graph.features, dtype=torch.float32)
        found["features"] = features[:, None] if features.ndim == 1 else features
    if graph.node_labels is not None:
        labels = torch.as_tensor(graph.node_labels)
        if labels.is_floating_point() and len(labels):
            raise InputError(
                f"graph {number} has node labels of type {labels.dtype}: labels are integers; give continuous values as features=…"
            )
        found["node_labels"] = (labels[:, None] if labels.ndim == 1 else labels).long()
    elif "features" in found:
        found["node_labels"] = torch.zeros(len(found["features"]), 1, dtype=torch.int64)
    else:
        raise InputError(f"graph {number} has neither node labels nor features: without them its size is unknown")
    kinds = {"edge_labels": torch.int64, "root_mask": torch.bool, "node_weights": torch.float32, "degrees": torch.int64}
    for name, kind in kinds.items():
        value = getattr(graph, name)
        if value is not None:
            found[name] = torch.as_tensor(value).to(kind)
    return found


def _ptr(sizes: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])


def _positions(ptr: Tensor, index: Tensor) -> Tensor:
    """Positions of everything that belongs to the graphs ``index``, graph by graph."""
    sizes = ptr.diff()[index]
    shift = ptr[:-1][index] - (sizes.cumsum(0) - sizes)
    return torch.repeat_interleave(shift, sizes) + torch.arange(int(sizes.sum()))


def num_classes(data: GraphData) -> int:
    """One more than the highest class."""
    return int(data.y.max()) + 1


def undirected(graph: Graph) -> Graph:
    """The graph with the other direction of every edge that lacks it; labels go with them, loops stay single.

    For edge lists that name each edge once. An edge that is there in both directions is left as it is.
    """
    edges = torch.as_tensor(graph.edge_index).long().reshape(2, -1)
    labels = torch.zeros(edges.shape[1], dtype=torch.int64)
    if graph.edge_labels is not None:
        labels = torch.as_tensor(graph.edge_labels).long()
    both = torch.cat([torch.cat([edges, labels[None]]), torch.cat([edges.flip(0), labels[None]])], 1)
    both = torch.unique(both, dim=1)
    return replace(graph, edge_index=both[:2], edge_labels=None if graph.edge_labels is None else both[2])
