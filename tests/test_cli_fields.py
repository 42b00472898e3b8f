"""Scenes from the command line: a run and its report, a comparison, and mistakes that get one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import limbeck
from limbeck.cli import main
from limbeck.rendering.cameras import orbit
from limbeck.rendering.fields import VolumeField
from limbeck.rendering.transforms_io import write_transforms

torch.set_num_threads(1)
CLOSED = ["--prior", "closed-form", "--prior-views", "12", "--resolution", "6", "--steps", "4", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from limbeck.tasks import scenes, teachers, view_renders

    monkeypatch.setattr(scenes, "TRUE_SAMPLES", 16)
    monkeypatch.setattr(teachers, "MIN_STEPS", 10)
    monkeypatch.setattr(view_renders, "REFERENCE_AZIMUTHS", 16)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def test_a_run_of_score_distillation_has_pictures_and_a_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["run", "esd", *CLOSED, "--judge-views", "4", "--turntable-frames", "4", "--out", str(folder)]) == 0
    assert "student" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and "Turntable" in page
    assert (folder / "artifact" / "turntable.gif").read_bytes().startswith(b"GIF8")
    assert isinstance(limbeck.load(folder).content, VolumeField)
    assert main(["resume", str(folder)]) == 0


def test_a_field_is_converted_and_both_are_pictured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    small = ["--views", "4", "--test-views", "2", "--view-size", "12", "--teacher-steps", "8", "--steps", "6"]
    assert main(["run", "pvd", *small, "--turntable-frames", "2", "--out", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "teacher" in page and "Held-out views" in page
    made = limbeck.load(folder).content
    assert isinstance(made, VolumeField) and "mlp" in str(made.config())


def test_methods_are_compared_with_equal_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*CLOSED, "--seeds", "2", "--out", str(tmp_path / "c")]
    assert main(["compare", "esd", "sds", *flags]) == 0
    assert "nearest_distance" in (tmp_path / "c" / "comparison.json").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["esd", "--task", "castle"], "castle"),
        (["sds", "--prior", "no/such/pipeline"], "no/such/pipeline"),
        (["prolificdreamer", "--t-low", "0.9"], "t_high_late must be above t_low"),
        (["pvd", "--data", "/no/such/scene"], "/no/such/scene"),
        (["momentum-gs", "--task", "fox"], "--data-root"),
    ],
)
def test_mistakes_get_one_line_and_code_2(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    assert main(["run", *flags, "--steps", "2", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and len(said.strip().splitlines()) == 1


def test_a_scene_with_a_bad_pose_or_a_missing_picture_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cameras = orbit(torch.arange(6) * 60.0, width=8, height=8)
    write_transforms(tmp_path / "a", cameras, torch.rand(6, 8, 8, 3))
    (tmp_path / "a" / "images" / "0003.png").unlink()
    assert main(["run", "pvd", "--data", str(tmp_path / "a"), "--out", str(tmp_path / "r")]) == 2
    assert "images/0003.png" in capsys.readouterr().err
    cameras.c2w[2, :3, :3] *= 2
    write_transforms(tmp_path / "b", cameras, torch.rand(6, 8, 8, 3))
    assert main(["run", "pvd", "--data", str(tmp_path / "b"), "--out", str(tmp_path / "r")]) == 2
    assert "images/0002.png is no rotation" in capsys.readouterr().err
