r"""How well links are predicted: for every node among all nodes that it could be linked with, and for links among unlinked pairs.

A node i with positives :math:`P_i` ranks all nodes but itself and those known to be its neighbours. Of a ranking with r of the positives among the first
K: hits is 1 if r is above 0, recall :math:`r / |P_i|`, precision :math:`r / K`, F1 their harmonic mean, NDCG the sum of
:math:`1 / \log_2(1 + rank)` over those r, divided by the largest possible; MRR is 1 / rank of the best-ranked positive. Equal scores count against the
positives, so that a constant score finds nothing. Nodes without positives are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.node_graphs import check_edges

KS = (5, 10, 20, 50, 100)
Scorer = Callable[[Tensor], Tensor]
"""Nodes (B,) -> their scores with all nodes (B, N), larger where a link is likelier."""
_ENTRIES = 4_000_000


@dataclass(frozen=True)
class NodeRanking:
    """How every node that has positives ranks them.

    Attributes:
        nodes: (n,) their numbers.
        measures: (n,) float64 each: ``hits_at_10``, ``recall_at_10``, ``ndcg_at_10``, ``precision_at_10``, ``f1_at_10`` …, ``mrr``.
    """

    nodes: Tensor
    measures: dict[str, Tensor]

    def means(self) -> dict[str, float]:
        """Every measure's mean over the nodes."""
        return {name: float(values.mean()) for name, values in self.measures.items()}


@torch.no_grad()
def rank_nodes(
    score: Scorer,
    num_nodes: int,
    positives: Tensor,
    known: Tensor | None = None,
    *,
    ks: Sequence[int] = KS,
    sides: Tensor | None = None,
    most: int | None = None,
    seed: int = 0,
) -> NodeRanking:
    """Rank all candidates of every node that has positives.

    Args:
        score: nodes (B,) -> scores (B, N).
        num_nodes: N.
        positives: (2, M) links to be found, undirected, one direction or both; both of their ends are asked.
        known: (2, E) links that are no candidates: those of training (and of validation, where test links are ranked).
        ks: the K.
        sides: (N,) of a graph of two sides, users and items: candidates are the nodes of the other side.
        most: rank for so many of the nodes at the most, drawn at random; None: for all.
        seed: of that draw.

    Raises:
        InputError: edges that name no node, no positives, a positive that is known already, scores that are NaN or of the wrong shape.
    """
    if not ks or min(ks) < 1:
        raise InputError(f"rankings are cut at 1 or more, not at {tuple(ks)}")
    wanted = _directed(positives, num_nodes)
    hidden = _directed(positives[:, :0] if known is None else known, num_nodes)
    if not wanted.numel():
        raise InputError("there are no links to be ranked")
    if bool(torch.isin(wanted, hidden).any()):
        u, v = divmod(int(wanted[torch.isin(wanted, hidden)][0]), num_nodes)
        raise InputError(f"the link {u} - {v} is to be found but known already: parts of the links must be disjoint")
    owners = wanted // num_nodes
    if most is not None and len(asked := torch.unique(owners)) > most:
        drawn = torch.randperm(len(asked), generator=torch.Generator().manual_seed(seed))[:most]
        kept = torch.isin(owners, asked[drawn])
        wanted, owners = wanted[kept], owners[kept]
    nodes, counts = torch.unique_consecutive(owners, return_counts=True)
    ends = counts.cumsum(0)
    found: list[dict[str, Tensor]] = []
    block = max(1, _ENTRIES // num_nodes)
    for start in range(0, len(nodes), block):
        some, size = nodes[start : start + block], counts[start : start + block]
        first, last = int(ends[start] - counts[start]), int(ends[start + len(some) - 1])
        ranks = _ranks(score, some, size, wanted[first:last], hidden, num_nodes, sides)
        found.append(_measures(ranks, size, ks))
    return NodeRanking(nodes, {name: torch.cat([f[name] for f in found]) for name in found[0]})


def hits_among(positive: Tensor, negative: Tensor, k: int) -> float:
    """The share of positive scores (P,) above the k-th highest of the negative ones (M,); equal ones are not above.

    Raises:
        InputError: k is not among 1 … M, or there are no positives.
    """
    if not 1 <= k <= len(negative) or not len(positive):
        raise InputError(
            f"hits at {k} need positives and {k} negatives or more, not {len(positive)} and {len(negative)}"
        )
    return float((positive > negative.topk(k).values[-1]).double().mean())


# ---- parts -------------------------------------------------------------------------------------------------------------


def _directed(pairs: Tensor, num_nodes: int) -> Tensor:
    """Both directions of links as sorted, distinct numbers u N + v, without self loops."""
    check_edges(pairs, num_nodes)
    pairs = pairs[:, pairs[0] != pairs[1]].cpu()
    both = torch.cat([pairs, pairs.flip(0)], 1)
    return torch.unique(both[0] * num_nodes + both[1])


def _ranks(
    score: Scorer,
    nodes: Tensor,
    counts: Tensor,
    wanted: Tensor,
    hidden: Tensor,
    num_nodes: int,
    sides: Tensor | None,
) -> Tensor:
    """(B, P) ranks from 1 of each node's positives, best first, infinity where a row has fewer."""
    scores = score(nodes)
    if scores.shape != (len(nodes), num_nodes):
        raise InputError(f"{len(nodes)} nodes have ({len(nodes)}, {num_nodes}) scores, not {tuple(scores.shape)}")
    if bool(torch.isnan(scores).any()):
        raise InputError("the scores of links hold NaN: the encoder or the predictor is broken")
    scores, device = scores.detach().float().clone(), scores.device
    row = torch.repeat_interleave(torch.arange(len(nodes)), counts)
    column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    places = wanted % num_nodes
    found = torch.full((len(nodes), int(counts.max())), -torch.inf)
    row_, places_ = row.to(device), places.to(device)
    found[row, column] = scores[row_, places_].cpu()
    low, high = (int(torch.searchsorted(hidden, n * num_nodes)) for n in (int(nodes[0]), int(nodes[-1]) + 1))
    near = hidden[low:high]
    at = torch.searchsorted(nodes, near // num_nodes).clamp_max(len(nodes) - 1)
    mine = nodes[at] == near // num_nodes
    # What is no candidate stands behind every positive: infinity below.
    scores[row_, places_] = -torch.inf
    scores[at[mine].to(device), (near[mine] % num_nodes).to(device)] = -torch.inf
    scores[torch.arange(len(nodes), device=device), nodes.to(device)] = -torch.inf
    if sides is not None:
        other = sides.to(device)
        scores[other[nodes.to(device)][:, None] == other[None]] = -torch.inf
    found = found.sort(1, descending=True).values.to(device)
    ahead = num_nodes - torch.searchsorted(scores.sort(1).values, found.contiguous())  # as many score as high or higher
    ranks = (ahead + torch.arange(1, found.shape[1] + 1, device=device)).double().cpu()
    return ranks.masked_fill(torch.arange(found.shape[1])[None] >= counts[:, None], torch.inf)


def _measures(ranks: Tensor, counts: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    gains = 1 / torch.log2(1 + ranks)
    ideal = (1 / torch.log2(torch.arange(2, 2 + ranks.shape[1], dtype=torch.float64))).cumsum(0)
    found: dict[str, Tensor] = {}
    for k in ks:
        right = ranks <= k
        hit = right.sum(1).double()
        found[f"hits_at_{k}"] = (hit > 0).double()
        found[f"recall_at_{k}"] = hit / counts
        found[f"ndcg_at_{k}"] = (gains * right).sum(1) / ideal[counts.clamp_max(k) - 1]
        found[f"precision_at_{k}"] = hit / k
        found[f"f1_at_{k}"] = 2 * hit / (counts + k)
    found["mrr"] = 1 / ranks[:, 0]
    return found
