"""The command line as people use it: quick answers, one-line errors, exit codes, runs that go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--student", "mlp-8", "--teacher", "mlp-32", "--teacher-epochs", "3", "--train-size", "100", "--no-progress"]


@pytest.fixture
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.getbasetemp() / "cli-cache"
    return {**os.environ, "LIMBECK_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def limbeck(*arguments: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "limbeck", *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["methods", "--json"], ["show", "kd"], ["--version"]])
def test_looking_around_needs_no_torch(arguments: list[str], env, tmp_path: Path):
    script = f"import sys; sys.argv[0] = 'limbeck'; from limbeck.cli import main; code = main({arguments!r}); heavy = [m for m in ('torch', 'transformers', 'pydantic', 'sklearn', 'numpy', 'matplotlib') if m in sys.modules]; sys.exit(code or (3 if heavy else 0))"
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_methods_as_json_and_by_family(env, tmp_path: Path):
    cards = json.loads(limbeck("methods", "--json", "--family", "models", env=env, cwd=tmp_path).stdout)
    assert {"kd", "bd-kd", "ofa-kd", "meal-v2"} <= {c["name"] for c in cards}
    listed = limbeck("methods", "--family", "search", env=env, cwd=tmp_path).stdout
    assert "diswot" in listed and "bd-kd" not in listed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rum"], "unknown command 'rum'; did you mean run"),
        (["run", "bd-kdd"], "unknown method 'bd-kdd'; did you mean bd-kd"),
        (["run"], "name a method"),
        (["run", "kd", "--temperature", "-1"], "--temperature must be float > 0 (got '-1')"),
        (["run", "kd", "--temprature", "2"], "unknown flag --temprature; did you mean --temperature"),
        (["run", "kd", "--optimizer", "adamm"], "--optimizer must be one of adamw, adam, sgd (got 'adamm')"),
        (["run", "kd", "--preset", "papers"], "unknown preset 'papers'; did you mean paper"),
        (["run", "kd", "--task", "mnist"], "task 'mnist' needs its data"),
        (["run", "kd", "--student", "resnet21"], "got 21"),
        (["run", "kd", "--student", "no.such:thing"], "no.such"),
        (["methods", "--family", "model"], "unknown family 'model'; did you mean models"),
        (["show", "kdd"], "unknown method 'kdd'"),
        (["taps", "cnn-w4-s2", "--input", "8x8"], "--input must be three integers"),
        (["report", "nowhere"], "nowhere"),
        (["resume", "nowhere"], "is not a run"),
        (["export", "nowhere", "--to", "onnx"], "no artifact in nowhere"),
        (["export", "nowhere"], "--to"),
        (["verify"], "name the methods to verify, or give --all"),
        (["verify", "supervised"], "no claim to verify"),
        (["compare", "kd"], "at least two different methods"),
    ],
)
def test_mistakes_are_one_line_and_exit_two(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from limbeck.cli import main

    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("limbeck: ") and line in said and "\n" not in said
    assert not any(tmp_path.iterdir())


def test_a_mistake_in_a_real_process(env, tmp_path: Path):
    done = limbeck("run", "kd", "--temperature", "hot", env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "limbeck: --temperature must be float > 0 (got 'hot')\n"


def test_run_report_export_and_taps(env, tmp_path: Path):
    done = limbeck("run", "kd", *SMALL, "--epochs", "3", "--out", "one", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "student" in done.stdout and "teacher" in done.stdout
    assert (tmp_path / "one" / "report.html").exists() and (
        tmp_path / "one" / "artifact" / "model.safetensors"
    ).exists()
    again = limbeck("run", "kd", *SMALL, "--epochs", "3", "--out", "one", env=env, cwd=tmp_path)
    assert again.returncode == 2 and "holds a run already" in again.stderr
    assert limbeck("export", "one", "--to", "onnx", env=env, cwd=tmp_path).returncode == 0
    assert (tmp_path / "one" / "student.onnx").exists()
    assert "layers.0" in limbeck("taps", "one", env=env, cwd=tmp_path).stdout
    assert limbeck("report", "one", "--out", "other.html", env=env, cwd=tmp_path).returncode == 0
    finished = limbeck("resume", "one", env=env, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr


def test_help_lists_every_setting_with_its_range(env, tmp_path: Path):
    text = " ".join(limbeck("run", "kd", "--help", env=env, cwd=tmp_path).stdout.split())
    assert "softens both distributions (> 0; default 4.0)" in text and "--label-noise" in text
    assert "default 60; paper 240" in text


def test_a_killed_run_resumes_from_its_folder_alone(env, tmp_path: Path):
    flags = [*SMALL, "--epochs", "400", "--checkpoint-seconds", "0"]
    assert limbeck("run", "kd", *flags, "--out", "whole", "--no-report", env=env, cwd=tmp_path).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "limbeck", "run", "kd", *flags, "--out", "cut", "--no-report"],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    began = time.monotonic()
    while not (tmp_path / "cut" / "checkpoint.pt").exists() and time.monotonic() - began < 100:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut" / "result.json").exists()
    resumed = limbeck("resume", "cut", "--no-report", env=env, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("metrics.jsonl", "artifact/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_is_one_line_and_resumable(env, tmp_path: Path):
    command = [sys.executable, "-m", "limbeck", "run", "kd", *SMALL, "--epochs", "20000", "--out", "x"]
    process = subprocess.Popen(
        command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    began = time.monotonic()
    while not (tmp_path / "x" / "checkpoint.pt").exists() and time.monotonic() - began < 100:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1].startswith("limbeck: stopped at step") and "limbeck resume x" in said
    assert "Traceback" not in said


def test_compare_writes_a_page(env, tmp_path: Path):
    done = limbeck(
        "compare",
        "kd",
        "supervised",
        "--seeds",
        "2",
        "--steps",
        "15",
        *[s for s in SMALL if s != "--no-progress"],
        "--out",
        "c",
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c" / "comparison.html").exists() and "supervised" in done.stdout
