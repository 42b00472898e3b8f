"""The engine: divergence, accumulation, several processes, refusals of the operating system, costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.batch import Batch, Losses
from limbeck.core.checkpoint import load_checkpoint
from limbeck.core.data import Stream, TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError, RunError, TrainingDiverged
from limbeck.core.method import Method
from limbeck.core.optim import TrainingConfig, make_optimised
from limbeck.core.stage import Stage
from limbeck.methods.models import KD
from tests.core.distributed_run import network, run
from tests.core.killable import data
from tests.helpers import lines

ROOT = Path(__file__).parents[2]
QUIET = EngineConfig(progress=False, log_every=1, device="cpu", checkpoint_steps=5)


class Plain(Method):
    """A linear regression whose loss can be made to explode at a given step."""

    name = "plain"

    class Config(TrainingConfig):
        pass

    def __init__(self, explode_at: int | None = None, **settings: object) -> None:
        super().__init__(**{"steps": 20, "batch_size": 12, "lr": 1e-2, "optimizer": "sgd", "momentum": 0.0, **settings})
        torch.manual_seed(0)
        self.network = nn.Linear(4, 2)
        self.explode_at, self.calls = explode_at, 0

    def losses(self, batch: Batch) -> Losses:
        self.calls += 1
        value = F.cross_entropy(self.network(batch.inputs), batch.labels)
        penalty = self.network.weight.square().mean()
        if self.explode_at is not None and self.calls > self.explode_at:
            penalty = penalty * float("inf")
        return Losses(ce=value, penalty=(0.1, penalty))

    def stages(self, train: TensorData, normalisers: object = None) -> list[Stage]:
        stream = Stream(train, self.config.batch_size, seed=0)
        steps = self.config.steps
        return [
            Stage(
                "only",
                steps,
                stream,
                losses=self.losses,
                accumulate=self.config.accumulate,
                optimisers=lambda: {"main": make_optimised(self.parameters(), self.config, steps)},
            )
        ]


def points(n: int = 48) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    return TensorData(torch.randn(n, 4, generator=generator), torch.arange(n) % 2)


def test_infinity_stops_with_term_and_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    method = Plain(explode_at=13)
    with pytest.raises(
        TrainingDiverged, match="loss term 'penalty' became inf at step 13 of stage 'only'; the last good checkpoint"
    ):
        Engine(tmp_path, QUIET).run(method, method.stages(points()))
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    assert kept["step"] == 10
    assert all(torch.isfinite(v).all() for v in kept["method"]["tensors"].values())


def test_weights_that_became_nan_are_never_saved(tmp_path: Path) -> None:
    method = Plain()
    stages = method.stages(points())

    def poison(step: int) -> None:
        if step == 10:
            with torch.no_grad():
                method.network.bias.fill_(float("nan"))

    stages[0].after_step = poison
    with pytest.raises(TrainingDiverged, match=r"the weights 'network.bias' hold NaN"):
        Engine(tmp_path, QUIET).run(method, stages)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5


def test_accumulated_micro_batches_equal_one_big_batch() -> None:
    whole, parts = Plain(), Plain(accumulate=3)
    a = Engine(None, QUIET).run(whole, whole.stages(points()))
    b = Engine(None, QUIET).run(parts, parts.stages(points()))
    torch.testing.assert_close(whole.network.weight, parts.network.weight, rtol=1e-5, atol=1e-6)
    for x, y in zip(a, b, strict=True):
        assert x["ce"] == pytest.approx(y["ce"], rel=1e-4)
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)


def test_accumulation_weighs_by_valid_tokens() -> None:
    """Micro-batches with different numbers of valid tokens weigh as they do in one big batch."""
    from limbeck.methods.models import BDKD

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (32, 6), generator=generator)
    labels[torch.rand(32, 6, generator=generator) < 0.6] = -100
    labels[:, 0] = 1
    tokens = TensorData(torch.randn(32, 6, 4, generator=generator), labels)

    def trained(accumulate: int) -> BDKD:
        torch.manual_seed(0)
        method = BDKD(
            nn.Linear(4, 3),
            nn.Linear(4, 3),
            steps=8,
            batch_size=8,
            accumulate=accumulate,
            evaluations=0,
            optimizer="sgd",
            lr=0.05,
        )
        Engine(None, QUIET).run(method, method.stages(tokens))
        return method

    torch.testing.assert_close(trained(1).student.weight, trained(4).student.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kd", "bd-kd"])
def test_two_processes_give_the_losses_of_one(tmp_path: Path, kind: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    run(tmp_path / "one", kind)
    # torchrun: accelerate's own launcher starts a single process where there is no GPU
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["-m", "tests.core.distributed_run", str(tmp_path / "two"), kind]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 25
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "ce"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), (a["step"], name)
    first, second = (torch.load(tmp_path / n / "final.pt", weights_only=True) for n in ("one", "two"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(InputError, match="batch size 10 cannot be divided among 4 processes"):
        Stream(points(), 10, rank=0, world=4)


def test_a_full_disk_is_one_clear_line_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    """A file-size limit makes the kernel refuse the write, as a full disk does."""
    script = f"""
import resource, signal, sys
from pathlib import Path
from limbeck.core.errors import RunError
from limbeck.core.checkpoint import load_checkpoint
from tests.core.killable import run, TwoStages, data
from limbeck.core.engine import Engine, EngineConfig
folder = Path({str(tmp_path)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
method = TwoStages()
stages = method.stages(data())
def limit(step):
    if step == 14:
        size = (folder / "checkpoint.pt").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size * 10))
stages[0].after_step = limit
try:
    Engine(folder, EngineConfig(progress=False, checkpoint_steps=5), seed=5).run(method, stages)
except RunError as error:
    print(error)
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 10
    print(sorted(p.name for p in folder.iterdir()))
    sys.exit(2)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "no space left to write" in done.stdout and "checkpoint.pt" in done.stdout
    assert "['checkpoint.pt', 'metrics.jsonl']" in done.stdout


def test_an_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    method = Plain()
    with pytest.raises(RunError, match="cannot write .*file"):
        Engine(tmp_path / "file" / "run", QUIET).run(method, method.stages(points()))


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path) -> None:
    def trained(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        method = KD(network(8), network(8), steps=10, batch_size=10, evaluations=0)
        Engine(None, QUIET, seed=seed).run(method, method.stages(data(), seed=seed))
        return method.student[1].weight

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_costs_are_counted(tmp_path: Path) -> None:
    method = KD(network(8), network(8), steps=10, batch_size=10, evaluations=0)
    engine = Engine(tmp_path, QUIET)
    engine.run(method, method.stages(data()))
    assert engine.cost["teacher_forwards"] == 100
    assert engine.cost["stages"]["distillation"]["steps"] == 10
    assert engine.cost["seconds"] > 0 and engine.cost["peak_memory_bytes"] > 1e6


def test_tensorboard_tracker_writes(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    method = Plain()
    Engine(tmp_path, QUIET.replace(trackers=("tensorboard",))).run(method, method.stages(points()))
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_stages_are_checked() -> None:
    with pytest.raises(InputError, match="either 'losses' or 'update'"):
        Stage("x", 3)
    with pytest.raises(InputError, match="at least one step"):
        Stage("x", 0, update=lambda b, s: {})
    method = Plain()
    with pytest.raises(InputError, match="different names"):
        Engine(None, QUIET).run(method, method.stages(points()) * 2)


def test_a_stage_without_data_or_gradients_runs() -> None:
    seen = []
    method = Plain()
    stage = Stage(
        "count", 4, update=lambda batch, stepper: (seen.append((batch, stepper.step)), {"x": torch.tensor(1.0)})[1]
    )
    rows = Engine(None, QUIET).run(method, [stage])
    assert seen == [(None, 0), (None, 1), (None, 2), (None, 3)]
    assert rows[-1]["x"] == 1.0
