"""The scoreboard: every method of the catalogue with the verdict on its claim.

``python -m limbeck.report.scoreboard README.md scoreboard`` renews the table between the two markers of a README;
``--check`` changes nothing and exits with 1 where the table is out of step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from limbeck import catalogue
from limbeck.catalogue import Card
from limbeck.core.errors import InputError, LimbeckError, RunError
from limbeck.core.files import explained, read_json, write_text
from limbeck.report.measures import Measure, measure
from limbeck.report.numbers import finite, human_seconds
from limbeck.report.page import write_page
from limbeck.report.strips import Strip, small_interval, strip_plot

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
VERDICTS = ("holds", "fails", "undecided")
NOT_MEASURED = "not measured"

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "name": str,
    "title": str,
    "claim": str,
    "verdict": str,
    "metric": str,
    "higher_is_better": bool,
    "arms": dict,
    "difference": dict,
    "checks": list,
    "seeds": list,
    "data": dict,
}
_PAIR = ("method", "baseline", "metric", "per_seed", "mean", "low", "high")


def read_scoreboard(folder: str | Path) -> list[dict[str, Any]]:
    """All results in a folder, sorted by name. Files whose name starts with a dot or underscore are left alone.

    Raises:
        RunError: no such folder, or a damaged file: not JSON, a field missing or of a wrong type, a name that is not the
            file's, arms or checks that do not fit together.
    """
    where = Path(folder).expanduser()
    if not where.is_dir():
        raise RunError(f"{where} is not a folder: run 'limbeck verify NAME' first, or say where the results are")
    return [_read(file) for file in sorted(where.glob("*.json")) if file.name[0] not in "._"]


def write_scoreboard(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of all verdicts.

    Args:
        folder: with ``NAME.json`` files.
        out: the HTML file; None: ``index.html`` in the folder.

    Returns:
        where the page is.

    Raises:
        RunError: see :func:`read_scoreboard`; or the page cannot be written.
    """
    results = {r["name"]: r for r in read_scoreboard(folder)}
    entries = [_entry(card, results.pop(name, None)) for name, card in catalogue.cards().items()]
    entries += [_entry(None, result) for result in results.values()]  # measured, but not in the catalogue
    states = [*VERDICTS, NOT_MEASURED]
    counts = {state: sum(e["verdict"] == state for e in entries) for state in states}
    dates = sorted(e["date"] for e in entries if e["date"])
    return write_page(
        Path(folder).expanduser() / "index.html" if out is None else Path(out).expanduser(),
        "scoreboard.html",
        entries=entries,
        counts=counts,
        families=list(dict.fromkeys(e["family"] for e in entries)),
        dates=(dates[0], dates[-1]) if dates else None,
    )


def ground_of(data: Mapping[str, Any]) -> str:
    """What a result was measured on: the data set's name, or the generated and real ones where there are several."""
    several = [data.get("generated", ""), *data.get("real", ())]
    return str(data.get("name") or "; ".join(filter(None, several)))


def readme_table(folder: str | Path) -> str:
    """The methods as a Markdown table: what each does, its paper, the verdict, the difference, the data.

    Raises:
        RunError: see :func:`read_scoreboard`.
    """
    results = {r["name"]: r for r in read_scoreboard(folder)}
    lines = [
        "| method | what it does | paper | verdict | difference (positive is better) | data |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, card in catalogue.cards().items():
        result = results.get(name)
        source = card.implementation.partition(":")[0].replace(".", "/") + ".py"
        verdict, difference, data = NOT_MEASURED, "", ""
        if result is not None:
            shown, d, count = _shown(result), result["difference"], len(result["seeds"])
            verdict, data = f"**{result['verdict']}**", ground_of(result["data"])
            difference = (
                f"{shown.label} {shown.difference(d['mean'])} {shown.interval(d['low'], d['high'])}, {count} seeds"
            )
        cells = (f"[{name}]({source})", card.summary, f"{card.paper} ({card.year})", verdict, difference, data)
        lines.append("| " + " | ".join(_markdown(cell) for cell in cells) + " |")
    return "\n".join(lines)


def update_readme(readme_path: str | Path, folder: str | Path) -> bool:
    """Put :func:`readme_table` between the markers of a README.

    Returns:
        whether the file changed.

    Raises:
        InputError: no such file, or it lacks the markers.
        RunError: see :func:`read_scoreboard`; or the file cannot be written.
    """
    path = Path(readme_path)
    before, after = _renewed(path, folder)
    if before == after:
        return False
    write_text(path, after)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this module; returns the exit code."""
    parser = argparse.ArgumentParser("python -m limbeck.report.scoreboard", description="Renew a README's table.")
    parser.add_argument("readme", type=Path, help="file with the markers")
    parser.add_argument("folder", type=Path, help="folder with NAME.json files")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the table is out of step")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            before, after = _renewed(options.readme, options.folder)
            if before != after:
                print(
                    f"{options.readme} is out of step with {options.folder}: run this without --check", file=sys.stderr
                )
                return 1
            return 0
        changed = update_readme(options.readme, options.folder)
    except LimbeckError as error:
        print(f"limbeck: {error}", file=sys.stderr)
        return 2
    print(f"{options.readme}: {'renewed' if changed else 'in step'}")
    return 0


# ---- reading -------------------------------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Any]:
    result = read_json(file)
    problem = _problem(result, file.stem)
    if problem:
        raise RunError(f"{file} is damaged: {problem}; measure it again with 'limbeck verify {file.stem}'")
    return dict(result)


def _problem(result: Any, name: str) -> str | None:
    """What is wrong with a result, or None."""
    if not isinstance(result, dict):
        return "it holds no object"
    for field, kind in _FIELDS.items():
        if field not in result:
            return f"'{field}' is missing"
        if not isinstance(result[field], kind):
            return f"'{field}' has a wrong type"
    if result["name"] != name:
        return f"its name is '{result['name']}'"
    if result["verdict"] not in VERDICTS:
        return f"unknown verdict '{result['verdict']}'"
    seeds = len(result["seeds"])
    for arm, found in result["arms"].items():
        if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict) or "role" not in found:
            return f"arm '{arm}' has no metrics or no role"
        wrong = [m for m, v in found["metrics"].items() if not isinstance(v, list) or len(v) != seeds]
        if wrong:
            return f"arm '{arm}' has not one '{wrong[0]}' for each of {seeds} seeds"
    for number, pair in enumerate([result["difference"], *result["checks"]]):
        what = "the difference" if number == 0 else f"check {number}"
        lacking = [f for f in _PAIR if not isinstance(pair, dict) or f not in pair]
        if lacking:
            return f"{what} lacks '{lacking[0]}'"
        if any(finite(pair[f]) is None for f in ("mean", "low", "high")):
            return f"{what} has a value that is no finite number"
        for arm in [arm for side in ("method", "baseline") for arm in pair[side].split(" - ")]:
            if pair["metric"] not in result["arms"].get(arm, {}).get("metrics", {}):
                return f"{what} speaks of '{pair['metric']}' of an arm '{arm}' that has none"
        if number and pair.get("verdict") not in VERDICTS:
            return f"{what} has no verdict"
    return None


# ---- what the page shows -------------------------------------------------------------------------------------------------


def _entry(card: Card | None, result: Mapping[str, Any] | None) -> dict[str, Any]:
    """One row of the page, with its details."""
    name = card.name if card is not None else str((result or {})["name"])
    entry: dict[str, Any] = {
        "name": name,
        "title": card.title if card is not None else (result or {})["title"],
        "family": card.family if card is not None else "not in the catalogue",
        "paper": f"{card.paper} ({card.year})" if card is not None else "",
        "summary": card.summary if card is not None else "",
        "baseline": card is not None and card.baseline,
        "claim": result["claim"] if result is not None else card.claim if card is not None else "",
        "verdict": NOT_MEASURED,
        "date": None,
        "result": None,
    }
    if result is None:
        return entry
    shown, d = _shown(result), result["difference"]
    values = {role: _mean(result["arms"][d[role]]["metrics"][d["metric"]]) for role in ("method", "baseline")}
    entry.update(
        verdict=result["verdict"],
        date=result.get("date"),
        result={
            "metric": f"{shown.label} {shown.arrow}",
            "method": {"text": shown.text(values["method"]), "sort": values["method"]},
            "baseline": {"text": shown.text(values["baseline"]), "sort": values["baseline"]},
            "against": d["baseline"],
            "difference": shown.difference(d["mean"]),
            "interval": shown.interval(d["low"], d["high"]),
            "sort": d["mean"],
            "picture": small_interval(d["mean"], d["low"], d["high"], result["verdict"]),
            "seeds": result["seeds"],
            "data": ground_of(result["data"]),
            "note": result.get("note") or "",
            "arms": _arms(result),
            "arm_plot": _arm_plot(result, shown),
            "checks": [_check(c) for c in result["checks"]],
            "check_plots": _check_plots(result),
            "facts": _facts(result),
        },
    )
    return entry


def _shown(result: Mapping[str, Any]) -> Measure:
    return measure(result["difference"]["metric"], result["higher_is_better"])


def _mean(values: Sequence[Any]) -> float | None:
    numbers = [v for v in map(finite, values) if v is not None]
    return fmean(numbers) if numbers else None


def _arms(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, arm in result["arms"].items():
        lines = [
            {
                "label": measure(m).label,
                "values": [measure(m).text(v) for v in values],
                "spread": measure(m).spread(values),
            }
            for m, values in arm["metrics"].items()
        ]
        settings = ", ".join(f"{k} {v}" for k, v in (arm.get("settings") or {}).items())
        tried = int(arm.get("candidates") or 1)
        if tried > 1:
            settings = f"{settings or 'defaults'} (chosen of {tried})"
        found.append(
            {
                "name": name,
                "role": arm["role"],
                "description": arm.get("description", ""),
                "settings": settings,
                "lines": lines,
            }
        )
    return found


def _arm_plot(result: Mapping[str, Any], shown: Measure) -> Any:
    strips = []
    for name, arm in result["arms"].items():
        values = [v for v in map(finite, arm["metrics"].get(shown.name, [])) if v is not None]
        strips.append(Strip(f"{name} ({arm['role']})", values, _mean(values), style=arm["role"]))
    return strip_plot(
        strips,
        f"{shown.label} of every arm, a dot per seed",
        axis=shown.axis(),
        scale=shown.scale,
        text=shown.text,
        seeds=result["seeds"],
    )


def _side(name: str) -> str:
    """One side of a check; in brackets if it is itself the difference of two arms."""
    return f"({name})" if " - " in name else name


def _check(check: Mapping[str, Any]) -> dict[str, Any]:
    shown = measure(check["metric"], check.get("higher_is_better"))
    margin = finite(check.get("margin")) or 0.0
    return {
        "statement": check.get("statement", ""),
        "pair": f"{_side(check['method'])} - {_side(check['baseline'])}",
        "metric": shown.label,
        "difference": shown.difference(check["mean"]),
        "interval": shown.interval(check["low"], check["high"]),
        "margin": shown.difference(margin) if margin else "0",
        "verdict": check["verdict"],
        "headline": check.get("headline", True),
    }


def _check_plots(result: Mapping[str, Any]) -> list[Any]:
    """One plot per measure, since differences of different measures share no axis."""
    by_metric: dict[str, list[Mapping[str, Any]]] = {}
    for check in result["checks"]:
        by_metric.setdefault(check["metric"], []).append(check)
    plots = []
    for metric, checks in by_metric.items():
        shown = measure(metric)
        strips = [
            Strip(
                f"{c['method']} against {c['baseline']}",
                [v for v in map(finite, c["per_seed"]) if v is not None],
                c["mean"],
                c["low"],
                c["high"],
                c["verdict"],
            )
            for c in checks
        ]
        margins = {finite(c.get("margin")) or 0.0 for c in checks}
        plots.append(
            strip_plot(
                strips,
                f"paired differences of {shown.label} with 95 % intervals",
                axis=shown.axis(difference=True),
                scale=shown.scale,
                signed=True,
                text=shown.difference,
                seeds=result["seeds"],
                marks=sorted({0.0, *margins}),
            )
        )
    return plots


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = {k: v for k, v in result["data"].items() if v is not None}
    facts = [(k.replace("_", " "), _plain(v)) for k, v in data.items()]
    if result.get("settings"):
        facts.append(("settings", ", ".join(f"{k} {_plain(v)}" for k, v in result["settings"].items())))
    facts.append(("seeds", ", ".join(map(str, result["seeds"]))))
    if result.get("tuning_seeds"):
        facts.append(("seeds for tuning", ", ".join(map(str, result["tuning_seeds"]))))
    facts.append(("measured in", human_seconds(finite(result.get("seconds")))))
    facts += [(k, str(result[k])) for k in ("date", "commit", "limbeck") if result.get(k)]
    return facts


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " × ".join(map(str, value)) if all(isinstance(v, int) for v in value) else ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ---- the README ----------------------------------------------------------------------------------------------------------


def _renewed(path: Path, folder: str | Path) -> tuple[str, str]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: name the README that holds the markers")
    with explained(path):
        before = path.read_text(encoding="utf-8")
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(BEGIN) > before.index(END):
        raise InputError(f"{path} must hold {BEGIN} and after it {END}, once each")
    head, rest = before.split(BEGIN)
    return before, f"{head}{BEGIN}\n{readme_table(folder)}\n{END}{rest.split(END)[1]}"


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
