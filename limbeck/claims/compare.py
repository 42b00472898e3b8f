"""Methods on equal ground: the same data, networks, initial weights, batches and number of updates, over seeds."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck import catalogue
from limbeck.claims import comparing_datasets, comparing_fields, comparing_graphs, comparing_samplers
from limbeck.claims.statistics import paired_difference
from limbeck.core.config import validate
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.files import explained, write_json
from limbeck.flags import add_flags, given, parse_strictly
from limbeck.tasks.base import TaskConfig, load_task

LOWER_IS_BETTER = (
    "nll",
    "brier",
    "ece",
    "adaptive_ece",
    *comparing_samplers.LOWER_IS_BETTER,
    *comparing_fields.LOWER_IS_BETTER,
)
_APART: dict[str, Any] = {
    "datasets": comparing_datasets,
    "samplers": comparing_samplers,
    "fields": comparing_fields,
    "graphs": comparing_graphs,
}
"""Families whose methods each have their own number of updates, and how they are compared."""
_UNLIKE = ("structures", "search")
"""Families whose methods turn different things into different things."""
SHARED = ("lr", "batch_size", "optimizer", "weight_decay", "schedule")


def comparison_setup(names: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """The settings that all methods share, from command-line flags.

    Raises:
        UnknownNameError, InputError: an unknown method or flag, or methods of different families.
    """
    classes = _classes(names)
    parser = argparse.ArgumentParser("limbeck compare", add_help=False)
    settings = next(iter(classes.values()))
    for title, model in (("data", settings.Setup), ("optimisation", settings.Config)):
        add_flags(parser, title, model)
    options = parse_strictly(parser, arguments)
    found = {**given(options, settings.Setup), **given(options, settings.Config)}
    validate(settings.Setup, {k: v for k, v in found.items() if k in settings.Setup.model_fields}, flags=True)
    return found


def compare(
    names: Sequence[str],
    setup: Mapping[str, Any] | None = None,
    *,
    seeds: int = 3,
    steps: int | None = None,
    metric: str | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train each method on each seed with the same budget, and compare the first with the others.

    Settings of ``setup`` that a method does not have are left out for it; the number of updates, batch size, learning rate,
    student and teacher are the same for all unless ``setup`` says otherwise for all.

    Args:
        names: two or more methods of one family; the first is the one that the differences are about.
        setup: task, networks and hyper-parameters by name, for all methods.
        seeds: how many, at least 2 for an interval.
        steps: updates for every method; the first method's own number if None. Methods that distil data sets have the same
            number of samples per class instead, samplers the same teacher, and each its own number of steps if None.
        metric: the test measure to compare; None: accuracy, for samplers a Fréchet distance, for fields PSNR or the distance to the prior.
        out: folder for ``comparison.json``, and for finished pairs, so that a stopped comparison goes on.
        quiet: print no progress.

    Raises:
        UnknownNameError, InputError: unknown methods, fewer than two, different families, an unknown measure.
    """
    setup = dict(setup or {})
    classes = _classes(names)
    if len(classes) < 2:
        raise InputError("name at least two different methods to compare")
    if seeds < 2:
        raise InputError(f"--seeds must be at least 2 for an interval (got {seeds})")
    first = next(iter(classes.values()))
    apart = _APART.get(first.family)
    for cls in classes.values():
        getattr(apart, "check", lambda _: None)(cls)
    load = load_task if apart is None else apart.load
    kind = getattr(apart, "TASKS", TaskConfig)
    usual = {"task": first.Setup.model_fields["task"].default}
    task = load(kind.make(**{**usual, **_fitting(setup, kind)}))
    metric = metric or ("accuracy" if apart is None else apart.usual_metric(task, first))
    updates: int | None
    if apart is not None:
        budget = apart.shared_settings(first, setup)
        validate(first.Config, _fitting({**setup, **budget}, first.Config))
        updates, words = steps, apart.words(budget)
    else:
        budget = {k: setup.get(k, first.Config.model_fields[k].default) for k in SHARED}
        config = validate(first.Config, {**_fitting(setup, first.Config), **budget})
        updates = steps or config.total_steps(max(1, len(task.train) // min(config.batch_size, len(task.train))))
        words = f"{updates:,} steps"
    ledger = _Pairs(None if out is None else out / "pairs.jsonl", {"setup": setup, "steps": updates})
    methods: dict[str, dict[str, Any]] = {n: {"metrics": {}, "seconds": [], "curve": []} for n in classes}
    curves: dict[str, list[list[list[float]]]] = {n: [] for n in classes}
    total, done, began = len(classes) * seeds, 0, time.monotonic()
    for seed in range(seeds):
        for name, cls in classes.items():
            entry = ledger.get(name, seed)
            if entry is None:
                if apart is not None:
                    settings = {**setup, **budget, **({} if steps is None else {"steps": steps})}
                    entry = apart.measure(cls, task, _fitting(setup, cls.Setup), settings, seed)
                else:
                    settings = {**_fitting(setup, cls.Config), **budget, "steps": updates, "evaluations": 10}
                    entry = _measure(cls, task, _fitting(setup, cls.Setup), settings, seed)
                ledger.keep(name, seed, entry)
            if metric not in entry["test"]:
                raise UnknownNameError("metric", metric, entry["test"], hint=f"Known: {', '.join(entry['test'])}.")
            for key, value in entry["test"].items():
                methods[name]["metrics"].setdefault(key, []).append(value)
            methods[name]["seconds"].append(entry["seconds"])
            curves[name].append(entry["curve"])
            done += 1
            if not quiet:
                left = (time.monotonic() - began) / done * (total - done)
                print(
                    f"  {done}/{total} {name} seed {seed}: {metric} {entry['test'][metric]:.4g}, about {left:.0f} s left",
                    flush=True,
                )
    for name, lists in curves.items():
        points = min(len(c) for c in lists)
        methods[name]["curve"] = [[lists[0][i][0], sum(c[i][1] for c in lists) / len(lists)] for i in range(points)]
    higher = metric not in LOWER_IS_BETTER
    lead, *rest = classes
    differences = []
    for other in rest:
        d = paired_difference(
            methods[lead]["metrics"][metric], methods[other]["metrics"][metric], higher_is_better=higher
        )
        differences.append(
            {"method": lead, "baseline": other, "mean": d.mean, "low": d.low, "high": d.high, "per_seed": d.per_seed}
        )
    found = {
        "task": task.describe(),
        "metric": metric,
        "higher_is_better": higher,
        "seeds": list(range(seeds)),
        "steps": updates,
        "budget": words,
        "methods": methods,
        "differences": differences,
        "settings": {**budget, **setup},
    }
    if out is not None:
        write_json(out / "comparison.json", found)
    return found


def _classes(names: Sequence[str]) -> dict[str, Any]:
    found = {catalogue.get(n).name: catalogue.get(n) for n in names}
    families = {card.family for card in found.values()}
    if len(families) > 1:
        raise InputError(f"methods of different families cannot be compared: {', '.join(sorted(families))}")
    (family,) = families
    if family in _UNLIKE:
        raise InputError(
            f"methods of the {family} family have different results, which have no common measure: see limbeck verify for each of them"
        )
    return {name: card.load() for name, card in found.items()}


def _fitting(settings: Mapping[str, Any], model: Any) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k in model.model_fields}


def _measure(cls: Any, task: Any, setup: Mapping[str, Any], config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    began = time.monotonic()

    def built(steps: int) -> tuple[Any, list[Any]]:
        checked = validate(cls.Config, {**config, "steps": steps})
        made = cls.on_task(task, validate(cls.Setup, setup), checked, seed=seed, progress=False)
        return made, made.stages(task.train, task.val, seed=seed)

    def others(stages: list[Any], steps: int) -> int:
        return sum(stage.steps for stage in stages) - steps

    budget = config["steps"]
    method, stages = built(budget)
    extra = others(stages, budget)
    if extra:  # further stages count too: the last one gets what they leave
        half = budget // 2 or 1
        if others(built(half)[1], half) != extra:
            raise InputError(
                f"{cls.name} is {len(stages)} trainings, which do not share one budget of updates: leave it out here, and see "
                f"limbeck verify {cls.name}"
            )
        if extra >= budget:
            raise InputError(
                f"{cls.name} needs {extra} updates before its last stage, as many as the whole budget of {budget}: raise --steps"
            )
        method, stages = built(budget - extra)
    rows = Engine(None, EngineConfig(progress=False), seed=mix_seed(seed, 2)).run(method, stages)
    judged = method.evaluate(task.test, task.class_names).get("rows", [])
    test = next((r for r in judged if r["who"] == "student"), None)
    if test is None:
        raise InputError(f"{cls.name} is not judged by one student, so it cannot be compared here")
    curve = [[r["step"], r["accuracy"]] for r in rows if r["split"] == "val" and "accuracy" in r]
    measures = {
        k: v for k, v in test.items() if isinstance(v, float) and k not in ("latency", "latency_ratio", "flops")
    }
    return {"test": measures, "curve": curve, "seconds": round(time.monotonic() - began, 2)}


class _Pairs:
    """Finished (method, seed) pairs of a comparison, so that one that was stopped goes on."""

    def __init__(self, path: Path | None, mark: dict[str, Any]) -> None:
        self.path, self.mark = path, json.dumps(mark, sort_keys=True, default=list)
        self.known: dict[tuple[str, int], dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that was being written when the process was killed
                if entry["mark"] == self.mark:
                    self.known[(entry["name"], entry["seed"])] = entry

    def get(self, name: str, seed: int) -> dict[str, Any] | None:
        return self.known.get((name, seed))

    def keep(self, name: str, seed: int, entry: dict[str, Any]) -> None:
        if self.path is None:
            return
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({"name": name, "seed": seed, "mark": self.mark, **entry}) + "\n")
