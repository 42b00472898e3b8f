"""InstaFlow: its losses against plain arithmetic, its stages, its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, Flow, VPCosine, VPDiscrete
from limbeck.diffusion.transforms import InSchedule, native
from limbeck.losses.perceptual import FeatureDistance
from limbeck.methods.samplers.instaflow import InstaFlow, Stacked, as_flow
from limbeck.networks.diffusion_mlp import DiffusionMLP
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
LABELS = torch.arange(3).repeat(8)


def flow_network(seed: int = 0, schedule: Any = None, prediction: str = "flow") -> Denoiser:
    torch.manual_seed(seed)
    network = DiffusionMLP((2,), width=16, blocks=1, num_classes=3)
    torch.nn.init.normal_(network.last.weight, std=0.3)
    return Denoiser(network, schedule or Flow(), prediction, null_cond=torch.tensor(3)).eval()


def small(**settings: Any) -> InstaFlow:
    options = {"steps": 6, "distil_steps": 6, "pairs": 24, "batch_size": 8, "teacher_nfe": 4, "flow_nfe": 3, **settings}
    return InstaFlow(flow_network(), LABELS, **options)


def pair_batch(n: int = 5) -> Batch:
    torch.manual_seed(1)
    return Batch({"z": torch.randn(n, 2), "x0": torch.randn(n, 2), "cond": torch.arange(n) % 3})


def test_reflow_regresses_the_straight_line() -> None:
    method, batch = small(cond_dropout=0.0), pair_batch()
    torch.manual_seed(2)
    found = method.reflow_losses(batch)["reflow"]
    torch.manual_seed(2)
    t = torch.rand(5)
    z, x, c = batch.inputs["z"], batch.inputs["x0"], batch.inputs["cond"]
    x_t = (1 - t)[:, None] * x + t[:, None] * z
    wanted = (method.student.module(x_t, 1000 * t, c) - (z - x)).square().mean()
    assert torch.allclose(found, wanted, atol=1e-6)


def test_distillation_regresses_one_step_from_noise() -> None:
    method, batch = small(), pair_batch()
    z, x, c = batch.inputs["z"], batch.inputs["x0"], batch.inputs["cond"]
    once = z - method.student.module(z, torch.full((5,), 1000.0), c)
    assert torch.allclose(method.distil_losses(batch)["l2"], (once - x).square().mean(), atol=1e-6)


def test_k_step_distillation_stands_on_the_line_with_the_same_target() -> None:
    method, batch = small(distil_k=4), pair_batch(64)
    z, x, c = batch.inputs["z"], batch.inputs["x0"], batch.inputs["cond"]
    torch.manual_seed(3)
    found = method.distil_losses(batch)["l2"]
    torch.manual_seed(3)
    t = (1 + torch.randint(4, (64,))) / 4
    x_t = (1 - t)[:, None] * x + t[:, None] * z
    wanted = (method.student.module(x_t, 1000 * t, c) - (z - x)).square().mean()
    assert set(t.tolist()) == {0.25, 0.5, 0.75, 1.0}
    assert torch.allclose(found, wanted, atol=1e-6)
    assert method.sampler().nfe == 4


def test_dropped_conditions_become_the_null_class() -> None:
    method, batch = small(cond_dropout=0.999999), pair_batch()
    torch.manual_seed(2)
    found = method.reflow_losses(batch)["reflow"]
    nobody = Batch({**batch.inputs, "cond": torch.full((5,), 3)})
    plain = small(cond_dropout=0.0)
    torch.manual_seed(2)
    torch.rand(5)  # the draw of what is dropped
    assert torch.allclose(found, plain.reflow_losses(nobody)["reflow"], atol=1e-6)


def test_gradients_reach_the_student_and_nobody_else() -> None:
    method = small()
    method(pair_batch()).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.parameters())
    assert all(p.grad is None for p in [*method.teacher.parameters(), *method.ema.parameters()])


def test_every_stage_has_pairs_of_its_own_and_the_second_come_from_the_flow() -> None:
    method = small(rounds=2)
    stages = method.stages(seed=0)
    names = [s.name for s in stages]
    assert names == ["pairs-1", "reflow-1", "pairs-2", "reflow-2", "pairs-distil", "distil"]
    stores = [s.state["pairs"] for s in stages]
    assert len({id(s) for s in stores}) == 3
    Engine(None, EngineConfig(progress=False), seed=1).run(method, stages)
    first, second, third = stores[0], stores[2], stores[4]
    assert not torch.equal(first.z, second.z) and not torch.equal(second.z, third.z)
    ends = Sampler.ode(method.teacher, 4, "dpm2m").sample(first.z, first.cond).x
    assert torch.allclose(first.x, ends, atol=1e-5)
    assert not torch.allclose(
        second.x, Sampler.ode(method.teacher, 4, "dpm2m").sample(second.z, second.cond).x, atol=1e-3
    )


def test_direct_distillation_has_the_updates_of_both_stages_on_the_teachers_pairs() -> None:
    stages = small(direct=True).stages(seed=0)
    assert [(s.name, s.steps) for s in stages] == [("pairs-distil", 1), ("distil", 12)]


@pytest.mark.parametrize(
    ("schedule", "prediction"), [(VPCosine(), "v"), (VPDiscrete(), "eps"), (EDM(0.02, 20.0), "x0"), (Flow(), "flow")]
)
def test_adapter_start_is_the_teachers_velocity(schedule: Any, prediction: str) -> None:
    teacher = flow_network(4, schedule, prediction)
    student = as_flow(teacher)
    x, t = torch.randn(6, 2), torch.linspace(0.05, 0.9, 6)
    seen = InSchedule(teacher, Flow()) if student is not teacher else teacher
    assert torch.allclose(student.predict(x, t, LABELS[:6], "flow"), seen.predict(x, t, LABELS[:6], "flow"))
    # a step of Euler of the flow is a step of DDIM of the teacher at the same noise to signal
    flow = Sampler(student, torch.tensor([0.9, 0.5, 0.2]), solver="euler")
    own = native(flow)
    z = torch.randn(6, 2)
    start = flow.start(z)
    if schedule.name != "flow":
        from limbeck.diffusion.transforms import transform

        start, _ = transform(flow.start(z), torch.full((6,), 0.9), Flow(), schedule)
    from limbeck.diffusion.solvers import ode_solve

    a = ode_solve(student, flow.start(z), flow.times, solver="euler", cond=LABELS[:6]).x
    b = ode_solve(own.denoiser, start, own.times, solver="ddim", cond=LABELS[:6]).x
    if schedule.name != "flow":
        b, _ = transform(b, torch.full((6,), float(own.times[-1])), schedule, Flow())
    assert torch.allclose(a, b, atol=2e-4)


def test_raw_start_reads_the_output_as_the_velocity() -> None:
    teacher = flow_network(4, VPDiscrete(), "eps")
    student = as_flow(teacher, "raw")
    x, t = torch.randn(4, 2), torch.rand(4)
    assert torch.equal(student.predict(x, t, LABELS[:4], "flow"), teacher.module(x, 1000 * t, LABELS[:4]))


def test_reflow_of_an_exact_teacher_lowers_the_transport_cost() -> None:
    law = gaussian_mixture(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 0.1)
    torch.manual_seed(0)
    student = Denoiser(DiffusionMLP((2,), width=32, blocks=2), Flow(), "flow")
    method = InstaFlow(
        law,
        None,
        student,
        steps=400,
        distil_steps=1,
        pairs=1024,
        batch_size=128,
        lr=3e-3,
        teacher_solver="heun",
        teacher_nfe=16,
    )
    stages = method.stages(seed=0)
    Engine(None, EngineConfig(progress=False), seed=1).run(method, stages)
    teachers, flows = stages[0].state["pairs"], stages[2].state["pairs"]
    # Never larger up to the error of the fit, which is large after 400 updates; a coupling without any sense costs 1 + 0.51.
    assert flows.transport_cost() < teachers.transport_cost() + 0.15


def test_feature_distance_is_a_term_of_its_own() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh())
    method = InstaFlow(
        flow_network(),
        LABELS,
        perceptual_steps=2,
        features=FeatureDistance(network, name="test"),
        pairs=8,
        batch_size=4,
    )
    losses = method.distil_losses(pair_batch(), perceptual=True)
    assert set(losses) == {"l2", "features"} and losses["features"] > 0
    assert [s.name for s in method.stages()][-1] == "distil-features"


def test_feature_steps_without_features_are_refused() -> None:
    with pytest.raises(InputError, match="features"):
        small(perceptual_steps=3).stages()


def test_stacked_networks_compose() -> None:
    a, b = flow_network(0).module, flow_network(1).module
    stack = Denoiser(Stacked(a, b), Flow(), "flow")
    z, c = torch.randn(4, 2), LABELS[:4]
    whole = z - stack.predict(z, 1.0, c, "flow")
    time = torch.full((4,), 1000.0)
    middle = z - a(z, time, c)
    assert torch.allclose(whole, middle - b(middle, time, c), atol=1e-6)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="pairs"):
        small()(torch.randn(4, 2))
    with pytest.raises(InputError, match="schedule 'flow'"):
        InstaFlow(flow_network(), LABELS, flow_network(0, EDM(), "x0"))
    with pytest.raises(InputError, match="class 7 was never seen"):
        method = InstaFlow(flow_network(), torch.tensor([0, 7]))
        method.check(Batch({"cond": torch.tensor([0, 7])}))
    bare = Denoiser(DiffusionMLP((2,), width=8, blocks=1), Flow(), "flow")
    with pytest.raises(InputError, match="null condition"):
        InstaFlow(bare, flow_guidance=1.5)


def test_resumes_exactly(tmp_path: Path) -> None:
    resumed_equals_uninterrupted(small, None, tmp_path, stops=(3,), every=2)
