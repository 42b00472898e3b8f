r"""Topological concentration: how much of a node's computation tree lies in the trees of its neighbours, exactly and by random projections.

With :math:`c_i^k(u)` the number of walks of k steps from i to u in the training graph, :math:`H_i^k` the multiset of their ends, K hops and a decay
:math:`\beta` (1 / mean degree unless given), over the neighbours :math:`N_i` of i in some part of the links:

.. math:: C_i = \frac{1}{|N_i|} \sum_{j \in N_i} \frac{\sum_{k, l = 1}^K \beta^{k + l - 2} \sum_{u \in H_j^l} c_i^k(u)}
                                                      {\sum_{k, l = 1}^K \beta^{k + l - 2} |H_i^k|}.

The trees are those of the training graph whatever the part. Of training neighbours one of :math:`H_i^1` is j itself, which is no neighbour of its own,
so that the term (1, 1) of the denominator is :math:`|H_i^1| - 1`: a clique has C = 1, and at K = 1 C is the local clustering coefficient. Without that
correction training links look less concentrated than others and there seems to be a shift where there is none.

The numerator is an inner product of two rows, :math:`\sum_k \beta^{k-1} A^k` at i and :math:`\sum_l \beta^{l-1} [A^l > 0]` at j, which is how it is
counted, and how projections approximate it: :math:`E\langle (A R)_i, (A R)_j \rangle = \langle A_i, A_j \rangle` for rows of R from N(0, I / d).

Source: "A Topological Perspective on Demystifying GNN-Based Link Prediction Performance" (2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.node_graphs import check_edges, sparse

BUDGET = 20_000_000
"""Entries of walk counts that are held at a time."""
_BLOCK = 64
"""Columns of the projection that are held at a time."""


@dataclass(frozen=True)
class Concentration:
    """One value for each node.

    Attributes:
        values: (N,) float64; 0 where it is not defined.
        defined: (N,) bool: nodes with neighbours in the part and in the training graph (two or more where the part is the training graph).
    """

    values: Tensor
    defined: Tensor

    @property
    def mean(self) -> float:
        """Over the nodes where it is defined; NaN if there are none."""
        return float(self.values[self.defined].mean()) if bool(self.defined.any()) else float("nan")


def topological_concentration(
    edges: Tensor,
    num_nodes: int,
    pairs: Tensor | None = None,
    *,
    hops: int = 2,
    beta: float | None = None,
    weights: Tensor | None = None,
    budget: int = BUDGET,
) -> Concentration:
    """The concentration of every node, by counting walks with sparse products.

    Time grows with the pairs times the ends of K steps from a node; memory stays under ``budget`` (and the ends from one node).

    Args:
        edges: (2, E) the training graph, undirected: one direction or both, in any order; self loops do not count.
        num_nodes: N.
        pairs: (2, M) links of another part (validation, test), likewise; None: the training links.
        hops: K, 1 to 3 as a rule. Where no triangles can be (users and items), 2 is the least that sees anything.
        beta: decay; None: 1 / mean degree.
        weights: (M,) of the pairs, or (E,) of the edges where there are no pairs: neighbours then count by weight, and every column is directed, from
            neighbour to node. With the weights of message passing this is the concentration as that sees it.
        budget: see above.

    Raises:
        InputError: edges that name no node, fewer than one hop, weights that do not fit.
    """
    graph, part = _Graph(edges, num_nodes, hops, beta), _part(edges, num_nodes, pairs, weights)
    found, reach = np.zeros(num_nodes), graph.reach()
    # Trees are counted once if all of them fit, else anew for each chunk.
    every = graph.trees(np.arange(num_nodes), counted=False) if reach.sum() <= budget else None
    for nodes, neighbours, mean in _chunks(part, reach, budget):
        shared = mean @ (graph.trees(neighbours, counted=False) if every is None else every[neighbours])
        found[nodes] += np.asarray(graph.trees(nodes, counted=True).multiply(shared).sum(1)).ravel()
    return _ratio(found, graph, part, training=pairs is None)


def approximate_concentration(
    edges: Tensor,
    num_nodes: int,
    pairs: Tensor | None = None,
    *,
    hops: int = 2,
    beta: float | None = None,
    weights: Tensor | None = None,
    dim: int = 256,
    draws: int = 8,
    alphas: Sequence[float] | None = None,
    norm: Literal["ratio", "row"] = "ratio",
    seed: int = 0,
) -> Concentration:
    r"""The concentration by random projections, in time linear in the links: O(dim draws (K E + M)).

    .. math:: Z = \sum_k \alpha_k \hat A^k R, \qquad \hat C_i = \frac{1}{|N_i|} \sum_{j \in N_i} \langle Z_i, Z_j \rangle \,/\, g_i.

    ``ratio``: :math:`\hat A` is A and :math:`g_i` is the denominator of the exact ratio, so that at K = 1 the expectation is the exact value; beyond,
    walks to a common end count with their multiplicity on both sides, and the two agree in order rather than in size. ``row``: :math:`\hat A` has rows
    that sum to 1 and :math:`g_i = 1`, so that at K = 1 the expectation is :math:`|N_i \cap N_j| / (d_i d_j)`.

    Args:
        edges, num_nodes, pairs, hops, beta, weights: as for :func:`topological_concentration`.
        dim: d, columns of R.
        draws: independent matrices R whose results are averaged; the same in law as one with ``dim * draws`` columns. No more than 64 columns are held
            at a time.
        alphas: (K,) weights of the hops; None: ``beta ** (k - 1)``.
        norm: see above.
        seed: of R.

    Raises:
        InputError: as there; dimensions below 1, as many alphas as hops needed.
    """
    if dim < 1 or draws < 1:
        raise InputError(f"a projection has a dimension of 1 or more and is drawn once or more, not {dim} and {draws}")
    graph, part = _Graph(edges, num_nodes, hops, beta), _part(edges, num_nodes, pairs, weights)
    if alphas is not None:
        if len(alphas) != hops:
            raise InputError(f"{hops} hops need as many alphas, not {len(alphas)}")
        graph.decay = tuple(float(a) for a in alphas)
    device, columns = edges.device, dim * draws
    around = graph.matrix.copy()
    if norm == "row":
        around.data /= np.repeat(graph.degrees, np.diff(around.indptr))
    elif norm != "ratio":
        raise InputError(f"projections are normalised by ratio or row, not '{norm}'")
    step, mean = _tensor(around, device), _tensor(part, device)
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(num_nodes, dtype=torch.float64, device=device)
    for start in range(0, columns, _BLOCK):
        width = min(_BLOCK, columns - start)
        reached = torch.randn(num_nodes, width, generator=generator).to(device) / columns**0.5
        z = torch.zeros_like(reached)
        for alpha in graph.decay:
            reached = step @ reached
            z += alpha * reached
        found += (z * (mean @ z)).sum(1)
    values = found.cpu().numpy()
    if norm == "ratio":
        return _ratio(values, graph, part, training=pairs is None)
    there = _there(graph, part, training=pairs is None)
    return Concentration(torch.from_numpy(np.where(there, values, 0.0)), torch.from_numpy(there))


def concentration_shift(train: Concentration, other: Concentration) -> dict[str, float]:
    """Topological distribution shift: the means of two parts over the nodes where both are defined, and the first less the second.

    Returns:
        ``train``, ``other``, ``shift`` and the number of ``nodes``; NaN where there are none.
    """
    both = train.defined & other.defined
    a, b = (float(c.values[both].mean()) if bool(both.any()) else float("nan") for c in (train, other))
    return {"train": a, "other": b, "shift": a - b, "nodes": float(both.sum())}


# ---- parts -------------------------------------------------------------------------------------------------------------


class _Graph:
    """The training graph, ready for counting walks."""

    def __init__(self, edges: Tensor, num_nodes: int, hops: int, beta: float | None) -> None:
        if hops < 1:
            raise InputError(f"a computation tree has 1 hop or more, not {hops}")
        if beta is not None and beta < 0:
            raise InputError(f"beta is 0 or more, not {beta}")
        self.matrix = link_matrix(edges, num_nodes)
        self.degrees = np.diff(self.matrix.indptr).astype(np.float64)
        self.beta = 1 / max(self.degrees.mean(), 1e-12) if beta is None else beta
        self.decay = tuple(self.beta**k for k in range(hops))

    def sizes(self) -> list[NDArray[np.float64]]:
        """(N,) each: walks of 1 … K steps from every node."""
        found = [self.degrees]
        for _ in self.decay[1:]:
            found.append(self.matrix @ found[-1])
        return found

    def reach(self) -> NDArray[np.float64]:
        """(N,) an upper bound on the entries of a node's tree."""
        size = len(self.degrees)
        return np.sum([np.minimum(s, size) for s in self.sizes()], axis=0) + 1

    def trees(self, rows: NDArray[np.int64], *, counted: bool) -> Any:
        """(n, N) sparse: the decayed sum over hops of the walks that end at each node, or of whether any does."""
        step = self.matrix[rows]
        total = step * self.decay[0]
        for weight in self.decay[1:]:
            step = step @ self.matrix
            seen = step if counted else step.astype(bool).astype(np.float64)
            total = total + weight * seen
        return total


def link_matrix(edges: Tensor, num_nodes: int) -> Any:
    """Links (2, E) as a symmetric scipy matrix of zeros and ones in CSR form, without self loops.

    Raises:
        InputError: edges that name no node.
    """
    from scipy.sparse import csr_matrix

    check_edges(edges, num_nodes)
    ends = edges.cpu().numpy()
    ends = ends[:, ends[0] != ends[1]]
    rows, columns = np.concatenate([ends[0], ends[1]]), np.concatenate([ends[1], ends[0]])
    found = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(num_nodes, num_nodes))
    found.data[:] = 1.0  # links that are named twice have been added up
    found.sort_indices()
    return found


def _part(edges: Tensor, num_nodes: int, pairs: Tensor | None, weights: Tensor | None) -> Any:
    """(N, N) sparse rows that average over each node's neighbours in a part."""
    from scipy.sparse import csr_matrix

    links = edges if pairs is None else pairs
    if weights is None:
        found = link_matrix(links, num_nodes)
    else:
        check_edges(links, num_nodes)
        if weights.shape != links.shape[1:] or not bool(((weights >= 0) & torch.isfinite(weights)).all()):
            raise InputError(f"{links.shape[1]} neighbours need as many weights of 0 or more")
        source, target = links.cpu().numpy()
        apart = source != target
        values = weights.detach().cpu().double().numpy()[apart]
        found = csr_matrix((values, (target[apart], source[apart])), shape=(num_nodes, num_nodes))
        found.sum_duplicates()
    total = np.asarray(found.sum(1)).ravel()
    found.data /= np.maximum(np.repeat(total, np.diff(found.indptr)), 1e-300)
    return found


def _chunks(part: Any, reach: NDArray[np.float64], budget: int) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """Nodes (n,), neighbours (m,) and the averages (n, m) between them, as many pairs at a time as the budget allows.

    A node with many neighbours may come in several chunks.
    """
    from scipy.sparse import csr_matrix

    owners = np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))
    spent = np.cumsum(reach[part.indices] + reach[owners])
    bounds = np.flatnonzero(np.diff(spent // budget, prepend=-1))
    for start, end in pairwise([*bounds, len(owners)]):
        nodes, row = np.unique(owners[start:end], return_inverse=True)
        neighbours, column = np.unique(part.indices[start:end], return_inverse=True)
        yield nodes, neighbours, csr_matrix((part.data[start:end], (row, column)), shape=(len(nodes), len(neighbours)))


def _there(graph: _Graph, part: Any, training: bool) -> NDArray[np.bool_]:
    there: NDArray[np.bool_] = (graph.degrees > (1 if training else 0)) & (np.diff(part.indptr) > 0)
    return there


def _ratio(numerators: NDArray[np.float64], graph: _Graph, part: Any, *, training: bool) -> Concentration:
    total = np.sum([w * s for w, s in zip(graph.decay, graph.sizes(), strict=True)], axis=0) * sum(graph.decay)
    if training:
        total = total - graph.decay[0] ** 2
    there = _there(graph, part, training)
    values = np.divide(numerators, total, out=np.zeros_like(numerators), where=there)
    return Concentration(torch.from_numpy(values), torch.from_numpy(there))


def _tensor(matrix: Any, device: torch.device) -> Tensor:
    rows = torch.from_numpy(np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)))
    columns, values = torch.from_numpy(matrix.indices.astype(np.int64)), torch.from_numpy(matrix.data).float()
    return sparse(rows, columns, values, matrix.shape).to(device)
