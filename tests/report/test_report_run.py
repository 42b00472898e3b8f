from __future__ import annotations

import base64
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from limbeck.core.errors import RunError
from limbeck.report.figures import Curve, line_figure, matrix_png, thinned
from limbeck.report.reproduce import command, settings_of
from limbeck.report.run import stage_panels, write_run_report
from tests.report import make
from tests.report.pages import sound

DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def test_a_finished_run(tmp_path):
    folder = make.run_folder(tmp_path / "run", make.result())
    path = write_run_report(folder)
    assert path == folder / "report.html"
    page = sound(path)
    assert "Knowledge distillation on digits" in page.text
    assert "Student: 96.2 % with 2.1 k parameters, 55 times fewer than its teacher (98.4 %)." in page.text
    assert "2026-02-03" in page.text
    for measure in (
        "accuracy",
        "adaptive ECE",
        "FLOPs per sample",
        "latency, batch of 64",
        "same answers as the teacher",
    ):
        assert measure in page.text
    charts = [a["aria-label"] for a in page.all("svg") if a.get("class") == "chart"]
    assert charts == [
        f"{name} against step, stage distillation" for name in ("loss", "ce", "accuracy", "NLL", "learning rate")
    ]
    assert "has not ended" not in page.text
    assert "Pictures" not in page.text


def test_text_from_files_is_escaped(tmp_path):
    hostile = "<script>alert(1)</script>"
    folder = make.run_folder(
        tmp_path / "run",
        make.result(confusion={"labels": [hostile, "b"], "matrix": [[3, 1], [0, 4]]}),
        task={"name": hostile, "source": hostile},
        method=hostile,
        rows=[{"stage": hostile, "step": 1, "split": "train", hostile: 1.0, "loss": 2.0}],
    )
    page = sound(write_run_report(folder))
    assert page.all("script") == []
    assert hostile in page.text


def test_a_run_that_has_not_ended(tmp_path):
    folder = make.run_folder(tmp_path / "a run", None)
    page = sound(write_run_report(folder, tmp_path / "out.html"))
    assert "This run has not ended." in page.text
    assert "step 240 in stage distillation" in page.text
    assert f"limbeck resume '{folder}'" in page.text
    assert "against step" in page.source
    assert "accuracy" in page.text


def test_a_run_that_has_only_begun(tmp_path):
    page = sound(write_run_report(make.run_folder(tmp_path / "run", None, rows=[])))
    assert "Nothing has been recorded yet." in page.text
    assert not any(a.get("class") == "chart" for a in page.all("svg"))


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    folder = make.run_folder(tmp_path / "run", None)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "distil')
    assert "step 240" in sound(write_run_report(folder)).text


def test_a_result_without_test_data(tmp_path):
    page = sound(write_run_report(make.run_folder(tmp_path / "run", {"cost": make.result()["cost"]})))
    assert "Nothing was judged: the run had no test data." in page.text
    assert "peak memory" in page.text


def test_not_a_run(tmp_path):
    with pytest.raises(RunError, match="is not a run"):
        write_run_report(tmp_path)


@pytest.mark.parametrize("text", ["{broken\n", "[1]\n", '{"split": "train"}\n'])
def test_damaged_metrics_are_named(tmp_path, text):
    folder = make.run_folder(tmp_path / "run", make.result())
    (folder / "metrics.jsonl").write_text(text)
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        write_run_report(folder)


def test_values_that_are_not_finite_are_left_out_of_curves(tmp_path):
    rows = [{"stage": "s", "step": n, "split": "train", "loss": v} for n, v in enumerate([1.0, math.nan, None, 0.5])]
    page = sound(write_run_report(make.run_folder(tmp_path / "run", None, rows=rows)))
    assert "train, last 0.500" in page.text


def test_train_and_validation_share_a_figure_and_rates_come_last():
    rows = [
        {"stage": "one", "step": 1, "split": "train", "lr_a": 0.1, "lr_b": 0.2, "loss": 2.0},
        {"stage": "one", "step": 1, "split": "val", "loss": 2.5},
        {"stage": "two", "step": 1, "split": "train", "adv": 1.0, "epoch": 3},
    ]
    one, two = stage_panels(rows)
    assert [(p["name"], [label for label, _, _ in p["legend"]]) for p in one["panels"]] == [
        ("loss", ["train", "val"]),
        ("learning rate", ["a", "b"]),
    ]
    assert (two["name"], [p["name"] for p in two["panels"]]) == ("two", ["adv"])


def test_confusion_up_to_twenty_classes_has_numbers(tmp_path):
    page = sound(write_run_report(make.run_folder(tmp_path / "run", make.result(20))))
    cells = [a for a in page.all("td") if (a.get("class") or "").startswith(("hit", "miss"))]
    assert len(cells) == 400
    assert cells[20]["style"] == "--a:0.32"  # 5 of 50: the square root of a tenth
    assert cells[21]["style"] == "--a:0.90"
    assert "<b>1</b> taken for 0: 10.0 %" in [c["title"] for c in cells]


def test_confusion_above_twenty_classes_is_a_picture(tmp_path):
    page = sound(write_run_report(make.run_folder(tmp_path / "run", make.result(21))))
    assert not any((a.get("class") or "").startswith("hit") for a in page.all("td"))
    assert [a["alt"] for a in page.all("img")] == ["Confusion matrix of 21 classes"]
    assert "Most frequent confusions" in page.text


def test_a_confusion_matrix_that_does_not_fit_is_an_error(tmp_path):
    folder = make.run_folder(tmp_path / "run", make.result(confusion={"labels": ["a"], "matrix": [[1, 2], [3, 4]]}))
    with pytest.raises(RunError, match="confusion"):
        write_run_report(folder)


def test_the_matrix_picture_has_strength_as_opacity():
    import io

    from matplotlib.image import imread

    pixels = imread(io.BytesIO(base64.b64decode(matrix_png(np.array([[1.0, 0.0], [0.25, 0.75]])))))
    assert pixels.shape == (2, 2, 4)
    np.testing.assert_allclose(pixels[..., 3], [[1, 0], [0.5, 0.75**0.5]], atol=1 / 255)
    assert pixels[0, 0, 2] > pixels[0, 0, 0]  # hits are blue
    assert pixels[1, 0, 0] > pixels[1, 0, 2]  # misses are red


def test_pictures_come_from_base64_and_from_files(tmp_path):
    pictures = [
        {"title": "inline", "caption": "a dot", "png": base64.b64encode(DOT).decode()},
        {"title": "from a file", "png": "artifact/grid.png"},
    ]
    folder = make.run_folder(tmp_path / "run", make.result(pictures=pictures))
    (folder / "artifact").mkdir()
    (folder / "artifact" / "grid.png").write_bytes(DOT)
    page = sound(write_run_report(folder))
    images = page.all("img")
    assert [a["alt"] for a in images] == ["inline", "from a file"]
    assert {a["src"] for a in images} == {"data:image/png;base64," + base64.b64encode(DOT).decode()}
    assert (images[0]["width"], images[0]["class"]) == ("240", "small")
    assert "a dot" in page.text


@pytest.mark.parametrize(
    ("png", "message"),
    [
        ("gone.png", "missing"),
        ("../secret.png", "outside"),
        ("not base64!", "neither"),
        (base64.b64encode(b"GIF89a" * 10).decode(), "not a PNG"),
    ],
)
def test_pictures_that_cannot_be_shown_are_named(tmp_path, png, message):
    (tmp_path / "secret.png").write_bytes(DOT)
    folder = make.run_folder(tmp_path / "run", make.result(pictures=[{"title": "grid", "png": png}]))
    with pytest.raises(RunError, match=f"'grid'.*{message}"):
        write_run_report(folder)


def test_a_reliability_diagram(tmp_path):
    bins = [
        {"lower": 0.0, "upper": 0.5, "count": 0, "confidence": None, "accuracy": None},
        {"lower": 0.5, "upper": 1.0, "count": 9, "confidence": 0.8, "accuracy": 0.7},
    ]
    page = sound(write_run_report(make.run_folder(tmp_path / "run", make.result(reliability=bins))))
    assert "reliability diagram" in [a.get("aria-label") for a in page.all("svg")]


# ---- how to reproduce ----------------------------------------------------------------------------------------------------


def test_the_command_has_only_what_differs(tmp_path):
    page = sound(write_run_report(make.run_folder(tmp_path / "run", make.result())))
    expected = "limbeck run kd --seed 3 --label-noise 0.1 --no-augment --teacher cnn-w16-s3 --temperature 2"
    assert f"\n{expected}\n" in page.text


def test_the_command_gives_back_the_same_settings(tmp_path):
    """What the command line makes of the command is what the run was made with."""
    import argparse
    import shlex

    from limbeck.core.config import validate
    from limbeck.core.engine import EngineConfig
    from limbeck.flags import add_flags, given, parse_strictly
    from limbeck.methods.models import KD

    setup = KD.Setup(data="my data/x", teacher=("a", "b:c"), augment=False, teacher_epochs=0.5)
    config = KD.Config(lr=1e-5, milestones=(0.5, 0.8), temperature=3, clip_grad=1.5, steps=7)
    engine = EngineConfig(trackers=("tensorboard",), log_every=5, checkpoint_steps=3)
    written = json.loads(
        json.dumps(
            {
                "method": "kd",
                "preset": "paper",
                "seed": 5,
                "setup": setup.model_dump(),
                "config": config.model_dump(),
                "engine": engine.model_dump(),
            }
        )
    )
    text = command(settings_of(written))
    assert text is not None
    words = shlex.split(text)
    assert words[:3] == ["limbeck", "run", "kd"]
    parser = argparse.ArgumentParser("limbeck run kd")
    parser.add_argument("--preset")
    parser.add_argument("--seed", type=int)
    for model in (KD.Setup, KD.Config, EngineConfig):
        add_flags(parser, "x", model)
    options = parse_strictly(parser, words[3:])
    assert (options.preset, options.seed) == ("paper", 5)
    assert validate(KD.Setup, given(options, KD.Setup)) == setup
    assert validate(KD.Config, {**KD.Config.preset_values("paper"), **given(options, KD.Config)}) == config
    assert validate(EngineConfig, given(options, EngineConfig)) == engine


def test_under_a_preset_the_presets_values_are_the_defaults():
    from limbeck.methods.models import KD

    config = KD.Config.make("paper", lr=0.1).model_dump(mode="json")
    settings = settings_of({"method": "kd", "preset": "paper", "setup": {}, "config": config})
    assert [s.name for s in settings.config if s.differs] == ["lr"]
    assert command(settings) == "limbeck run kd --preset paper --lr 0.1"


def test_a_value_that_looks_like_a_flag_stays_a_value():
    settings = settings_of({"method": "kd", "setup": {"data": "-odd"}, "config": {}})
    assert command(settings) == "limbeck run kd --data=-odd"


def test_a_run_on_own_objects_points_to_fit(tmp_path):
    page = sound(write_run_report(make.run_folder(tmp_path / "run", make.result(), setup=None, task=None)))
    assert "limbeck.fit('kd', data, student=…, teacher=…, val=…, test=…, seed=3, temperature=2.0)" in page.text
    assert "limbeck run" not in page.text


def test_a_method_outside_the_catalogue_has_no_command(tmp_path):
    page = sound(write_run_report(make.run_folder(tmp_path / "run", make.result(), method="my-own")))
    assert "not in the catalogue" in page.text
    assert "my-own on digits" in page.text


def test_a_method_whose_library_is_absent_still_gets_its_report(tmp_path, monkeypatch):
    from limbeck import catalogue

    monkeypatch.setattr(catalogue, "cards", lambda: {"far": make.card("far")})
    settings = settings_of({"method": "far", "setup": {"task": "digits"}, "config": {"lr": 0.1}})
    assert not any(s.known for s in settings.config)
    assert command(settings) == "limbeck run far --task digits --lr 0.1"


# ---- figures -------------------------------------------------------------------------------------------------------------


def test_figures_follow_the_style_sheet_and_are_the_same_every_time():
    curve = Curve("train", [1, 2, 3], [3.0, 2.0, 1.0])
    svg = str(line_figure([curve], "a <label>"))
    assert svg == str(line_figure([curve], "a <label>"))
    assert "var(--s1)" in svg
    assert "a &lt;label&gt;" in svg
    assert "http" not in svg
    assert "#0000f1" not in svg


def test_long_curves_are_averaged_in_bins():
    steps, values = thinned(range(1, 1001), [float(n) for n in range(1000)], most=10)
    np.testing.assert_allclose(steps, np.arange(1, 1001).reshape(10, 100).mean(1))
    np.testing.assert_allclose(values, np.arange(1000).reshape(10, 100).mean(1))
    steps, values = thinned([1, 2, 3], [1.0, math.inf, 2])
    assert (steps.tolist(), values.tolist()) == ([1, 3], [1, 2])


def test_importing_reports_imports_no_torch():
    code = (
        "import sys, limbeck.report.run, limbeck.report.tables, limbeck.report.scoreboard, limbeck.report.compare;"
        "print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = make.run_folder(tmp_path / "run", make.result())
    (folder / "report.html").write_text("old")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(RunError, match=r"cannot write .*report\.html"):
        write_run_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")] == []
