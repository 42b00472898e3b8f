"""A run that is killed at any moment and resumed ends bit for bit where an uninterrupted one ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import Interrupted, RunError
from tests.core.killable import TwoStages, data, run
from tests.helpers import lines

ROOT = Path(__file__).parents[2]
KILLS = 20


def start(folder: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.core.killable", str(folder)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder).wait(300) == 0
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigkill_at_random_moments(uninterrupted: Path, tmp_path: Path) -> None:
    """Kills real processes at random moments until 20 have died while they worked; then lets one finish."""
    chance = random.Random(0)
    folder = tmp_path / "killed"
    folder.mkdir()
    kills = 0
    rounds = 0
    while kills < KILLS:
        rounds += 1
        process = start(folder)
        began = time.monotonic()
        while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() - began < 120:
            time.sleep(0.02)
        size = _size(folder)
        while process.poll() is None and _size(folder) == size and time.monotonic() - began < 120:
            time.sleep(0.002)  # imports take seconds; wait until the process has written something of its own
        time.sleep(chance.uniform(0, 0.12))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            kills += 1
        else:  # it got to the end; start over to collect more kills
            _same(uninterrupted, folder)
            for file in folder.iterdir():
                file.unlink()
    assert rounds >= KILLS
    assert start(folder).wait(300) == 0
    _same(uninterrupted, folder)


def _size(folder: Path) -> tuple[int, int]:
    def stamp(name: str) -> int:
        try:
            return (folder / name).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    return stamp("metrics.jsonl"), stamp("checkpoint.pt")


def _same(expected: Path, found: Path) -> None:
    a, b = torch.load(expected / "final.pt", weights_only=True), torch.load(found / "final.pt", weights_only=True)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert lines(expected) == lines(found)


def test_ctrl_c_saves_and_says_how_to_go_on(uninterrupted: Path, tmp_path: Path) -> None:
    method = TwoStages()
    stages = method.stages(data())
    stages[1].after_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 33 else None
    settings = EngineConfig(progress=False, log_every=7, device="cpu")
    before = signal.getsignal(signal.SIGINT)  # a background job may have been started with it ignored
    with pytest.raises(Interrupted, match="stopped at step 33 of stage 'second'; continue with: limbeck resume"):
        Engine(tmp_path, settings, seed=5).run(method, stages, resume=True)
    assert signal.getsignal(signal.SIGINT) is before
    finished = run(tmp_path)
    expected = torch.load(uninterrupted / "final.pt", weights_only=True)
    for name, value in finished.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert lines(tmp_path) == lines(uninterrupted)


def test_checkpoint_cadence_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    finished = run(tmp_path, checkpoint_steps=1)
    expected = torch.load(uninterrupted / "final.pt", weights_only=True)
    assert all(torch.equal(v, expected[k]) for k, v in finished.state_dict().items())


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(RunError, match="is not a checkpoint or is damaged"):
        run(tmp_path)


def test_a_checkpoint_with_another_teacher_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    method = TwoStages()
    with torch.no_grad():
        method.teacher[1].weight.add_(1)
    with pytest.raises(RunError, match="made with another 'teacher'"):
        Engine(tmp_path, EngineConfig(progress=False), seed=5).run(method, method.stages(data()), resume=True)


def test_checkpoints_hold_no_pickled_objects(tmp_path: Path) -> None:
    """weights_only loading succeeds, and a file with a pickled object is refused without running it."""
    run(tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["stage"] == "second"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, ("touch " + str(tmp_path / "ran"),))

    torch.save({"format": 1, "x": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="damaged"):
        run(tmp_path)
    assert not (tmp_path / "ran").exists()
