"""Experts trained together against the same training written out, the cache, and being killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.blocks import ensembles
from limbeck.blocks.diffaug import DiffAug
from limbeck.blocks.trajectories import ABOUT, TrajectoryBuffer
from limbeck.core.data import MapData, TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import RunError
from limbeck.tasks import experts
from limbeck.tasks.augment import ShiftFlip
from limbeck.tasks.experts import (
    ExpertConfig,
    ExpertTraining,
    build_experts,
    expert_accuracies,
)
from tests.helpers import Stopped
from tests.tasks.experts_run import LONG, data, network, run


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def build(config: ExpertConfig, seed: int = 0, **options) -> TrajectoryBuffer:
    return build_experts(data(), network, config, seed=seed, progress=False, **options)


def by_hand(config: ExpertConfig, number: int, seed: int = 0) -> list[torch.Tensor]:
    """One expert with a module, an optimiser and a loop, as anybody would write it."""
    made = ExpertTraining(network, config, seed=seed)
    model: nn.Module = made.network.write(made.theta[number].detach())
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    real, size = data(), config.batch_size
    kept = [made.network.flatten(model)]
    for epoch in range(config.epochs):
        if epoch == config.epochs // 2 + 1 and config.lr_decay < 1:
            optimizer = torch.optim.SGD(model.parameters(), config.lr * config.lr_decay, momentum=config.momentum)
        for position in range(len(real) // size):
            made._batch(real, epoch * (len(real) // size) + position, size, len(real) // size)  # makes the order
            ids = made._orders[1][number, position * size : (position + 1) * size]
            loss = F.cross_entropy(model(real.inputs[ids]), real.labels[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        kept.append(made.network.flatten(model))
    return kept


@pytest.mark.parametrize(
    "config",
    [
        ExpertConfig(experts=3, epochs=3, batch_size=16),
        ExpertConfig(experts=2, epochs=4, batch_size=16, momentum=0.9, weight_decay=0.01),
        ExpertConfig(experts=2, epochs=5, batch_size=30, momentum=0.9, lr_decay=0.3),
    ],
)
def test_each_expert_is_trained_as_if_it_were_alone(config):
    buffer = build(config)
    assert (buffer.experts, buffer.epochs) == (config.experts, config.epochs)
    for number in range(config.experts):
        for epoch, expected in enumerate(by_hand(config, number)):
            torch.testing.assert_close(buffer.snapshot(number, epoch), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(buffer.snapshot(0, 0), buffer.snapshot(1, 0))


def test_an_expert_does_not_depend_on_how_many_there_are():
    many, few = (build(ExpertConfig(experts=n, epochs=2, batch_size=16, rho=0.2), augment=ShiftFlip(1)) for n in (4, 2))
    torch.testing.assert_close(many.subset([0, 1]).stacked(-1), few.stacked(-1), rtol=1e-4, atol=1e-5)


def test_taking_turns_gives_the_same_experts(monkeypatch):
    config = ExpertConfig(experts=3, epochs=2, batch_size=16, rho=0.2)
    together = build(config).stacked(-1)
    monkeypatch.setattr(ensembles, "MAPPED_UP_TO", 0)
    one_by_one = build(config, folder=os.environ["LIMBECK_CACHE"] + "/turns").stacked(-1)
    torch.testing.assert_close(one_by_one, together, rtol=1e-4, atol=1e-5)
    assert not torch.equal(one_by_one, torch.zeros_like(one_by_one))


def test_orders_and_augmentation_are_each_experts_own():
    made = ExpertTraining(network, ExpertConfig(experts=2, batch_size=20), augment=ShiftFlip(2))
    x, y = made._batch(data(), 0, 60, 1)
    assert not torch.equal(made._orders[1][0], made._orders[1][1])
    assert (y.sort(1).values == data().labels.sort().values).all()  # each sees all samples once
    aligned = [x[k][made._orders[1][k].argsort()] for k in range(2)]
    assert not torch.equal(aligned[0], aligned[1])  # the same samples under other shifts


def test_flat_training_gives_other_and_flatter_experts():
    plain, flat = (build(ExpertConfig(experts=2, epochs=6, batch_size=10, rho=r)) for r in (0.0, 1.0))
    assert torch.equal(plain.stacked(0), flat.stacked(0))
    made = ExpertTraining(network, ExpertConfig(experts=2))
    x = data().inputs.expand(2, -1, -1, -1, -1)
    y = data().labels.expand(2, -1)
    from limbeck.blocks.sharpness import sharpness

    rises = [sharpness(lambda t: made.gradients(t, x, y), b.stacked(-1), 0.5).mean() for b in (plain, flat)]
    assert rises[1] < rises[0]


def test_experts_learn():
    config = ExpertConfig(experts=2, epochs=25, batch_size=10)
    made = ExpertTraining(network, config)
    buffer = build(config)
    before, after = (expert_accuracies(made.network, buffer.stacked(e), data()) for e in (0, -1))
    assert before.shape == (2,) and (after > 0.9).all() and after.mean() > before.mean()


def test_they_come_from_the_cache_when_nothing_changed(monkeypatch):
    config = ExpertConfig(experts=2, epochs=2, batch_size=16)
    first = build(config)
    folders = list((Path(os.environ["LIMBECK_CACHE"]) / "experts").iterdir())
    assert [f for f in folders if f.is_dir()] and not list(Path(os.environ["LIMBECK_CACHE"]).rglob("checkpoint.pt"))
    monkeypatch.setattr(experts, "_train", lambda *a: pytest.fail("trained again"))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    again = build(config)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.stacked(-1), again.stacked(-1))
    assert again.about["training"]["epochs"] == 2
    for changed in (
        lambda: build(config, seed=1),
        lambda: build(config.replace(lr=0.1)),
        lambda: build(config, augment=ShiftFlip(1)),
        lambda: build_experts(data(30), network, config, progress=False),
    ):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            changed()


def test_data_that_cannot_be_hashed_is_not_cached():
    real = data(30)
    config = ExpertConfig(experts=2, epochs=2, batch_size=15)
    mapped = MapData(list(zip(real.inputs, real.labels.tolist(), strict=True)), replayable=True)
    buffer = build_experts(mapped, network, config, progress=False)
    assert buffer.epochs == 2 and not (Path(os.environ["LIMBECK_CACHE"]) / "experts").exists()
    expected = build_experts(TensorData(real.inputs, real.labels), network, config, progress=False)
    torch.testing.assert_close(buffer.stacked(-1), expected.stacked(-1))


def test_a_folder_with_other_experts_is_refused(tmp_path):
    build(ExpertConfig(experts=2, epochs=1), folder=tmp_path / "mine")
    with pytest.raises(RunError, match="other data, networks or settings"):
        build(ExpertConfig(experts=2, epochs=1, lr=0.1), folder=tmp_path / "mine")


def test_a_crash_in_the_middle_changes_nothing(tmp_path):
    whole = run(tmp_path / "whole", 6)
    made = ExpertTraining(
        network,
        ExpertConfig(experts=3, epochs=6, batch_size=20, rho=0.1, momentum=0.5, lr_decay=0.5),
        seed=1,
        augment=ShiftFlip(1),
    )
    writer = experts.TrajectoryWriter(tmp_path / "broken", 3, 6, made.theta.shape[1])

    def keep(epoch: int, theta: torch.Tensor) -> None:
        writer.write(epoch, theta)
        if epoch == 5:
            raise Stopped

    engine = Engine(
        tmp_path / "broken", EngineConfig(progress=False, checkpoint_steps=4), seed=experts.mix_seed(1, 109)
    )
    with pytest.raises(Stopped):
        engine.run(made, [made.stage(data(), keep)], resume=True)
    resumed = run(tmp_path / "broken", 6)
    for epoch in range(7):
        assert torch.equal(whole.stacked(epoch), resumed.stacked(epoch)), epoch


def test_a_killed_process_leaves_files_to_go_on_with(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.tasks.experts_run", str(tmp_path / "killed")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    rows = tmp_path / "killed" / "metrics.jsonl"
    began = time.monotonic()
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() - began < 300:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert rows.stat().st_size and not (tmp_path / "killed" / ABOUT).exists()
    with pytest.raises(RunError, match="no finished trajectories"):
        TrajectoryBuffer.load(tmp_path / "killed")
    resumed, whole = run(tmp_path / "killed", LONG), run(tmp_path / "whole", LONG)
    for epoch in (0, 1, LONG // 2, LONG):
        assert torch.equal(whole.stacked(epoch), resumed.stacked(epoch)), epoch


def test_large_batches_take_turns_on_a_cpu():
    made = ExpertTraining(network, ExpertConfig(experts=3))
    sample = data().fetch(torch.arange(2), None).inputs
    assert ensembles.networks_at_once(made.network, made.theta, sample, 20) == 3
    assert ensembles.networks_at_once(made.network, made.theta, sample, 2000) == 1


def test_an_experts_batch_gets_one_operation():
    made = ExpertTraining(network, ExpertConfig(experts=2, batch_size=20), augment=DiffAug())
    draws = [made._draw(20, torch.Generator().manual_seed(n)) for n in range(8)]
    assert all(len(d[:, 0].unique()) == 1 and len(d.unique(dim=0)) == 20 for d in draws)
    assert len({int(d[0, 0]) for d in draws}) > 1
