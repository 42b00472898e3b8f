r"""How well inner products of node features tell which nodes are joined, without a matrix of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.node_graphs import check_edges

EPS = 1e-8
CHUNK = 1 << 22
"""Inner products held at once while the extremes are searched."""


class EdgeReconstruction:
    r"""The error of an adjacency that is read off inner products, as a function of node features q (N, D):

    .. math:: L = \sqrt{\tfrac{1}{N^2}\sum_{ij} (A_{ij} - \hat A_{ij})^2 + \epsilon}, \qquad \hat A_{ij} = \frac{G_{ij} - \min G}{\max G - \min G},
        \qquad G = q q^T.

    It is exact over all :math:`N^2` pairs and holds none of them for the gradient:
    :math:`\sum_{ij} G_{ij}^2 = |q^T q|_F^2`, :math:`\sum_{ij} G_{ij} = |\sum_i q_i|^2`, and :math:`\sum_{ij} A_{ij} G_{ij}` runs over the edges.
    Only the search for the two extremes looks at all pairs, in chunks and without a graph; where rows are known to be equal in groups (quantised
    features), it looks at pairs of groups. The gradient of an extreme goes to the pair of groups that has it, evenly to their members.

    Constant features give :math:`\hat A = 0` and no gradient.

    Args:
        edge_index: (2, E) int64, both directions of each edge.
        num_nodes: N.
        edge_weight: (E,) entries of A; None: 1.
        self_loops: whether A has ones on its diagonal.
        block: where N is above it, each call is on this many nodes drawn afresh: a quarter at random, up to three random neighbours of each, and
            the rest at random. None: always all.

    Raises:
        InputError: edges that name no node, weights that do not fit, or a block of fewer than 2 nodes.

    Source: "VQGraph: Rethinking Graph Representation Space for Bridging GNNs and MLPs"; the sums in closed form and :math:`\epsilon` are ours.
    """

    def __init__(
        self,
        edge_index: Tensor,
        num_nodes: int,
        *,
        edge_weight: Tensor | None = None,
        self_loops: bool = True,
        block: int | None = None,
    ) -> None:
        check_edges(edge_index, num_nodes)
        if edge_weight is not None and edge_weight.shape != edge_index.shape[1:]:
            raise InputError(f"{edge_index.shape[1]} edges need as many weights, not {tuple(edge_weight.shape)}")
        if block is not None and block < 2:
            raise InputError(f"a block has 2 nodes at least (got {block})")
        order = torch.argsort(edge_index[0], stable=True)
        self.source, self.target = edge_index[:, order]
        self.weight = None if edge_weight is None else edge_weight[order]
        self.degrees = torch.bincount(self.source, minlength=num_nodes)
        self.pointer = torch.cat([self.degrees.new_zeros(1), self.degrees.cumsum(0)])
        self.num_nodes, self.self_loops, self.block = num_nodes, self_loops, block

    def __call__(self, q: Tensor, groups: Tensor | None = None) -> Tensor:
        """The error, a scalar.

        Args:
            q: (N, D).
            groups: (N,) int64; rows with the same number are equal. None: they may all differ.

        Raises:
            InputError: not N rows.
        """
        if q.ndim != 2 or len(q) != self.num_nodes or (groups is not None and groups.shape != q.shape[:1]):
            raise InputError(f"{self.num_nodes} nodes need (N, D) features of as many rows, not {tuple(q.shape)}")
        if self.block is None or self.num_nodes <= self.block:
            return self._error(q, groups, self.source, self.target, self.weight)
        chosen = self.draw_block(self.block)
        source, target, weight = self._inside(chosen)
        return self._error(q[chosen], None if groups is None else groups[chosen], source, target, weight)

    def draw_block(self, size: int) -> Tensor:
        """``size`` different nodes, drawn with torch's global generator: see ``block``."""
        device = self.source.device
        order = torch.randperm(self.num_nodes, device=device)
        seeds = order[: max(1, size // 4)].repeat(3)
        seeds = seeds[self.degrees[seeds] > 0]
        ranks = (torch.rand(len(seeds), device=device) * self.degrees[seeds]).long()
        near = self.target[self.pointer[seeds] + ranks.minimum(self.degrees[seeds] - 1)]
        place = torch.arange(self.num_nodes, device=device)
        priority = torch.empty_like(place)
        priority[order] = place + len(place)
        priority[near] -= len(place)
        priority[order[: max(1, size // 4)]] = -1  # the seeds before their neighbours before all others
        return torch.argsort(priority, stable=True)[:size]

    def _inside(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The edges among some nodes, renumbered in their order."""
        place = torch.full((self.num_nodes,), -1, dtype=torch.long, device=nodes.device)
        place[nodes] = torch.arange(len(nodes), device=nodes.device)
        source, target = place[self.source], place[self.target]
        inside = (source >= 0) & (target >= 0)
        return source[inside], target[inside], None if self.weight is None else self.weight[inside]

    def _error(self, q: Tensor, groups: Tensor | None, source: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        q = q.double()  # differences of large sums
        low, high = extremes(group_means(q, groups))
        span = (high - low).detach()
        flat = bool(span <= 1e-9 * high.detach().abs() + 1e-12)
        scale = torch.zeros_like(span) if flat else 1 / (high - low)
        size = len(q)
        total = q.sum(0).square().sum()
        squares = (q.T @ q).square().sum()
        along = _edge_sum(q, source, target, weight)
        entries = float(len(source)) if weight is None else float(weight.double().sum())
        squared = float(len(source)) if weight is None else float(weight.double().square().sum())
        if self.self_loops:
            along = along + q.square().sum()
            entries, squared = entries + size, squared + size
        mine = scale**2 * (squares - 2 * low * total + low**2 * size**2)
        both = scale * (along - low * entries)
        error = (mine - 2 * both + squared) / size**2
        return (error.clamp_min(0) + EPS).sqrt().float()


def group_means(q: Tensor, groups: Tensor | None) -> Tensor:
    """One row (G, D) for each group of equal rows, whose gradient goes evenly to its members; q itself without groups."""
    if groups is None:
        return q
    numbers, place = torch.unique(groups, return_inverse=True)
    count = torch.bincount(place, minlength=len(numbers)).to(q.dtype)
    total = q.new_zeros(len(numbers), q.shape[1]).index_add(0, place, q)
    return total / count[:, None]


def extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest inner product among rows (G, D), each with itself included; differentiable scalars."""
    with torch.no_grad():
        step = max(1, CHUNK // len(rows))
        found = []
        for first in range(0, len(rows), step):
            part = (rows[first : first + step] @ rows.T).reshape(-1)
            found += [(part[i], i + first * len(rows)) for i in (part.argmin(), part.argmax())]
        values, places = torch.stack([v for v, _ in found]), torch.stack([p for _, p in found])
        ends = places[torch.stack([values.argmin(), values.argmax()])]
    low, high = (rows[ends // len(rows)] * rows[ends % len(rows)]).sum(1)
    return low, high


def _edge_sum(q: Tensor, source: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    r""":math:`\sum_{e=(u,v)} w_e \langle q_u, q_v\rangle`, holding no row for each edge for the gradient."""
    found: Tensor = _EdgeSum.apply(q, source, target, weight)
    return found


class _EdgeSum(torch.autograd.Function):
    """Edges in parts, forwards and backwards, so that (E, D) is never held."""

    @staticmethod
    def forward(ctx, q, source, target, weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, source, target, weight)
        total = q.new_zeros(())
        for part in _parts(len(source), q.shape[1]):
            along = (q[source[part]] * q[target[part]]).sum(1)
            total += along.sum() if weight is None else along @ weight[part].to(q.dtype)
        return total

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        q, source, target, weight = ctx.saved_tensors
        out = torch.zeros_like(q)
        for part in _parts(len(source), q.shape[1]):
            u, v = source[part], target[part]
            share = 1.0 if weight is None else weight[part].to(q.dtype)[:, None]
            out.index_add_(0, u, share * q[v])
            out.index_add_(0, v, share * q[u])
        return gradient * out, None, None, None


def _parts(edges: int, width: int) -> list[slice]:
    step = max(1, CHUNK // max(1, width))
    return [slice(first, first + step) for first in range(0, edges, step)]
