"""Progressive distillation: targets, weights, rounds, results."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import limbeck
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, Flow, Schedule, VPCosine
from limbeck.methods.samplers.progressive import Progressive
from limbeck.networks.diffusion_mlp import DiffusionMLP
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)

QUIET = EngineConfig(progress=False)
SMALL = {"start_steps": 8, "student_steps": 2, "steps": 24, "batch_size": 8}
LABELS = torch.arange(40) % 2


def net(
    schedule: Schedule | None = None, prediction: str = "v", seed: int = 0, classes: int | None = 2, width: int = 16
) -> Denoiser:
    torch.manual_seed(seed)
    schedule = VPCosine() if schedule is None else schedule
    scale = 1.0 if schedule.name == "edm" else 1e-3
    module = DiffusionMLP((2,), width=width, blocks=1, num_classes=classes, time_features=8, time_scale=scale)
    torch.nn.init.normal_(module.last.weight, std=0.3)
    null = None if classes is None else torch.tensor(classes)
    precond = "edm" if schedule.name == "edm" else None
    return Denoiser(module, schedule, prediction, precond=precond, null_cond=null).eval()


def data(n: int = 40) -> TensorData:
    return TensorData(torch.randn(n, 2, generator=torch.Generator().manual_seed(1)), LABELS[:n])


def made(teacher: Denoiser | None = None, student: Denoiser | None = None, **settings) -> Progressive:
    return Progressive(net() if teacher is None else teacher, LABELS, student, **{**SMALL, **settings})


def drawn(method: Progressive, batch: Batch, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and noise as the method draws them."""
    torch.manual_seed(seed)
    intervals = len(method.grid(method.number)) - 1
    return torch.randint(intervals, (len(batch.inputs),)), torch.randn_like(batch.inputs)


@pytest.mark.parametrize("weighting", ["truncated-snr", "snr+1"])
@pytest.mark.parametrize("number", [0, 1])
def test_the_loss_is_that_of_the_paper(weighting, number):
    method = made(net(), net(seed=3), weighting=weighting, guidance=2.0)
    method.former.module.load_state_dict(net(seed=5).module.state_dict())
    method.number = number
    batch = Batch(data().inputs[:12], LABELS[:12])
    place, eps = drawn(method, batch, 7)
    steps = 8 // 2 ** (number + 1)
    t = 1 - place.numpy() / steps
    middle, s = t - 0.5 / steps, t - 1 / steps

    def alpha(v):
        return np.cos(np.pi / 2 * v)[:, None]

    def sigma(v):
        return np.sin(np.pi / 2 * v)[:, None]

    def teacher(x, v):
        times = torch.from_numpy(v).float()
        return (
            (method.teacher if number == 0 else method.former)
            .predict(torch.from_numpy(x).float(), times, batch.labels, "x0", 2.0 if number == 0 else 1.0)
            .detach()
            .numpy()
        )

    def ddim(x, v, w):
        x0 = teacher(x, v)
        return alpha(w) * x0 + sigma(w) / sigma(v) * (x - alpha(v) * x0)

    x_t = alpha(t) * batch.inputs.numpy() + sigma(t) * eps.numpy()
    x_s = ddim(ddim(x_t, t, middle), middle, s)
    ratio = sigma(s) / sigma(t)
    target = (x_s - ratio * x_t) / (alpha(s) - ratio * alpha(t))
    found = method.student.predict(torch.from_numpy(x_t).float(), torch.from_numpy(t).float(), batch.labels)
    snr = (alpha(t) / sigma(t))[:, 0] ** 2
    weight = np.maximum(snr, 1) if weighting == "truncated-snr" else snr + 1
    expected = (weight * np.square(found.detach().numpy() - target).mean(1)).mean()
    torch.manual_seed(7)
    assert method(batch).item() == pytest.approx(expected, rel=2e-3)


def test_only_the_student_learns():
    method = made()
    method(Batch(data().inputs, LABELS)).backward()
    frozen = [*method.teacher.parameters(), *method.former.parameters(), *method.ema.parameters()]
    assert all(p.grad is None for p in frozen)
    assert method.student.module.last.weight.grad.abs().sum() > 0
    students = {id(p) for p in method.student.parameters()}
    assert {id(p) for p in method.trainable_parameters()} == students


@pytest.mark.parametrize("schedule", [VPCosine(), Flow(), EDM(0.02, 20.0)], ids=repr)
def test_grids_are_nested_and_end_clean(schedule):
    method = made(net(schedule, {"vp-cosine": "v", "flow": "flow", "edm": "x0"}[schedule.name]), start_steps=16)
    assert method.rounds == 3
    assert [len(method.grid(r)) - 1 for r in range(3)] == [8, 4, 2]
    for a, b in itertools.pairwise([method.times, *(method.grid(r) for r in range(3))]):
        assert torch.equal(a[::2], b) and b[-1] == 0 and float(b[0]) == pytest.approx(schedule.t_max)
    assert np.isfinite(method(Batch(data().inputs, LABELS)).item())


def test_updates_are_shared_out():
    method = made(start_steps=32, student_steps=1, steps=700)
    assert method.updates() == [100, 100, 100, 200, 200]
    assert sum(made(start_steps=32, student_steps=1, steps=5).updates()) == 5
    assert [(s.name, s.steps) for s in method.stages(data())] == [
        ("16-steps", 100),
        ("8-steps", 100),
        ("4-steps", 100),
        ("2-steps", 200),
        ("1-steps", 200),
    ]


def test_the_average_becomes_the_next_teacher():
    method = made(ema=0.5)
    Engine(None, QUIET, seed=1).run(method, method.stages(data())[:1])
    averaged = {k: v.clone() for k, v in method.ema.module.state_dict().items()}
    assert not torch.equal(averaged["last.weight"], method.student.module.last.weight)
    assert torch.equal(method.former.module.last.weight, net().module.last.weight)
    method.begin_round(1)
    for module in (method.student.module, method.former.module, method.ema.module):
        assert all(torch.equal(v, averaged[k]) for k, v in module.state_dict().items())
    assert method.ema.updates == 0 and not method.train().former.training


def test_a_teacher_of_straight_paths_needs_no_second_step():
    """One Gaussian without spread: every step of DDIM is exact, so the teacher's one-step prediction is the target."""
    exact = gaussian_mixture(torch.tensor([[0.5, -0.3]]), 0.0, schedule=VPCosine())
    method = Progressive(exact, None, net(classes=None), **SMALL)
    method.student = exact
    assert method(Batch({"x0": data().inputs})).item() < 1e-8


def paired(sampler: Sampler, fine: Sampler) -> float:
    z, cond = torch.randn(400, 2, generator=torch.Generator().manual_seed(9)), torch.arange(400) % 2
    return (sampler.sample(z, cond).x - fine.sample(z, cond).x).square().mean().item()


def test_students_follow_the_teacher_with_guidance_built_in():
    torch.manual_seed(0)
    method = made(net(seed=2), steps=160, lr=5e-3, batch_size=64, guidance=2.0, ema=0.9)
    Engine(None, QUIET, seed=0).run(method, method.stages(data()))
    contestants = method.contestants()
    assert list(contestants) == ["student", "teacher, 2 DDIM steps", "teacher, 8 DDIM steps", "teacher, 25 steps"]
    fine = contestants["teacher, 8 DDIM steps"]
    student, plain = contestants["student"], contestants["teacher, 2 DDIM steps"]
    assert (student.nfe, plain.nfe, student.guidance) == (2, 4, 1.0)
    assert paired(student, fine) < 0.6 * paired(plain, fine)
    first, second = method.updates()
    assert method.counters["teacher_evaluations"] == 40 * (first * 4 + second * 2)


def test_resume_is_exact(tmp_path):
    resumed_equals_uninterrupted(made, data(), tmp_path, stops=(7, 11))


def test_without_data_the_teacher_makes_samples(tmp_path):
    run = limbeck.fit(
        Progressive,
        Conditions(LABELS),
        teacher=net(),
        test=data(),
        out=tmp_path / "run",
        engine={"progress": False},
        pairs=64,
        teacher_nfe=4,
        judge_count=60,
        **SMALL,
    )
    assert list(run.result["cost"]["stages"]) == ["samples", "4-steps", "2-steps"]
    assert run.result["rows"][0]["who"] == "student" and run.result["rows"][0]["nfe"] == 2
    loaded = limbeck.load(tmp_path / "run").content
    z = torch.randn(5, 2)
    torch.testing.assert_close(loaded.sample(z, LABELS[:5]).x, run.method.sampler().sample(z, LABELS[:5]).x)


def test_a_student_of_another_size_starts_from_its_own_weights():
    method = made(student=net(seed=8, width=8))
    assert torch.equal(method.former.module.last.weight, net(seed=8, width=8).module.last.weight)
    Engine(None, QUIET).run(method, method.stages(data()))
    assert method.sampler().steps == 2


def test_paper_preset():
    config = Progressive.Config.make("paper")
    assert (config.start_steps, config.lr, config.schedule, config.ema) == (8192, 1e-4, "linear", 0)
    assert made(**{**config.model_dump(), "pairs": 4}).updates() == [50_000] * 11


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: made(start_steps=12), "times 2, 4, 8 … \\(got 12 and 2"),
        (lambda: made(start_steps=2), "got 2 and 2"),
        (lambda: made(steps=1), "2 rounds need at least as many updates"),
        (lambda: made(student=net(Flow(), "flow")), "the same schedule of noise"),
        (lambda: made(net(VPCosine(), "eps")), "the teacher cannot be asked for x0 by way of 'eps'"),
        (lambda: made()(Batch({"cond": LABELS})), "progressive needs samples"),
    ],
)
def test_errors_name_the_remedy(call, line):
    with pytest.raises(InputError, match=line):
        call()
