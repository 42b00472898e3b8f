from __future__ import annotations

import pytest
import torch

from limbeck.blocks.edge_reweighting import MessageGraph, reweighted, segment_softmax
from limbeck.core.errors import InputError
from limbeck.core.node_graphs import NodeGraph

torch.set_num_threads(1)


def messages(norm: str = "sym", loops: bool = True) -> MessageGraph:
    edges = torch.tensor([[0, 1, 2, 0], [1, 2, 3, 2]])
    return MessageGraph(NodeGraph.of(torch.ones(6, 1), edges).adjacency(norm, self_loops=loops))  # type: ignore[arg-type]


def test_softmax_is_taken_within_segments_in_any_order() -> None:
    scores, segments = torch.randn(30), torch.randint(5, (30,))
    found = segment_softmax(scores, segments, 7)
    for segment in range(5):
        mine = segments == segment
        torch.testing.assert_close(found[mine], torch.softmax(scores[mine], 0))
    large = segment_softmax(torch.tensor([1000.0, 1001.0]), torch.zeros(2, dtype=torch.long), 1)
    torch.testing.assert_close(large, torch.softmax(torch.tensor([0.0, 1.0]), 0))


@pytest.mark.parametrize(("norm", "loops"), [("sym", True), ("row", False)])
def test_the_support_stays_and_what_is_added_sums_to_alpha_times_the_row(norm: str, loops: bool) -> None:
    graph = messages(norm, loops)
    before = graph.matrix(original=True).to_dense()
    scores = torch.rand(len(graph.base))
    graph.reweight(scores, 2.0)
    after = graph.matrix().to_dense()
    assert torch.equal(after != 0, before != 0)
    torch.testing.assert_close((after - before).sum(1), 2 * before.sum(1))
    rows = {(int(i), int(j)): k for k, (i, j) in enumerate(zip(graph.rows, graph.columns, strict=True))}
    share = scores[rows[2, 1]].exp() / sum(scores[k].exp() for (i, _), k in rows.items() if i == 2)
    torch.testing.assert_close(after[2, 1], before[2, 1] + 2 * share * before[2].sum())


def test_alpha_zero_gives_the_original_weights() -> None:
    graph = messages()
    graph.reweight(torch.rand(len(graph.base)), 1.0)
    graph.reweight(torch.rand(len(graph.base)), 0.0)
    assert torch.equal(graph.weights, graph.base)


def test_steps_pile_up_only_when_asked() -> None:
    graph, scores = messages(), torch.rand(10)
    scores = torch.rand(len(graph.base))
    graph.reweight(scores, 1.0)
    once = graph.weights.clone()
    graph.reweight(scores, 1.0)
    assert torch.equal(graph.weights, once)
    graph.reweight(scores, 1.0, accumulate=True)
    torch.testing.assert_close(graph.weights, 2 * once - graph.base)


def test_weights_are_state_and_neighbours_have_no_loops() -> None:
    graph = messages()
    graph.reweight(torch.rand(len(graph.base)), 1.0)
    other = messages()
    assert list(graph.state_dict()) == ["weights"]
    other.load_state_dict(graph.state_dict())
    pairs, weights = other.neighbours()
    assert pairs.shape == (2, 8) and bool((pairs[0] != pairs[1]).all())
    dense = graph.matrix().to_dense()
    torch.testing.assert_close(weights, dense[pairs[1], pairs[0]])


def test_wrong_input_is_named() -> None:
    base, rows = torch.ones(3), torch.tensor([0, 0, 1])
    with pytest.raises(InputError, match="as many scores"):
        reweighted(base, torch.ones(2), rows, 2, 1.0)
    with pytest.raises(InputError, match="alpha is 0 or more"):
        reweighted(base, torch.ones(3), rows, 2, -1.0)
    with pytest.raises(InputError, match="NaN or infinity"):
        reweighted(base, torch.tensor([1.0, float("nan"), 0.0]), rows, 2, 1.0)
