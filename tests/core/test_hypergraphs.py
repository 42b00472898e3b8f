from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.hypergraphs import Hypergraph, from_graph
from tests.largest_array import LargestArray

torch.set_num_threads(1)
EDGES = [[0, 1, 2], [2, 3], [3], [0, 2, 3, 4]]


def small(weights: Tensor | None = None) -> Hypergraph:
    made = Hypergraph.of(EDGES, 6)  # vertex 5 is isolated
    return Hypergraph(made.pointer, made.members, 6, weights)


def incidence(graph: Hypergraph) -> Tensor:
    h = torch.zeros(graph.num_nodes, graph.num_edges)
    h[graph.members, graph.edge_of] = 1
    return h


def drawn(seed: int = 0, nodes: int = 40, edges: int = 30) -> Hypergraph:
    generator = torch.Generator().manual_seed(seed)
    lists = [
        torch.randperm(nodes, generator=generator)[: int(torch.randint(1, 6, (1,), generator=generator))].tolist()
        for _ in range(edges)
    ]
    return Hypergraph.of(lists, nodes)


def test_operators_are_those_of_the_incidence() -> None:
    graph, x = small(), torch.randn(6, 3)
    h = incidence(graph)
    assert graph.sizes.tolist() == [3, 2, 1, 4] and graph.degrees.tolist() == [2, 1, 3, 3, 1, 0]
    y = h.T @ x / h.sum(0)[:, None]
    torch.testing.assert_close(graph.vertex_to_edge(x), y)
    torch.testing.assert_close(graph.edge_to_vertex(y), h @ y / h.sum(1).clamp_min(1)[:, None])


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 0.5, 3.0])])
def test_smoothing_is_the_papers_matrix(weights: Tensor | None) -> None:
    graph, x = small(weights).with_singletons(), torch.randn(6, 3)
    h = incidence(graph)
    w = torch.ones(graph.num_edges) if graph.weights is None else graph.weights
    root = (h @ w).rsqrt()
    laplacian = root[:, None] * (h * w / h.sum(0)) @ (h.T * root)
    torch.testing.assert_close(graph.smooth(x), laplacian @ x)


def test_means_of_equal_rows_are_these_rows() -> None:
    graph = drawn().with_singletons()
    ones = torch.ones(40, 2)
    torch.testing.assert_close(graph.vertex_to_edge(ones), torch.ones(graph.num_edges, 2))
    torch.testing.assert_close(graph.edge_to_vertex(torch.ones(graph.num_edges, 2)), ones)


def test_isolated_vertices_get_hyperedges_of_their_own() -> None:
    graph = small().with_singletons()
    assert graph.num_edges == 5 and graph.members[-1] == 5 and int(graph.degrees.min()) == 1
    assert graph.with_singletons() is graph
    assert bool(torch.isfinite(graph.smooth(torch.randn(6, 2))).all())


def test_the_three_forms_are_one() -> None:
    graph = small()
    again = Hypergraph.from_index(graph.index()[:, torch.randperm(len(graph.members))], 6)
    assert torch.equal(incidence(again), incidence(graph))
    for form in (incidence(graph), incidence(graph).to_sparse(), incidence(graph).to_sparse_csr()):
        assert torch.equal(incidence(Hypergraph.from_incidence(form)), incidence(graph))


def test_the_induced_hypergraph_cuts_hyperedges() -> None:
    part = small().induced(torch.tensor([3, 0, 5]))
    kept = {tuple(sorted(part.members[a:b].tolist())) for a, b in zip(part.pointer[:-1], part.pointer[1:], strict=True)}
    assert kept == {
        (1,),
        (0,),
        (0, 1),
        (2,),
    }  # [2, 3] and [3] become {3}, [0, 2, 3, 4] becomes {3, 0}, and 5 stands alone
    assert part.num_edges == 5


def test_the_clique_expansion_joins_members() -> None:
    h = incidence(small())
    expected = ((h @ h.T) > 0) & ~torch.eye(6, dtype=torch.bool)
    found = torch.zeros(6, 6, dtype=torch.bool)
    edges = small().clique_edges()
    found[edges[0], edges[1]] = True
    assert torch.equal(found, expected) and edges.shape[1] == int(expected.sum())


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_a_neighbourhood_answers_as_the_whole_does(hops: int) -> None:
    graph = drawn(nodes=80).with_singletons()
    x, asked = torch.randn(80, 4, dtype=torch.float64), torch.tensor([7, 3, 11])
    part, held, at = graph.neighbourhood(asked, hops)
    assert len(held) < 80 or hops > 1
    whole, near = x, x[held]
    for _ in range(hops):
        whole, near = graph.smooth(whole).relu(), part.smooth(near).relu()
    assert torch.equal(held[at], asked)
    torch.testing.assert_close(near[at], whole[asked])
    torch.testing.assert_close(part.to("cpu").smooth(x[held]), part.smooth(x[held]))


def test_a_graph_becomes_its_edges_and_neighbourhoods() -> None:
    graph = from_graph(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), 4)
    kept = [
        tuple(sorted(graph.members[a:b].tolist())) for a, b in zip(graph.pointer[:-1], graph.pointer[1:], strict=True)
    ]
    assert kept == [(0, 1), (1, 2), (0, 1), (0, 1, 2), (1, 2), (3,)]


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ([[0, 1], []], "hyperedge 1 is empty: drop it"),
        ([[0, 1], [2, 9]], "hyperedge 1 names vertex 9, but vertices are numbered 0 to 5"),
        ([[0], [-2]], "hyperedge 1 names vertex -2"),
        ([[1, 1]], "names a vertex twice"),
    ],
)
def test_wrong_hyperedges_are_named(edges: list[list[int]], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Hypergraph.of(edges, 6)
    assert "\n" not in str(caught.value)


def test_wrong_weights_pointers_and_rows_are_named() -> None:
    with pytest.raises(InputError, match="4 hyperedges need as many weights"):
        small(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(InputError, match="pointer goes from 0"):
        Hypergraph(torch.tensor([0, 2]), torch.tensor([0]), 3)
    with pytest.raises(InputError, match="6 vertices need"):
        small().vertex_to_edge(torch.zeros(5, 2))
    with pytest.raises(InputError, match="hyperedge 1 is empty"):
        Hypergraph.from_index(torch.tensor([[0, 1], [0, 2]]), 3)
    with pytest.raises(InputError, match="hyperedge index"):
        Hypergraph.from_index(torch.zeros(3, 2, dtype=torch.long), 3)


def test_fingerprints_tell_hypergraphs_apart() -> None:
    assert small().fingerprint() == small().fingerprint() != drawn().fingerprint()
    assert small().fingerprint() != small().with_singletons().fingerprint()


def test_products_are_sparse() -> None:
    """55,000 vertices and 38,500 hyperedges: no array is larger than a few times the features and the members."""
    nodes, edges = 55_000, 38_500
    generator = torch.Generator().manual_seed(0)
    members = torch.randint(nodes, (5 * edges,), generator=generator)
    x = torch.randn(nodes, 16, requires_grad=True)
    with LargestArray() as seen:
        index = torch.unique(members * edges + torch.arange(edges).repeat_interleave(5))
        graph = Hypergraph.from_index(torch.stack([index // edges, index % edges]), nodes).with_singletons()
        graph.smooth(graph.edge_to_vertex(graph.vertex_to_edge(x))).sum().backward()
        graph.induced(torch.arange(0, nodes, 2))
        graph.neighbourhood(torch.tensor([3]), 2)
        graph.clique_edges()
    assert len(graph.members) < seen.entries <= 5 * 5 * edges * 2
