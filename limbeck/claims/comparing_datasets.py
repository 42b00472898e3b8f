"""How methods of the ``datasets`` family are compared: as many samples per class, judged by the same networks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from limbeck.core.config import validate
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.core.seeding import seed_everything
from limbeck.tasks.base import load_task
from limbeck.tasks.judging_datasets import JudgingConfig

SHARED = ("ipc", *JudgingConfig.model_fields)
load = load_task


def shared_settings(first: Any, setup: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for all methods: samples per class and the protocol of judging, as the first method has them."""
    fields = first.Config.model_fields
    return {k: setup.get(k, fields[k].default) for k in SHARED if k in fields}


def words(budget: Mapping[str, Any]) -> str:
    """What is equal, for the reader."""
    return f"{budget['ipc']} samples per class" if "ipc" in budget else "judged alike"


def usual_metric(task: Any, first: Any = None) -> str:
    return "accuracy"


def measure(cls: Any, task: Any, setup: Mapping[str, Any], config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Distil on a seed, and judge the result.

    Raises:
        InputError: the method is judged by other measures than accuracy.
    """
    began = time.monotonic()
    settings = validate(cls.Config, {k: v for k, v in config.items() if k in cls.Config.model_fields})
    method = cls.on_task(task, validate(cls.Setup, setup), settings, seed=seed, progress=False)
    method.show_progress = False
    seed_everything(mix_seed(seed, 3))
    method.prepare_run(task.train, task.val, None)
    Engine(None, EngineConfig(progress=False), seed=mix_seed(seed, 2)).run(
        method, method.stages(task.train, task.val, seed=seed)
    )
    rows = method.evaluate(task.test, task.class_names)["rows"]
    if "accuracy" not in rows[0]:
        raise InputError(f"{cls.name} is not judged by accuracy, so it cannot be compared here")
    test = {k: float(v) for k, v in rows[0].items() if isinstance(v, int | float)}
    return {"test": test, "curve": [], "seconds": round(time.monotonic() - began, 2)}
