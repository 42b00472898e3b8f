r"""Networks over the nodes of one graph or hypergraph.

A network is called as ``network(features, structure)`` with features (N, F) and gives logits (N, K). A structure is a
:class:`~limbeck.core.node_graphs.NodeGraph`, a :class:`~limbeck.core.hypergraphs.Hypergraph` or, for networks over graphs, a sparse matrix (N, N) that
is normalised already. Networks over graphs see a hypergraph as its clique expansion; those over hypergraphs see a graph as its edges and
neighbourhoods. All products are sparse.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.hypergraphs import Hypergraph, from_graph
from limbeck.core.node_graphs import NodeGraph, Norm
from limbeck.core.sparse_products import product
from limbeck.networks.feature_linear import FeatureLinear
from limbeck.networks.graphs import gather_sum, softmax_by

Structure = NodeGraph | Hypergraph | Tensor


class NodeNetwork(nn.Module):
    """``depth`` convolutions with ReLU and dropout between them; the last one gives the logits.

    Args:
        in_features: F. num_classes: K.
        hidden: width of the hidden layers.
        depth: convolutions.
        dropout: after each hidden layer.

    Attributes:
        layers: the convolutions; ``layers[i](x, structure)``.
        over: what the network sees, ``graph`` or ``hypergraph``.
        takes_sparse: features may be sparse (CSR).
    """

    over: ClassVar[str] = "graph"
    takes_sparse: ClassVar[bool] = True

    def __init__(
        self, in_features: int, num_classes: int, *, hidden: int = 32, depth: int = 2, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.in_features, self.num_classes, self.depth = in_features, num_classes, depth
        widths = [in_features, *[hidden] * (depth - 1), num_classes]
        self.layers = nn.ModuleList(self.convolution(a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(dropout)

    def convolution(self, before: int, after: int) -> nn.Module:
        """One layer, called with features and what :meth:`seen` gives."""
        raise NotImplementedError(f"{type(self).__name__} defines no convolution")

    def seen(self, structure: Structure) -> Any:
        """The structure as the convolutions take it."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it sees")

    def embed(self, x: Tensor, structure: Structure) -> Tensor:
        """(N, hidden) the last hidden layer, after ReLU and dropout; the features themselves at depth 1."""
        held = self.seen(structure)
        for layer in self.layers[:-1]:
            x = self.dropout(F.relu(layer(x, held)))
        return x

    def forward(self, x: Tensor, structure: Structure) -> Tensor:
        """Logits (N, K)."""
        logits: Tensor = self.layers[-1](self.embed(x, structure), self.seen(structure))
        return logits


# ---- over graphs ---------------------------------------------------------------------------------------------------------


class _Propagated(nn.Module):
    """``A (x W) + b``."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.linear = FeatureLinear(before, after, bias=False)
        self.bias = nn.Parameter(torch.zeros(after))
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return product(adjacency, self.linear(x)) + self.bias


class GCN(NodeNetwork):
    """Convolutions with the symmetrically normalised adjacency with self loops.

    Source: "Semi-Supervised Classification with Graph Convolutional Networks" (2017).
    """

    def convolution(self, before: int, after: int) -> nn.Module:
        return _Propagated(before, after)

    def seen(self, structure: Structure) -> Tensor:
        return adjacency_of(structure, "sym", self_loops=True)


class _OwnAndMean(nn.Module):
    """``x W_1 + (A x) W_2 + b``, A with rows that sum to 1 (0 where there are no neighbours)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.own, self.arriving = FeatureLinear(before, after), FeatureLinear(before, after, bias=False)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        # The cheaper order of two products.
        first = self.arriving.out_features < self.arriving.in_features or x.layout != torch.strided
        mean = product(adjacency, self.arriving(x)) if first else self.arriving(product(adjacency, x))
        found: Tensor = self.own(x) + mean
        return found


class SAGE(NodeNetwork):
    """A node's own features, and the mean of its neighbours', weighted where edges have weights.

    Source: "Inductive Representation Learning on Large Graphs" (2017), mean aggregator over all neighbours.
    """

    def convolution(self, before: int, after: int) -> nn.Module:
        return _OwnAndMean(before, after)

    def seen(self, structure: Structure) -> Tensor:
        return adjacency_of(structure, "row", self_loops=False)


class _Attending(nn.Module):
    """``sum_u a_uv W x_u + b`` over u with an edge to v, ``a_uv = softmax_u leaky_relu(s . W x_u + t . W x_v)``; the mean over heads."""

    def __init__(self, before: int, after: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear = FeatureLinear(before, heads * after, bias=False)
        self.source, self.target = (nn.Parameter(torch.empty(heads, after)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(after))
        for weight in (self.linear.weight, self.source, self.target):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        rows, columns = _entries(adjacency)
        sent = self.linear(x).view(len(x), self.heads, -1)
        score = F.leaky_relu((sent * self.source).sum(-1)[columns] + (sent * self.target).sum(-1)[rows], 0.2)
        weight = softmax_by(score, rows, len(x))
        return gather_sum(weight[..., None] * sent[columns], rows, len(x)).mean(1) + self.bias


class GAT(NodeNetwork):
    """Attention over a node's neighbours and itself, the mean of four heads in every layer; edge weights are not looked at.

    Source: "Graph Attention Networks" (2018); there hidden heads stand side by side.
    """

    heads: ClassVar[int] = 4

    def convolution(self, before: int, after: int) -> nn.Module:
        return _Attending(before, after, self.heads)

    def seen(self, structure: Structure) -> Tensor:
        return adjacency_of(structure, "none", self_loops=True)


# ---- over hypergraphs ----------------------------------------------------------------------------------------------------


class HypergraphNetwork(NodeNetwork):
    """Base of the networks over hypergraphs."""

    over = "hypergraph"

    def seen(self, structure: Structure) -> Hypergraph:
        return hypergraph_of(structure)


class _Smoothed(FeatureLinear):
    """``L (x W + b)``."""

    def forward(self, x: Tensor, hypergraph: Hypergraph) -> Tensor:  # type: ignore[override]
        return hypergraph.smooth(super().forward(x))


class HGNN(HypergraphNetwork):
    r"""Convolutions :math:`L X \Theta` with :math:`L = D_v^{-1/2} H W D_e^{-1} H^T D_v^{-1/2}`.

    Source: "Hypergraph Neural Networks" (2019).
    """

    def convolution(self, before: int, after: int) -> nn.Module:
        return _Smoothed(before, after)


class _TwoMeans(FeatureLinear):
    def forward(self, x: Tensor, hypergraph: Hypergraph) -> Tensor:  # type: ignore[override]
        return hypergraph.edge_to_vertex(hypergraph.vertex_to_edge(super().forward(x)))


class HGNNPlus(HypergraphNetwork):
    """The mean over a hyperedge's members, then the mean over a vertex's hyperedges.

    Source: "HGNN+: General Hypergraph Neural Networks" (2022), without hyperedge groups.
    """

    def convolution(self, before: int, after: int) -> nn.Module:
        return _TwoMeans(before, after)


class _EdgeActivated(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.to_edges, self.to_vertices = FeatureLinear(before, after), nn.Linear(after, after)

    def forward(self, x: Tensor, hypergraph: Hypergraph) -> Tensor:
        y = F.relu(hypergraph.vertex_to_edge(self.to_edges(x)))
        return hypergraph.edge_to_vertex(self.to_vertices(y))


class HNHN(HypergraphNetwork):
    """Hyperedges have a nonlinearity and weights of their own; both means are plain.

    Source: "HNHN: Hypergraph Networks with Hyperedge Neurons" (2020), without its degree exponents.
    """

    def convolution(self, before: int, after: int) -> nn.Module:
        return _EdgeActivated(before, after)


class _DegreeScaled(FeatureLinear):
    def forward(self, x: Tensor, hypergraph: Hypergraph) -> Tensor:  # type: ignore[override]
        y = hypergraph.vertex_to_edge(super().forward(x))
        degrees = hypergraph.weighted_degrees.to(y.dtype)
        of_edges = hypergraph.vertex_to_edge(degrees[:, None])
        # The sum over a vertex's hyperedges is its mean times their number.
        total = hypergraph.edge_to_vertex(y * of_edges.rsqrt()) * hypergraph.degrees.to(y.dtype)[:, None]
        return total * degrees.clamp_min(1e-12).rsqrt()[:, None]


class UniGCN(HypergraphNetwork):
    r""":math:`x'_v = d_v^{-1/2} \sum_{e \ni v} d_e^{-1/2} y_e`, y the means over members and :math:`d_e` the mean degree of a hyperedge's members.

    Source: "UniGNN: a Unified Framework for Graph and Hypergraph Neural Networks" (2021).
    """

    def convolution(self, before: int, after: int) -> nn.Module:
        return _DegreeScaled(before, after)


NODE_NETWORKS: dict[str, type[NodeNetwork]] = {
    "gcn": GCN,
    "sage": SAGE,
    "gat": GAT,
    "hgnn": HGNN,
    "hgnn+": HGNNPlus,
    "hnhn": HNHN,
    "unigcn": UniGCN,
}


def node_network(kind: str, in_features: int, num_classes: int, **options: Any) -> NodeNetwork:
    """A freshly initialised network by its kind.

    Raises:
        UnknownNameError: no such kind.
    """
    if kind not in NODE_NETWORKS:
        raise UnknownNameError("network over nodes", kind, NODE_NETWORKS, hint=f"Known: {', '.join(NODE_NETWORKS)}.")
    return NODE_NETWORKS[kind](in_features, num_classes, **options)


# ---- structures as networks see them -------------------------------------------------------------------------------------


def adjacency_of(structure: Structure, norm: Norm, *, self_loops: bool) -> Tensor:
    """The sparse matrix (N, N) of a structure, made once for each structure; a matrix is taken as it is.

    A hypergraph is seen as its clique expansion.
    """
    if isinstance(structure, Tensor):
        return structure
    # Structures never change, so what is derived from one can stay with it.
    held: dict[Any, Tensor] = vars(structure).setdefault("_adjacencies", {})
    key = (norm, self_loops)
    if key not in held:
        graph = structure
        if isinstance(structure, Hypergraph):
            edges = structure.clique_edges()
            graph = NodeGraph(torch.zeros(structure.num_nodes, 1, device=edges.device), edges)
        assert isinstance(graph, NodeGraph)
        held[key] = graph.adjacency(norm, self_loops=self_loops)
    return held[key]


def hypergraph_of(structure: Structure) -> Hypergraph:
    """The structure as a hypergraph without isolated vertices, made once for each.

    Raises:
        InputError: a bare matrix, whose edges are not known.
    """
    if isinstance(structure, Tensor):
        raise InputError("a network over hypergraphs needs a Hypergraph or a NodeGraph, not a matrix")
    held = vars(structure).get("_as_hypergraph")
    if held is None:
        if isinstance(structure, NodeGraph):
            held = from_graph(structure.edge_index, structure.num_nodes)
        else:
            held = structure.with_singletons()
        if held is not structure:  # one that held itself would outlive its use
            vars(structure)["_as_hypergraph"] = held
    found: Hypergraph = held
    return found


def gather(network: nn.Module, structure: Structure, vertices: Tensor) -> tuple[Structure, Tensor, Tensor]:
    """What a network must see to answer for some vertices (n,) as on the whole structure.

    Returns:
        the part of the structure, which vertices it holds (m,), and where ``vertices`` stand among them.

    Raises:
        InputError: the network is none of this module, so that its reach is unknown.
    """
    if not isinstance(network, NodeNetwork):
        raise InputError(f"how far {type(network).__name__} reaches is unknown: give one of {', '.join(NODE_NETWORKS)}")
    if network.over == "hypergraph":
        return hypergraph_of(structure).neighbourhood(vertices, network.depth)
    return _rows_around(network.seen(structure), vertices, network.depth)


def _rows_around(adjacency: Tensor, vertices: Tensor, hops: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a normalised matrix that so many products need, as a smaller matrix."""
    pointer, columns, values = adjacency.crow_indices(), adjacency.col_indices(), adjacency.values()
    held = vertices
    for _ in range(hops):
        picked, _ = _spans(pointer, held)
        held = torch.unique(torch.cat([held, columns[picked]]))
    picked, owner = _spans(pointer, held)
    place = torch.searchsorted(held, columns[picked]).clamp_max(len(held) - 1)
    inside = held[place] == columns[picked]  # rows at the rim lose entries that no answer needs
    counts = torch.bincount(owner[inside], minlength=len(held))
    found = torch.sparse_csr_tensor(
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        place[inside],
        values[picked][inside],
        (len(held), len(held)),
        check_invariants=False,
    )
    return found, held, torch.searchsorted(held, vertices)


def _spans(pointer: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the entries of some rows are, and whose each is."""
    counts = pointer[rows + 1] - pointer[rows]
    owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    within = torch.arange(len(owner), device=rows.device) - (counts.cumsum(0) - counts)[owner]
    return pointer[rows][owner] + within, owner


def _entries(adjacency: Tensor) -> tuple[Tensor, Tensor]:
    pointer = adjacency.crow_indices()
    rows = torch.repeat_interleave(torch.arange(len(pointer) - 1, device=pointer.device), pointer.diff())
    return rows, adjacency.col_indices()
