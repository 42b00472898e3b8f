"""BOSS: the loss, what is trained, stages, results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import limbeck
from limbeck.core.data import Stream
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, Flow, Schedule, VPCosine
from limbeck.diffusion.step_sizes import bellman_schedule, jump_costs, to_diffusers
from limbeck.methods.samplers import boss
from limbeck.methods.samplers.boss import BOSS
from limbeck.networks.diffusion_mlp import DiffusionMLP
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)

QUIET = EngineConfig(progress=False)
SMALL = {"anchors": 20, "probes": 12, "pairs": 40, "steps": 30, "batch_size": 16, "student_steps": 3}


def net(schedule: Schedule | None = None, prediction: str = "flow", classes: int | None = 2, seed: int = 0) -> Denoiser:
    """A network whose ODE bends: random weights, also in the last layer."""
    torch.manual_seed(seed)
    schedule = Flow() if schedule is None else schedule
    scale = 1.0 if schedule.name == "edm" else 1e-3
    module = DiffusionMLP((2,), width=16, blocks=1, num_classes=classes, time_features=8, time_scale=scale)
    torch.nn.init.normal_(module.last.weight, std=0.6)
    null = None if classes is None else torch.tensor(classes)
    precond = "edm" if schedule.name == "edm" else None
    return Denoiser(module, schedule, prediction, precond=precond, null_cond=null).eval()


LABELS = torch.arange(10) % 2


def made(**settings) -> BOSS:
    return BOSS(net(), LABELS, **{**SMALL, **settings})


def ready(**settings) -> BOSS:
    method = made(**settings)
    method.find_schedule()
    method.make_segments()
    return method


def test_the_loss_of_a_flow_is_the_published_one():
    method = ready()
    method.student = net(seed=4)
    batch = method.segments.segments(3).fetch(torch.arange(120), None)
    x = {k: v.double().numpy() for k, v in batch.inputs.items()}
    u = method.student.predict(batch.inputs["x_t"], batch.inputs["t"].float(), batch.inputs["cond"], "flow")
    slope = (x["x_s"] - x["x_t"]) / (x["s"] - x["t"])[:, None]
    expected = np.square(u.detach().double().numpy() - slope).mean()
    assert method(batch).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("schedule", "prediction"), [(EDM(0.02, 20.0), "x0"), (VPCosine(), "v")], ids=["edm", "vp"])
def test_other_schedules_have_the_loss_of_a_rectified_flow(schedule, prediction):
    method = BOSS(net(schedule, prediction), LABELS, **SMALL)
    method.find_schedule()
    method.make_segments()
    method.student = net(schedule, prediction, seed=4)
    batch = method.segments.segments(3).fetch(torch.arange(120), None)
    inputs = batch.inputs
    t, s = inputs["t"], inputs["s"]
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    alpha_s, sigma_s = schedule.alpha(s)[:, None], schedule.sigma(s)[:, None]
    # The same segment in the coordinates of a flow: x / (alpha + sigma) at time sigma / (alpha + sigma).
    start, end = inputs["x_t"] / (alpha + sigma), inputs["x_s"] / (alpha_s + sigma_s)
    slope = (end - start) / (sigma_s / (alpha_s + sigma_s) - sigma / (alpha + sigma))
    x0 = method.student.predict(inputs["x_t"], t.float(), inputs["cond"])
    velocity = (inputs["x_t"] - alpha * x0) / sigma - x0
    assert method(batch).item() == pytest.approx((velocity - slope).square().mean().item(), rel=1e-3)


def test_a_student_in_all_the_teachers_steps_has_nothing_to_learn():
    method = ready(student_steps=20)
    batch = method.segments.segments(20).fetch(torch.arange(100), None)
    assert method(batch).item() < 1e-8


def test_only_the_student_learns():
    method = ready()
    loss = method(method.segments.segments(3).fetch(torch.arange(9), None))
    loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is None for p in method.ema.parameters())
    assert method.student.module.last.weight.grad.abs().sum() > 0


def paired(sampler: Sampler, teacher: Denoiser, guidance: float = 1.0) -> float:
    z, cond = torch.randn(300, 2, generator=torch.Generator().manual_seed(77)), torch.arange(300) % 2
    exact = Sampler.ode(teacher, 200, "ddim", guidance).sample(z, cond).x
    return (sampler.sample(z, cond).x - exact).square().mean().item()


def test_straightening_beats_the_schedule_alone_and_both_are_cheap():
    method = made(steps=200, lr=5e-3, pairs=200, batch_size=64, guidance=2.0)
    Engine(None, QUIET, seed=0).run(method, method.stages(seed=0))
    teacher = method.teacher
    alone = method.step_schedule().sampler(teacher, guidance=2.0)
    trained = method.sampler()
    assert trained.nfe == 3 and alone.nfe == 6 and trained.guidance == 1
    assert paired(trained, teacher, 2.0) < 0.6 * paired(alone, teacher, 2.0)
    assert torch.equal(trained.times, method.step_schedule().times)
    assert method.counters["trajectories"] == 200


def test_several_schedules_share_one_pass():
    method = made(harvest=(2, 5, 3))
    before = method.teacher.evaluations
    method.find_schedule()
    method.make_segments()
    assert method.teacher.evaluations - before == 2 * 20  # one chunk of probes, one of trajectories
    for k in (2, 3, 5):
        pool = method.segments.segments(k)
        assert len(pool) == 40 * k
        assert torch.equal(method.segments.times[k], method.step_schedule(k).times)
    other = BOSS(net(), LABELS, **{**SMALL, "student_steps": 5}, cost_matrix=method.costs)
    assert torch.equal(other.step_schedule().times, method.segments.times[5])
    assert [s.name for s in other.stages()] == ["trajectories", "straighten"]


def test_the_schedule_is_that_of_the_free_function():
    method = made(guidance=1.5)
    assert torch.equal(
        method.find_schedule().indices,
        bellman_schedule(net(), 3, (2,), anchors=20, probes=12, conditions=LABELS, guidance=1.5).indices,
    )


def test_a_schedule_alone_trains_nothing(tmp_path):
    method = made(straighten=False, guidance=1.5)
    assert [s.name for s in method.stages()] == ["schedule"]
    before = {k: v.clone() for k, v in method.state_dict().items()}
    Engine(None, QUIET).run(method, method.stages())
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    sampler = method.sampler()
    assert sampler.denoiser is method.teacher and sampler.guidance == 1.5
    assert next(iter(method.contestants())) == "teacher, 3 steps of the schedule"


def test_adapters_learn_and_weights_stay():
    method = ready(lora_rank=2, lr=1e-2)
    weights = {k: v.clone() for k, v in method.student.module.state_dict().items()}
    pool = Stream(method.segments.segments(3), 32)
    x, t, cond = torch.randn(5, 2), torch.full((5,), 0.6), torch.tensor([0, 1, 0, 1, 0])
    torch.testing.assert_close(method.averaged.predict(x, t, cond), method.teacher.predict(x, t, cond))
    optimised = method.optimised(20)["student"]
    assert {id(p) for p in optimised.parameters()} == {id(p) for p in method.lora.parameters()}
    for step in range(20):
        loss = method(pool.batch(step))
        optimised.optimizer.zero_grad()
        loss.backward()
        optimised.optimizer.step()
        method.follow(step)
    assert all(torch.equal(v, weights[k]) for k, v in method.student.module.state_dict().items())
    trained = method.averaged
    assert not torch.allclose(trained.predict(x, t, cond), method.teacher.predict(x, t, cond))
    for _ in range(1200):
        method.follow(0)
    torch.testing.assert_close(
        method.averaged.predict(x, t, cond), method.student.predict(x, t, cond), atol=1e-5, rtol=1e-4
    )
    assert trained.module.state_dict().keys() == weights.keys()  # merged: a plain network


@pytest.mark.parametrize("rank", [None, 2])
def test_resume_is_exact(tmp_path, monkeypatch, rank):
    monkeypatch.setattr(boss, "MOST_AT_ONCE", 4)  # ten steps of trajectories, three of probes

    def make() -> BOSS:
        return BOSS(net(), LABELS, **{**SMALL, "lora_rank": rank})

    method = resumed_equals_uninterrupted(make, Conditions(LABELS), tmp_path)
    assert method.segments.done == 40 and method.costs.probes == 12


def test_chunks_do_not_change_probes(monkeypatch):
    whole = made().find_schedule().costs
    monkeypatch.setattr(boss, "MOST_AT_ONCE", 5)
    parts = made().find_schedule().costs
    above = torch.isfinite(whole.values)
    torch.testing.assert_close(whole.values[above], parts.values[above], rtol=1e-5, atol=1e-8)
    assert parts.probes == 12


def test_a_run_gives_a_sampler_that_comes_back(tmp_path):
    run = limbeck.fit(
        BOSS,
        Conditions(LABELS),
        teacher=net(),
        test=Conditions(LABELS),
        out=tmp_path / "run",
        engine={"progress": False},
        judge_count=60,
        **SMALL,
    )
    names = [row["who"] for row in run.result["rows"]]
    assert names[:3] == ["student", "teacher, 3 steps of the schedule", "teacher, 3 steps of its grid"]
    assert run.result["rows"][0]["nfe"] == 3
    assert len(run.result["step_schedule"]["times"]) == 4
    loaded = limbeck.load(tmp_path / "run").content
    z, cond = torch.randn(6, 2), LABELS[:6]
    torch.testing.assert_close(loaded.sample(z, cond).x, run.method.sampler().sample(z, cond).x)
    assert (tmp_path / "run" / "artifact" / "jump-costs.npz").exists()
    assert to_diffusers(run.method.step_schedule(), Flow())["sigmas"][0] == 1


def test_paper_preset():
    config = BOSS.Config.make("paper")
    assert (config.anchors, config.probes, config.pairs, config.batch_size) == (100, 100, 5000, 15)
    assert round(config.warmup * config.steps) == 5000


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: made(student_steps=21), "between 1 and the 20 intervals"),
        (lambda: made(harvest=(0,)), "between 1 and the 20 intervals"),
        (lambda: made().sampler(), r"call find_schedule\(\) first"),
        (lambda: made()(torch.randn(4, 2)), "BOSS learns from segments"),
        (lambda: BOSS(net(), LABELS, net(VPCosine(), "v"), **SMALL), "the same schedule of noise"),
        (lambda: BOSS(net(classes=None), shape=(2,), guidance=2.0, lora_rank=0), "lora_rank must be"),
        (
            lambda: BOSS(
                net(), LABELS, student_steps=8, cost_matrix=jump_costs(net(), torch.randn(3, 2), 5, cond=LABELS[:3])
            ),
            "between 1 and the 5 intervals",
        ),
    ],
)
def test_errors_name_the_remedy(call, line):
    with pytest.raises(InputError, match=line):
        call()
