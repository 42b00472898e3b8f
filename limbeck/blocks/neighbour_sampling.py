"""Small parts of a large graph: some nodes, and a few random neighbours of each, hop by hop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.node_graphs import NodeGraph, places


class NeighbourSampler:
    """Draws the surroundings of nodes: from each node of a hop up to k different neighbours, uniformly and without replacement.

    What is drawn depends on torch's global generator. Edge weights are kept.

    Args:
        graph: with both directions of each edge.
        fanouts: k of each hop, the first one from the seeds.

    Raises:
        InputError: no hops, or a k below 1.

    Source: "Inductive Representation Learning on Large Graphs" (2017).
    """

    def __init__(self, graph: NodeGraph, fanouts: Sequence[int]) -> None:
        if not len(fanouts) or min(fanouts) < 1:
            raise InputError(f"fan-outs are 1 or more neighbours for each hop (got {tuple(fanouts)})")
        self.graph, self.fanouts = graph, tuple(fanouts)
        self._order = torch.argsort(graph.edge_index[1], stable=True)
        self._source = graph.edge_index[0, self._order]
        degrees = graph.degrees
        self._pointer = torch.cat([degrees.new_zeros(1), degrees.cumsum(0)])

    def around(self, seeds: Tensor) -> tuple[NodeGraph, Tensor]:
        """The part of the graph around different nodes (n,), both directions of every drawn edge, and the numbers of its nodes (m,): the seeds first.

        Raises:
            InputError: no seeds, seeds named twice, or numbers that are no nodes.
        """
        place = places(seeds, self.graph.num_nodes)
        held, frontier = [seeds], seeds
        drawn = []
        count = len(seeds)
        for k in self.fanouts:
            edges = self._draw(frontier, k)
            drawn.append(edges)
            sources = torch.unique(self._source[edges])
            frontier = sources[place[sources] < 0]
            place[frontier] = torch.arange(count, count + len(frontier), device=place.device)
            count += len(frontier)
            held.append(frontier)
        nodes = torch.cat(held)
        chosen = self._order[torch.cat(drawn)]
        ends = place[self.graph.edge_index[:, chosen]]
        keys = torch.cat([ends[0] * count + ends[1], ends[1] * count + ends[0]])
        keys, first = _unique(keys)
        weight = self.graph.edge_weight
        labels = self.graph.labels
        return (
            NodeGraph(
                self.graph.features[nodes],
                torch.stack([keys // count, keys % count]),
                None if labels is None else labels[nodes],
                None if weight is None else weight[chosen].repeat(2)[first],
            ),
            nodes,
        )

    def _draw(self, nodes: Tensor, k: int) -> Tensor:
        """Places, among the edges in order of destination, of up to k edges into each node."""
        starts = self._pointer[nodes]
        counts = self._pointer[nodes + 1] - starts
        owner = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
        before = counts.cumsum(0) - counts
        rank = torch.arange(len(owner), device=nodes.device) - before[owner]
        edges = starts[owner] + rank
        # In a random order of each node's edges the first k stay.
        shuffled = torch.argsort(owner + torch.rand(len(owner), device=nodes.device, dtype=torch.float64))
        return edges[shuffled][rank < k]


def _unique(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Different keys, rising, and where each is first."""
    order = torch.argsort(keys, stable=True)
    held = keys[order]
    new = torch.ones(len(held), dtype=torch.bool, device=held.device)
    new[1:] = held[1:] != held[:-1]
    return held[new], order[new]
