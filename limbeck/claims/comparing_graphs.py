"""How methods of the ``graphs`` family are compared: the same nodes, split and perceptron, the same passes of teacher and student."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from limbeck.core.config import validate
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.core.seeding import seed_everything
from limbeck.methods.graphs.base import NodeDistiller
from limbeck.tasks.node_classification import NodeSetup, load_nodes

TASKS = NodeSetup
SHARED = ("epochs", "teacher_epochs", "lr", "weight_decay", "teacher_lr", "teacher_weight_decay", "node_batch")
TIMES = ("latency_whole", "latency_single", "ratio_whole", "ratio_single")
load = load_nodes


def shared_settings(first: Any, setup: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for all methods, as the first has it."""
    fields = first.Config.model_fields
    found = {k: setup.get(k, fields[k].default) for k in SHARED}
    return {**found, "task": setup.get("task", first.Setup.model_fields["task"].default)}


def words(budget: Mapping[str, Any]) -> str:
    """What is equal, for the reader."""
    return f"{budget['epochs']} passes of the student, {budget['teacher_epochs']} of its teacher"


def usual_metric(task: Any, first: Any = None) -> str:
    """Accuracy on test nodes."""
    return "accuracy"


def measure(cls: Any, task: Any, setup: Mapping[str, Any], config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Train on a seed, and judge the student.

    Raises:
        InputError: a number of steps was asked for.
    """
    if "steps" in config:
        raise InputError("methods of the graphs family are given passes over the nodes: use --epochs, not --steps")
    began = time.monotonic()
    settings = validate(cls.Config, {k: v for k, v in config.items() if k in cls.Config.model_fields})
    asked = {**setup, "task": config["task"]}
    seed_everything(mix_seed(seed, 3))
    method = cls.on_task(task, settings, seed=seed, setup=validate(cls.Setup, asked))
    method.show_progress = False
    Engine(None, EngineConfig(progress=False), seed=mix_seed(seed, 2)).run(method, method.stages(seed=seed))
    parts = task.parts()
    row = method.eval().evaluate(parts.test, parts.class_names)["rows"][0]
    test = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and k not in TIMES}
    return {"test": test, "curve": [], "seconds": round(time.monotonic() - began, 2)}


def check(cls: Any) -> None:
    """That a method can be compared.

    Raises:
        InputError: it does not distil into a network on nodes.
    """
    if not issubclass(cls, NodeDistiller):
        raise InputError(
            f"{cls.name} does not distil into a network on nodes, so it cannot be compared here; see limbeck verify {cls.name}"
        )
