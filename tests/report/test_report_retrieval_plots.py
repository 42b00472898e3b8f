"""Plots for retrieval are pictures that can be read."""

from __future__ import annotations

import base64

from limbeck.report.retrieval_plots import cosine_histogram_png, recall_curves_png


def test_plots_are_pngs() -> None:
    curves = recall_curves_png([0, 0.25, 8], {"dense": [0.1, 0.2, float("nan")]}, "r", "R@1", ("untouched", 0.1))
    histogram = cosine_histogram_png({"before": [0.1, 0.2, -0.3], "after": [0.0], "none": []}, "cosine")
    empty = cosine_histogram_png({}, "cosine")
    for picture in (curves, histogram, empty):
        assert base64.b64decode(picture, validate=True).startswith(b"\x89PNG")
    assert curves != histogram != empty
