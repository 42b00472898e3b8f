r"""A network over nodes that says everything through a codebook: its second layer sees codes, not features."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.vector_quantizer import Quantised, VectorQuantizer
from limbeck.core.errors import InputError
from limbeck.networks.node_networks import NodeNetwork, Structure, node_network


@dataclass(frozen=True)
class Tokens:
    """What the tokenizer makes of the nodes.

    Attributes:
        hidden: (N, D) features h of the first layer, which the codes stand for.
        quantised: codes q and the commitment loss.
        edge_side: (N, D) what inner products and the second layer are made of.
        node_side: (N, D) what h is reconstructed by.
        logits: (N, K).
    """

    hidden: Tensor
    quantised: Quantised
    edge_side: Tensor
    node_side: Tensor
    logits: Tensor


class NodeTokenizer(NodeNetwork):
    r"""Two layers with a codebook between them:

    .. math:: h = \mathrm{dropout}(\mathrm{relu}(f_1(X, A))), \quad q = \mathrm{VQ}(h), \quad
        z = W_c\,\mathrm{relu}(f_2(W_1 q, A)), \quad q^{node} = W_2 q.

    Args:
        in_features: F. num_classes: K.
        quantizer: the codebook; its codes' size is D.
        hidden: width of the second layer.
        dropout: after the first layer.
        kind: of both layers, a name in :data:`~limbeck.networks.node_networks.NODE_NETWORKS`.
        first, second: layers of one's own instead, ``(x, structure) -> (N, D)`` and ``(N, hidden)``.

    Raises:
        InputError: one layer of one's own without the other.
        UnknownNameError: no such kind.

    Source: "VQGraph: Rethinking Graph Representation Space for Bridging GNNs and MLPs" (2024).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        quantizer: VectorQuantizer,
        *,
        hidden: int = 64,
        dropout: float = 0.5,
        kind: str = "gcn",
        first: nn.Module | None = None,
        second: nn.Module | None = None,
    ) -> None:
        nn.Module.__init__(self)  # its layers are made otherwise
        if (first is None) != (second is None):
            raise InputError("give both layers of the tokenizer, or none")
        dim = quantizer.codebook.shape[1]
        self.in_features, self.num_classes, self.depth = in_features, num_classes, 2
        self.first = first or node_network(kind, in_features, dim, depth=1)
        self.second = second or node_network(kind, dim, hidden, depth=1)
        self.over = getattr(self.first, "over", "graph")  # type: ignore[misc]
        self.takes_sparse = isinstance(self.first, NodeNetwork)  # type: ignore[misc]
        self.quantizer = quantizer
        self.to_edges, self.to_nodes = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.head = nn.Linear(hidden, num_classes)
        self.dropout = nn.Dropout(dropout)

    @property
    def dim(self) -> int:
        """D."""
        return self.quantizer.codebook.shape[1]

    def seen(self, structure: Structure) -> object:
        """The structure as the layers take it.

        Raises:
            InputError: the layers are one's own, so that this is unknown.
        """
        if not isinstance(self.first, NodeNetwork):
            raise InputError(f"what {type(self.first).__name__} sees of a graph is unknown")
        return self.first.seen(structure)

    def embed(self, x: Tensor, structure: Structure) -> Tensor:
        """(N, D) features h before they are quantised."""
        found: Tensor = self.dropout(F.relu(self.first(x, structure)))
        return found

    def tokens(self, x: Tensor, structure: Structure) -> Tokens:
        """All that the losses need; in training mode the codes follow."""
        h = self.embed(x, structure)
        quantised = self.quantizer(h)
        edge_side = self.to_edges(quantised.values)
        logits = self.head(F.relu(self.second(edge_side, structure)))
        return Tokens(h, quantised, edge_side, self.to_nodes(quantised.values), logits)

    def forward(self, x: Tensor, structure: Structure) -> Tensor:
        """Logits (N, K)."""
        return self.tokens(x, structure).logits
