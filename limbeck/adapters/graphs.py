"""Graphs of torch_geometric as ours, and back. Reading needs no torch_geometric: anything with its attributes will do.

A torch_geometric graph keeps discrete labels in several ways; :func:`from_pyg` reads them all:

- ``x`` of integers (V,) or (V, F): label columns, such as the atoms of the OGB molecules;
- ``x`` of floats that are 1 once and 0 elsewhere in every row of the data set: one label, as in the TU data sets;
- other ``x`` of floats: continuous features, with label 0 for all nodes;
- no ``x``: a node's label is its degree.

``edge_attr`` is read alike; several columns of integers become one number (mixed radix), which keeps them apart. The number
depends on how many values each column has: give ``edge_columns``, or convert all parts of a data set in one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import InputError, MissingDependencyError
from limbeck.core.graphs import Graph, GraphData


def is_pyg(value: Any) -> bool:
    """True for an object with a torch_geometric graph's attributes."""
    return not isinstance(value, Graph) and hasattr(value, "edge_index") and hasattr(value, "num_nodes")


def from_pyg(graphs: Iterable[Any], *, edge_columns: Sequence[int] | None = None, **options: Any) -> GraphData:
    """A data set from torch_geometric graphs (or a data set of them).

    Args:
        graphs: each with ``edge_index`` (2, E), ``y`` of one integer, and ``x``, ``edge_attr`` or ``num_nodes`` as above.
        edge_columns: how many values each column of an integer ``edge_attr`` has; None: as many as these graphs show.
        options: ``label_counts``, ``edge_label_count``: how many values there are, where these graphs do not show all.

    Raises:
        InputError: no graphs, no class, or edge attributes that are not discrete.
    """
    items = list(graphs)
    if not items:
        raise InputError("the data set is empty: it needs at least one graph")
    xs = [getattr(g, "x", None) for g in items]
    attributes = [getattr(g, "edge_attr", None) for g in items]
    for name, values in (("x", xs), ("edge_attr", attributes)):
        missing = [i for i, v in enumerate(values) if v is None]
        if missing and len(missing) < len(items):
            raise InputError(f"graph {missing[0]} has no {name}, but others have: give it for all or none")
    sizes = [_nodes(g, x, i) for i, (g, x) in enumerate(zip(items, xs, strict=True))]
    labels, features = _node_columns(items, xs, sizes)
    edge_labels = _edge_numbers(attributes, edge_columns)
    made = []
    for i, item in enumerate(items):
        y = getattr(item, "y", None)
        if y is None or torch.as_tensor(y).numel() != 1 or float(torch.as_tensor(y)) != int(torch.as_tensor(y)):
            raise InputError(f"graph {i} has y = {y}: a class is one integer")
        made.append(
            Graph(
                labels[i],
                torch.as_tensor(item.edge_index),
                int(torch.as_tensor(y)),
                None if edge_labels is None else edge_labels[i],
                root_mask=getattr(item, "root_mask", None),
                features=None if features is None else features[i],
            )
        )
    return GraphData.of(made, **options)


def as_graphs(value: Any) -> GraphData:
    """What users have as a data set of graphs: ours, a list of :class:`~limbeck.core.graphs.Graph`, or torch_geometric's.

    Raises:
        InputError: nothing of the kind.
    """
    if isinstance(value, GraphData):
        return value
    if hasattr(value, "__len__") and hasattr(value, "__getitem__") and len(value):
        items = [value[i] for i in range(len(value))]
        if isinstance(items[0], Graph):
            return GraphData.of(items)
        if is_pyg(items[0]):
            return from_pyg(items)
    raise InputError(
        f"a data set of graphs is a GraphData, a list of limbeck.core.graphs.Graph or of torch_geometric graphs, not {type(value).__name__}"
    )


def to_pyg(data: GraphData) -> list[Any]:
    """A list of ``torch_geometric.data.Data``: ``x`` (V, F) labels, ``edge_index``, ``y`` (1,), and what else the data has
    (``edge_attr`` (E,), ``root_mask``, ``node_weights``, ``degrees``, ``features``).

    Raises:
        MissingDependencyError: torch_geometric is not installed.
    """
    try:
        from torch_geometric.data import Data
    except ImportError:
        raise MissingDependencyError("torch_geometric", "graphs", "making torch_geometric graphs") from None
    out = []
    for number in range(len(data)):
        graph = data.graph(number)
        extra = {name: getattr(graph, name) for name in ("root_mask", "node_weights", "degrees", "features")}
        made = Data(x=graph.node_labels, edge_index=graph.edge_index, y=torch.tensor([graph.y]))
        for name, value in {"edge_attr": graph.edge_labels, **extra}.items():
            if value is not None:
                setattr(made, name, value)
        out.append(made)
    return out


def _nodes(graph: Any, x: Any, number: int) -> int:
    size = len(x) if x is not None else getattr(graph, "num_nodes", None)
    if size is None:
        raise InputError(f"graph {number} has neither x nor num_nodes: the number of its nodes is unknown")
    return int(size)


def _node_columns(
    items: Sequence[Any], xs: Sequence[Any], sizes: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Labels (V, F) of each graph, and continuous features where they are."""
    if xs[0] is None:
        degrees = [
            torch.bincount(torch.as_tensor(g.edge_index)[1], minlength=n)[:, None]
            for g, n in zip(items, sizes, strict=True)
        ]
        return tuple(degrees), None
    x = torch.cat([torch.as_tensor(v).reshape(len(v), -1) for v in xs])
    if not x.is_floating_point():
        return x.long().split(list(sizes)), None
    if one_hot(x):
        return x.argmax(1, keepdim=True).split(list(sizes)), None
    return torch.zeros(len(x), 1, dtype=torch.int64).split(list(sizes)), x.float().split(list(sizes))


def _edge_numbers(attributes: Sequence[Any], columns: Sequence[int] | None) -> tuple[Tensor, ...] | None:
    if attributes[0] is None:
        return None
    sizes = [len(a) for a in attributes]
    joined = torch.cat([torch.as_tensor(a).reshape(len(a), -1) for a in attributes])
    if not joined.is_floating_point():
        return mixed_radix(joined.long(), columns).split(sizes)
    if not one_hot(joined):
        raise InputError("edge_attr holds continuous values: edge labels must be discrete; quantise or drop them")
    return joined.argmax(1).split(sizes)


def one_hot(x: Tensor) -> bool:
    """True if every row (N, D) is 1 once and 0 elsewhere."""
    return bool(((x == 0) | (x == 1)).all()) and bool((x.sum(1) == 1).all())


def mixed_radix(columns: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """(N,) one number for each row of (N, F) integers from 0; different rows get different numbers.

    Args:
        columns: (N, F) int64.
        counts: how many values each column has; None: as many as are shown.

    Raises:
        InputError: a value beyond its count, or another number of columns.
    """
    if columns.shape[1] == 0 or not len(columns):
        return torch.zeros(len(columns), dtype=torch.int64)
    seen = columns.max(0).values + 1
    sizes = seen if counts is None else torch.tensor(list(counts))
    if len(sizes) != len(seen) or bool((seen > sizes).any()):
        raise InputError(f"edge_attr has columns of {seen.tolist()} values, which do not fit edge_columns {counts}")
    weights = torch.ones_like(sizes)
    weights[:-1] = sizes.flip(0).cumprod(0).flip(0)[1:]
    return (columns * weights).sum(1)
