"""``limbeck.fit``: build a method, run it, judge it, keep what came out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from limbeck import catalogue
from limbeck.core.config import Config, validate
from limbeck.core.data import Data, as_data, mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError, RunError
from limbeck.core.method import Method
from limbeck.core.run import ARTIFACT, Run, RunFolder
from limbeck.core.seeding import seed_everything
from limbeck.core.semi import SemiSupervisedData


def fit(
    method: str | type[Method] | Method,
    data: Any = None,
    *,
    unlabelled: Any = None,
    val: Any = None,
    test: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    preset: str = "small",
    seed: int = 0,
    engine: EngineConfig | Mapping[str, Any] | None = None,
    student: Any = None,
    teacher: Any = None,
    **settings: Any,
) -> Run:
    """Run a method.

    By name on a built-in task::

        run = limbeck.fit("kd", task="digits", temperature=2)

    on your own modules and data::

        run = limbeck.fit("kd", (x, y), student=small, teacher=big, test=(xt, yt), epochs=30)

    or with an object you made::

        run = limbeck.fit(KD(small, big, temperature=2), train_set)

    Args:
        method: a name from the catalogue, a class, or an object.
        data: training data: tensors ``(x, y)``, a map-style data set, a ``DataLoader``. None: the task that ``task`` names. A path or
            a name: what ``--data`` takes.
        unlabelled: further training data without labels, for methods that learn from it too.
        val, test: the same for validation and testing; both may be left out with own data.
        out: the run's folder. None keeps everything in memory; nothing can then be resumed.
        resume: continue the run in ``out`` where it stopped, or do nothing more than read its result if it had ended.
        preset: ``small`` or ``paper``.
        seed: fixes initialisation, order and every draw.
        engine: how to execute, see :class:`limbeck.core.engine.EngineConfig`.
        student, teacher: modules (with own data), or networks' names (with a task).
        settings: the method's hyper-parameters and the task's settings by name.

    Returns:
        the run, with the trained method, its result and metrics.

    Raises:
        UnknownNameError, InputError: something asked for does not exist or does not fit.
        TrainingDiverged, Interrupted, RunError: see the engine.
    """
    options = engine if isinstance(engine, EngineConfig) else validate(EngineConfig, dict(engine or {}))
    if isinstance(data, str | Path):  # a task's setting of the same name: where its data is
        settings, data = {"data": str(data), **settings}, None
    by_name = not isinstance(method, Method) and data is None
    if by_name and unlabelled is not None:
        raise InputError("unlabelled data goes with data of your own; a task keeps some labels with labelled=…")
    made, setup, splits, names, described = (
        _from_task(method, preset, seed, options, student, teacher, settings)
        if by_name
        else _from_objects(method, preset, seed, data, unlabelled, val, test, student, teacher, settings)
    )
    folder = None if out is None else RunFolder(Path(out).expanduser())
    if folder is not None:
        asked = {
            "method": made.name,
            "family": made.family,
            "setup": None if setup is None else setup.model_dump(),
            "config": made.config.model_dump(),
            "preset": preset,
            "seed": seed,
            "engine": options.model_dump(),
            "task": described,
        }
        if resume and (folder.path / "config.json").exists():
            _same_run(folder.config, asked, folder.path)
        else:
            folder.begin(asked)
    train, valid, tested = splits
    made.show_progress = options.progress
    made.check(_sample(train, made))
    made.prepare_run(train, valid, setup)
    worker = Engine(None if folder is None else folder.path, options, seed=mix_seed(seed, 2))
    rows = worker.run(made, made.stages(train, valid, seed=seed), resume=resume)
    result: dict[str, Any] = {"cost": worker.cost}
    if tested is not None:
        result.update(made.evaluate(tested, names))
    if folder is not None and worker.accelerator.is_main_process:
        about = {"method": made.name, "task": described, "class_names": names, "measures": _first_row(result)}
        made.save_artifact(folder.path / ARTIFACT, about)
        folder.finish(result)
    return Run(made, result, rows, None if folder is None else folder.path)


def resume(path: str | Path, engine: Mapping[str, Any] | None = None) -> Run:
    """Continue a run that was started by name on a task.

    Raises:
        RunError: no run there, or one that was made from a program's own objects.
    """
    folder = RunFolder(Path(path).expanduser())
    config = folder.config
    if config["setup"] is None:
        raise RunError(
            f"the run in {path} was made from a program's own models or data: call limbeck.fit(…, out={str(path)!r}, resume=True) there"
        )
    setup = dict(config["setup"])
    return fit(
        config["method"],
        out=folder.path,
        resume=True,
        preset=config["preset"],
        seed=config["seed"],
        engine={**config["engine"], **(engine or {})},
        student=setup.pop("student", None),
        teacher=setup.pop("teacher", None),
        **setup,
        **config["config"],
    )


def split_settings(
    cls: type[Method], preset: str, settings: Mapping[str, Any], *, flags: bool = False
) -> tuple[Config, Config]:
    """Sort settings into a method's hyper-parameters and its setup, and validate both.

    Raises:
        InputError: unknown names or values out of range, in one line.
    """
    setup = {k: v for k, v in settings.items() if k in cls.Setup.model_fields}
    hyper = {k: v for k, v in settings.items() if k not in setup}
    return (
        validate(cls.Config, {**cls.Config.preset_values(preset), **hyper}, flags=flags),
        validate(cls.Setup, setup, flags=flags),
    )


def _from_task(
    method: Any, preset: str, seed: int, options: EngineConfig, student: Any, teacher: Any, settings: Mapping[str, Any]
) -> tuple[Any, Any, tuple[Data, Data | None, Data | None], Any, Any]:
    cls: Any = catalogue.get(method).load() if isinstance(method, str) else method
    named = dict(settings)
    for role, value in (("student", student), ("teacher", teacher)):
        if value is None or value == ():
            continue
        if not isinstance(value, str | tuple | list):
            raise InputError(f"{role} is an object, so the data must be given too: limbeck.fit(method, data, {role}=…)")
        named[role] = (value,) if role == "teacher" and isinstance(value, str) else value
    config, setup = split_settings(cls, preset, named)
    seed_everything(mix_seed(seed, 3))
    made, task = cls.build(setup, config, seed=seed, progress=options.progress)
    return made, setup, (task.train, task.val, task.test), task.class_names, task.describe()


def _from_objects(
    method: Any,
    preset: str,
    seed: int,
    data: Any,
    unlabelled: Any,
    val: Any,
    test: Any,
    student: Any,
    teacher: Any,
    settings: Mapping[str, Any],
) -> tuple[Any, None, tuple[Data, Data | None, Data | None], None, None]:
    if data is None:
        raise InputError("a method object needs training data: limbeck.fit(method, data)")
    train = as_data(data) if unlabelled is None else SemiSupervisedData(data, unlabelled)
    splits = (train, None if val is None else as_data(val), None if test is None else as_data(test))
    if isinstance(method, Method):
        if settings or student is not None or teacher is not None:
            raise InputError("the method is an object already: its settings and models belong to its constructor")
        return method, None, splits, None, None
    cls: Any = catalogue.get(method).load() if isinstance(method, str) else method
    config = validate(cls.Config, {**cls.Config.preset_values(preset), **settings})
    seed_everything(mix_seed(seed, 3))
    made = cls.from_data(train, student, teacher, config, seed=seed)
    return made, None, splits, None, None


def _sample(train: Data, method: Any) -> Any:
    size = min(getattr(method.config, "batch_size", 32), len(train), 64)
    return train.fetch(torch.arange(size), 0)


def _same_run(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Resuming with other settings would mix two runs; say which differ."""
    import json

    plain = json.loads(json.dumps(now))
    differing = [
        f"{part}.{key} was {before[part].get(key)!r}, is {value!r}"
        for part in ("config", "setup")
        if before.get(part) and plain.get(part)
        for key, value in plain[part].items()
        if before[part].get(key) != value
    ]
    if before["method"] != now["method"]:
        differing.insert(0, f"method was {before['method']}, is {now['method']}")
    if differing:
        raise RunError(f"cannot resume {path} with other settings: {'; '.join(differing[:3])}")
    if before["seed"] != now["seed"]:
        warnings.warn(
            f"the run in {path} was started with seed {before['seed']}; it goes on with its own state", stacklevel=3
        )


def _first_row(result: dict[str, Any]) -> dict[str, Any] | None:
    rows = result.get("rows")
    return rows[0] if rows else None
