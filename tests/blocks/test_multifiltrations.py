"""Builders of multi-filtered complexes, and the functions they filter by."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch

from limbeck.blocks.multifiltrations import (
    Multifiltration,
    enclosing_radius,
    function_rips,
    graph_lower_star,
    image_lower_star,
)
from limbeck.blocks.vertex_functions import codensity, graph_function
from limbeck.core.errors import InputError, UnknownNameError

torch.set_num_threads(1)
SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def test_codensity_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 2))
    by_hand = [-np.log(np.mean([np.exp(-((a - b) ** 2).sum() / (2 * 0.3**2)) for b in x])) for a in x]
    assert np.allclose(codensity(x, 0.3).numpy(), by_hand)
    near = [np.sqrt(np.mean(np.sort(((a - x) ** 2).sum(1))[:4])) for a in x]
    assert np.allclose(codensity(x, 0.3, "dtm").numpy(), near)  # 0.3 of 12 points, rounded up: 4
    assert (codensity(x, 0.05, "dtm") == 0).all()  # the nearest point is itself


def test_codensity_carries_gradients_and_survives_far_points() -> None:
    x = torch.tensor([[0.0], [0.1], [1e4]], dtype=torch.float64, requires_grad=True)
    found = codensity(x, 0.1)
    assert float(found[2].detach()) == pytest.approx(np.log(3))  # only itself is near
    found.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad[0].abs() > 0
    assert torch.isfinite(torch.autograd.grad(codensity(x, 0.9, "dtm").sum(), x)[0]).all()


def test_function_rips_puts_edges_where_the_last_of_scale_and_function_is() -> None:
    found = function_rips(SQUARE, np.array([4.0, 3.0, 2.0, 1.0]), threshold=1.2)
    assert found.cells[1].tolist() == [[0, 1], [0, 3], [1, 2], [2, 3]] and found.clique_dimension == 2
    assert found.values[1].tolist() == [[1.0, 4.0], [1.0, 4.0], [1.0, 3.0], [1.0, 2.0]]
    assert found.values[0].tolist() == [[0.0, 4.0], [0.0, 3.0], [0.0, 2.0], [0.0, 1.0]]
    every = function_rips(SQUARE, np.zeros((4, 2)))  # the enclosing radius is the diagonal
    assert len(every.cells[1]) == 6 and every.parameters == 3
    table = np.abs(SQUARE[:, None] - SQUARE[None]).sum(-1)
    assert function_rips(table, np.zeros(4), distances=True).bounds()[1].tolist() == [2.0, 0.0]
    assert enclosing_radius(table) == 2.0


def test_graphs_of_all_kinds_make_filtrations() -> None:
    both = [[0, 1, 1, 2, 2], [1, 0, 2, 1, 2]]  # both directions, a loop, and node 3 alone
    found = graph_lower_star(4, both, np.array([[0.0, 3.0], [1.0, 2.0], [2.0, 1.0], [9.0, 9.0]]))
    assert found.cells[1].tolist() == [[0, 1], [1, 2]] and found.values[1].tolist() == [[1.0, 3.0], [2.0, 2.0]]
    assert len(graph_lower_star(2, torch.zeros(2, 0, dtype=torch.int64), np.zeros(2)).cells[1]) == 0
    full = networkx.complete_graph(5)
    cliques = graph_lower_star(5, np.array(full.edges).T, np.arange(5.0), dimension=2)
    assert cliques.top_dimension == 2 and len(cliques.cells[1]) == 10


def test_functions_on_nodes_are_those_of_networkx() -> None:
    graph = networkx.karate_club_graph()
    edges, n = np.array(graph.edges).T, len(graph)
    assert graph_function("degree", n, edges).tolist() == [graph.degree(v) for v in range(n)]
    values, vectors = np.linalg.eigh(networkx.normalized_laplacian_matrix(graph, weight=None).toarray())
    expected = (vectors**2 * np.exp(-0.5 * values)).sum(1)
    assert np.allclose(graph_function("hks-0.5", n, edges), expected)
    forman = {}
    for u, v in graph.edges:
        triangles = len(set(graph[u]) & set(graph[v]))
        forman[u, v] = forman[v, u] = 4 - graph.degree(u) - graph.degree(v) + 3 * triangles
    means = [np.mean([forman[v, u] for u in graph[v]]) for v in range(n)]
    assert np.allclose(graph_function("curvature", n, edges), means)
    assert graph_function("curvature", 3, [[0], [1]])[2] == 0  # isolated
    assert graph_function("hks", 2, np.zeros((2, 0), dtype=int)).tolist() == [1.0, 1.0]


def test_an_image_is_a_cubical_complex() -> None:
    image = np.arange(6.0).reshape(1, 2, 3)
    found = image_lower_star(np.concatenate([image, -image]))
    assert [len(c) for c in found.cells] == [6, 7 + 2, 4]
    vertices, edges, triangles = found.values
    assert vertices[4].tolist() == [4.0, -4.0]
    diagonal = (found.cells[1] == [0, 4]).all(1).argmax()
    assert edges[diagonal].tolist() == [4.0, 0.0]  # with its square, which has the corners 0, 1, 3, 4
    assert triangles[:, 0].tolist() == [4.0, 5.0, 4.0, 5.0]
    assert len(image_lower_star(np.zeros((2, 1, 4))).cells[2]) == 0


def test_units_change_values_only() -> None:
    found = function_rips(SQUARE, np.arange(4.0))
    scaled = found.rescaled(*found.bounds())
    assert scaled.bounds()[0].tolist() == [0, 0] and scaled.bounds()[1].tolist() == [1, 1]
    assert scaled.cells is found.cells


def test_what_is_no_filtration_is_refused() -> None:
    one, two = np.array([[0], [1], [2]]), np.array([[0, 1], [0, 2], [1, 2]])
    zero = np.zeros
    with pytest.raises(InputError, match="appears before one of its faces"):
        Multifiltration((one, two), (np.ones((3, 2)), zero((3, 2))))
    with pytest.raises(InputError, match="lacks one of its faces"):
        Multifiltration((one, two[:2], np.array([[0, 1, 2]])), (zero((3, 2)), zero((2, 2)), zero((1, 2))))
    with pytest.raises(InputError, match="different vertices from 0"):
        Multifiltration((one, np.array([[0, 3]])), (zero((3, 2)), zero((1, 2))))
    with pytest.raises(InputError, match="NaN or infinity"):
        Multifiltration((one,), (np.full((3, 2), np.inf),))
    with pytest.raises(InputError, match="do not fit"):
        Multifiltration((one,), (zero((2, 2)),))
    with pytest.raises(InputError, match="i-th cell"):
        Multifiltration((one[::-1],), (zero((3, 2)),))
    with pytest.raises(InputError, match="at least one vertex"):
        Multifiltration((), ())


def test_bad_data_gives_one_clear_line() -> None:
    with pytest.raises(InputError, match="points hold NaN"):
        function_rips(np.array([[np.nan, 0.0]]), np.zeros(1))
    with pytest.raises(InputError, match="3 values for 4 points"):
        function_rips(SQUARE, np.zeros(3))
    with pytest.raises(InputError, match="symmetric"):
        function_rips(np.array([[0.0, 1.0], [2.0, 0.0]]), np.zeros(2), distances=True)
    with pytest.raises(InputError, match="goes from 0 to 7, but there are 3 nodes"):
        graph_lower_star(3, [[0], [7]], np.zeros(3))
    with pytest.raises(InputError, match="do not fit 3 nodes"):
        graph_lower_star(3, [[0], [1]], np.zeros(4))
    with pytest.raises(InputError, match="channels must be an array with 3 axes"):
        image_lower_star(np.zeros((4, 4)))
    with pytest.raises(UnknownNameError, match="did you mean degree"):
        graph_function("degre", 3, [[0], [1]])
    with pytest.raises(InputError, match="must be a number"):
        graph_function("hks-soon", 3, [[0], [1]])
    with pytest.raises(InputError, match="own above 5000"):
        graph_function("hks", 6000, [[0], [1]])
    with pytest.raises(InputError, match="bandwidth must be above 0"):
        codensity(SQUARE, 0.0)
    with pytest.raises(UnknownNameError, match="kde"):
        codensity(SQUARE, 0.1, "kd")  # type: ignore[arg-type]
