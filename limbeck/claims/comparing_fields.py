"""How methods of the ``fields`` family are compared: the same scene or prior, the same number of updates, judged from the same cameras."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from limbeck.core.config import validate
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.seeding import seed_everything
from limbeck.tasks.scenes import SceneSetup, load_scene

TASKS = SceneSetup
SHARED = ("steps", "batch_size", "judge_views", "ray_samples")
LOWER_IS_BETTER = ("nearest_distance", "inception_quality")
load = load_scene


def shared_settings(first: Any, setup: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for all methods, as the first has it; and the first one's scene, where methods have their own usual ones."""
    fields = first.Config.model_fields
    found = {k: setup.get(k, fields[k].default) for k in SHARED if k in fields}
    return {**found, "task": setup.get("task", first.Setup.model_fields["task"].default)}


def words(budget: Mapping[str, Any]) -> str:
    """What is equal, for the reader."""
    return f"{budget['steps']:,} updates, one scene"


def usual_metric(task: Any, first: Any = None) -> str:
    """Quality on held-out views; for methods that learn from a prior, the distance of renders to its images."""
    return "nearest_distance" if first is not None and "prior" in first.Setup.model_fields else "psnr"


def measure(cls: Any, task: Any, setup: Mapping[str, Any], config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Train on a seed, and judge the result."""
    began = time.monotonic()
    asked = {**setup, **{k: v for k, v in config.items() if k in cls.Setup.model_fields}}
    settings = validate(cls.Config, {k: v for k, v in config.items() if k in cls.Config.model_fields})
    seed_everything(mix_seed(seed, 3))
    method, task = cls.build(validate(cls.Setup, asked), settings, seed=0, progress=False)
    method.show_progress = False
    Engine(None, EngineConfig(progress=False), seed=mix_seed(seed, 2)).run(
        method, method.stages(task.train, task.val, seed=seed)
    )
    row = method.eval().evaluate(task.test, task.class_names)["rows"][0]
    test = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and k != "seconds_per_view"}
    return {"test": test, "curve": [], "seconds": round(time.monotonic() - began, 2)}
