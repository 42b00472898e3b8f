from __future__ import annotations

import math

import pytest

from limbeck.report.measures import contestants, measure
from limbeck.report.numbers import digits, finite, human_bytes, human_count, human_seconds, percent, times


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (438, "438"), (999, "999"), (2100, "2.1 k"), (94186, "94.2 k"), (999_999, "1 M"), (25_557_032, "25.6 M"), (None, "n/a")],
)  # fmt: skip
def test_counts(value, text):
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (512, "512 B"), (1864, "1.82 KiB"), (503463936, "480 MiB"), (2**40, "1 TiB"), (math.nan, "n/a")]
)  # fmt: skip
def test_bytes(value, text):
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (3e-6, "3.00 µs"), (0.00073, "730 µs"), (0.0042, "4.20 ms"), (1.163, "1.16 s"), (59.99, "60.0 s"),
     (125, "2 min 05 s"), (3719.6, "1 h 02 min"), (90000, "1 d 1 h"), (None, "n/a")],
)  # fmt: skip
def test_seconds(value, text):
    assert human_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.51662, "0.517"), (-12.345, "-12.3"), (1234.4, "1,234"), (0.000123, "0.000123"), (3.14e-6, "3.14e-06"), (math.inf, "n/a")],
)  # fmt: skip
def test_digits(value, text):
    assert digits(value) == text


def test_percent_times_and_finite():
    assert percent(0.9621) == "96.2 %"
    assert (times(4.13), times(55.2), times(1234)) == ("4.1", "55", "1,234")
    assert finite(True) is None
    assert finite("1") is None
    assert finite(math.nan) is None
    assert finite(3) == 3.0


def test_differences_and_intervals_carry_signs_and_units():
    accuracy, nll = measure("accuracy"), measure("nll")
    assert accuracy.difference(0.0123) == "+1.2 points"
    assert accuracy.difference(-0.05) == "-5.0 points"
    assert accuracy.difference(0.0) == "0.0 points"
    assert accuracy.interval(-0.004, 0.02) == "[-0.4, +2.0]"
    assert nll.difference(-0.03129) == "-0.0313"
    assert nll.interval(0.0, 0.02) == "[0.0000, +0.0200]"
    assert nll.interval(None, 0.5) == "[n/a, +0.500]"


def test_spread_is_mean_and_sample_deviation():
    assert measure("accuracy").spread([0.9, 0.92, 0.94]) == "92.0 ± 2.0 %"
    assert measure("nll").spread([0.3, 0.31, 0.29]) == "0.300 ± 0.010"
    assert measure("nll").spread([0.25]) == "0.250"
    assert measure("nll").spread([None]) == "n/a"


def test_versus_speaks_of_factors_for_cost_and_points_for_quality():
    assert measure("parameters").versus(100, 5500) == ("55 times fewer", "better")
    assert measure("latency").versus(0.4, 0.1) == ("4.0 times slower", "worse")
    assert measure("accuracy").versus(0.9, 0.95) == ("-5.0 points", "worse")
    assert measure("nll").versus(0.1, 0.2) == ("-0.100", "better")
    assert measure("nll").versus(0.1, 0.1) == ("same", "")
    assert measure("anything").versus(2, 1) == ("+1.00", "")
    assert measure("nll").versus(None, 1) == ("", "")


def test_an_unknown_measure_keeps_its_name_and_takes_a_direction():
    unknown = measure("frechet_distance", higher_is_better=False)
    assert (unknown.label, unknown.arrow, unknown.group) == ("frechet distance", "↓", "other measures")
    assert measure("nll", higher_is_better=True).arrow == "↑"
    assert measure("frechet_distance").arrow == ""


def test_contestants_turn_rows_into_lines_in_a_fixed_order():
    names, groups = contestants(
        [
            {"who": "student", "parameters": 10, "mine": 1.5, "accuracy": 0.5},
            {"who": "teacher", "accuracy": 0.75, "note": "x"},
        ]
    )
    assert names == ["student", "teacher"]
    assert list(groups) == ["quality", "cost", "other measures"]
    assert groups["quality"][0].values == ["50.0 %", "75.0 %"]
    assert groups["cost"][0].values == ["10", "n/a"]
    assert groups["quality"][0].versus == "-25.0 points"
