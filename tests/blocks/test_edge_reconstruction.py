from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.blocks import edge_reconstruction
from limbeck.blocks.edge_reconstruction import EPS, EdgeReconstruction
from limbeck.core.errors import InputError
from limbeck.core.node_graphs import NodeGraph
from limbeck.metrics.autograd_memory import SavedTensorMeter

torch.set_num_threads(1)


def graph(n: int = 30) -> NodeGraph:
    edges = torch.randint(n - 1, (2, 3 * n), generator=torch.Generator().manual_seed(0))  # the last node is alone
    return NodeGraph.of(torch.zeros(n, 1), edges)


def dense(q: Tensor, adjacency: Tensor) -> Tensor:
    g = q @ q.T
    scaled = (g - g.min()) / (g.max() - g.min())
    return (((adjacency - scaled) ** 2).mean() + EPS).sqrt()


def both(error: EdgeReconstruction, q: Tensor, adjacency: Tensor, groups: Tensor | None = None) -> None:
    """Value and gradient are those of the matrix of all pairs."""
    mine, theirs = q.clone().requires_grad_(), q.clone().double().requires_grad_()
    found, expected = error(mine, groups), dense(theirs, adjacency.double())
    torch.testing.assert_close(found, expected.float())
    found.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad.float(), theirs.grad.float(), rtol=1e-4, atol=1e-7)  # type: ignore[union-attr]


def test_it_is_the_error_over_all_pairs() -> None:
    g = graph()
    a = g.adjacency("none", self_loops=True).to_dense()
    both(EdgeReconstruction(g.edge_index, 30), torch.randn(30, 4), a)
    both(EdgeReconstruction(g.edge_index, 30, self_loops=False), torch.randn(30, 4), a - torch.eye(30))


def test_weights_are_the_entries() -> None:
    g = graph()
    weight = torch.rand(g.num_edges) + 0.1
    a = torch.zeros(30, 30)
    a[g.edge_index[0], g.edge_index[1]] = weight
    both(EdgeReconstruction(g.edge_index, 30, edge_weight=weight, self_loops=False), torch.randn(30, 4), a)


def test_equal_rows_share_the_gradient_of_the_extremes_as_ties_do() -> None:
    g = graph()
    groups = torch.randint(3, (30,))
    q = torch.randn(3, 4).double()[groups]
    a = g.adjacency("none", self_loops=True).to_dense()
    both(EdgeReconstruction(g.edge_index, 30), q, a, groups)


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    g, q = graph(), torch.randn(30, 4)
    whole = EdgeReconstruction(g.edge_index, 30)(q)
    monkeypatch.setattr(edge_reconstruction, "CHUNK", 7)
    both(EdgeReconstruction(g.edge_index, 30), q, g.adjacency("none", self_loops=True).to_dense())
    torch.testing.assert_close(EdgeReconstruction(g.edge_index, 30)(q), whole)


def test_constant_features_reconstruct_nothing_and_get_no_gradient() -> None:
    g = graph()
    q = torch.full((30, 4), 0.3, requires_grad=True)
    found = EdgeReconstruction(g.edge_index, 30)(q)
    found.backward()
    entries = g.num_edges + 30
    torch.testing.assert_close(found, torch.tensor(entries / 900 + EPS).sqrt())
    assert torch.equal(q.grad, torch.zeros_like(q))


def test_a_perfect_reconstruction_has_finite_slope() -> None:
    edges = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    q = torch.eye(2).repeat_interleave(2, 0).requires_grad_()
    found = EdgeReconstruction(edges, 4)(q)
    found.backward()
    assert float(found.detach()) == pytest.approx(EPS**0.5)
    assert torch.isfinite(q.grad).all()  # type: ignore[union-attr]


def test_a_graph_without_edges_and_a_complete_one() -> None:
    none = EdgeReconstruction(torch.zeros(2, 0, dtype=torch.long), 5)
    both(none, torch.randn(5, 3), torch.eye(5))
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    complete = EdgeReconstruction(pairs[:, pairs[0] != pairs[1]], 5)
    both(complete, torch.randn(5, 3), torch.ones(5, 5))


def test_a_block_is_the_error_of_its_nodes() -> None:
    g = graph(200)
    error = EdgeReconstruction(g.edge_index, 200, block=40)
    q = torch.randn(200, 4)
    torch.manual_seed(3)
    chosen = error.draw_block(40)
    assert len(chosen.unique()) == 40
    torch.manual_seed(3)
    found = error(q)
    part = g.induced(chosen)
    a = part.adjacency("none", self_loops=True).to_dense()
    torch.testing.assert_close(found, dense(q[chosen], a))
    assert not torch.equal(error.draw_block(40), chosen)


def test_blocks_hold_neighbours() -> None:
    n = 4000
    ring = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])
    error = EdgeReconstruction(NodeGraph.of(torch.zeros(n, 1), ring).edge_index, n, block=80)
    source, _, _ = error._inside(error.draw_block(80))
    assert len(source) >= 2 * 15  # of 20 seeds, nearly each has a neighbour there; 80 nodes at random have 3


def test_memory_grows_with_nodes_and_edges_not_with_pairs() -> None:
    def held(n: int) -> int:
        g = graph(n)
        q, groups = torch.randn(n, 4, requires_grad=True), torch.arange(n) % 10
        error = EdgeReconstruction(g.edge_index, n)
        with SavedTensorMeter() as meter:
            error(q, groups).backward()
        return meter.peak

    assert held(8000) < 2.5 * held(4000)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="nodes are numbered 0 to 4"):
        EdgeReconstruction(torch.tensor([[0], [7]]), 5)
    with pytest.raises(InputError, match="as many weights"):
        EdgeReconstruction(torch.tensor([[0], [1]]), 5, edge_weight=torch.ones(3))
    with pytest.raises(InputError, match="2 nodes"):
        EdgeReconstruction(torch.tensor([[0], [1]]), 5, block=1)
    with pytest.raises(InputError, match="5 nodes"):
        EdgeReconstruction(torch.tensor([[0], [1]]), 5)(torch.randn(4, 2))
