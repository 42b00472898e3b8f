"""What the claims of the ``models`` family share: the data they run on, and how an arm is trained and measured."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck import catalogue
from limbeck.claims.base import Outcome
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.method import Method
from limbeck.metrics.classification import classification_metrics
from limbeck.tasks.base import Task, TaskConfig, load_task
from limbeck.tasks.teachers import predictions

QUIET = EngineConfig(progress=False, log_every=1000)


def available(name: str, data_root: str | None) -> bool:
    """True if a data set's folder is under the data root (or ``$LIMBECK_DATA``)."""
    root = data_root or os.environ.get("LIMBECK_DATA")
    return root is not None and (Path(root).expanduser() / name).is_dir()


@functools.lru_cache(maxsize=8)
def task(data_root: str | None, name: str, train_size: int | None, **settings: Any) -> Task:
    """A task, loaded once per process; ``settings`` are those of :class:`limbeck.tasks.base.TaskConfig`."""
    return load_task(TaskConfig.make(task=name, data_root=data_root, train_size=train_size, **settings))


def train(method: str, on: Task, config: Mapping[str, Any], seed: int, **setup: Any) -> Outcome:
    """Train a catalogue method on a task, and measure its student on validation and test data.

    Two calls with the same seed and student start from the same weights and see the same batches.
    """
    cls: Any = catalogue.get(method).load()
    made = cls.on_task(
        on, cls.Setup.make(**setup), cls.Config.make(**{"evaluations": 0, **config}), seed=seed, progress=False
    )
    return run(made, on, seed)


def run(made: Method, on: Task, seed: int) -> Outcome:
    """Run a method that is already built, quietly and in memory, and measure its student."""
    method: Any = made
    Engine(None, QUIET, seed=mix_seed(seed, 2)).run(method, method.stages(on.train, None, seed=seed))
    return Outcome(measures(method.student, on, "val"), measures(method.student, on, "test"))


def measures(model: Any, on: Task, part: str) -> dict[str, float]:
    """Quality and calibration of a classifier on a part of a task."""
    was_training = model.training
    model.eval()
    logits, labels = predictions(model, getattr(on, part))
    model.train(was_training)
    return classification_metrics(logits, labels, on.num_classes)
