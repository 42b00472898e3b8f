"""A run's result in one sentence and a few figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.report.measures import measure
from limbeck.report.numbers import finite, human_count, human_seconds, percent, times

_SHARE = "share_of_real_bytes"


def sentence(result: Mapping[str, Any]) -> str:
    """What came out, for a reader in a hurry.

    ``student: 96.2 % with 2.1 k parameters, 55 times fewer than its teacher (98.4 %)``. Families without accuracies name
    the first measure instead; a distilled data set is named beside what it was compared with; a result that judged nothing says so.
    """
    rows = result.get("rows") or []
    if not rows:
        return "nothing was judged: the run had no test data"
    first = rows[0]
    key = _headline(first)
    if key is None:
        return f"{first.get('who', 'result')}: no measure is a finite number"
    shown = measure(key)
    text = f"{first.get('who', 'result')}: {_named(key, first[key])}"
    share = finite(result.get(_SHARE))
    if share is not None:  # data was distilled: what counts is what stands beside it
        samples = human_count(finite(first.get("samples")))
        others = "; ".join(f"{row.get('who')}: {shown.text(row.get(key))}" for row in rows[1:])
        return f"{text} from {samples} samples, {percent(share)} of the bytes of the real data" + f" ({others})" * bool(
            others
        )
    if finite(first.get("nfe")) is not None:  # a sampler: what counts is how often the network is asked
        return text + _against_evaluations(rows, key)
    size = finite(first.get("parameters"))
    if size is not None:
        text += f" with {human_count(size)} parameters"
    teachers = [row for row in rows[1:] if str(row.get("who", "")).startswith("teacher")]
    if len(teachers) == 1:
        text += _against(size, finite(teachers[0].get("parameters")), "its teacher", shown.text(teachers[0].get(key)))
    elif teachers:
        sizes = [finite(t.get("parameters")) for t in teachers]
        total = None if None in sizes else sum(s for s in sizes if s is not None)
        values = [v for v in (finite(t.get(key)) for t in teachers) if v is not None]
        spread = f"{shown.text(min(values))} to {shown.text(max(values))}" if values else "n/a"
        text += _against(size, total, f"its {len(teachers)} teachers together", spread)
    return text


def tiles(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures at the head of a report: (value, what it is, beside what)."""
    rows = result.get("rows") or []
    found: list[tuple[str, str, str]] = []
    if rows:
        first, other = rows[0], rows[1] if len(rows) == 2 else {}
        key = _headline(first)
        if key is not None:
            shown = measure(key)
            beside = f"{other['who']}: {shown.text(other.get(key))}" if other else ""
            found.append((shown.text(first[key]), f"{first.get('who', '')} {shown.label}".strip(), beside))
        found += _ratio(first, other, "parameters", "fewer parameters", "more parameters")
        found += _ratio(first, other, "latency", "faster", "slower")
        if finite(first.get("nfe")) is not None and len(rows) > 1:  # a sampler, beside the many-step teacher
            found += _ratio(first, rows[-1], "nfe", "fewer network evaluations", "more network evaluations")
            found += _ratio(first, rows[-1], "seconds_per_sample", "faster", "slower")
    share = finite(result.get(_SHARE))
    if share is not None:
        found.append((percent(share), measure(_SHARE).label, f"{human_count(finite(rows[0].get('samples')))} samples"))
        key = _headline(rows[0])
        found += [(measure(key).text(row.get(key)), str(row.get("who")), "") for row in rows[1:] if key is not None]
    same = finite((result.get("agreement") or {}).get("top1_agreement"))
    if same is not None:
        found.append((percent(same), "same answers as the teacher", ""))
    cost = result.get("cost") or {}
    if finite(cost.get("seconds")) is not None:
        steps = sum(int(stage.get("steps", 0)) for stage in (cost.get("stages") or {}).values())
        found.append((human_seconds(cost["seconds"]), "training time", f"{steps:,} steps"))
    return found


def _against_evaluations(rows: list[Mapping[str, Any]], key: str) -> str:
    """How many evaluations a sampler takes, beside the others."""
    shown = measure(key)
    own = finite(rows[0]["nfe"]) or 0.0
    text = f" in {_evaluations(own)}"
    others = [
        f"{row.get('who')}: {shown.text(row.get(key))} in {_evaluations(finite(row.get('nfe')) or 0.0)}"
        for row in rows[1:]
    ]
    return text + f" ({'; '.join(others)})" * bool(others)


def _evaluations(count: float) -> str:
    return f"{count:.0f} network evaluation{'s' * (count != 1)}"


def _headline(row: Mapping[str, Any]) -> str | None:
    if finite(row.get("accuracy")) is not None:
        return "accuracy"
    quality = [k for k, v in row.items() if finite(v) is not None and measure(k).group not in ("cost",)]
    return quality[0] if quality else None


def _named(key: str, value: Any) -> str:
    text = measure(key).text(value)
    return text if key == "accuracy" else f"{measure(key).label} {text}"


def _against(size: float | None, other: float | None, whom: str, quality: str) -> str:
    if size is None or other is None or min(size, other) <= 0:
        return f"; {whom}: {quality}"
    if size == other:
        return f", as many as {whom} ({quality})"
    factor, word = max(size, other) / min(size, other), "fewer" if size < other else "more"
    return f", {times(factor)} times {word} than {whom} ({quality})"


def _ratio(
    first: Mapping[str, Any], other: Mapping[str, Any], key: str, less: str, more: str
) -> list[tuple[str, str, str]]:
    a, b = finite(first.get(key)), finite(other.get(key))
    if a is None or b is None or min(a, b) <= 0 or a == b:
        return []
    shown = measure(key)
    return [(f"{times(max(a, b) / min(a, b))} ×", less if a < b else more, f"{shown.text(a)}, not {shown.text(b)}")]
