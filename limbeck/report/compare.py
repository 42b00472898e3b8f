"""The report of a comparison: methods on equal ground, as one HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from limbeck import catalogue
from limbeck.report.figures import SERIES, Curve, line_figure
from limbeck.report.measures import Measure, measure
from limbeck.report.numbers import finite, human_seconds
from limbeck.report.page import write_page
from limbeck.report.strips import Strip, strip_plot
from limbeck.report.tables import ranked


def write_comparison(found: Mapping[str, Any], out_folder: str | Path) -> Path:
    """Write ``comparison.html``.

    Args:
        found: ``task``, ``metric``, ``higher_is_better``, ``seeds``, ``steps``, ``methods`` (name -> ``metrics`` per seed,
            ``seconds``, ``curve``), ``differences`` (``method``, ``baseline``, ``mean``, ``low``, ``high``, ``per_seed``) and
            ``settings``.
        out_folder: where to.

    Returns:
        the file.

    Raises:
        RunError: it cannot be written.
    """
    shown = measure(found["metric"], found["higher_is_better"])
    methods = ranked(found)
    task = found.get("task") or {}
    others = [m for m in dict.fromkeys(k for _, v in methods for k in v["metrics"]) if m != shown.name]
    color = {name: number for number, name in enumerate(found["methods"], 1)}
    best = methods[0] if methods else None
    return write_page(
        Path(out_folder).expanduser() / "comparison.html",
        "compare.html",
        title=f"{', '.join(found['methods'])} on {task.get('name', 'one task')}",
        summary=None
        if best is None
        else f"{best[0]} comes first with {shown.spread(best[1]['metrics'].get(shown.name, []))}",
        shown=shown,
        seeds=found["seeds"],
        budget=found.get("budget") or f"{found['steps']:,} steps",
        others=[measure(m) for m in others],
        rows=[
            {
                "name": name,
                "title": card.title if (card := catalogue.cards().get(name)) else "",
                "color": (color[name] - 1) % SERIES + 1,
                "values": [m.spread(values["metrics"].get(m.name, [])) for m in (shown, *map(measure, others))],
                "seconds": _mean_seconds(values.get("seconds") or []),
            }
            for name, values in methods
        ],
        dots=_dots(methods, shown, found["seeds"]),
        differences=[
            {
                "method": d["method"],
                "baseline": d["baseline"],
                "difference": shown.difference(d["mean"]),
                "interval": shown.interval(d["low"], d["high"]),
                "reading": _reading(d),
            }
            for d in found.get("differences") or []
        ],
        difference_plot=_differences(found, shown),
        curves=line_figure(
            [
                Curve(name, [p[0] for p in v["curve"]], [p[1] for p in v["curve"]], color[name])
                for name, v in methods
                if v.get("curve")
            ],
            f"mean {shown.label} against step for every method",
            wide=True,
        ),
        per_seed=[
            {"name": name, "values": [shown.text(x) for x in values["metrics"].get(shown.name, [])]}
            for name, values in methods
        ],
        facts=[(k.replace("_", " "), _plain(v)) for k, v in task.items() if v is not None],
        settings=[(k, _plain(v)) for k, v in (found.get("settings") or {}).items()],
    )


def _dots(methods: list[tuple[str, Any]], shown: Measure, seeds: list[Any]) -> Any:
    strips = []
    for name, values in methods:
        numbers = [v for v in map(finite, values["metrics"].get(shown.name, [])) if v is not None]
        strips.append(Strip(name, numbers, fmean(numbers) if numbers else None))
    return strip_plot(
        strips,
        f"{shown.label} of every method, a dot per seed",
        axis=shown.axis(),
        scale=shown.scale,
        text=shown.text,
        seeds=seeds,
    )


def _differences(found: Mapping[str, Any], shown: Measure) -> Any:
    strips = [
        Strip(
            f"{d['method']} against {d['baseline']}",
            [v for v in map(finite, d["per_seed"]) if v is not None],
            d["mean"],
            d["low"],
            d["high"],
            {"better": "holds", "worse": "fails"}.get(_reading(d), "undecided"),
        )
        for d in found.get("differences") or []
    ]
    return strip_plot(
        strips,
        f"paired differences of {shown.label} with 95 % intervals",
        axis=shown.axis(difference=True),
        scale=shown.scale,
        signed=True,
        text=shown.difference,
        seeds=found["seeds"],
        marks=[0.0],
    )


def _reading(difference: Mapping[str, Any]) -> str:
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "no clear difference"


def _mean_seconds(seconds: list[Any]) -> str:
    numbers = [s for s in map(finite, seconds) if s is not None]
    return human_seconds(fmean(numbers) if numbers else None)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
