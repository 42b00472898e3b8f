from __future__ import annotations

import math

import pytest

from limbeck.report.compare import write_comparison
from limbeck.report.strips import Strip, nice_ticks, strip_plot, tick_labels
from tests.report import make
from tests.report.pages import sound


def test_a_comparison(tmp_path):
    path = write_comparison(make.comparison(), tmp_path / "out")
    assert path == tmp_path / "out" / "comparison.html"
    page = sound(path)
    assert "supervised, kd on digits" in page.text
    assert "kd comes first with 94.0 ± 1.0 % accuracy." in page.text
    assert page.text.index("94.0 ± 1.0 %") < page.text.index("91.0 ± 1.0 %")
    assert "+3.0 points" in page.text
    assert "[+2.0, +4.0]" in page.text
    labels = [a.get("aria-label") for a in page.all("svg")]
    assert "mean accuracy against step for every method" in labels
    assert "paired differences of accuracy with 95 % intervals" in labels
    assert page.source.count("<circle") == 6 + 3


@pytest.mark.parametrize(
    ("low", "high", "reading"), [(0.01, 0.02, "better"), (-0.02, -0.01, "worse"), (-0.01, 0.01, "no clear difference")]
)
def test_a_difference_is_read_by_its_interval(tmp_path, low, high, reading):
    difference = {
        "method": "kd",
        "baseline": "supervised",
        "mean": 0.0,
        "low": low,
        "high": high,
        "per_seed": [0.0] * 3,
    }
    page = sound(write_comparison(make.comparison(differences=[difference]), tmp_path))
    assert f">{reading}</td>" in page.source


def test_what_is_absent_is_left_out(tmp_path):
    found = make.comparison(differences=[], settings={}, task={"name": "<x>"})
    for method in found["methods"].values():
        method["curve"] = []
    page = sound(write_comparison(found, tmp_path))
    assert "Learning curves" not in page.text
    assert "Paired differences" not in page.text
    assert "<x>" in page.text


def test_more_methods_than_colours(tmp_path):
    found = make.comparison()
    found["methods"] = {f"m{n}": found["methods"]["kd"] for n in range(11)}
    page = sound(write_comparison(found, tmp_path))
    assert "stroke-dasharray" in page.source
    assert all(f"m{n}" in page.text for n in range(11))


# ---- strips --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3, 12, [0, 5, 10]), (0.9, 0.95, [0.9, 0.91, 0.92, 0.93, 0.94, 0.95])],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_tick_labels_have_the_decimals_they_need():
    assert tick_labels([0.9, 0.92, 0.94]) == ["0.90", "0.92", "0.94"]
    assert tick_labels([-5, 0, 5], signed=True) == ["-5", "0", "+5"]
    assert tick_labels([0, 5000, 10000]) == ["0", "5,000", "10,000"]
    assert tick_labels([0.7]) == ["0.7"]
    assert tick_labels([]) == []


def test_positions_are_linear_in_the_values():
    import re

    svg = str(strip_plot([Strip("a", [0.0, 5.0, 10.0], 5.0)], "t"))
    x = [float(v) for v in re.findall(r'<circle cx="([\d.]+)"', svg)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.02)
    assert x[0] < x[1]
    mean = re.search(r'class="mean" x1="([\d.]+)"', svg)
    assert mean is not None
    assert float(mean.group(1)) == pytest.approx(x[1])


def test_strips_survive_equal_and_absent_values():
    assert "<circle" in strip_plot([Strip("a", [2.0, 2.0], 2.0)], "t")
    assert strip_plot([Strip("a", [math.nan])], "t") == ""
    assert strip_plot([], "t") == ""
    assert "&lt;b&gt;" in strip_plot([Strip("<b>", [1.0, 2.0])], "t")
