from __future__ import annotations

import io
import re
import sys

import pytest

from limbeck.report.summary import sentence, tiles
from limbeck.report.tables import comparison_table, ranked, result_table, verdict_table
from tests.report import make


def test_the_sentence_of_a_distilled_student():
    assert sentence(make.result()) == (
        "student: 96.2 % with 2.1 k parameters, 55 times fewer than its teacher (98.4 %)"
    )


def test_the_sentence_of_other_results():
    assert "no test data" in sentence({"cost": {}})
    alone = sentence({"rows": [make.student_row()]})
    assert alone == "student: 96.2 % with 2.1 k parameters"
    several = [
        make.student_row(),
        {**make.teacher_row(), "who": "teacher 1"},
        {**make.teacher_row(), "who": "teacher 2", "accuracy": 0.97},
    ]
    assert sentence({"rows": several}).endswith("110 times fewer than its 2 teachers together (97.0 % to 98.4 %)")
    equal = [make.student_row(), {**make.teacher_row(), "parameters": 2100}]
    assert "as many as its teacher (98.4 %)" in sentence({"rows": equal})
    other = {"rows": [{"who": "generator", "frechet": 12.5}]}
    assert sentence(other) == "generator: frechet 12.5"
    assert "no measure" in sentence({"rows": [{"who": "x", "accuracy": None}]})


def test_tiles_name_factors():
    found = {label: (value, beside) for value, label, beside in tiles(make.result())}
    assert found["fewer parameters"] == ("55 ×", "2.1 k, not 116 k")
    assert found["faster"][0] == "5.2 ×"
    assert found["training time"] == ("12.5 s", "240 steps")
    assert found["student accuracy"] == ("96.2 %", "teacher: 98.4 %")


def test_a_piped_table_has_no_colour_codes_and_is_not_cut():
    text = result_table(make.result())
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    accuracy = next(line for line in text.splitlines() if line.startswith("accuracy"))
    assert accuracy.split() == ["accuracy", "↑", "96.2", "%", "98.4", "%", "-2.2", "points"]
    assert "240 steps in 12.5 s, 480 MiB at most" in text


def test_wide_results_are_not_cut_either():
    rows = [make.student_row(), *({**make.teacher_row(), "who": f"teacher number {n}"} for n in range(12))]
    text = result_table({"rows": rows})
    assert "…" not in text
    assert all(f"teacher number {n}" in text for n in range(12))
    assert max(map(len, text.splitlines())) > 150


def test_markup_in_names_is_text():
    assert "[bold]me[/bold]" in result_table({"rows": [{**make.student_row(), "who": "[bold]me[/bold]"}]})


def test_a_terminal_gets_colours_and_no_line_beyond_its_width(monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    text = verdict_table(make.entry("kd"))
    assert "\x1b[" in text
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in text.splitlines()) <= 60


def test_an_ascii_terminal_gets_ascii(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    text = comparison_table(make.comparison())
    assert text.isascii()
    assert "+/-" in text


def test_a_result_without_rows_tells_the_cost():
    assert "no test data" in result_table({"cost": make.result()["cost"]})
    assert "240 steps" in result_table({"cost": make.result()["cost"]})


@pytest.mark.parametrize(("higher", "order"), [(True, ["kd", "supervised"]), (False, ["supervised", "kd"])])
def test_ranking_follows_the_direction(higher, order):
    assert [name for name, _ in ranked(make.comparison(higher_is_better=higher))] == order


def test_methods_without_values_come_last():
    found = make.comparison()
    found["methods"] = {"broken": {"metrics": {"accuracy": [None, None, None]}, "seconds": []}, **found["methods"]}
    assert [name for name, _ in ranked(found)][-1] == "broken"
    assert "n/a" in comparison_table(found)


def test_comparison_table_shows_differences():
    text = comparison_table(make.comparison())
    kd = next(line for line in text.splitlines() if line.startswith("kd"))
    assert kd.split()[1:] == ["94.0", "±", "1.0", "%", "+3.0", "points", "[+2.0,", "+4.0]", "supervised", "5.10", "s"]
    assert "1,200 steps, 3 seeds" in text


def test_verdict_table_shows_claim_arms_checks_and_note():
    text = verdict_table(make.entry("kd", verdict="undecided"))
    for part in (
        "kd: undecided",
        "Claim of kd",
        "baseline",
        "[+1.6, +2.4]",
        "its likelihood is better",
        "Note on kd.",
        "1 min 15 s",
    ):
        assert part in text


def test_the_sentence_of_a_distilled_data_set():
    rows = [
        {"who": "distilled", "accuracy": 0.965, "samples": 100, "bytes": 6512},
        {"who": "random, same bytes", "accuracy": 0.943, "samples": 100, "bytes": 6512},
        {"who": "whole set", "accuracy": 0.985, "samples": 1000, "bytes": 65008},
    ]
    result = {"rows": rows, "share_of_real_bytes": 0.1}
    assert sentence(result) == (
        "distilled: 96.5 % from 100 samples, 10.0 % of the bytes of the real data (random, same bytes: 94.3 %; whole set: 98.5 %)"
    )
    shown = tiles(result)
    assert ("10.0 %", "share of the bytes of the real data", "100 samples") in shown
    assert ("98.5 %", "whole set", "") in shown
