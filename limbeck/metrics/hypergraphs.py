"""How smooth representations are over a hypergraph, and how pure its hyperedges are."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.hypergraphs import Hypergraph


def topology_score(embeddings: Tensor, hypergraph: Hypergraph) -> float:
    r"""The mean distance of a hyperedge's members to their mean, :math:`\frac1M \sum_e \frac{1}{|e|} \sum_{v \in e} \|z_v - \bar z_e\|_2`; 0 where all are equal.

    Args:
        embeddings: (N, D).
        hypergraph: over the same vertices.

    Source: "LightHGNN: Distilling Hypergraph Neural Networks into MLPs for 100x Faster Inference" (2024).
    """
    means = hypergraph.vertex_to_edge(embeddings)
    apart = (embeddings[hypergraph.members] - means[hypergraph.edge_of]).norm(dim=1)
    sums = torch.zeros(hypergraph.num_edges, dtype=apart.dtype, device=apart.device)
    return float((sums.index_add_(0, hypergraph.edge_of, apart) / hypergraph.sizes).mean())


def purity(hypergraph: Hypergraph, labels: Tensor, num_classes: int) -> Tensor:
    """(M,) the share of each hyperedge's members that are of its most frequent class.

    Args:
        labels: (N,) int64, -1 where there is none; members without a label count as another class.
    """
    known = labels[hypergraph.members] >= 0
    keys = hypergraph.edge_of[known] * num_classes + labels[hypergraph.members[known]]
    counts = torch.bincount(keys, minlength=hypergraph.num_edges * num_classes).view(-1, num_classes)
    return counts.max(1).values / hypergraph.sizes
