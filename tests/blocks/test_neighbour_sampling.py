from __future__ import annotations

import pytest
import torch

from limbeck.blocks.neighbour_sampling import NeighbourSampler
from limbeck.core.errors import InputError
from limbeck.core.node_graphs import NodeGraph

torch.set_num_threads(1)


def graph(n: int = 40) -> NodeGraph:
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(n - 1, (2, 4 * n), generator=generator)  # the last node is alone
    made = NodeGraph.of(torch.randn(n, 3, generator=generator), edges, torch.arange(n))
    u, v = made.edge_index
    return NodeGraph(made.features, made.edge_index, made.labels, (u.minimum(v) * n + u.maximum(v) + 1).float())


def test_a_part_is_made_of_the_graphs_edges() -> None:
    g = graph()
    part, nodes = NeighbourSampler(g, (3, 2)).around(torch.tensor([5, 2, 39]))
    assert nodes[:3].tolist() == [5, 2, 39] and len(nodes.unique()) == len(nodes)
    assert torch.equal(part.features, g.features[nodes]) and torch.equal(part.labels, nodes)
    known = {tuple(e) for e in g.edge_index.T.tolist()}
    ends = nodes[part.edge_index]
    found = [tuple(e) for e in ends.T.tolist()]
    assert set(found) <= known and {(v, u) for u, v in found} == set(found) and len(set(found)) == len(found)
    low, high = ends.minimum(ends.flip(0))[0], ends.maximum(ends.flip(0))[0]
    assert torch.equal(part.edge_weight, (low * 40 + high + 1).float())


def test_fan_outs_bound_what_is_drawn() -> None:
    g = graph()
    seeds = torch.tensor([0, 1])
    part, nodes = NeighbourSampler(g, (2,)).around(seeds)
    inward = [int((part.edge_index[1] == s).sum()) for s in range(2)]
    assert all(min(2, int(g.degrees[s])) <= n <= 4 for s, n in enumerate(inward)) and len(nodes) <= 6
    whole, everyone = NeighbourSampler(g, (1000,) * 6).around(seeds)
    expected = g.induced(everyone)
    assert whole.num_edges == expected.num_edges  # with enough of everything it is the connected component


def test_every_neighbour_is_as_likely() -> None:
    g = NodeGraph.of(torch.zeros(6, 1), torch.tensor([[0, 0, 0, 0, 0], [1, 2, 3, 4, 5]]))
    sampler = NeighbourSampler(g, (2,))
    torch.manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(500):
        counts[sampler.around(torch.tensor([0]))[1]] += 1
    assert counts[0] == 500 and counts[1:].sum() == 1000
    assert (counts[1:] - 200).abs().max() < 50  # 4.5 standard deviations


def test_an_isolated_seed_is_alone() -> None:
    part, nodes = NeighbourSampler(graph(), (3, 3)).around(torch.tensor([39]))
    assert nodes.tolist() == [39] and part.num_edges == 0


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="fan-outs"):
        NeighbourSampler(graph(), ())
    sampler = NeighbourSampler(graph(), (2,))
    for seeds in ([], [3, 3], [40]):
        with pytest.raises(InputError, match="nodes to keep"):
            sampler.around(torch.tensor(seeds, dtype=torch.long))
