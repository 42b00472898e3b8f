from __future__ import annotations

import json

import pytest

from limbeck import catalogue
from limbeck.core.errors import InputError, RunError
from limbeck.report import scoreboard
from limbeck.report.scoreboard import (
    BEGIN,
    END,
    ground_of,
    read_scoreboard,
    readme_table,
    update_readme,
    write_scoreboard,
)
from tests.report import make
from tests.report.pages import sound


@pytest.fixture
def three(monkeypatch):
    """A catalogue of three methods."""
    cards = {n: make.card(n, f) for n, f in (("alpha", "models"), ("beta", "models"), ("gamma", "datasets"))}
    monkeypatch.setattr(catalogue, "cards", lambda: cards)
    return cards


def test_results_come_sorted_and_other_files_are_left_alone(tmp_path):
    folder = make.scoreboard_folder(tmp_path, make.entry("beta"), make.entry("alpha"))
    (folder / ".half.json").write_text("{")
    (folder / "_notes.json").write_text("{")
    (folder / "index.html").write_text("")
    assert [r["name"] for r in read_scoreboard(folder)] == ["alpha", "beta"]


def _without(field):
    return lambda e: e.pop(field)


def _set(*keys_and_value):
    *keys, value = keys_and_value

    def change(e):
        for key in keys[:-1]:
            e = e[key]
        e[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("claim"), "'claim' is missing"),
        (_without("arms"), "'arms' is missing"),
        (_set("seeds", 3), "'seeds' has a wrong type"),
        (_set("name", "other"), "its name is 'other'"),
        (_set("verdict", "maybe"), "unknown verdict 'maybe'"),
        (_set("arms", "plain", "metrics", "accuracy", [0.1]), "arm 'plain' has not one 'accuracy' for each of 3 seeds"),
        (_set("arms", "plain", {}), "arm 'plain' has no metrics"),
        (_set("difference", "mean", None), "the difference has a value that is no finite number"),
        (_set("difference", "baseline", "gone"), "an arm 'gone'"),
        (_set("difference", {}), "the difference lacks 'method'"),
        (_set("checks", 0, "verdict", ""), "check 1 has no verdict"),
        (_set("checks", [3]), "check 1 lacks"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, change, message):
    entry = make.entry("kd")
    change(entry)
    (tmp_path / "kd.json").write_text(json.dumps(entry))
    with pytest.raises(RunError, match=rf"kd\.json is damaged: .*{message}.*limbeck verify kd"):
        read_scoreboard(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_file_that_is_no_object_is_named(tmp_path, text):
    (tmp_path / "kd.json").write_text(text)
    with pytest.raises(RunError, match=r"kd\.json"):
        read_scoreboard(tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(RunError, match="not a folder"):
        write_scoreboard(tmp_path / "none")


def test_every_method_has_a_row(tmp_path, three):
    folder = make.scoreboard_folder(
        tmp_path, make.entry("alpha", 0.02), make.entry("beta", -0.01, "fails"), make.entry("stray", 0.0, "undecided")
    )
    path = write_scoreboard(folder)
    assert path == folder / "index.html"
    page = sound(path)
    rows = [(a["id"], a["data-verdict"], a["data-family"]) for a in page.all("tbody") if a.get("class") == "entry"]
    assert rows == [
        ("alpha", "holds", "models"),
        ("beta", "fails", "models"),
        ("gamma", "not measured", "datasets"),
        ("stray", "undecided", "not in the catalogue"),
    ]
    assert "4 of 4" in page.text
    assert "+2.0 points" in page.text
    assert "[−1.4, −0.6]" in page.text
    assert "limbeck verify gamma" in page.text
    sorts = [a["data-sort"] for a in page.all("td") if a.get("data-label") == "Difference"]
    assert sorts == ["0.02", "-0.01", "", "0.0"]


def test_details_hold_every_value_check_and_fact(tmp_path, three):
    page = sound(write_scoreboard(make.scoreboard_folder(tmp_path, make.entry("alpha"))))
    for part in (
        "91.6 %",
        "93.0 %",
        "its likelihood is better",
        "(does not decide)",
        "lr 0.01 (chosen of 3)",
        "Note on alpha.",
    ):
        assert part in page.text
    for fact in ("0123456789ab", "2026-02-03", "1 min 15 s", "1,000"):
        assert fact in page.text
    labels = [a.get("aria-label") for a in page.all("svg")]
    assert "accuracy of every arm, a dot per seed" in labels
    assert "paired differences of NLL with 95 % intervals" in labels
    assert page.source.count("<circle") == 1 + 2 * 3 + 2 * 3  # the small interval, two arms, two checks
    assert "seed 2: 92.9 %" in page.text


def test_an_empty_folder_gives_a_page_of_unmeasured_methods(tmp_path, three):
    page = sound(write_scoreboard(tmp_path, tmp_path / "page.html"))
    assert [a["data-verdict"] for a in page.all("tbody") if a.get("class") == "entry"] == ["not measured"] * 3


def test_text_is_escaped(tmp_path, three):
    hostile = '"><script>alert(1)</script>'
    entry = make.entry("alpha", claim=hostile, note=hostile, data={"name": hostile})
    entry["arms"]["plain"]["description"] = hostile
    entry["checks"][0]["statement"] = hostile
    page = sound(write_scoreboard(make.scoreboard_folder(tmp_path, entry)))
    assert len(page.all("script")) == 1
    assert page.text.count(hostile) >= 5


def test_values_that_are_null_are_shown_as_absent(tmp_path, three):
    entry = make.entry("alpha")
    entry["arms"]["alpha"]["metrics"]["accuracy"] = [None, 0.93, None]
    assert "n/a" in sound(write_scoreboard(make.scoreboard_folder(tmp_path, entry))).text


# ---- README --------------------------------------------------------------------------------------------------------------


def test_the_readme_table(tmp_path, three):
    entry = make.entry("beta", -0.01, "fails")
    lines = readme_table(make.scoreboard_folder(tmp_path, entry)).splitlines()
    assert len(lines) == 5
    assert lines[3] == (
        "| [beta](limbeck/methods/models/beta.py) | What beta does \\| in short. | Paper of beta (2020) "
        "| **fails** | accuracy -1.0 points [-1.4, -0.6], 3 seeds | digits |"
    )
    assert lines[4].endswith("| not measured |  |  |")
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_the_readme_is_renewed_between_its_markers_only(tmp_path, three):
    folder = make.scoreboard_folder(tmp_path / "s", make.entry("alpha"))
    readme = tmp_path / "README.md"
    readme.write_text(f"# Head\n{BEGIN}\nold\n{END}\ntail {{}} \\1\n")
    assert update_readme(readme, folder) is True
    assert readme.read_text() == f"# Head\n{BEGIN}\n{readme_table(folder)}\n{END}\ntail {{}} \\1\n"
    assert update_readme(readme, folder) is False


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_readme_without_its_markers_is_an_error(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(InputError, match="methods:begin"):
        update_readme(readme, tmp_path)
    assert readme.read_text() == text


def test_from_the_shell(tmp_path, three, capsys):
    folder = make.scoreboard_folder(tmp_path / "s", make.entry("alpha"))
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    arguments = [str(readme), str(folder)]
    assert scoreboard.main([*arguments, "--check"]) == 1
    assert readme.read_text() == f"{BEGIN}\n{END}\n"
    assert "out of step" in capsys.readouterr().err
    assert scoreboard.main(arguments) == 0
    assert scoreboard.main([*arguments, "--check"]) == 0
    assert scoreboard.main([str(tmp_path / "gone.md"), str(folder)]) == 2
    assert "gone.md" in capsys.readouterr().err


def test_the_ground_is_named_where_there_are_several() -> None:
    assert ground_of({"name": "digits", "train": 3}) == "digits"
    assert ground_of({"generated": "blocks", "real": ["cora", "yeast"]}) == "blocks; cora; yeast"
    assert ground_of({}) == ""
