"""Dataset distillation from the command line: a run, its report, and mistakes that get one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limbeck import catalogue
from limbeck.cli import main

FEW = ["--ipc", "2", "--steps", "3", "--batch-real", "4", "--judge-steps", "3", "--judge-seeds", "1"]


@pytest.mark.parametrize("name", list(catalogue.cards()))
def test_every_method_lists_its_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", name, "--help"]) == 0
    assert "--seed" in capsys.readouterr().out


def test_a_run_reports_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["run", "datadam", *FEW, "--network", "convnet-w4-d2", "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "random, same bytes" in said and "whole set" in said and "of the bytes of the real data" in said
    page = (folder / "report.html").read_text()
    assert "Distilled images" in page and "data:image/png;base64," in page
    assert main(["resume", str(folder)]) == 0
    assert main(["show", "datadam"]) == 0


def images(folder: Path, sides: tuple[int, ...]) -> Path:
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(8):
            side = sides[number % len(sides)]
            Image.fromarray(np.full((side, side), 30 * number, dtype=np.uint8)).save(folder / label / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("what", "flags", "message"),
    [
        ("empty", [], "holds no files"),
        ("mixed", [], "mixed sizes"),
        ("plain", ["--ipc", "50"], "ipc 50 is more than the"),
        ("plain", ["--ipc", "2", "--diffaug", "crops"], "unknown augmentation 'crops'; did you mean crop?"),
        ("plain", ["--ipc", "2", "--judge-networks", "nothing"], "unknown network 'nothing'"),
        ("plain", ["--ipc", "2", "--factor", "3"], "cannot be cut into 3x3"),
    ],
)
def test_mistakes_get_one_line(
    what: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    if what == "empty":
        folder.mkdir()
    else:
        images(folder, (8, 12) if what == "mixed" else (8,))
    assert main(["run", "datadam", "--data", str(folder), *flags, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1


def test_one_class_only_and_tables_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "data", (8,))
    for file in (folder / "b").iterdir():
        file.unlink()
    (folder / "b").rmdir()
    assert main(["run", "dm", "--data", str(folder), "--ipc", "1", "--out", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main(["run", "datadam", "--task", "wine", "--ipc", "1", "--out", str(tmp_path / "run")]) == 2
    assert "distils images" in capsys.readouterr().err
