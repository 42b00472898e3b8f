"""TGeo-KD: the equations, who learns from what, class means, the validation part, baselines, resuming, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import limbeck
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.methods.models import KD, TGeoKD
from tests.helpers import resumed_equals_uninterrupted

QUIET = EngineConfig(progress=False)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def net(width: int = 8, classes: int = 3, seed: int = 0, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(4, width), *([nn.BatchNorm1d(width)] if norm else []), nn.Tanh(), nn.Linear(width, classes)]
    return nn.Sequential(*layers)


def batch(n: int = 12, classes: int = 3, seed: int = 0) -> Batch:
    return Batch(torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % classes)


def data(n: int = 60, classes: int = 3) -> TensorData:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(n) % classes
    x[torch.arange(n), y] += 4
    return TensorData(x, y)


def method(**settings) -> TGeoKD:
    student, teacher = net(), net(16, seed=1)
    torch.manual_seed(5)
    return TGeoKD(student, teacher, **{"batch_size": 10, "steps": 20, "evaluations": 0, **settings})


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None and p.grad.abs().sum() > 0]


# ---- the inner loss and who learns from it ---------------------------------------------------------------------------


def test_the_inner_loss_is_the_weighted_mean_of_both_losses():
    made = method(temperature=3.0).eval()
    b = batch()
    ratio = made.ratios(b)
    zs, zt = made.student(b.inputs), made.teachers.models[0](b.inputs)
    soft = 9 * (F.softmax(zt / 3, -1) * (F.log_softmax(zt / 3, -1) - F.log_softmax(zs / 3, -1))).sum(-1)
    hard = -F.log_softmax(zs, -1)[torch.arange(12), b.labels]
    losses = made.losses(b)
    torch.testing.assert_close(losses.total, (ratio * soft + (1 - ratio) * hard).mean())
    torch.testing.assert_close(losses.observed["ratio"], ratio.mean())
    assert ratio.std() > 0 and ratio.shape == (12,)


def test_the_ratio_is_the_controllers_answer_to_features_by_hand():
    made = method().eval()
    made.measure(data())
    b = batch()
    s, t = (F.softmax(m(b.inputs), -1) for m in (made.student, made.teachers.models[0]))
    g = torch.eye(3)[b.labels]
    o = made.class_means.means[b.labels]
    edges = [(o - s) ** 2, (g - s) ** 2, (t - s) ** 2, (t - g) ** 2, (o - g) ** 2]
    delta = torch.cat([s, t, g, o, *edges], 1)
    expected = 0.01 + 0.98 * torch.sigmoid(made.controller.layers(delta).squeeze(1))
    torch.testing.assert_close(made.ratios(b), expected.detach())


def test_class_means_are_the_teachers_mean_probabilities_per_class():
    made, d = method(), data(61)
    made.measure(d)
    p = F.softmax(made.teachers.models[0](d.inputs), -1)
    expected = torch.stack([p[d.labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(made.class_means.means, expected)
    assert bool(made.class_means.measured) and made.counters["teacher_forwards"] == 61
    made.measure((d.inputs[d.labels < 2], d.labels[d.labels < 2]))
    torch.testing.assert_close(made.class_means.means[2], p[d.labels < 2].mean(0))  # a class without samples


def test_without_class_means_those_of_the_batch_serve():
    made, b = method().eval(), batch()
    before = made.ratios(b)
    made.measure((b.inputs, b.labels))
    torch.testing.assert_close(before, made.ratios(b))


def test_the_students_step_gives_the_controller_no_gradient():
    made = method()
    made(batch()).backward()
    assert len(gradients(made.student)) == 6 and not gradients(made.controller) and not gradients(made.teachers)


def test_the_controllers_step_gives_the_student_no_gradient():
    made = method()
    before = {k: v.clone() for k, v in made.student.state_dict().items() if "running" not in k and "num_b" not in k}
    made.controller_loss(batch(), batch(seed=3)).backward()
    assert len(gradients(made.controller)) == 6 and not gradients(made.student) and not gradients(made.teachers)
    assert all(torch.equal(made.student.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("form", ["exact", "finite_difference"])
def test_the_controllers_gradient_is_that_of_validation_after_a_step(form):
    """Brute force in float64: move one weight of the controller, take the student's step, look at validation data."""
    student, teacher = net(norm=False).double(), net(16, seed=1).double()
    torch.manual_seed(5)
    made = TGeoKD(student, teacher, hypergrad_form=form, hypergrad_eps=1e-4, virtual_lr=0.3, temperature=2.0)
    made.measure(TensorData(data().inputs.double(), data().labels))
    b, v = (Batch(x.inputs.double(), x.labels) for x in (batch(), batch(9, seed=3)))
    made.controller_loss(b, v).backward()
    features = made.features(student(b.inputs), made.teach(b), b.labels)

    def after() -> float:
        soft, hard = made._rows(student(b.inputs), made.teach(b), b)
        ratio = made.controller(features)
        grads = torch.autograd.grad((ratio * soft + (1 - ratio) * hard).mean(), list(student.parameters()))
        with torch.no_grad():
            named = dict(student.named_parameters())
            moved = {k: p - 0.3 * g for (k, p), g in zip(named.items(), grads, strict=True)}
            return float(F.cross_entropy(torch.func.functional_call(student, moved, (v.inputs,)), v.labels))

    for weight in (made.controller.layers[0].weight, made.controller.layers[2].bias, made.controller.layers[4].weight):
        at = int(weight.grad.abs().argmax())
        ends = []
        for shift in (1e-5, -2e-5):
            weight.data.view(-1)[at] += shift
            ends.append(after())
        weight.data.view(-1)[at] += 1e-5
        assert float(weight.grad.view(-1)[at]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3)


def test_a_virtual_step_moves_no_running_statistics_and_draws_nothing():
    made = method()
    b, v = batch(), batch(seed=3)
    teacher = made.teach(b)
    logits = made.student_logits(b).detach()
    before = {k: x.clone() for k, x in made.state_dict().items()}
    state = torch.get_rng_state()
    found = made.hypergradient(b, v, logits, teacher)
    assert set(found.gradient) == {name for name, _ in made.controller.named_parameters()}
    assert all(torch.equal(x, before[k]) for k, x in made.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("settings", [{"hypergrad": "t1t2"}, {"hypergrad": "neumann"}, {"unroll": "last_layer"}])
def test_other_solvers_agree_in_direction(settings):
    def direction(**given) -> Tensor:
        made = method(virtual_lr=0.01, hypergrad_form="exact", **given)
        made.controller_loss(batch(), batch(seed=3)).backward()
        return torch.cat([p.grad.flatten() for p in made.controller.parameters()])

    assert F.cosine_similarity(direction(), direction(**settings), dim=0) > (0.5 if "unroll" in settings else 0.95)


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(made: TGeoKD, d: TensorData | None = None) -> TGeoKD:
    d = data() if d is None else d
    Engine(None, QUIET, seed=1).run(made, made.stages(d, None, seed=0))
    return made


def weights(made) -> Tensor:
    return torch.cat([p.detach().flatten() for p in made.student.parameters()])


def test_a_controller_frozen_at_one_half_is_plain_distillation():
    """Same data order: the learned arm holds data out, so it gets the validation data from elsewhere."""
    held = TensorData(batch(9, seed=3).inputs, batch(9).labels)

    def made(**settings) -> TGeoKD:
        student, teacher = net(), net(16, seed=1)
        torch.manual_seed(5)
        return TGeoKD(student, teacher, batch_size=10, steps=20, evaluations=0, validation=held, **settings)

    frozen = made(controller_lr=1e-30, controller_weight_decay=0)
    for p in frozen.controller.layers[-1].parameters():
        nn.init.zeros_(p)
    fixed = run(made(ratio="fixed", alpha=0.5))
    torch.testing.assert_close(weights(run(frozen)), weights(fixed))
    plain = KD(
        net(),
        net(16, seed=1),
        alpha=0.5,
        **{k: getattr(fixed.config, k) for k in KD.Config.model_fields if k != "alpha"},
    )
    Engine(None, QUIET, seed=1).run(plain, plain.stages(data(), None, seed=0))
    torch.testing.assert_close(weights(plain), weights(fixed))
    assert (weights(run(made())) - weights(fixed)).abs().max() > 1e-5


def test_the_ratio_is_constant_in_the_warm_up_and_then_the_controllers():
    made = method(controller_warmup=0.5, alpha=0.25)
    engine = Engine(None, EngineConfig(progress=False, log_every=1), seed=1)
    rows = engine.run(made, made.stages(data(), None, seed=0))
    seen = [r["ratio"] for r in rows]
    assert seen[:10] == [0.25] * 10 and all(0.3 < r < 0.7 for r in seen[10:])


def test_the_controller_takes_its_turns():
    start = method()
    for every, calls in ((1, 18), (4, 4)):  # of steps 2 to 19; 4, 8, 12 and 16
        made = method(controller_every=every, controller_warmup=0.1)
        stage = made.stages(data(), None, seed=0)[0]
        optimised = stage.optimisers()["controller"].optimizer
        count = 0
        step = optimised.step

        def counted(*a, step=step, **k):
            nonlocal count
            count += 1
            return step(*a, **k)

        optimised.step = counted
        made_optimisers = {**stage.optimisers(), "controller": limbeck.core.optim.Optimised(optimised)}
        stage.optimisers = lambda made_optimisers=made_optimisers: made_optimisers
        Engine(None, QUIET, seed=1).run(made, [stage])
        assert count == calls
        assert any(
            not torch.equal(a, b)
            for a, b in zip(made.controller.parameters(), start.controller.parameters(), strict=True)
        )
    untrained = run(method(ratio="untrained"))
    assert all(
        torch.equal(a, b) for a, b in zip(untrained.controller.parameters(), start.controller.parameters(), strict=True)
    )


def test_the_ratios_that_were_trained_with_are_remembered_by_whether_the_teacher_is_right():
    made = method(ratio="confidence")
    d, seen = data(), {True: [], False: []}
    stage = made.stages(d, None, seed=0)[0]
    update = stage.update

    def watched(batch, stepper):
        p = F.softmax(made.teachers.models[0](batch.inputs), -1)
        for row, label in zip(p, batch.labels, strict=True):
            seen[bool(row.argmax() == label)].append(float(row[label].detach()))
        return update(batch, stepper)

    stage.update = watched
    Engine(None, QUIET, seed=1).run(made, [stage])
    assert made.ratio_counts.tolist() == [len(seen[False]), len(seen[True])] and min(made.ratio_counts) > 0
    expected = [sum(seen[k]) / len(seen[k]) for k in (False, True)]
    torch.testing.assert_close(made.ratio_means, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_validation_samples_are_held_out_and_not_trained_on():
    made = method(validation_fraction=0.2)
    stage = made.stages(data(), None, seed=0)[0]
    assert len(stage.stream.data) == 48
    assert len(method(ratio="fixed").stages(data(), None, seed=0)[0].stream.data) == 60
    given = TGeoKD(net(), net(16, seed=1), validation=data(9))
    assert len(given.stages(data(), None, seed=0)[0].stream.data) == 60


def test_it_learns_whom_to_trust():
    """Labels are wrong where the teacher is right (flip) and right where the teacher is wrong (blind)."""
    x, truth = data(600).inputs, data(600).labels
    flip, blind = torch.arange(600) % 10 < 3, truth == 2

    class Oracle(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return 6 * F.one_hot(inputs[:, :3].argmax(-1) % 2, 3).float()

    labels = torch.where(flip & ~blind, 1 - truth, truth)
    made = TGeoKD(
        net(16),
        Oracle(),
        validation=(data(90).inputs, data(90).labels),
        steps=300,
        temperature=2.0,
        controller_lr=0.01,
        evaluations=0,
    )
    run(made, TensorData(x, labels))
    ratio = made.ratios((x, labels))
    assert ratio[flip & ~blind].mean() > ratio[blind].mean() + 0.2


def test_two_classes_and_soft_labels():
    d = data(40, 2)
    made = TGeoKD(net(classes=2), net(16, 2, seed=1), steps=12, batch_size=10, evaluations=0)
    run(made, d)
    assert made.ratios((d.inputs, d.labels)).shape == (40,)
    soft = TensorData(d.inputs, F.one_hot(d.labels, 2).float())
    torch.testing.assert_close(made.ratios((d.inputs, d.labels)), made.ratios((soft.inputs, soft.labels)))
    run(TGeoKD(net(classes=2), net(16, 2, seed=1), steps=6, batch_size=10, evaluations=0), soft)


# ---- baselines -------------------------------------------------------------------------------------------------------


def test_schedules_of_the_ratio():
    b = batch()
    wls, confident = method(ratio="wls").eval(), method(ratio="confidence").eval()
    pick = torch.arange(12), b.labels
    ce_s = -F.log_softmax(wls.student(b.inputs), -1)[pick]
    ce_t = -F.log_softmax(wls.teachers.models[0](b.inputs), -1)[pick]
    torch.testing.assert_close(wls.ratios(b), (1 - torch.exp(-ce_s / ce_t)).detach())
    torch.testing.assert_close(confident.ratios(b), torch.exp(-ce_t))
    torch.testing.assert_close(method(ratio="fixed", alpha=0.3).ratios(b), torch.full((12,), 0.3))
    falling = method(ratio="annealing", alpha=0.8)
    engine = Engine(None, EngineConfig(progress=False, log_every=1), seed=1)
    rows = engine.run(falling, falling.stages(data(), None, seed=0))
    assert [r["ratio"] for r in rows] == pytest.approx([0.8 * (1 - i / 20) for i in range(20)])


def test_several_teachers_are_joined_by_their_mean_probabilities():
    torch.manual_seed(5)
    made = TGeoKD(net(), [net(16, seed=1), net(16, seed=2)], temperature=2.0, ratio="fixed", alpha=1.0).eval()
    b = batch()
    soft = torch.stack([F.softmax(m(b.inputs) / 2, -1) for m in made.teachers.models]).mean(0)
    expected = 4 * (soft * (soft.log() - F.log_softmax(made.student(b.inputs) / 2, -1))).sum(-1).mean()
    torch.testing.assert_close(made(b), expected)
    assert made.features(made.student_logits(b), made.teach(b), b.labels).shape == (12, 27)


# ---- resuming, keeping, reporting ------------------------------------------------------------------------------------


def test_resume_is_exact(tmp_path):
    found = resumed_equals_uninterrupted(lambda: method(steps=25, controller_every=2), data(), tmp_path)
    assert bool(found.class_means.measured)


def test_a_run_reports_ratios_and_keeps_the_plain_student(tmp_path):
    made = limbeck.fit(
        "tgeo-kd",
        (data().inputs, data().labels),
        student=net(),
        teacher=net(16, seed=1),
        test=data(),
        steps=12,
        out=tmp_path / "run",
        engine={"progress": False},
        batch_size=10,
    )
    result = made.result
    assert 0 < result["final_ratio"] < 1
    assert {"ratio_teacher_right", "ratio_teacher_wrong"} & set(result)
    assert result["pictures"][-1]["title"] == "Fusion ratios"
    state = limbeck.load(tmp_path / "run", model=net()).content.state_dict()
    assert set(state) == set(net().state_dict())
    ratio, right = made.method.training_ratios(data(), most=25)
    assert len(ratio) == len(right) == 20  # every third of 60
    assert torch.equal(right, made.method.teachers.models[0](data().inputs[::3]).argmax(-1) == data().labels[::3])


def test_a_bare_loop_trains_both():
    made = method()
    student = torch.optim.SGD(made.student.parameters(), 0.1)
    controller = torch.optim.Adam(made.controller.parameters(), 0.01)
    made.measure((data().inputs, data().labels))
    losses = []
    for _ in range(30):
        made.controller_loss(
            (data().inputs[:40], data().labels[:40]), (data().inputs[40:], data().labels[40:])
        ).backward()
        controller.step()
        controller.zero_grad()
        loss = made((data().inputs[:40], data().labels[:40]))
        loss.backward()
        student.step()
        student.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0] and math.isfinite(losses[-1])


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"accumulate": 2}, "set accumulate to 1"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"ratio": "learnt"}, "ratio"),
        ({"controller_features": "option4"}, "controller_features"),
        ({"ratio_margin": 0.5}, "ratio_margin"),
        ({"alpha": 1.5}, "alpha"),
    ],
)
def test_bad_settings_are_one_line(settings, line):
    with pytest.raises(InputError, match=line) as error:
        method(**settings)
    assert "\n" not in str(error.value)


def test_other_bad_input():
    with pytest.raises(
        InputError, match="made for 4 classes, but the student has 3 and the teacher 3: give num_classes"
    ):
        TGeoKD(net(), net(16, seed=1), num_classes=4).check(batch())
    with pytest.raises(InputError, match="needs labels"):
        method()(Batch(torch.randn(4, 4)))
    with pytest.raises(InputError, match="one sample cannot be divided"):
        method().stages(TensorData(torch.randn(1, 4), torch.zeros(1).long()))
    with pytest.raises(InputError, match="tgeo-kd needs teacher="):
        limbeck.fit("tgeo-kd", data(), student=net())
    with pytest.raises(InputError, match="must know the number of classes"):
        TGeoKD(nn.Conv1d(1, 1, 1), net())
