"""What the claims about networks over nodes share: tasks, trained teachers, and what an arm is worth."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.claims.base import Outcome
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.seeding import seed_everything
from limbeck.core.stage import Stage
from limbeck.tasks.judging_nodes import NodeModel
from limbeck.tasks.node_classification import NodeSetup, NodeTask, load_nodes

QUIET = EngineConfig(progress=False, log_every=1000)


def available(path: str, data_root: str | None) -> bool:
    """True if a file or folder is under the data root (or ``$LIMBECK_DATA``)."""
    root = data_root or os.environ.get("LIMBECK_DATA")
    return root is not None and (Path(root).expanduser() / path).exists()


@functools.lru_cache(maxsize=8)
def task(name: str, data_root: str | None, seed: int, setting: str = "transductive", **more: Any) -> NodeTask:
    """A task with the split (and, where it is generated, the graph) of a seed."""
    return load_nodes(NodeSetup.make(task=name, data_root=data_root, split_seed=seed, setting=setting, **more))


def run(made: Any, seed: int, stages: list[Stage] | None = None) -> Any:
    """Run a method that is built, or some of its stages, quietly and in memory, and return it."""
    seed_everything(mix_seed(seed, 3))
    made.show_progress = False
    Engine(None, QUIET, seed=mix_seed(seed, 2)).run(made, stages or made.stages(seed=seed))
    return made.eval()


def accuracies(model: NodeModel, on: NodeTask) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy on validation and on test nodes, and on the seen and hidden ones of the latter where some are hidden."""
    watched = on.observed()
    val = {"accuracy": _share(model.logits(watched).cpu()[watched.val], watched.labels[watched.val])}
    said, labels = model.answers(on), on.labels[on.test]
    test = {"accuracy": _share(said, labels)}
    if len(on.hidden):
        hidden = torch.isin(on.test, on.hidden)
        test["accuracy_seen"] = _share(said[~hidden], labels[~hidden])
        test["accuracy_hidden"] = _share(said[hidden], labels[hidden])
    return val, test


def together(found: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]) -> Outcome:
    """One outcome from several grounds: test measures are called ``MEASURE on GROUND``, the validation measure is the mean."""
    val = sum(v["accuracy"] for v, _ in found.values()) / len(found)
    return Outcome({"accuracy": val}, {f"{m} on {ground}": x for ground, (_, t) in found.items() for m, x in t.items()})


def _share(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())
