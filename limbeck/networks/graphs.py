"""Small message-passing networks over many graphs at once: GCN, GIN, GAT and GraphSAGE, without a graph library.

Their input is a :class:`limbeck.core.graphs.GraphBatch`. A node starts as the sum of the embeddings of its label columns;
each layer mixes in what arrives over the incoming edges; the readout is the sum or the mean over all nodes of a graph, or
over the nodes of ``root_mask`` where there is one, weighted by ``node_weights`` where there are any. An edge's label adds its
embedding to what the edge carries (our decision for all four; GIN also passes it through a ReLU, as GINE does).

``in_shape`` of these networks is the number of values of each label column.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.core.graphs import GraphBatch
from limbeck.networks.base import Network, isotropic_stages

Readout = Literal["mean", "sum"]


class Convolution(nn.Module):
    """One layer: what arrives at each node, and what the node makes of it.

    Args:
        width: of the node states.
        edge_values: number of edge labels; 0: edges have none.
    """

    def __init__(self, width: int, edge_values: int) -> None:
        super().__init__()
        self.edges = nn.Embedding(edge_values, width) if edge_values else None

    def messages(self, h: Tensor, graphs: GraphBatch) -> Tensor:
        """(E, width) what each edge carries: the state of its source, plus the embedding of its label."""
        carried = h[graphs.edge_index[0]]
        if self.edges is None:
            return carried
        if graphs.edge_labels is None:
            raise InputError(
                "the network has edge embeddings, but these graphs have no edge labels: build it without -e"
            )
        labelled: Tensor = carried + self.edges(graphs.edge_labels)
        return labelled

    def forward(self, h: Tensor, graphs: GraphBatch) -> Tensor:
        """States (V, width) in, states (V, width) out."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")


class GCNConvolution(Convolution):
    """``h_v' = W sum_u h_u / sqrt((d_u + 1)(d_v + 1)) + b`` over the neighbours u and v itself.

    ``d`` is the number of incoming edges, or the batch's ``degrees`` where it has them: a leaf of a computation tree has no
    children, and without its original degree a root's state is not that of the node in its graph.

    Source: "Semi-Supervised Classification with Graph Convolutional Networks" (2017).
    """

    def __init__(self, width: int, edge_values: int) -> None:
        super().__init__(width, edge_values)
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor, graphs: GraphBatch) -> Tensor:
        source, target = graphs.edge_index
        degrees = in_degrees(graphs) if graphs.degrees is None else graphs.degrees
        scale = (degrees.to(h.dtype) + 1).rsqrt()[:, None]
        arriving = self.messages(h, graphs) * scale[source]
        out: Tensor = self.linear(scale * gather_sum(arriving, target, len(h)) + scale**2 * h)
        return out


class GINConvolution(Convolution):
    """``h_v' = MLP((1 + eps) h_v + sum_u m_uv)``, ``m_uv = h_u`` or, with edge labels, ``relu(h_u + e_uv)``.

    Source: "How Powerful are Graph Neural Networks?" (2019), without its batch normalisation, which makes a node's state depend on
    the rest of the batch; with edges "Strategies for Pre-training Graph Neural Networks" (2020).
    """

    def __init__(self, width: int, edge_values: int) -> None:
        super().__init__(width, edge_values)
        self.eps = nn.Parameter(torch.zeros(()))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, graphs: GraphBatch) -> Tensor:
        arriving = self.messages(h, graphs)
        if self.edges is not None:
            arriving = F.relu(arriving)
        out: Tensor = self.mlp((1 + self.eps) * h + gather_sum(arriving, graphs.edge_index[1], len(h)))
        return out


class SAGEConvolution(Convolution):
    """``h_v' = W1 h_v + W2 mean_u m_uv + b``, ``m_uv = h_u + e_uv``; a node without neighbours has the mean 0.

    Source: "Inductive Representation Learning on Large Graphs" (2017), mean aggregator.
    """

    def __init__(self, width: int, edge_values: int) -> None:
        super().__init__(width, edge_values)
        self.own, self.arriving = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor, graphs: GraphBatch) -> Tensor:
        total = gather_sum(self.messages(h, graphs), graphs.edge_index[1], len(h))
        mean = total / in_degrees(graphs).clamp(min=1).to(h.dtype)[:, None]
        out: Tensor = self.own(h) + self.arriving(mean)
        return out


class GATConvolution(Convolution):
    """``h_v' = sum_u a_uv W m_uv + b`` over the neighbours u and v itself, in several heads side by side;
    ``a_uv = softmax_u leaky_relu(s . W m_uv + t . W h_v)``, ``m_uv = h_u + e_uv``, and ``m_vv = h_v``.

    Source: "Graph Attention Networks" (2018).

    Raises:
        InputError: ``heads`` does not divide ``width``.
    """

    def __init__(self, width: int, edge_values: int, heads: int = 4) -> None:
        super().__init__(width, edge_values)
        if width % heads:
            raise InputError(
                f"{heads} attention heads do not divide the width {width}: choose a width that is a multiple"
            )
        self.heads = heads
        self.linear = nn.Linear(width, width, bias=False)
        self.source, self.target = (nn.Parameter(torch.empty(heads, width // heads)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.source)
        nn.init.xavier_uniform_(self.target)

    def forward(self, h: Tensor, graphs: GraphBatch) -> Tensor:
        nodes = len(h)
        own = torch.arange(nodes, device=h.device)
        target = torch.cat([graphs.edge_index[1], own])
        sent = self.linear(torch.cat([self.messages(h, graphs), h])).view(len(target), self.heads, -1)
        mine = (sent[-nodes:] * self.target).sum(-1)
        score = F.leaky_relu((sent * self.source).sum(-1) + mine[target], 0.2)
        weight = softmax_by(score, target, nodes)
        out: Tensor = gather_sum(weight[..., None] * sent, target, nodes).flatten(1) + self.bias
        return out


CONVOLUTIONS: dict[str, type[Convolution]] = {
    "gcn": GCNConvolution,
    "gin": GINConvolution,
    "gat": GATConvolution,
    "sage": SAGEConvolution,
}


class GraphNetwork(Network):
    """A graph classifier of ``depth`` equal message-passing layers with ReLU between them, a readout and a linear layer.

    The layers are the modules ``layers.0``, ``layers.1``, …; their outputs are node states (V, width).

    Args:
        in_shape: number of values of each column of node labels.
        num_classes: number of logits.
        kind: ``gcn``, ``gin``, ``gat`` or ``sage``.
        width: of the node states.
        depth: number of layers: how many steps away a node sees.
        readout: ``mean`` or ``sum`` over the nodes.
        edge_values: number of edge labels; 0: edges have none (labels that are there are not looked at).
        heads: attention heads of ``gat``.
    """

    axes = None

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        *,
        kind: str = "gin",
        width: int = 32,
        depth: int = 2,
        readout: Readout = "mean",
        edge_values: int = 0,
        heads: int = 4,
    ) -> None:
        super().__init__(in_shape, num_classes)
        self.kind, self.readout = kind, readout
        self.embeddings = nn.ModuleList(nn.Embedding(values, width) for values in self.in_shape)
        extra = {"heads": heads} if kind == "gat" else {}
        self.layers = nn.ModuleList(CONVOLUTIONS[kind](width, edge_values, **extra) for _ in range(depth))
        self.head = nn.Linear(width, self.num_classes)
        self.feature_dim = width
        self.stage_paths = [f"layers.{i}" for i in (range(depth) if depth <= 4 else isotropic_stages(depth))]

    def embed_nodes(self, graphs: GraphBatch) -> Tensor:
        """(V, width) states of all nodes after the last layer.

        Raises:
            InputError: label columns that do not fit, labels unknown to the network, or continuous features.
        """
        labels = graphs.node_labels
        if graphs.features is not None:
            raise InputError(
                "graph networks here read discrete labels, and these graphs have continuous features: "
                "quantise them (limbeck.blocks.quantised_nodes) or drop them"
            )
        if labels.shape[1] != len(self.embeddings):
            raise InputError(
                f"the network was built for {len(self.embeddings)} columns of node labels, these graphs have {labels.shape[1]}"
            )
        h = torch.stack([embed(column) for embed, column in zip(self.embeddings, labels.unbind(1), strict=True)]).sum(0)
        for number, layer in enumerate(self.layers):
            h = layer(F.relu(h) if number else h, graphs)
        return h

    def embed(self, x: Any) -> Tensor:
        """(G, width) the graphs of a :class:`limbeck.core.graphs.GraphBatch`."""
        h, graph = self.embed_nodes(x), x.graph
        weights = torch.ones_like(h[:, 0]) if x.node_weights is None else x.node_weights.to(h.dtype)
        if x.root_mask is not None:
            weights = weights * x.root_mask
        total = gather_sum(h * weights[:, None], graph, len(x.sizes))
        if self.readout == "sum":
            return total
        # A graph without a root, or with no weight on any, has the mean 0.
        return total / gather_sum(weights, graph, len(x.sizes)).clamp(min=1e-9)[:, None]

    def forward(self, x: GraphBatch | Tensor, *rest: Tensor | None) -> Tensor:
        """Logits (G, classes) of a batch of graphs, given whole or field by field."""
        graphs = x if isinstance(x, GraphBatch) else GraphBatch(x, *rest)  # type: ignore[arg-type]
        logits: Tensor = self.head(self.embed(graphs))
        return logits


def gcn(in_shape: tuple[int, ...], num_classes: int, **options: int) -> GraphNetwork:
    """See :class:`GCNConvolution`."""
    return GraphNetwork(in_shape, num_classes, kind="gcn", **options)  # type: ignore[arg-type]


def gin(in_shape: tuple[int, ...], num_classes: int, **options: int) -> GraphNetwork:
    """See :class:`GINConvolution`."""
    return GraphNetwork(in_shape, num_classes, kind="gin", **options)  # type: ignore[arg-type]


def gat(in_shape: tuple[int, ...], num_classes: int, **options: int) -> GraphNetwork:
    """See :class:`GATConvolution`."""
    return GraphNetwork(in_shape, num_classes, kind="gat", **options)  # type: ignore[arg-type]


def sage(in_shape: tuple[int, ...], num_classes: int, **options: int) -> GraphNetwork:
    """See :class:`SAGEConvolution`."""
    return GraphNetwork(in_shape, num_classes, kind="sage", **options)  # type: ignore[arg-type]


def gather_sum(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """(count, …) the sum of the rows (N, …) of each group (N,)."""
    return values.new_zeros(count, *values.shape[1:]).index_add(0, groups, values)


def softmax_by(scores: Tensor, groups: Tensor, count: int) -> Tensor:
    """(N, H) softmax of scores (N, H) within each group (N,) of rows."""
    at = groups[:, None].expand_as(scores)
    top = scores.new_full((count, scores.shape[1]), -torch.inf).scatter_reduce(0, at, scores.detach(), "amax")
    exponents = (scores - top[groups]).exp()
    return exponents / gather_sum(exponents, groups, count)[groups]


def in_degrees(graphs: GraphBatch) -> Tensor:
    """(V,) number of incoming edges."""
    target = graphs.edge_index[1]
    return torch.zeros(len(graphs.node_labels), dtype=torch.int64, device=target.device).index_add(
        0, target, torch.ones_like(target)
    )
