"""How a search is shown: its course, its scores, what its candidates cost, and a table of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.blocks.evolution import Evolution
from limbeck.blocks.scored_search import ScoredSearch
from limbeck.blocks.search_spaces import Code
from limbeck.report.search_plots import front_png, history_png, score_scatter_png


def search_pictures(
    record: ScoredSearch, sizes: Mapping[Code, int], members: Mapping[str, Code], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """The course of the search, its scores, their costs, and the cost and accuracy of what was trained.

    Args:
        record: what was judged.
        sizes: parameters of every judged candidate.
        members: candidates that were trained, by role.
        rows: of a result, with ``who``, ``parameters`` and ``accuracy``.
    """
    joined, codes = record.joined(), list(record.scores)
    history = [joined[code] for code, _ in record.searcher.history]
    children = record.searcher.population if isinstance(record.searcher, Evolution) else None
    costs, worth = [sizes[code] for code in codes], [joined[code] for code in codes]
    panels = {name: [record.scores[code][name] for code in codes] for name in record.scores[codes[0]]}
    marks = {role: codes.index(code) for role, code in members.items()}
    trained = {str(row["who"]): (float(row["parameters"]), float(row["accuracy"])) for row in rows}
    scatter = score_scatter_png(
        panels, worth, worth_label="joined score", colours=costs, colour_label="parameters", marks=marks
    )
    named = {role: (float(costs[n]), worth[n]) for role, n in marks.items()}
    limit = record.searcher.budget.most.get("parameters")
    return [
        {
            "title": "The search",
            "caption": f"{len(history)} candidates, {len(codes)} different ones; none was trained.",
            "png": history_png(history, again_from=children),
        },
        {
            "title": "What candidates scored",
            "caption": "Each score against the joined one.",
            "png": scatter,
        },
        {
            "title": "Cost and score",
            "caption": "All judged candidates; the line joins those than which none is both smaller and better.",
            "png": front_png(costs, worth, worth_label="joined score", marks=named, limit=limit),
        },
        {
            "title": "Cost and accuracy",
            "caption": "What was trained, on test data.",
            "png": front_png([c for c, _ in trained.values()], [a for _, a in trained.values()], marks=trained),
        },
    ]


def search_table(record: ScoredSearch, sizes: Mapping[Code, int]) -> dict[str, Any]:
    """Every judged candidate with its options, scores and parameters, best first; values for JSON (null for what is infinite)."""
    space, joined = record.searcher.space, record.joined()
    return {
        "space": space.name,
        "combine": record.config.combine,
        "candidates": [
            {
                "options": space.options(code),
                "scores": {name: _finite(value) for name, value in record.scores[code].items()},
                "score": _finite(joined[code]),
                "parameters": sizes[code],
            }
            for code in sorted(joined, key=lambda c: -joined[c])
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
