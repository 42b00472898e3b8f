"""Histograms are pictures, with and without values."""

from __future__ import annotations

import base64

import pytest

from limbeck.report.histograms import histogram_png


@pytest.mark.parametrize("groups", [{"a": [0.1, 0.9], "b": [0.5]}, {"a": [0.0, 1.0], "b": []}, {}])
def test_a_histogram_is_a_png(groups):
    assert base64.b64decode(histogram_png(groups, "x")).startswith(b"\x89PNG")


def test_other_values_give_another_picture():
    assert histogram_png({"a": [0.1] * 5}, "x") != histogram_png({"a": [0.9] * 5}, "x")
