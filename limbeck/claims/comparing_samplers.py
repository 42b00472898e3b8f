"""How methods of the ``samplers`` family are compared: the same teacher, guidance and batches, judged at the same noise."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from limbeck.core.config import validate
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.core.seeding import seed_everything
from limbeck.tasks.generation import load_generation
from limbeck.tasks.generators import load_generator

SHARED = ("batch_size", "guidance", "judge_count")
OF_THE_TEACHER = ("noise_schedule", "predicts", "teacher_network", "teacher_steps", "dropout")
LOWER_IS_BETTER = ("frechet_features", "frechet_pixels", "sliced_wasserstein", "mmd", "paired_mse")
load = load_generation


def shared_settings(first: Any, setup: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for all methods, as the first has it; the teacher's settings too, though methods have their own usual ones."""
    fields = {**first.Config.model_fields, **first.Setup.model_fields}
    return {k: setup.get(k, fields[k].default) for k in (*SHARED, *OF_THE_TEACHER)}


def words(budget: Mapping[str, Any]) -> str:
    """What is equal, for the reader."""
    return f"one teacher ({budget['noise_schedule']}), batches of {budget['batch_size']}"


def usual_metric(task: Any, first: Any = None) -> str:
    """The distance to data in a classifier's features where there is one."""
    return "sliced_wasserstein" if task.images is None else "frechet_features"


def measure(cls: Any, task: Any, setup: Mapping[str, Any], config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Distil on a seed, and judge the result.

    Raises:
        InputError: a pipeline as teacher: there are no real samples to judge by.
    """
    if setup.get("teacher"):
        raise InputError("samplers are compared on a task with real samples, not on a pipeline: leave --teacher out")
    began = time.monotonic()
    asked = {**setup, **{k: v for k, v in config.items() if k in cls.Setup.model_fields}}
    chosen = validate(cls.Setup, asked)
    settings = validate(cls.Config, {k: v for k, v in config.items() if k in cls.Config.model_fields})
    seed_everything(mix_seed(seed, 3))
    teacher, task = load_generator(chosen, needs_images=cls.needs_images, progress=False)
    method = cls.on_task(task, teacher, settings, seed=seed, setup=chosen)
    method.show_progress = False
    Engine(None, EngineConfig(progress=False), seed=mix_seed(seed, 2)).run(
        method, method.stages(task.train, task.val, seed=seed)
    )
    row = method.eval().evaluate(task.test, task.class_names)["rows"][0]
    test = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and k != "seconds_per_sample"}
    return {"test": test, "curve": [], "seconds": round(time.monotonic() - began, 2)}
