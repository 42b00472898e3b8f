from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.node_graphs import NodeGraph
from limbeck.networks.node_networks import GCN
from limbeck.tasks.judging_nodes import NodeModel, judge_nodes, node_times, on_device
from limbeck.tasks.node_classification import NodeTask

torch.set_num_threads(1)


def task() -> NodeTask:
    torch.manual_seed(0)
    graph = NodeGraph.of(torch.randn(12, 3), torch.tensor([list(range(11)), list(range(1, 12))]))
    parts = {"train": [0, 1, 2], "val": [3, 4], "test": [5, 6, 7, 8, 9, 10, 11], "hidden": [6, 9]}
    return NodeTask.of(graph, graph.features, [0, 1, 2] * 4, **parts)


class Sized(nn.Module):
    """Says how many nodes it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor, structure: Any) -> Tensor:
        self.seen.append(len(x))
        return torch.eye(3)[torch.full((len(x),), 0 if len(x) == 12 else 1)]


def test_hidden_nodes_are_answered_from_the_whole_graph_and_others_from_what_was_there() -> None:
    model = NodeModel(Sized(), True)
    said = model.answers(task()).argmax(1)
    assert said.tolist() == [1, 0, 1, 1, 0, 1, 1] and model.module.seen == [12, 10]


def test_rows_hold_the_accuracies_of_both_kinds_of_nodes() -> None:
    on = task()
    torch.manual_seed(1)
    models = {"student": NodeModel(nn.Linear(3, 3).train(), False), "teacher": NodeModel(GCN(3, 3), True)}
    found = judge_nodes(models, on, rounds=2)
    student, teacher = found["rows"]
    right = models["student"].module(on.features[on.test]).argmax(1) == on.labels[on.test]
    assert student["accuracy"] == pytest.approx(float(right.double().mean()))
    assert student["accuracy_hidden"] == pytest.approx(float(right[[1, 4]].double().mean()))
    assert student["accuracy_seen"] == pytest.approx(float(right[[0, 2, 3, 5, 6]].double().mean()))
    assert student["parameters"] == 12 and teacher["ratio_single"] > 0
    assert student["ratio_single"] == student["ratio_whole"] == 1
    assert sum(map(sum, found["confusion"]["matrix"])) == 7 and 0 <= found["agreement"]["top1_agreement"] <= 1
    assert models["student"].module.training


def test_a_single_answer_is_that_of_the_whole() -> None:
    on = task()
    model = NodeModel(GCN(3, 3).eval(), True)
    for node in (0, 6, 11):
        torch.testing.assert_close(model.single(on, torch.tensor([node])), model.whole(on)[node : node + 1])


def test_models_of_unknown_reach_are_timed_on_the_whole_only() -> None:
    found = node_times(
        {"student": NodeModel(nn.Linear(3, 3), False), "teacher": NodeModel(Sized(), True)}, task(), rounds=2
    )
    assert set(found["teacher"]) == {"latency_whole", "ratio_whole"} and "latency_single" in found["student"]


def test_what_a_device_needs_is_moved_once() -> None:
    on = task()
    assert on_device(on, "cpu") is on_device(on, torch.device("cpu"))
    assert on_device(on, "cpu")[1] is on.structure
