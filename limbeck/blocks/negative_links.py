"""Pairs of nodes that are not linked, drawn uniformly."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.node_graphs import check_edges

_DENSE = 0.5  # share of linked pairs from which drawing and rejecting takes longer than listing the others
_MOST = 10_000_000  # draws at a time


class UnlinkedPairs:
    """The ordered pairs of different nodes without a link.

    Args:
        num_nodes: N.
        links: (2, M) undirected, one direction or both.
        sides: (N,) of a graph of two sides: pairs are of different sides.

    Raises:
        InputError: edges that name no node, or every pair is linked.
    """

    def __init__(self, num_nodes: int, links: Tensor, sides: Tensor | None = None) -> None:
        check_edges(links, num_nodes)
        links = links[:, links[0] != links[1]].cpu()
        both = torch.cat([links, links.flip(0)], 1)
        self.num_nodes, self.linked = num_nodes, torch.unique(both[0] * num_nodes + both[1])
        self.sides = None if sides is None else sides.cpu()
        groups = None if self.sides is None else torch.unique(self.sides, return_counts=True)[1]
        self.possible = num_nodes * (num_nodes - 1) if groups is None else int(num_nodes**2 - (groups**2).sum())
        if len(self.linked) >= self.possible:
            raise InputError(f"all of the {num_nodes} nodes are linked with each other: no pair is left to predict")
        self._listed: Tensor | None = None
        if len(self.linked) > _DENSE * self.possible:
            every = torch.arange(num_nodes * num_nodes)
            self._listed = every[self._free(every)]

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Pairs (count, 2), with repetitions, from torch's random state or a generator."""
        if self._listed is not None:
            keys = self._listed[torch.randint(len(self._listed), (count,), generator=generator)]
            return torch.stack([keys // self.num_nodes, keys % self.num_nodes], 1)
        kept: list[Tensor] = []
        missing, share = count, (self.possible - len(self.linked)) / self.num_nodes**2
        while missing > 0:
            keys = torch.randint(self.num_nodes**2, (min(_MOST, int(1.2 * missing / share) + 16),), generator=generator)
            keys = keys[self._free(keys)][:missing]
            kept.append(keys)
            missing -= len(keys)
        keys = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.long)
        return torch.stack([keys // self.num_nodes, keys % self.num_nodes], 1)

    def _free(self, keys: Tensor) -> Tensor:
        u, v = keys // self.num_nodes, keys % self.num_nodes
        free = u != v
        if self.sides is not None:
            free &= self.sides[u] != self.sides[v]
        if len(self.linked):
            at = torch.searchsorted(self.linked, keys).clamp_max(len(self.linked) - 1)
            free &= self.linked[at] != keys
        return free
