"""Results as plain text for the terminal.

Tables take their natural width where the output is piped, and the terminal's where there is one; colours only on a terminal
(and never with ``NO_COLOR`` set).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from limbeck.report.measures import contestants, measure
from limbeck.report.numbers import finite, human_bytes, human_count, human_seconds
from limbeck.report.summary import sentence

__all__ = ["comparison_table", "human_bytes", "human_count", "human_seconds", "result_table", "verdict_table"]

_PIPED_WIDTH = 10_000
_STYLES = {"holds": "bold green", "fails": "bold red", "undecided": "bold yellow", "better": "green", "worse": "red"}
_ASCII = str.maketrans({"─": "-", "━": "-", "µ": "u", "±": "+/-", "↑": None, "↓": None, "×": "x", "…": "."})


def result_table(result: Mapping[str, Any]) -> str:
    """What a run gave: a line per measure, a column per contestant, and the cost.

    Args:
        result: as in ``result.json``; without ``rows`` only the sentence and the cost are shown.
    """
    names, groups = contestants(result.get("rows") or [])
    parts: list[Any] = []
    if groups:
        table = _table("", *names, *(["against " + names[1]] if len(names) == 2 else []))
        for number, lines in enumerate(groups.values()):
            if number:
                table.add_section()
            for line in lines:
                versus = [Text(line.versus, _STYLES.get(line.judged, ""))] if len(names) == 2 else []
                table.add_row(
                    Text(f"{line.measure.label} {line.measure.arrow}".strip()), *map(Text, line.values), *versus
                )
        parts.append(table)
    agreement = result.get("agreement") or {}
    if agreement:
        parts.append(Text("; ".join(f"{measure(k).label}: {measure(k).text(v)}" for k, v in agreement.items())))
    parts.append(Text(f"{sentence(result)}{_cost(result.get('cost') or {})}"))
    return _render(parts)


def comparison_table(found: Mapping[str, Any]) -> str:
    """Methods on equal ground, best first: mean ± standard deviation over seeds, and the paired difference."""
    shown = measure(found["metric"], found["higher_is_better"])
    methods = ranked(found)
    differences = {d["method"]: d for d in reversed(found.get("differences") or [])}
    table = _table("method", f"{shown.label} {shown.arrow}", "difference", "95 % interval", "against", "time per seed")
    for name, values in methods:
        seconds = [s for s in map(finite, values.get("seconds") or []) if s is not None]
        d = differences.get(name)
        against = (
            (shown.difference(d["mean"]), shown.interval(d["low"], d["high"]), d["baseline"]) if d else ("", "", "")
        )
        cells = [shown.spread(values["metrics"].get(shown.name, [])), *against]
        table.add_row(Text(name, "bold"), *map(Text, cells), Text(human_seconds(fmean(seconds) if seconds else None)))
    task, count = (found.get("task") or {}).get("name", "task"), len(found["seeds"])
    budget = found.get("budget") or f"{found['steps']:,} steps"
    head = f"{task}, {budget}, {count} seed{'s' * (count != 1)}; mean ± standard deviation"
    return _render([Text(head), table, *([Text("differences: positive is better")] if differences else [])])


def verdict_table(result: Mapping[str, Any]) -> str:
    """A claim's verdict: the claim, every arm's values per seed, every check with its interval.

    Args:
        result: a scoreboard entry.
    """
    shown = measure(result["metric"], result.get("higher_is_better"))
    verdict = result["verdict"]
    head = Text.assemble(f"{result['name']}: ", (verdict, _STYLES[verdict]), f"  {result['claim']}")
    arms = _table("arm", "role", f"{shown.label} {shown.arrow}", "per seed", left=2)
    for name, arm in result["arms"].items():
        values = arm["metrics"].get(shown.name, [])
        arms.add_row(
            Text(name, "bold"), Text(arm["role"]), Text(shown.spread(values)), Text(" ".join(map(shown.text, values)))
        )
    checks = _table("check", "difference", "95 % interval", "verdict")
    for check in result["checks"]:
        kind = measure(check["metric"], check.get("higher_is_better"))
        checks.add_row(
            Text(check["statement"]),
            Text(f"{kind.label} {kind.difference(check['mean'])}"),
            Text(kind.interval(check["low"], check["high"])),
            Text(check["verdict"], _STYLES[check["verdict"]]),
        )
    data, count = result.get("data") or {}, len(result["seeds"])
    tail = (
        f"{data.get('name', 'data')}, {count} seed{'s' * (count != 1)}, {human_seconds(finite(result.get('seconds')))}"
    )
    return _render([head, arms, checks, Text(tail), *([Text(result["note"])] if result.get("note") else [])])


def ranked(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The methods of a comparison with their values, best mean first; those without a value last."""
    sign = 1 if found["higher_is_better"] else -1

    def key(item: tuple[str, Any]) -> float:
        values = [v for v in map(finite, item[1]["metrics"].get(found["metric"], [])) if v is not None]
        return -sign * fmean(values) if values else float("inf")

    return sorted(found["methods"].items(), key=key)


def _cost(cost: Mapping[str, Any]) -> str:
    if finite(cost.get("seconds")) is None:
        return ""
    steps = sum(int(stage.get("steps", 0)) for stage in (cost.get("stages") or {}).values())
    peak = finite(cost.get("peak_memory_bytes"))
    memory = f", {human_bytes(peak)} at most" if peak else ""
    return f"\n{steps:,} steps in {human_seconds(cost['seconds'])}{memory}"


def _table(*columns: str, left: int = 1) -> Table:
    """A table whose first ``left`` columns are text and the rest numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number < left else "right", overflow="fold")
    return table


def _render(parts: Sequence[Any]) -> str:
    terminal = sys.stdout.isatty()
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=None if terminal else _PIPED_WIDTH,
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    for number, part in enumerate(parts):
        if number:
            console.print()
        console.print(part)
    text = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    return text
