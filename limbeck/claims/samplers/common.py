"""What the claims of the ``samplers`` family share: tasks and teachers, how an arm is run, and what its sampler is worth.

Every sampler of a seed gets the same noise and the same classes. Validation samples choose among settings, test samples are looked at once
per trained sampler. Measures that are compared as ratios are recorded as natural logarithms (``log_…``), so that a margin of ln(4/3) asks for
three quarters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from limbeck import catalogue
from limbeck.claims.base import Outcome
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.seeding import seed_everything
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.samplers import Sampler
from limbeck.tasks.base import TaskConfig
from limbeck.tasks.diffusion_teachers import diffusion_teacher, fresh_denoiser, reference_schedule
from limbeck.tasks.generation import GenerationTask, load_generation
from limbeck.tasks.judging_samplers import Compared, Ground, draw

QUIET = EngineConfig(progress=False, log_every=1000)
COUNT = 2000
_LOGS = ("frechet_pixels", "frechet_features", "sliced_wasserstein", "paired_mse")


@functools.cache
def task(name: str = "digits", data_root: str | None = None) -> GenerationTask:
    """A task of generation by name."""
    return load_generation(TaskConfig.make(task=name, data_root=data_root))


@functools.cache
def _teacher(name: str, schedule: str, prediction: str | None, network: str, steps: int, dropout: float) -> Denoiser:
    return diffusion_teacher(
        task(name), schedule, prediction, network=network, steps=steps, dropout=dropout, progress=False
    )


def teacher(
    on: GenerationTask,
    schedule: str = "flow",
    prediction: str | None = None,
    *,
    network: str = "mlp-w160-b3",
    steps: int = 5000,
    dropout: float = 0.1,
) -> Denoiser:
    """A task's reference teacher, from the cache."""
    return _teacher(on.name, schedule, prediction, network, steps, dropout)


def fresh(on: GenerationTask, schedule: str, network: str, seed: int, prediction: str | None = None) -> Denoiser:
    """An untrained student, the same for all arms of a seed."""
    seed_everything(mix_seed(seed, 41))
    return fresh_denoiser(on, reference_schedule(schedule), prediction, network)


def build(
    method: str,
    on: GenerationTask,
    known: Denoiser,
    seed: int,
    config: Mapping[str, Any],
    student: Denoiser | None = None,
) -> Any:
    """A catalogue method on a task with a teacher."""
    cls: Any = catalogue.get(method).load()
    seed_everything(mix_seed(seed, 3))
    made = cls(known, on.conditions, student, cls.Config.make(**config), shape=on.shape, seed=seed)
    made.on, made.show_progress = on, False
    return made


def run(made: Any, on: GenerationTask, seed: int) -> Any:
    """Run a method that is built, quietly and in memory, and return it."""
    seed_everything(mix_seed(seed, 3))
    Engine(None, QUIET, seed=mix_seed(seed, 2)).run(made, made.stages(on.train, on.val, seed=seed))
    return made.eval()


def measures(
    sampler: Sampler, on: GenerationTask, seed: int, part: str, *, fine: Sampler | None = None, count: int = COUNT
) -> dict[str, float]:
    """Every measure of a sampler on a part of a task, the noise being that of the seed; distances also as logarithms.

    Args:
        fine: whose samples from the same noise ``paired_mse`` is the distance to.
    """
    conditions: Conditions | None = on.conditions if sampler.denoiser.conditional else None
    ground = Ground.of(on.shape, conditions, getattr(on, part), on, progress=False)
    asked = {"it": sampler} if fine is None else {"it": sampler, "fine": fine}
    drawn = draw(asked, on.shape, count, ground.cond, seed=mix_seed(seed, 43))
    found = Compared(ground, drawn.cond).measures(drawn.samples["it"], drawn.samples.get("fine"))
    logs = {f"log_{k}": math.log(max(found[k], 1e-12)) for k in _LOGS if k in found}
    return {**found, **logs, "nfe": float(drawn.nfe["it"])}


def worth(
    sampler: Sampler,
    on: GenerationTask,
    seed: int,
    *,
    fine: Sampler | None = None,
    count: int = COUNT,
    tuned: bool = True,
    more: Mapping[str, float] | None = None,
) -> Outcome:
    """A sampler's measures on validation and test samples.

    Args:
        tuned: whether validation measures are needed (an arm with one candidate needs none).
        more: further test measures to record.
    """
    val = measures(sampler, on, seed, "val", fine=fine, count=count) if tuned else {}
    return Outcome(val, {**measures(sampler, on, seed, "test", fine=fine, count=count), **(more or {})})
