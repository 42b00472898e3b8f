"""Graphs of nodes and hypergraphs in torch_geometric's form, as sparse incidences or as lists, to ours and back.

Reading needs no graph library: whatever has the right attributes is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import InputError, MissingDependencyError
from limbeck.core.hypergraphs import Hypergraph
from limbeck.core.node_graphs import NodeGraph


def from_pyg_node(data: Any, *, undirected: bool = False) -> NodeGraph:
    """A graph from a torch_geometric ``Data`` (or anything with ``x`` and ``edge_index``).

    Self loops and double edges are dropped; the weight of a double edge (``edge_weight``, or a one-column ``edge_attr``) is that of the first.

    Args:
        data: ``x`` (N, F), ``edge_index`` (2, E), and where there are any ``y`` (N,) or (N, 1) and weights.
        undirected: add the other direction of each edge; torch_geometric's own data sets hold both already.

    Raises:
        InputError: no ``x`` or ``edge_index``, or contents that do not fit.
    """
    x, index = _attribute(data, "x"), _attribute(data, "edge_index")
    if x is None or index is None:
        raise InputError("a graph of nodes needs x (features) and edge_index: this object lacks one of them")
    features, edges = torch.as_tensor(x), torch.as_tensor(index).long()
    if not features.is_floating_point():
        features = features.float()
    labels = _labels(_attribute(data, "y"), len(features))
    weight = _weights(data, edges)
    if weight is None:
        return NodeGraph.of(features, edges, labels, undirected=undirected)
    from limbeck.core.node_graphs import check_edges

    check_edges(edges, len(features))
    if undirected:
        edges, weight = torch.cat([edges, edges.flip(0)], 1), torch.cat([weight, weight])
    apart = edges[0] != edges[1]
    edges, weight = edges[:, apart], weight[apart]
    keys, place = torch.unique(edges[0] * len(features) + edges[1], return_inverse=True)
    first = torch.full((len(keys),), len(place)).scatter_reduce(0, place, torch.arange(len(place)), "amin")
    return NodeGraph(features, edges[:, first], labels, weight[first])


def to_pyg_node(graph: NodeGraph) -> Any:
    """A torch_geometric ``Data`` with ``x``, ``edge_index`` and, where there are any, ``y`` and ``edge_weight``.

    Raises:
        MissingDependencyError: torch_geometric is not installed.
    """
    return _pyg(x=graph.features, edge_index=graph.edge_index, y=graph.labels, edge_weight=graph.edge_weight)


def as_hypergraph(value: Any, num_nodes: int | None = None, weights: Tensor | None = None) -> Hypergraph:
    """A hypergraph from what people have.

    Args:
        value: a :class:`~limbeck.core.hypergraphs.Hypergraph`; a ``Data`` of torch_geometric with ``hyperedge_index`` (and ``hyperedge_weight``);
            a ``hyperedge_index`` (2, nnz) int64; an incidence (N, M), sparse (torch or scipy) or dense floats; a list of lists of vertices; or an
            object with ``num_v`` and ``e`` = (lists of vertices, weights), as DeepHypergraph's.
        num_nodes: N, where the value does not tell; None: the largest vertex plus 1.
        weights: (M,) of the hyperedges, where the value has none.

    Raises:
        InputError: none of these, or contents that do not fit.
    """
    if isinstance(value, Hypergraph):
        return value
    index = _attribute(value, "hyperedge_index")
    if index is not None:
        own = _attribute(value, "hyperedge_weight")
        size = num_nodes if num_nodes is not None else _size(value)
        return as_hypergraph(torch.as_tensor(index).long(), size, weights if own is None else torch.as_tensor(own))
    if hasattr(value, "tocoo"):  # scipy's sparse matrices
        held = value.tocoo()
        there = np.flatnonzero(held.data)
        found = np.stack([held.row[there], held.col[there]]).astype(np.int64)
        return _indexed(torch.from_numpy(found), held.shape[0], weights)
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        if value.layout == torch.strided and value.ndim == 2 and len(value) == 2 and not value.is_floating_point():
            size = num_nodes if num_nodes is not None else int(value[0].max()) + 1 if value.numel() else 0
            return _indexed(value.long(), size, weights)
        held = (value.to_sparse_coo() if value.layout != torch.strided else value.to_sparse()).coalesce()
        if held.ndim != 2:
            raise InputError(f"an incidence is (vertices, hyperedges), not {tuple(value.shape)}")
        return _indexed(held.indices()[:, held.values() != 0], held.shape[0], weights)
    if hasattr(value, "num_v") and hasattr(value, "e"):
        edges, own = value.e
        weights = torch.as_tensor(own, dtype=torch.float32) if own is not None else weights
        return as_hypergraph([list(edge) for edge in edges], int(value.num_v), weights)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _listed(value, num_nodes, weights)
    raise InputError(
        f"a hypergraph is a hyperedge index, an incidence or lists of vertices, not {type(value).__name__}"
    )


def from_pyg_hypergraph(data: Any) -> tuple[Hypergraph, Tensor, Tensor | None]:
    """Hypergraph, features (N, F) and labels (N,) or None of a torch_geometric ``Data`` with ``x`` and ``hyperedge_index``.

    Raises:
        InputError: one of them is missing or does not fit.
    """
    x = _attribute(data, "x")
    if x is None or _attribute(data, "hyperedge_index") is None:
        raise InputError("a hypergraph with features needs x and hyperedge_index: this object lacks one of them")
    features = torch.as_tensor(x)
    features = features if features.is_floating_point() else features.float()
    return as_hypergraph(data, len(features)), features, _labels(_attribute(data, "y"), len(features))


def to_pyg_hypergraph(hypergraph: Hypergraph, features: Tensor | None = None, labels: Tensor | None = None) -> Any:
    """A torch_geometric ``Data`` with ``hyperedge_index``, ``num_nodes`` and, where there are any, ``x``, ``y`` and ``hyperedge_weight``; what
    ``HypergraphConv`` reads.

    Raises:
        MissingDependencyError: torch_geometric is not installed.
    """
    return _pyg(
        x=features,
        hyperedge_index=hypergraph.index(),
        y=labels,
        hyperedge_weight=hypergraph.weights,
        num_nodes=hypergraph.num_nodes,
    )


# ---- parts -------------------------------------------------------------------------------------------------------------


def _indexed(index: Tensor, num_nodes: int, weights: Tensor | None) -> Hypergraph:
    """Memberships in any order; columns of an incidence without a member are refused by name."""
    if not index.shape[1]:
        raise InputError("the hypergraph has no hyperedge: give one member at least")
    return Hypergraph.from_index(index, num_nodes, weights)


def _listed(edges: Sequence[Any], num_nodes: int | None, weights: Tensor | None) -> Hypergraph:
    if not len(edges):
        raise InputError("the hypergraph has no hyperedge: give one list of vertices at least")
    sizes = torch.tensor([len(edge) for edge in edges], dtype=torch.long)
    members = torch.from_numpy(np.concatenate([np.asarray(list(e), dtype=np.int64) for e in edges]))
    size = num_nodes if num_nodes is not None else int(members.max()) + 1 if len(members) else 0
    return Hypergraph(torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), members, size, weights)


def _attribute(data: Any, name: str) -> Any:
    return data.get(name) if isinstance(data, Mapping) else getattr(data, name, None)


def _size(data: Any) -> int | None:
    x = _attribute(data, "x")
    size = len(x) if x is not None else _attribute(data, "num_nodes")
    return None if size is None else int(size)


def _labels(y: Any, nodes: int) -> Tensor | None:
    if y is None:
        return None
    labels = torch.as_tensor(y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (nodes,) or labels.is_floating_point():
        raise InputError(f"y must be {nodes} class numbers, not {tuple(labels.shape)} {labels.dtype}")
    return labels.long()


def _weights(data: Any, edges: Tensor) -> Tensor | None:
    weight = _attribute(data, "edge_weight")
    if weight is None:
        found = _attribute(data, "edge_attr")
        if found is None or not torch.as_tensor(found).is_floating_point() or torch.as_tensor(found).squeeze().ndim > 1:
            return None
        weight = found
    weight = torch.as_tensor(weight).reshape(-1).float()
    if edges.ndim == 2 and len(weight) != edges.shape[1]:
        raise InputError(f"{edges.shape[1]} edges need as many weights, not {len(weight)}")
    return weight


def _pyg(**attributes: Any) -> Any:
    try:
        from torch_geometric.data import Data
    except ImportError as error:
        raise MissingDependencyError("torch_geometric", "graphs", "giving graphs to torch_geometric") from error
    made = Data()
    for name, value in attributes.items():
        if value is not None:
            setattr(made, name, value)
    return made
