"""How models that classify nodes are judged side by side: on test nodes that were seen in training and on hidden ones, and by their time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import logits_of
from limbeck.core.data import mix_seed
from limbeck.core.hypergraphs import Hypergraph
from limbeck.metrics.classification import agreement, classification_metrics, confusion_matrix, reliability_table
from limbeck.metrics.cost import count_bytes, count_parameters
from limbeck.metrics.turns import time_in_turns
from limbeck.networks.node_networks import NodeNetwork, Structure, gather
from limbeck.tasks.node_classification import NodeTask


class NodeModel:
    """A model that classifies the nodes of a task, with or without their graph.

    Args:
        module: ``module(features, structure) -> logits``, or ``module(features) -> logits``.
        structured: which of the two.
    """

    def __init__(self, module: nn.Module, structured: bool) -> None:
        self.module, self.structured = module, structured

    @property
    def device(self) -> torch.device:
        found = next(self.module.parameters(), None)
        return torch.device("cpu") if found is None else found.device

    @torch.no_grad()
    def logits(self, task: NodeTask) -> Tensor:
        """(N, K) for all nodes of a task, in evaluation mode."""
        inputs = self._inputs(task)
        was_training = self.module.training
        self.module.eval()
        found = logits_of(self.module(*inputs))
        self.module.train(was_training)
        return found

    def answers(self, task: NodeTask) -> Tensor:
        """(n, K) for the test nodes of a task, on the CPU.

        Seen nodes are answered from the graph that was there in training, hidden ones from the whole graph, which they have joined by then.
        """
        watched = task.observed()
        assert watched.kept is not None
        found = torch.empty(task.num_nodes, task.num_classes)
        if len(task.hidden):
            found[task.hidden] = self.logits(task).cpu()[task.hidden].float()
        found[watched.kept] = self.logits(watched).cpu().float()
        return found[task.test]

    def whole(self, task: NodeTask) -> Tensor:
        """Answers for all nodes, as a server that has everything in memory gives them."""
        return logits_of(self.module(*self._inputs(task)))

    def single(self, task: NodeTask, node: Tensor) -> Tensor:
        """(1, K) the answer for one node (1,): a row of features, or what the network reaches of the graph, which is gathered first."""
        x, structure = self._held(task)
        if not self.structured:
            return logits_of(self.module(x[node]))
        part, held, at = gather(self.module, structure, node)
        return logits_of(self.module(x[held], part))[at]

    def _inputs(self, task: NodeTask) -> tuple[Any, ...]:
        x, structure = self._held(task)
        return (x, structure) if self.structured else (x,)

    def _held(self, task: NodeTask) -> tuple[Tensor, Structure]:
        return on_device(task, self.device)


def on_device(task: NodeTask, device: torch.device | str) -> tuple[Tensor, Structure]:
    """Features and structure of a task on a device, moved there once; isolated vertices of a hypergraph have a hyperedge of their own."""
    held: dict[str, tuple[Tensor, Structure]] = vars(task).setdefault("_on_device", {})
    key = str(device)
    if key not in held:
        structure = task.hypergraph if isinstance(task.structure, Hypergraph) else task.structure
        moved = structure if key == "cpu" else structure.to(device)
        held[key] = (task.features.to(device), moved)
    return held[key]


def judge_nodes(models: Mapping[str, NodeModel], task: NodeTask, *, seed: int = 0, rounds: int = 20) -> dict[str, Any]:
    """Measure several models on a task's test nodes.

    Args:
        models: by role; the first is the result, and is compared with ``teacher`` where there is one.
        task: with test nodes.
        seed: of the nodes that single answers are timed on.
        rounds: of the timing.

    Returns:
        ``rows``: for each model quality and calibration on all test nodes, ``accuracy_seen`` and ``accuracy_hidden`` where some are hidden, size,
        and the times of all answers and of a single one with their ratios to the first model's; ``agreement``, ``reliability`` and ``confusion``
        of the first.
    """
    said = {who: model.answers(task) for who, model in models.items()}
    labels = task.labels[task.test]
    hidden = torch.isin(task.test, task.hidden)
    times = node_times(models, task, seed=seed, rounds=rounds)
    rows = []
    for who, model in models.items():
        row: dict[str, Any] = {"who": who, **classification_metrics(said[who], labels, task.num_classes)}
        if bool(hidden.any()):
            right = said[who].argmax(1) == labels
            row["accuracy_seen"] = float(right[~hidden].double().mean())
            row["accuracy_hidden"] = float(right[hidden].double().mean())
        rows.append(
            row | {"parameters": count_parameters(model.module), "bytes": count_bytes(model.module)} | times[who]
        )
    first = next(iter(models))
    names: Sequence[str] = task.class_names
    result: dict[str, Any] = {
        "rows": rows,
        "reliability": reliability_table(torch.softmax(said[first], -1), labels),
        "confusion": {
            "labels": list(names),
            "matrix": confusion_matrix(said[first], labels, task.num_classes).tolist(),
        },
    }
    if "teacher" in said and first != "teacher":
        result["agreement"] = agreement(said[first], said["teacher"])
    return result


def node_times(
    models: Mapping[str, NodeModel], task: NodeTask, *, seed: int = 0, rounds: int = 20
) -> dict[str, dict[str, float]]:
    """Seconds for the answers on all nodes (``latency_whole``) and on a single one (``latency_single``), and their ratios to the first model's.

    Whatever depends on the structure alone (normalised matrices, pointers) is made before. Single answers of models that are no networks of this
    library are not timed, since how far they reach is unknown.
    """
    chosen = torch.randint(task.num_nodes, (64,), generator=torch.Generator().manual_seed(mix_seed(seed, 53)))
    modes = {who: model.module.training for who, model in models.items()}
    for model in models.values():
        model.module.eval()
    device = next(iter(models.values())).device
    nodes = chosen.to(device)
    whole = {who: (lambda _, m=model: m.whole(task)) for who, model in models.items()}
    single = {
        who: (lambda call, m=model: m.single(task, nodes[call % 64 : call % 64 + 1]))
        for who, model in models.items()
        if not model.structured or isinstance(model.module, NodeNetwork)
    }
    found: dict[str, dict[str, float]] = {who: {} for who in models}
    for what, ways, repeats in (("whole", whole, 1), ("single", single, 8)):
        for who, entry in time_in_turns(ways, rounds, device=device, repeats=repeats).items():
            found[who][f"latency_{what}"] = entry["median_seconds"]
            found[who][f"ratio_{what}"] = entry["ratio"]
    for who, model in models.items():
        model.module.train(modes[who])
    return found
