"""The deep form: equations, rounds, the estimated weight, resume in every stage, regressors, use by name and on own modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck import networks
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError, RunError
from limbeck.methods.models import GTSelfDistillation
from tests.helpers import Stopped, lines

C = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def net(seed: int = 0, width: int = 8, out: int = C) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, out))


def data(n: int = 60, seed: int = 0) -> TensorData:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(n) % C
    x[torch.arange(n), y] += 2
    return TensorData(x, y)


def batch() -> Batch:
    return Batch(data(12).inputs, data(12).labels)


def in_round_two(weight: float = 0.3, **settings: Any) -> GTSelfDistillation:
    """A method in its second round, whose teacher and student have different weights, in float64."""
    method = GTSelfDistillation(net(), rounds=2, gt_weight=weight, **settings).double()
    method.finish_round()
    method.begin_round(2, seed=1)
    return method.eval()


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def run(method: GTSelfDistillation, val: TensorData | None = None, seed: int = 0) -> GTSelfDistillation:
    Engine(None, EngineConfig(progress=False), seed=3).run(method, method.stages(data(), val, seed=seed))
    return method


# ---- the loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_equals_the_equation(weight: float) -> None:
    method, b = in_round_two(weight, regulariser=0.01), batch()
    x = b.inputs.double()
    p, t = softmax(method.student(x).detach().numpy()), softmax(method.archive[0](x).numpy())
    y = np.eye(C)[b.labels]
    norms = sum(np.sqrt((v.detach().numpy() ** 2).sum()) for v in method.student.parameters())
    expected = weight * ((p - y) ** 2).mean() + (1 - weight) * ((p - t) ** 2).mean() + 0.01 * norms
    losses = method.losses(Batch(x, b.labels))
    assert losses.total.item() == pytest.approx(expected, rel=1e-12)
    assert ("labels" in losses) == (weight > 0) and ("teacher" in losses) == (weight < 1)


def test_cross_entropy_is_that_of_the_mixed_target() -> None:
    method, b = in_round_two(0.3, loss="cross_entropy", regulariser=0.0), batch()
    x = b.inputs.double()
    mixed = 0.3 * F.one_hot(b.labels, C) + 0.7 * torch.softmax(method.archive[0](x), -1)
    expected = F.cross_entropy(method.student(x), mixed)
    torch.testing.assert_close(method(Batch(x, b.labels)), expected)


def test_first_round_is_plain_training_whatever_the_weight() -> None:
    for weight in (0.0, 0.4, (0.0, 0.7)):
        method = GTSelfDistillation(net(), rounds=2, gt_weight=weight).eval()
        assert set(method.losses(batch())) == {"labels", "norms"}
        assert method.gt_weight == 1.0
    trained = [run(GTSelfDistillation(net(), rounds=1, gt_weight=w, steps=5)).student.state_dict() for w in (0.0, 0.9)]
    assert all(torch.equal(v, trained[1][k]) for k, v in trained[0].items())


def test_soft_labels_are_taken_as_they_are() -> None:
    method, b = in_round_two(0.3), batch()
    hard = method(Batch(b.inputs.double(), b.labels))
    soft = method(Batch(b.inputs.double(), F.one_hot(b.labels, C).double()))
    torch.testing.assert_close(hard, soft)


def test_a_student_that_equals_its_teacher_has_no_gradient_from_it() -> None:
    method = in_round_two(0.0, regulariser=0.0)
    method.student.load_state_dict(method.archive[0].state_dict())
    method(Batch(batch().inputs.double(), batch().labels)).backward()
    assert max(p.grad.abs().max() for p in method.student.parameters()) < 1e-12


def test_gradients_reach_the_student_only_and_weights_of_zero_have_finite_ones() -> None:
    method, b = in_round_two(), batch()
    method.train()
    assert not method.archive.training and not method.archive[0][1].training
    before = copy.deepcopy(method.archive.state_dict())
    with torch.no_grad():
        method.student[3].bias.zero_()
    method(Batch(b.inputs.double(), b.labels)).backward()
    assert all(torch.isfinite(p.grad).all() for p in method.student.parameters())
    assert all(p.grad is None for p in method.archive.parameters())
    assert all(torch.equal(v, before[k]) for k, v in method.archive.state_dict().items())
    assert {id(p) for p in method.trainable_parameters()} == {id(p) for p in method.student.parameters()}
    assert method.counters["teacher_forwards"] == 12


# ---- rounds -------------------------------------------------------------------------------------------------------------


def test_each_round_starts_from_new_weights_and_its_teacher_is_the_student_before() -> None:
    method = GTSelfDistillation(net(), rounds=3, gt_weight=0.5)
    seen = [copy.deepcopy(method.student.state_dict())]
    for number in (2, 3):
        method.finish_round()
        trained = copy.deepcopy(method.student.state_dict())
        method.begin_round(number, seed=7)
        assert all(torch.equal(v, trained[k]) for k, v in method.archive[number - 2].state_dict().items())
        assert not any(torch.equal(method.student[0].weight, s["0.weight"]) for s in seen)
        seen.append(copy.deepcopy(method.student.state_dict()))
    again = GTSelfDistillation(net(), rounds=3, gt_weight=0.5)
    again.finish_round()
    state = torch.get_rng_state()
    again.begin_round(2, pure=True, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.student[0].weight, seen[1]["0.weight"])  # both trainings of a round start alike


@pytest.mark.parametrize("kind", ["named", "factory", "module"])
def test_ways_to_new_weights(kind: str) -> None:
    named = networks.build("mlp-8", in_shape=(4,), num_classes=C)
    student, fresh = {"named": (named, None), "factory": (net(), lambda: net(99)), "module": (net(), None)}[kind]
    method = GTSelfDistillation(student, rounds=2, gt_weight=0.5, fresh=fresh)
    before = copy.deepcopy(student.state_dict())
    method.finish_round()
    method.begin_round(2, seed=0)
    changed = [k for k, v in student.state_dict().items() if not torch.equal(v, before[k])]
    assert any(k.endswith("weight") for k in changed)
    if fresh is not None:
        assert torch.equal(student[0].weight, net(99)[0].weight)


def test_a_plain_loop_needs_no_engine() -> None:
    method = GTSelfDistillation(net(), rounds=2, regulariser=0.0)
    for number, pure in ((1, False), (2, True), (2, False)):
        method.begin_round(number, pure=pure)
        optimizer = torch.optim.Adam(method.trainable_parameters(), 0.02)
        for _ in range(40):
            optimizer.zero_grad()
            method((data().inputs, data().labels)).backward()
            optimizer.step()
        if pure:
            found = method.estimate_weight(data(30, seed=1))
            assert method.weights == [1.0, found.value]
        else:
            method.finish_round()
    assert method.quick_metrics(data(90, seed=2))["accuracy"] > 0.6


def test_rounds_out_of_order_are_refused() -> None:
    method = GTSelfDistillation(net(), rounds=3, gt_weight=0.5)
    for call, line in (
        (lambda: method.begin_round(2), "round 2 needs the student of round 1, which is not finished"),
        (lambda: method.begin_round(4), "rounds 1 to 3, and no round 4"),
        (lambda: method.begin_round(1, pure=True), "round 1 has no teacher"),
        (lambda: method.estimate_weight(data()), "begin_round.number, pure=True"),
    ):
        with pytest.raises(InputError, match=line):
            call()
    method.finish_round()
    method.begin_round(2, pure=True)
    with pytest.raises(InputError, match="estimate its weight"):
        method.finish_round()


# ---- the estimated weight -----------------------------------------------------------------------------------------------


def test_the_weight_is_the_closed_form_on_validation_outputs() -> None:
    method = GTSelfDistillation(net(), rounds=2)
    method.finish_round()
    method.begin_round(2, pure=True, seed=1)
    assert method.gt_weight == 0.0 and set(method.losses(batch())) == {"teacher", "norms"}
    val = data(30, seed=5)
    f, g = (
        softmax(m.eval()(val.inputs).detach().numpy().astype(np.float64)) for m in (method.archive[0], method.student)
    )
    method.student.train()
    y = np.eye(C)[val.labels]
    grid = np.linspace(-3, 4, 70_001)
    a, b, c = ((f - g) ** 2).sum(), ((y - g) * (f - g)).sum(), ((y - g) ** 2).sum()
    found = method.estimate_weight(val)
    assert method.student.training
    assert found.unconstrained == pytest.approx(grid[np.argmin(a * grid**2 - 2 * b * grid + c)], abs=1e-4)
    assert found.value == min(1.0, max(0.0, found.unconstrained)) == method.weights[1]
    method.begin_round(2, seed=1)
    assert method.gt_weight == found.value


def test_networks_that_agree_keep_the_weight_before() -> None:
    method = GTSelfDistillation(net(), rounds=3)
    method.weights = [1.0, 0.4, 1.0]
    method.finish_round()
    method.begin_round(2, seed=1)
    method.finish_round()
    method.begin_round(3, pure=True, seed=1)
    method.student.load_state_dict(method.archive[0].state_dict())
    assert method.estimate_weight(data()).value == 0.4 and method.unclipped[2] is None


def test_stages_of_a_run_with_estimated_weights() -> None:
    method = GTSelfDistillation(net(), rounds=3, steps=12, batch_size=20)
    stages = method.stages(data(), data(30, seed=1))
    assert [s.name for s in stages] == ["round-1", "round-2-pure", "round-2", "round-3-pure", "round-3"]
    assert [s.name for s in GTSelfDistillation(net(), rounds=3, gt_weight=0.5).stages(data())] == [
        "round-1",
        "round-2",
        "round-3",
    ]
    run(method, data(30, seed=1))
    assert (method.round, method.finished, method.pure) == (3, 3, False)
    assert method.weights[0] == 1.0 and all(0 <= w <= 1 for w in method.weights)
    assert method.unclipped[0] is None and None not in method.unclipped[1:]
    result = method.evaluate(data(45, seed=2))
    assert [r["who"] for r in result["rows"]] == ["student", "round 1", "round 2"]
    assert result["gt_weight_per_round"] == method.weights
    assert [r["gt_weight"] for r in result["rows"]] == [method.weights[2], *method.weights[:2]]
    assert result["accuracy_per_round"][2] == result["rows"][0]["accuracy"]
    assert result["accuracy_per_round"][0] == result["rows"][1]["accuracy"]


def test_weights_per_round_are_used_in_their_rounds() -> None:
    method = GTSelfDistillation(net(), rounds=3, gt_weight=(0.1, 0.2, 0.9))
    used = []
    for number in (1, 2, 3):
        method.begin_round(number)
        used.append(method.gt_weight)
        method.finish_round()
    assert used == [1.0, 0.2, 0.9]


def test_estimated_weights_need_labelled_validation_data() -> None:
    method = GTSelfDistillation(net(), rounds=2)
    for val in (None, TensorData(data().inputs)):
        with pytest.raises(InputError, match="needs labelled validation data: give val="):
            method.stages(data(), val)
    assert len(GTSelfDistillation(net(), rounds=1).stages(data())) == 1


# ---- resume -------------------------------------------------------------------------------------------------------------

STAGES = ["round-1", "round-2-pure", "round-2", "round-3-pure", "round-3"]


def _estimated() -> GTSelfDistillation:
    return GTSelfDistillation(net(), rounds=3, steps=9, batch_size=20, evaluations=0)


def _go(method: GTSelfDistillation, folder: Path, stop: tuple[str, int] | None = None) -> None:
    stages = method.stages(data(), data(30, seed=1), seed=0)
    for stage in stages:
        if stop is not None and stage.name == stop[0]:

            def crash(step: int, at: int = stop[1]) -> None:
                if step == at:
                    raise Stopped

            stage.after_step = crash
    engine = Engine(folder, EngineConfig(progress=False, checkpoint_steps=4, log_every=3), seed=3)
    if stop is None:
        engine.run(method, stages, resume=True)
        return
    with pytest.raises(Stopped):
        engine.run(method, stages, resume=True)


def test_resume_is_exact_in_every_stage(tmp_path: Path) -> None:
    whole = _estimated()
    _go(whole, tmp_path / "whole")
    for number, (stage, step) in enumerate(
        (s, n) for s in STAGES for n in (1, 6)
    ):  # before and after the stage's first checkpoint
        folder = tmp_path / f"broken-{number}"
        _go(_estimated(), folder, (stage, step))
        torch.manual_seed(1000 + number)  # what happened to be drawn meanwhile does not matter
        method = _estimated()
        _go(method, folder)
        expected, found = whole.training_state(), method.training_state()
        assert expected["rounds"] == found["rounds"], stage
        assert expected["tensors"].keys() == found["tensors"].keys()
        assert all(torch.equal(v, found["tensors"][k]) for k, v in expected["tensors"].items()), stage
        assert expected["counters"] == found["counters"]
        assert lines(tmp_path / "whole") == lines(folder)


def test_a_run_that_is_broken_in_every_stage_is_exact_too(tmp_path: Path) -> None:
    whole = _estimated()
    _go(whole, tmp_path / "whole")
    for stage in STAGES:
        _go(_estimated(), tmp_path / "broken", (stage, 5))
    method = _estimated()
    _go(method, tmp_path / "broken")
    assert method.weights == whole.weights and method.unclipped == whole.unclipped
    assert all(torch.equal(v, method.state_dict()[k]) for k, v in whole.state_dict().items())


def test_checkpoints_hold_teachers_and_weights_and_fit_only_as_many_rounds() -> None:
    method = run(_estimated(), data(30, seed=1))
    state = method.training_state()
    assert {k.split(".")[1] for k in state["tensors"] if k.startswith("archive")} == {"0", "1"}
    assert state["rounds"]["weights"] == method.weights
    other = _estimated()
    other.load_training_state(state)
    assert other.weights == method.weights and other.round == 3
    with pytest.raises((RunError, RuntimeError), match="does not fit"):
        GTSelfDistillation(net(), rounds=2).load_training_state(state)


# ---- regressors ---------------------------------------------------------------------------------------------------------


def test_a_regressor_is_distilled_alike() -> None:
    x = data(80).inputs
    y = (x @ torch.tensor([1.0, -1.0, 0.5, 0.0])).tanh()
    train, val, test = (TensorData(x[a:b], y[a:b]) for a, b in ((0, 40), (40, 60), (60, 80)))
    method = GTSelfDistillation(net(out=1), rounds=2, outputs="identity", steps=40, lr=0.02)
    method.check(Batch(x[:8], y[:8]))
    Engine(None, EngineConfig(progress=False), seed=3).run(method, method.stages(train, val))
    result = method.evaluate(test)
    found = method.student.eval()(test.inputs)[:, 0].detach()
    assert result["rows"][0]["mse"] == pytest.approx(float(((found - test.labels) ** 2).mean()), rel=1e-5)
    assert result["rows"][0]["r2"] > 0.3 and len(result["mse_per_round"]) == 2
    assert method.quick_metrics(test)["mse"] == result["rows"][0]["mse"]


def test_a_regressors_loss_is_on_raw_values() -> None:
    method = in_round_two(0.25, outputs="identity", regulariser=0.0)
    x, y = batch().inputs.double(), torch.randn(12, C, dtype=torch.float64)
    z, t = method.student(x), method.archive[0](x)
    expected = 0.25 * ((z - y) ** 2).mean() + 0.75 * ((z - t) ** 2).mean()
    torch.testing.assert_close(method(Batch(x, y)), expected)


@pytest.mark.parametrize(
    ("settings", "given", "line"),
    [
        ({"outputs": "identity"}, batch(), "targets of a regressor must be floating-point"),
        ({"outputs": "identity"}, Batch(torch.randn(4, 4), torch.randn(4, 2)), r"shape \(4, 3\) for targets \(4, 2\)"),
        ({}, Batch(torch.randn(4, 4), torch.randn(4)), "class indices must be integers"),
        ({}, Batch(torch.randn(4, 4), torch.tensor([0, 1, 2, 7])), "student has classes 0 to 2"),
        ({}, Batch(torch.randn(4, 4)), "needs labels"),
        ({}, Batch(torch.full((4, 4), float("nan")), torch.zeros(4).long()), "is nan on the first batch"),
    ],
)
def test_dry_run_names_what_is_wrong(settings: dict[str, Any], given: Batch, line: str) -> None:
    with pytest.raises(InputError, match=line):
        GTSelfDistillation(net(), gt_weight=0.5, **settings).check(given)


# ---- settings, own modules, runs by name ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"gt_weight": 1.2}, r"gt_weight must lie in \[0, 1\] \(got 1\.2\)"),
        ({"gt_weight": (1.0, -0.1), "rounds": 2}, r"gt_weight must lie in \[0, 1\]"),
        ({"gt_weight": (0.5, 0.5)}, "2 weights for 4 rounds"),
        ({"gt_weight": "best"}, "gt_weight must be float or one of estimated"),
        ({"rounds": 0}, "rounds must be int >= 1"),
        ({"regulariser": -1}, "regulariser must be"),
        ({"outputs": "identity", "loss": "cross_entropy"}, "cross-entropy is for class probabilities"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        GTSelfDistillation(net(), **settings)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_networks_that_cannot_be_drawn_anew_are_named_at_once() -> None:
    with pytest.raises(InputError, match="'weight' of Bare.*give a function that builds the network"):
        GTSelfDistillation(Bare())
    GTSelfDistillation(Bare(), rounds=1)
    method = GTSelfDistillation(Bare(), fresh=lambda: net(), rounds=2, gt_weight=0.5)
    method.finish_round()
    with pytest.raises(InputError, match="builds another architecture"):
        method.begin_round(2)


def test_fit_on_own_modules(tmp_path: Path) -> None:
    student = net()
    kind: dict[str, Any] = {"engine": {"progress": False}, "steps": 10, "batch_size": 20}
    found = limbeck.fit(
        "gt-self-distillation",
        (data().inputs, data().labels),
        val=data(30, seed=1),
        test=data(30, seed=2),
        student=student,
        rounds=2,
        out=tmp_path / "run",
        **kind,
    )
    again = limbeck.load(tmp_path / "run", model=net(5)).content
    assert set(again.state_dict()) == set(net().state_dict())
    torch.testing.assert_close(again(data().inputs), student.eval()(data().inputs))
    assert len(found.result["gt_weight_per_round"]) == 2
    built = limbeck.fit("gt-self-distillation", data(), student=Bare, rounds=2, gt_weight=0.5, **kind)
    assert isinstance(built.method.student, Bare)
    for settings, line in (
        ({"student": net()}, "needs labelled validation data"),
        ({"student": net(), "teacher": net()}, "has no teacher but the student's own"),
        ({}, "needs student="),
    ):
        with pytest.raises(InputError, match=line):
            limbeck.fit("gt-self-distillation", data(), **kind, **settings)


def test_run_by_name_on_digits_can_be_resumed_and_reported(tmp_path: Path) -> None:
    from limbeck.report.run import write_run_report

    found = limbeck.fit(
        "gt-self-distillation",
        task="digits",
        student="mlp-32",
        train_size=200,
        augment=False,
        rounds=2,
        epochs=30,
        out=tmp_path,
        engine={"progress": False},
    )
    assert found.result["accuracy_per_round"][1] > 0.7
    page = write_run_report(tmp_path).read_text()
    assert "weight of the labels" in page and "accuracy per round" in page and "round 1" in page
    assert limbeck.fitting.resume(tmp_path).result["gt_weight_per_round"] == found.result["gt_weight_per_round"]


def test_the_command_lines_ways_of_giving_weights() -> None:
    config = GTSelfDistillation.Config
    assert config.make(gt_weight=["0.6"]).gt_weight == 0.6
    assert config.make(gt_weight=["estimated"]).gt_weight == "estimated"
    assert config.make(gt_weight=["1", "0.5"], rounds=2).gt_weight == (1.0, 0.5)
    assert config.make("paper").rounds == 5
