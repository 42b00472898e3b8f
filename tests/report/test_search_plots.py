"""Pictures of searches are pictures, also where scores are infinite."""

from __future__ import annotations

import base64
import math

from limbeck.report.search_plots import cost_front, front_png, history_png, score_scatter_png


def is_png(text: str) -> bool:
    return base64.b64decode(text).startswith(b"\x89PNG")


def test_the_front_is_what_nothing_is_cheaper_and_better_than():
    costs, worth = [3, 1, 2, 2, 5], [0.7, 0.5, 0.4, 0.6, 0.7]
    assert cost_front(costs, worth) == [1, 3, 0]
    assert cost_front([], []) == []


def test_pictures_are_drawn():
    scores = {"a": [1.0, 2.0, -math.inf, 0.5], "b": [0.0, 0.0, 0.0, 0.0]}
    worth = [0.5, 0.6, 0.1, -math.inf]
    marks = {"best": 1, "lost": 2}
    assert is_png(score_scatter_png(scores, worth, notes={"a": "tau 0.3"}, colours=[1, 2, 3, 4], marks=marks))
    assert is_png(score_scatter_png({"a": scores["a"]}, worth))
    assert is_png(history_png(scores["a"], again_from=2)) and is_png(history_png([-math.inf]))
    assert is_png(front_png([1, 10, 100, 3], worth, marks={"it": (10, 0.6)}, limit=50))
    assert is_png(front_png([1], [-math.inf]))
