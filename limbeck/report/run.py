"""The report of one run: a single HTML file that opens offline."""

from __future__ import annotations

import base64
import binascii
import json
import shlex
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck import catalogue
from limbeck.core.errors import RunError
from limbeck.report.figures import Curve, last_value, line_figure, matrix_png, reliability_figure
from limbeck.report.measures import contestants, measure
from limbeck.report.numbers import digits, finite, human_bytes, human_count, human_seconds
from limbeck.report.page import write_page
from limbeck.report.reproduce import Setting, Settings, call, command, settings_of
from limbeck.report.summary import sentence, tiles

NUMBERS_UP_TO = 20  # classes: a larger confusion matrix is a picture without numbers
_PNG = b"\x89PNG\r\n\x1a\n"
_SHOWN = {"cost", "rows", "agreement", "confusion", "pictures", "reliability"}
_NOT_CURVES = {"stage", "step", "split", "epoch"}


def write_run_report(path: str | Path, out: str | Path | None = None) -> Path:
    """Write a run's report.

    Args:
        path: the run's folder.
        out: the HTML file; None: ``report.html`` in the run's folder.

    Returns:
        where the report is.

    Raises:
        RunError: no run there, one of its files is damaged, a picture is missing, or the report cannot be written.
    """
    from limbeck.core.run import RunFolder  # imports torch, so only when a report is written

    folder = RunFolder(Path(path).expanduser())
    config, result, rows = folder.config, folder.result, _rows(folder)
    found = result or {}
    settings = settings_of(config)
    card = catalogue.cards().get(settings.method)
    task = config.get("task") or {}
    names, groups = contestants(found.get("rows") or [])
    what = card.title if card else settings.method or "A run"
    target = folder.path / "report.html" if out is None else Path(out).expanduser()
    return write_page(
        target,
        "run.html",
        title=f"{what} on {task['name']}" if task.get("name") else what,
        method=settings.method or "own method",
        card=card,
        settings=settings,
        task={k: _cell(v) for k, v in task.items()},
        started=(config.get("environment") or {}).get("started"),
        ended=result is not None,
        last=rows[-1] if rows else None,
        folder=shlex.quote(str(folder.path)),
        summary=None if result is None else sentence(found),
        tiles=tiles(found),
        names=names,
        groups=groups,
        agreement=_measured(found.get("agreement") or {}),
        stages=stage_panels(rows),
        confusion=_confusion(found.get("confusion")),
        reliability=_reliability(found.get("reliability")),
        pictures=[_picture(folder.path, p) for p in found.get("pictures") or []],
        cost=_cost(found.get("cost") or {}),
        more=_measured({k: v for k, v in found.items() if k not in _SHOWN}),
        parts=_parts(settings),
        environment=_environment(config.get("environment") or {}),
        command=command(settings),
        call=call(settings),
    )


def stage_panels(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One group of figures for each stage: a figure per logged name, train and validation together, and the learning rates.

    Args:
        rows: of ``metrics.jsonl``.

    Returns:
        per stage its name and figures (name, svg, and a legend of label, series number and last value).
    """
    stages: dict[str, dict[str, dict[str, list[tuple[float, Any]]]]] = {}
    for row in rows:
        names = stages.setdefault(str(row.get("stage", "")), {})
        split = str(row.get("split", "train"))
        for name, value in row.items():
            if name in _NOT_CURVES or not (value is None or isinstance(value, int | float)):
                continue
            rate = name == "lr" or name.startswith("lr_")
            figure, line = (
                ("learning rate", name.removeprefix("lr_") if name != "lr" else "lr") if rate else (name, split)
            )
            names.setdefault(figure, {}).setdefault(line, []).append((row["step"], value))
    found = []
    for stage, names in stages.items():
        panels = []
        for name in sorted(names, key=lambda n: n == "learning rate"):  # the rates come last, the rest as logged
            curves = [
                Curve(line, [s for s, _ in points], [v for _, v in points], _series(name, line, position))
                for position, (line, points) in enumerate(names[name].items())
            ]
            shown = name if name == "learning rate" else measure(name).label
            svg = line_figure(curves, f"{shown} against step, stage {stage}")
            if svg:
                legend = [(c.label, (c.color - 1) % 8 + 1, _last(c, name)) for c in curves]
                panels.append({"name": shown, "svg": svg, "legend": legend})
        found.append({"name": stage, "panels": panels})
    return found


def _last(curve: Curve, name: str) -> str:
    value = last_value(curve)
    return digits(value) if name == "learning rate" else measure(name).text(value)


def _series(figure: str, line: str, position: int) -> int:
    if figure == "learning rate":
        return 3 + position
    return {"train": 1, "val": 2}.get(line, 3 + position)


def _rows(folder: Any) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = folder.rows
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise RunError(f"{folder.path / 'metrics.jsonl'} is not valid JSON lines: it was changed or damaged") from None
    if not all(isinstance(row, dict) and "step" in row for row in rows):
        raise RunError(f"{folder.path / 'metrics.jsonl'} has a line without a step: it was changed or damaged")
    return rows


def _measured(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(measure(k).label, measure(k).text(v) if finite(v) is not None else _cell(v)) for k, v in values.items()]


def _cell(value: Any) -> str:
    """A value of a config or task for a table."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        if value and all(isinstance(v, int | float | str) for v in value):
            return ", ".join(map(_cell, value))
        return json.dumps(value, ensure_ascii=False) if value else "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _confusion(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The matrix with each cell's share of its row; as a picture above :data:`NUMBERS_UP_TO` classes."""
    if not found:
        return None
    counts = np.array(found["matrix"], dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(found["labels"]) != len(counts):
        raise RunError("result.json has a confusion matrix that is not square or does not fit its labels")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    labels = [str(label) for label in found["labels"]]
    off = shares * (1 - np.eye(len(shares)))
    worst = np.dstack(np.unravel_index(np.argsort(-off, axis=None, kind="stable")[:5], off.shape))[0]
    confusions = [
        (labels[i], labels[j], int(counts[i, j]), f"{100 * shares[i, j]:.0f} %") for i, j in worst if counts[i, j] > 0
    ]
    if len(labels) > NUMBERS_UP_TO:
        return {"labels": labels, "png": matrix_png(shares), "worst": confusions}
    rows = [
        {
            "label": labels[i],
            "recall": f"{100 * shares[i, i]:.0f} %",
            "cells": [
                {
                    "count": int(counts[i, j]),
                    "share": f"{100 * shares[i, j]:.1f}",
                    # errors are rare where training went well: the square root keeps them visible
                    "strength": f"{shares[i, j] if i == j else shares[i, j] ** 0.5:.2f}",
                    "hit": i == j,
                }
                for j in range(len(labels))
            ],
        }
        for i in range(len(labels))
    ]
    return {"labels": labels, "rows": rows, "worst": confusions}


def _reliability(found: Any) -> list[tuple[str, Any]]:
    """A figure per model: bins as a list (the first model's), or by model."""
    if not found:
        return []
    by_model = found if isinstance(found, dict) else {"": found}
    figures = [(who, reliability_figure(bins, f"reliability diagram {who}".strip())) for who, bins in by_model.items()]
    return [(who, svg) for who, svg in figures if svg]


def _picture(folder: Path, picture: Mapping[str, Any]) -> dict[str, Any]:
    """A picture as a data URI; ``png`` is base64 or a path inside the run's folder."""
    title = str(picture.get("title", "picture"))
    source = str(picture.get("png", ""))
    if source.lower().endswith(".png"):
        file = (folder / source).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise RunError(f"picture '{title}' lies outside the run's folder: {source}")
        if not file.is_file():
            raise RunError(f"picture '{title}' is missing: {file}")
        data = file.read_bytes()
    else:
        try:
            data = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        except (binascii.Error, ValueError):
            raise RunError(f"picture '{title}' is neither base64 nor the path of a .png file") from None
    if not data.startswith(_PNG) or len(data) < 24:
        raise RunError(f"picture '{title}' is not a PNG")
    width, height = struct.unpack(">II", data[16:24])
    grow = max(1, 240 // max(width, 1))  # a picture of a few pixels is shown with its pixels visible
    return {
        "title": title,
        "caption": str(picture.get("caption") or ""),
        "uri": "data:image/png;base64," + base64.b64encode(data).decode(),
        "width": width * grow,
        "height": height * grow,
        "small": grow > 1,
    }


def _cost(cost: Mapping[str, Any]) -> dict[str, Any] | None:
    if not cost:
        return None
    total = finite(cost.get("seconds")) or 0.0
    stages = []
    for name, stage in (cost.get("stages") or {}).items():
        seconds, steps = finite(stage.get("seconds")) or 0.0, int(stage.get("steps") or 0)
        stages.append(
            {
                "name": name,
                "steps": f"{steps:,}",
                "seconds": human_seconds(seconds),
                "rate": f"{digits(steps / seconds)} / s" if seconds > 0 else digits(None),
                "share": f"{100 * seconds / total:.0f}" if total > 0 else "0",
            }
        )
    rest = {k: v for k, v in cost.items() if k not in ("stages", "seconds", "peak_memory_bytes")}
    others = [(k.replace("_", " "), human_count(finite(v))) for k, v in rest.items() if finite(v) is not None]
    peak = finite(cost.get("peak_memory_bytes"))
    if peak:
        others.insert(0, ("peak memory", human_bytes(peak)))
    return {"stages": stages, "seconds": human_seconds(total), "others": others}


def _parts(settings: Settings) -> list[tuple[str, list[dict[str, Any]]]]:
    def lines(part: Sequence[Setting]) -> list[dict[str, Any]]:
        return [
            {
                "name": s.name,
                "value": _cell(s.value),
                "default": _cell(s.default) if s.known else "",
                "differs": s.differs,
                "description": s.description,
            }
            for s in part
        ]

    parts = [("Method", lines(settings.config))]
    if settings.setup is not None:
        parts.append(("Task and networks", lines(settings.setup)))
    return [(name, part) for name, part in [*parts, ("Execution", lines(settings.engine))] if part]


def _environment(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    flat = {k: v for k, v in found.items() if not isinstance(v, dict)}
    for inner in (v for v in found.values() if isinstance(v, dict)):
        flat.update(inner)
    return [(k, _cell(v)) for k, v in flat.items()]
