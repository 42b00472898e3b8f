"""One graph whose nodes are told apart: features, edges and labels as flat tensors, without a graph library.

Edges are directed and say where messages go: column (u, v) of ``edge_index`` carries a message from u to v. An undirected graph holds both
directions of every edge. Nothing of size N x N is ever made: adjacencies are sparse.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.errors import InputError

Norm = Literal["sym", "row", "none"]


@dataclass(frozen=True)
class NodeGraph:
    """A graph of N nodes.

    Attributes:
        features: (N, F) float.
        edge_index: (2, E) int64, source and destination; no self loops (layers add their own where they want them).
        labels: (N,) int64 classes, or None.
        edge_weight: (E,) float, above 0; None: 1 each.

    Raises:
        InputError: edges that name no node, NaN in the features, lengths that do not fit, self loops.
    """

    features: Tensor
    edge_index: Tensor
    labels: Tensor | None = None
    edge_weight: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or not len(self.features):
            raise InputError(f"features of nodes are (N, F) with N of 1 or more, not {tuple(self.features.shape)}")
        if not self.features.is_floating_point():
            raise InputError(f"features of nodes are floating-point numbers, not {self.features.dtype}")
        finite = torch.isfinite(self.features).all(1)
        if not bool(finite.all()):
            raise InputError(f"node {int((~finite).nonzero()[0])} has NaN or infinity among its features: clean them")
        check_edges(self.edge_index, len(self.features))
        if bool((self.edge_index[0] == self.edge_index[1]).any()):
            raise InputError(
                "the graph has self loops: remove them (layers add their own), for example with NodeGraph.of"
            )
        if self.labels is not None and self.labels.shape != (len(self.features),):
            raise InputError(f"{len(self.features)} nodes need as many labels, not {tuple(self.labels.shape)}")
        if self.edge_weight is not None and (
            self.edge_weight.shape != self.edge_index.shape[1:] or not bool((self.edge_weight > 0).all())
        ):
            raise InputError("every edge needs one weight above 0, or none has any")

    @classmethod
    def of(cls, features: Tensor, edges: Tensor, labels: Tensor | None = None, *, undirected: bool = True) -> NodeGraph:
        """A graph from edges in any order: double edges and self loops are dropped, and both directions made.

        Args:
            edges: (2, E) node numbers. undirected: add the other direction of each edge.
        """
        check_edges(edges, len(features))
        both = torch.cat([edges, edges.flip(0)], 1) if undirected else edges
        both = both[:, both[0] != both[1]]
        return cls(features, torch.unique(both, dim=1), labels)

    @property
    def num_nodes(self) -> int:
        return len(self.features)

    @property
    def num_edges(self) -> int:
        """Directed edges E."""
        return self.edge_index.shape[1]

    @property
    def degrees(self) -> Tensor:
        """(N,) incoming edges of each node; 0 for isolated ones."""
        return torch.bincount(self.edge_index[1], minlength=self.num_nodes)

    def adjacency(self, norm: Norm = "sym", *, self_loops: bool = True) -> Tensor:
        r"""What a node takes in, as a sparse (N, N) matrix in CSR form: row v, column u for the edge u to v.

        ``sym``: :math:`D^{-1/2} A D^{-1/2}` with D the row sums; ``row``: :math:`D^{-1} A`; ``none``: A. Rows of isolated nodes without self loops
        are zero.
        """
        source, target = self.edge_index
        weight = torch.ones(self.num_edges, device=source.device) if self.edge_weight is None else self.edge_weight
        if self_loops:
            loop = torch.arange(self.num_nodes, device=source.device)
            source, target = torch.cat([source, loop]), torch.cat([target, loop])
            weight = torch.cat([weight.to(self.features.dtype), torch.ones_like(loop, dtype=self.features.dtype)])
        weight = weight.to(self.features.dtype)
        degree = torch.zeros(self.num_nodes, dtype=weight.dtype, device=weight.device).index_add_(0, target, weight)
        if norm == "row":
            weight = weight / degree[target]
        elif norm == "sym":
            root = degree.clamp_min(1e-12).rsqrt()
            weight = weight * root[target] * root[source]
        elif norm != "none":
            raise InputError(f"an adjacency is normalised sym, row or none, not '{norm}'")
        return sparse(target, source, weight, (self.num_nodes, self.num_nodes))

    def induced(self, kept: Tensor) -> NodeGraph:
        """The graph on some nodes (n,) int64, renumbered in their order, with the edges among them.

        Raises:
            InputError: no nodes, or some twice.
        """
        place = places(kept, self.num_nodes)
        ends = place[self.edge_index]
        inside = (ends >= 0).all(0)
        return replace(
            self,
            features=self.features[kept],
            edge_index=ends[:, inside],
            labels=None if self.labels is None else self.labels[kept],
            edge_weight=None if self.edge_weight is None else self.edge_weight[inside],
        )

    def to(self, device: torch.device | str) -> NodeGraph:
        """The same graph on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        weight = None if self.edge_weight is None else self.edge_weight.to(device)
        return NodeGraph(self.features.to(device), self.edge_index.to(device), labels, weight)

    def fingerprint(self) -> str:
        """A hash of the content (hex, 16 digits)."""
        return hash_tensors(self.features, self.edge_index, self.labels, self.edge_weight)


def check_edges(edges: Tensor, nodes: int) -> None:
    """Edges are (2, E) whole numbers of nodes.

    Raises:
        InputError: they are not; it names the first edge that is wrong.
    """
    if edges.ndim != 2 or edges.shape[0] != 2 or edges.is_floating_point():
        raise InputError(f"edges are (2, E) whole numbers, not {tuple(edges.shape)} {edges.dtype}")
    if not edges.numel():
        return
    wrong = ((edges < 0) | (edges >= nodes)).any(0)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise InputError(
            f"edge {first} joins {int(edges[0, first])} and {int(edges[1, first])}, but nodes are numbered 0 to {nodes - 1}"
        )


def places(kept: Tensor, nodes: int) -> Tensor:
    """(nodes,) where each node stands in ``kept``, -1 where it does not.

    Raises:
        InputError: none kept, some twice, or numbers that are no nodes.
    """
    if not len(kept) or int(kept.min()) < 0 or int(kept.max()) >= nodes:
        raise InputError(f"nodes to keep are some of 0 to {nodes - 1}")
    place = torch.full((nodes,), -1, dtype=torch.long, device=kept.device)
    place[kept] = torch.arange(len(kept), device=kept.device)
    if int((place >= 0).sum()) != len(kept):
        raise InputError("nodes to keep are named twice")
    return place


def sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse CSR matrix from entries in any order; equal places add up."""
    order = torch.argsort(rows * shape[1] + columns)
    counts = torch.bincount(rows, minlength=shape[0])
    pointer = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the layout is young
        return torch.sparse_csr_tensor(pointer, columns[order], values[order], shape, check_invariants=False)


def hash_tensors(*parts: Tensor | None) -> str:
    """A hash of tensors (hex, 16 digits)."""
    digest = hashlib.sha256()
    for part in parts:
        if part is None:
            digest.update(b"none")
            continue
        array = part.detach().cpu().contiguous()
        digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return digest.hexdigest()[:16]
