r"""A hypergraph as a list of vertex lists, and its means: from vertices to hyperedges and back, all sparse.

With the incidence :math:`H \in \{0,1\}^{N \times M}`, the vertices' degrees :math:`d_v = \sum_e w_e H_{ve}` and the hyperedges' sizes :math:`\delta_e`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.node_graphs import hash_tensors, places, sparse
from limbeck.core.sparse_products import product


@dataclass(frozen=True)
class Hypergraph:
    """M hyperedges over N vertices.

    Attributes:
        pointer: (M + 1,) int64; hyperedge e holds ``members[pointer[e]:pointer[e + 1]]``.
        members: (nnz,) int64 vertex numbers, each at most once in a hyperedge.
        num_nodes: N.
        weights: (M,) float above 0; None: 1 each.
        outer_degrees: (N,) float, weighted degrees that :meth:`smooth` uses in the place of its own: those in a larger hypergraph that this one was
            cut from. None: its own.

    Raises:
        InputError: an empty hyperedge, a vertex number out of range, a vertex twice in a hyperedge, lengths that do not fit.
    """

    pointer: Tensor
    members: Tensor
    num_nodes: int
    weights: Tensor | None = None
    outer_degrees: Tensor | None = None

    def __post_init__(self) -> None:
        pointer, members = self.pointer, self.members
        if pointer.ndim != 1 or not len(pointer) or int(pointer[0]) != 0 or int(pointer[-1]) != len(members):
            raise InputError(f"a hypergraph's pointer goes from 0 to the number of members, {len(members)}")
        sizes = pointer.diff()
        if bool((sizes <= 0).any()):
            raise InputError(f"hyperedge {int((sizes <= 0).nonzero()[0])} is empty: drop it")
        if len(members):
            wrong = (members < 0) | (members >= self.num_nodes)
            if bool(wrong.any()):
                place = int(wrong.nonzero()[0])
                edge = int(torch.searchsorted(pointer, place, right=True)) - 1
                raise InputError(
                    f"hyperedge {edge} names vertex {int(members[place])}, but vertices are numbered 0 to {self.num_nodes - 1}"
                )
            keys = self.edge_of * self.num_nodes + members
            if len(torch.unique(keys)) != len(keys):
                raise InputError("a hyperedge names a vertex twice: make its members unique")
        if self.weights is not None and (self.weights.shape != sizes.shape or not bool((self.weights > 0).all())):
            raise InputError(f"{len(sizes)} hyperedges need as many weights above 0")

    # ---- making -----------------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, edges: list[list[int]] | tuple[tuple[int, ...], ...], num_nodes: int) -> Hypergraph:
        """From lists of vertices."""
        sizes = torch.tensor([len(e) for e in edges], dtype=torch.long)
        pointer = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return cls(pointer, torch.tensor([v for e in edges for v in e], dtype=torch.long), num_nodes)

    @classmethod
    def from_index(cls, hyperedge_index: Tensor, num_nodes: int, weights: Tensor | None = None) -> Hypergraph:
        """From torch_geometric's ``hyperedge_index`` (2, nnz): vertices, and which hyperedge each belongs to, in any order.

        Raises:
            InputError: another shape, or a hyperedge number that is missing.
        """
        if hyperedge_index.ndim != 2 or hyperedge_index.shape[0] != 2 or not hyperedge_index.shape[1]:
            raise InputError(f"a hyperedge index is (2, nnz), not {tuple(hyperedge_index.shape)}")
        vertices, edges = hyperedge_index
        if int(edges.min()) < 0:
            raise InputError("hyperedges are numbered from 0")
        order = torch.argsort(edges, stable=True)
        sizes = torch.bincount(edges)
        return cls(torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), vertices[order], num_nodes, weights)

    @classmethod
    def from_incidence(cls, incidence: Tensor) -> Hypergraph:
        """From an incidence (N, M), dense or sparse: non-zero means a member."""
        held = (incidence.to_sparse_coo() if incidence.layout != torch.strided else incidence.to_sparse()).coalesce()
        return cls.from_index(held.indices(), incidence.shape[0])

    def index(self) -> Tensor:
        """``hyperedge_index`` (2, nnz)."""
        return torch.stack([self.members, self.edge_of])

    # ---- sizes ------------------------------------------------------------------------------------------------------------

    @property
    def num_edges(self) -> int:
        return len(self.pointer) - 1

    @property
    def sizes(self) -> Tensor:
        """(M,) members of each hyperedge."""
        return self.pointer.diff()

    @cached_property
    def edge_of(self) -> Tensor:
        """(nnz,) the hyperedge of each member."""
        edges = torch.arange(self.num_edges, device=self.pointer.device)
        return torch.repeat_interleave(edges, self.pointer.diff())

    @cached_property
    def degrees(self) -> Tensor:
        """(N,) how many hyperedges each vertex is in; 0 for isolated ones."""
        return torch.bincount(self.members, minlength=self.num_nodes)

    @cached_property
    def isolated(self) -> Tensor:
        """The vertices that are in no hyperedge."""
        return (self.degrees == 0).nonzero()[:, 0]

    # ---- operators --------------------------------------------------------------------------------------------------------

    @cached_property
    def to_edges(self) -> Tensor:
        """Sparse (M, N): the mean over a hyperedge's members."""
        share = 1 / self.sizes.float()
        return sparse(self.edge_of, self.members, share[self.edge_of], (self.num_edges, self.num_nodes))

    @cached_property
    def to_vertices(self) -> Tensor:
        """Sparse (N, M): the mean over a vertex's hyperedges; a zero row for an isolated vertex."""
        share = 1 / self.degrees.clamp_min(1).float()
        return sparse(self.members, self.edge_of, share[self.members], (self.num_nodes, self.num_edges))

    def vertex_to_edge(self, x: Tensor) -> Tensor:
        """Means of vertices' rows (N, F) over hyperedges, (M, F)."""
        self._check(x, self.num_nodes, "vertices")
        return product(self.to_edges.to(x.dtype), x)

    def edge_to_vertex(self, y: Tensor) -> Tensor:
        """Means of hyperedges' rows (M, F) over those that a vertex is in, (N, F)."""
        self._check(y, self.num_edges, "hyperedges")
        return product(self.to_vertices.to(y.dtype), y)

    @cached_property
    def weighted_degrees(self) -> Tensor:
        """(N,) the sum of the weights of each vertex's hyperedges."""
        if self.outer_degrees is not None:
            return self.outer_degrees
        if self.weights is None:
            return self.degrees.float()
        zero = torch.zeros(self.num_nodes, device=self.members.device)
        return zero.index_add_(0, self.members, self.weights.float()[self.edge_of])

    @cached_property
    def _halves(self) -> tuple[Tensor, Tensor]:
        """D_v^{-1/2} H W D_e^{-1} (N, M) and H^T D_v^{-1/2} (M, N)."""
        weight = (
            torch.ones(self.num_edges, device=self.members.device) if self.weights is None else self.weights.float()
        )
        degree = self.weighted_degrees
        root = torch.where(degree > 0, degree.clamp_min(1e-12).rsqrt(), torch.zeros_like(degree))
        out = root[self.members] * (weight / self.sizes.float())[self.edge_of]
        return (
            sparse(self.members, self.edge_of, out, (self.num_nodes, self.num_edges)),
            sparse(self.edge_of, self.members, root[self.members], (self.num_edges, self.num_nodes)),
        )

    def smooth(self, x: Tensor) -> Tensor:
        r"""HGNN's smoothing :math:`D_v^{-1/2} H W D_e^{-1} H^T D_v^{-1/2} X` of rows (N, F), in two sparse products.

        Source: "Hypergraph Neural Networks".
        """
        self._check(x, self.num_nodes, "vertices")
        out, into = self._halves
        return product(out.to(x.dtype), product(into.to(x.dtype), x))

    # ---- other hypergraphs ------------------------------------------------------------------------------------------------

    def with_singletons(self) -> Hypergraph:
        """Isolated vertices get a hyperedge of their own, so that no degree is 0."""
        alone = self.isolated
        if not len(alone):
            return self
        more = self.pointer[-1] + 1 + torch.arange(len(alone), device=alone.device)
        weights = None if self.weights is None else torch.cat([self.weights, self.weights.new_ones(len(alone))])
        return Hypergraph(torch.cat([self.pointer, more]), torch.cat([self.members, alone]), self.num_nodes, weights)

    def induced(self, kept: Tensor) -> Hypergraph:
        """On some vertices (n,), renumbered in their order: each hyperedge keeps its members among them, and is dropped when none is."""
        place = places(kept, self.num_nodes)
        found = place[self.members]
        inside = found >= 0
        sizes = torch.bincount(self.edge_of[inside], minlength=self.num_edges)
        some = sizes > 0
        pointer = torch.cat([sizes.new_zeros(1), sizes[some].cumsum(0)])
        return Hypergraph(
            pointer, found[inside], len(kept), None if self.weights is None else self.weights[some]
        ).with_singletons()

    def clique_edges(self) -> Tensor:
        """(2, E) every pair of members of a hyperedge, both directions, each once: the clique expansion.

        Its size is the sum of squared hyperedge sizes: small hyperedges only.
        """
        sizes, first = self.sizes, self.pointer[:-1]
        pairs = sizes * sizes
        owner = torch.repeat_interleave(torch.arange(self.num_edges, device=sizes.device), pairs)
        rank = torch.arange(len(owner), device=sizes.device) - (pairs.cumsum(0) - pairs)[owner]
        size = sizes[owner]
        u, v = self.members[first[owner] + rank // size], self.members[first[owner] + rank % size]
        apart = u != v
        return torch.unique(torch.stack([u[apart], v[apart]]), dim=1)

    def neighbourhood(self, vertices: Tensor, hops: int = 1) -> tuple[Hypergraph, Tensor, Tensor]:
        """What a network of so many layers needs to answer for some vertices: their hyperedges whole, and again for the members.

        Its answers for ``vertices`` are those on the whole hypergraph.

        Returns:
            the hypergraph of those hyperedges, which vertices it holds (n,), and where ``vertices`` stand among them.
        """
        held = vertices
        edges = torch.zeros(0, dtype=torch.long, device=vertices.device)
        for _ in range(hops):
            rows = self._by_vertex[0]
            starts, counts = rows[held], rows[held + 1] - rows[held]
            picked = _ranges(starts, counts)
            edges = torch.unique(self._by_vertex[1][picked])
            picked = _ranges(self.pointer[edges], self.sizes[edges])
            held = torch.unique(torch.cat([held, self.members[picked]]))
        picked = _ranges(self.pointer[edges], self.sizes[edges])
        sizes = self.sizes[edges]
        members = torch.searchsorted(held, self.members[picked])
        pointer = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        weights = None if self.weights is None else self.weights[edges]
        # A part of a checked hypergraph needs no checks, which would count as time of a request.
        found = object.__new__(Hypergraph)
        parts = (pointer, members, len(held), weights, self.weighted_degrees[held])
        vars(found).update(zip(("pointer", "members", "num_nodes", "weights", "outer_degrees"), parts, strict=True))
        return found, held, torch.searchsorted(held, vertices)

    @cached_property
    def _by_vertex(self) -> tuple[Tensor, Tensor]:
        """Pointer (N + 1,) and the hyperedges of each vertex in turn."""
        order = torch.argsort(self.members, stable=True)
        return torch.cat([self.degrees.new_zeros(1), self.degrees.cumsum(0)]), self.edge_of[order]

    def to(self, device: torch.device | str) -> Hypergraph:
        """The same on another device."""
        weights, outer = (None if x is None else x.to(device) for x in (self.weights, self.outer_degrees))
        return Hypergraph(self.pointer.to(device), self.members.to(device), self.num_nodes, weights, outer)

    def fingerprint(self) -> str:
        """A hash of the content (hex, 16 digits)."""
        return hash_tensors(self.pointer, self.members, torch.tensor(self.num_nodes), self.weights)

    @staticmethod
    def _check(x: Tensor, rows: int, what: str) -> None:
        if x.ndim != 2 or len(x) != rows:
            raise InputError(f"{rows} {what} need (N, F) rows of as many, not {tuple(x.shape)}")


def from_graph(edge_index: Tensor, num_nodes: int) -> Hypergraph:
    """A plain graph as a hypergraph: every edge, and every node with its neighbours."""
    upper = edge_index[:, edge_index[0] < edge_index[1]]
    loop = torch.arange(num_nodes, device=edge_index.device)
    pairs = torch.stack([upper.T.reshape(-1), torch.arange(upper.shape[1], device=loop.device).repeat_interleave(2)])
    around = torch.stack([torch.cat([edge_index[0], loop]), torch.cat([edge_index[1], loop]) + upper.shape[1]])
    return Hypergraph.from_index(torch.cat([pairs, around], 1), num_nodes)


def _ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """All numbers of several ranges, one range after the other."""
    total = int(counts.sum())
    owner = torch.repeat_interleave(torch.arange(len(starts), device=starts.device), counts)
    return starts[owner] + torch.arange(total, device=starts.device) - (counts.cumsum(0) - counts)[owner]
