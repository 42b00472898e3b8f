"""Consistency distillation: the loss against plain arithmetic, grids and decays, both recipes, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import limbeck
from limbeck.blocks.lora import LoRA
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.extra_time import GuidanceScale
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.schedules import EDM, Flow, Schedule, VPCosine
from limbeck.diffusion.solvers import ode_solve
from limbeck.methods.samplers.consistency import Consistency
from limbeck.networks.diffusion_mlp import DiffusionMLP
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
LABELS = torch.arange(3).repeat(8)


def network(schedule: Schedule | None = None, prediction: str = "v", **more: Any) -> Denoiser:
    torch.manual_seed(0)
    made = DiffusionMLP((2,), width=16, blocks=1, num_classes=3, time_scale=1.0 if more.get("precond") else 1e-3)
    torch.nn.init.normal_(made.last.weight, std=0.3)
    return Denoiser(made, schedule or VPCosine(), prediction, null_cond=torch.tensor(3), **more).eval()


def edm() -> Denoiser:
    return network(EDM(0.02, 20.0), "x0", precond="edm")


def method(teacher: Denoiser | None = None, **settings: Any) -> Consistency:
    return Consistency(teacher or network(), LABELS, **{"steps": 6, "batch_size": 8, "teacher_nfe": 4, **settings})


def batch(n: int = 6) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(n, 2), torch.arange(n) % 3)


def data() -> TensorData:
    torch.manual_seed(3)
    return TensorData(torch.randn(24, 2), LABELS)


def run(made: Consistency) -> Consistency:
    Engine(None, EngineConfig(progress=False), seed=1).run(made, made.stages(data(), None, seed=0))
    return made


def test_loss_of_consistency_models_by_hand():
    """Heun's step in sigma, then the squared distance of both consistency functions."""
    made, given = method(edm(), points=5, sigma_data=0.5), batch()
    with torch.no_grad():
        for p in made.target.parameters():
            p.add_(0.05)  # so that target and student differ
    torch.manual_seed(2)
    found = made.losses(given)["consistency"].item()
    torch.manual_seed(2)
    start = torch.randint(1, 5, (6,))
    noise = torch.randn(6, 2)
    grid = ((20 ** (1 / 7) + np.arange(5) / 4 * (0.02 ** (1 / 7) - 20 ** (1 / 7))) ** 7)[::-1]
    t, s = (torch.tensor(grid[i].copy(), dtype=torch.float32)[:, None] for i in (start.numpy(), start.numpy() - 1))
    x0, c = given.inputs, given.labels

    def denoised(x: Tensor, sigma: Tensor, net: Any) -> Tensor:
        total = sigma**2 + 0.25
        inner = net(x / total.sqrt(), sigma[:, 0].log() / 4, c)
        return 0.25 / total * x + sigma * 0.5 / total.sqrt() * inner

    def function(x: Tensor, sigma: Tensor, net: Any) -> Tensor:
        inner = net(x / (sigma**2 + 0.25).sqrt(), sigma[:, 0].log() / 4, c)
        skip = 0.25 / ((sigma - 0.02) ** 2 + 0.25)
        return skip * x + 0.5 * (sigma - 0.02) / (sigma**2 + 0.25).sqrt() * inner

    x = x0 + t * noise
    teacher = made.teacher.module
    slope = (x - denoised(x, t, teacher)) / t
    ahead = x + (s - t) * slope
    x_s = x + (s - t) * 0.5 * (slope + (ahead - denoised(ahead, s, teacher)) / s)
    wanted = (function(x, t, made.student.module) - function(x_s, s, made.target.module)).square().mean()
    assert found == pytest.approx(wanted.item(), rel=1e-4)


def test_latent_recipe_jumps_over_points_with_guidance():
    made = method(form="lcm", points=9, skip=3, guidance=2.5, distance="pseudo-huber", huber_c=0.1)
    given = batch()
    torch.manual_seed(2)
    found = made.losses(given)["consistency"].item()
    torch.manual_seed(2)
    start = torch.randint(1, 9, (6,))
    grid = torch.linspace(1e-4, 1, 9)
    t, s = grid[start], grid[(start - 3).clamp_min(0)]
    x_t = made.teacher.schedule.add_noise(given.inputs, torch.randn(6, 2), t)
    c, blank = given.labels, torch.full((6,), 3)
    a, b = (torch.cos(t * math.pi / 2)[:, None], torch.sin(t * math.pi / 2)[:, None])
    with_cond, without = (made.teacher.module(x_t, 1000 * t, k) for k in (c, blank))
    v = without + 2.5 * (with_cond - without)
    x0, eps = a * x_t - b * v, b * x_t + a * v
    x_s = torch.cos(s * math.pi / 2)[:, None] * x0 + torch.sin(s * math.pi / 2)[:, None] * eps
    gap = made.student.predict(x_t, t, c) - made.slow.predict(x_s, s, c)
    wanted = (torch.sqrt(gap.square().sum(1) + 0.01) - 0.1).mean()
    assert found == pytest.approx(wanted.item(), rel=1e-4)


def test_gradients_reach_the_student_alone():
    made = method(guidance=2.0)
    made(batch()).backward()
    assert all(p.grad is not None for n, p in made.student.named_parameters() if "classes" not in n)
    others = [*made.teacher.parameters(), *made.target.parameters(), *made.ema.parameters()]
    assert all(p.grad is None for p in others)


def test_an_exact_student_has_no_loss():
    """For one Gaussian, x0 is a linear function of where a trajectory is; both of its points give the same x0."""
    mean, std = torch.tensor([[0.5, -1.0]]), 0.6
    teacher = gaussian_mixture(mean, std, schedule=Flow())

    class Exact(torch.nn.Module):
        shape = (2,)

        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, model_time: Tensor, cond: Any = None) -> Tensor:
            t = (model_time / 1000)[:, None]
            return mean + std * (x - (1 - t) * mean) / torch.sqrt((1 - t) ** 2 * std**2 + t**2) + 0 * self.unused

    student = Denoiser(Exact(), Flow(), "x0")
    x0 = teacher.sample(64, torch.Generator().manual_seed(0))[0]
    losses = {}
    for points in (10, 100):
        made = Consistency(teacher, None, student, form="lcm", skip=1, solver="heun", points=points, sigma_data=1e-4)
        torch.manual_seed(0)
        losses[points] = made.losses(Batch({"x0": x0}))["consistency"].item()
    assert losses[100] < 1e-6 and losses[100] < losses[10] / 100


def test_heun_is_that_of_the_solver():
    made = method(network(Flow(), "flow"), solver="heun", form="lcm", guidance=2.0)
    x, c = torch.randn(4, 2), torch.arange(4) % 3
    t, s = torch.full((4,), 0.8), torch.full((4,), 0.3)
    expected = ode_solve(made.teacher, x, torch.tensor([0.8, 0.3]), solver="heun", cond=c, guidance=2.0).x
    torch.testing.assert_close(made.teacher_step(made.teacher, x, t, s, c, 2.0), expected, rtol=1e-5, atol=1e-5)


def test_growing_grid_and_its_decay():
    made = method(discretisation="growing", points=151, points_start=2, steps=100, target_ema=0.9)
    assert [made.points(k) for k in (0, 100)] == [2, 151]  # s0 and s1 + 1 of the paper
    middle = math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    assert made.points(25) == middle
    assert made.decay(0) == pytest.approx(math.exp(2 * math.log(0.9) / 2)) and made.decay(100) > made.decay(25) > 0.9
    assert method(points=9).points(3) == 9 and method(target_ema=0.5).decay(7) == 0.5
    counted = run(method(discretisation="growing", points=9, points_start=3, steps=5))
    assert int(counted.updates) == 5


def test_grids():
    cm, lcm = method(edm()), method(form="lcm", points=5)
    assert len(cm.grid(18)) == 18 and cm.grid(18)[0].item() == pytest.approx(0.02)
    assert cm.grid(18)[-1].item() == pytest.approx(20) and bool((cm.grid(18).diff() > 0).all())
    torch.testing.assert_close(lcm.grid(5), torch.linspace(1e-4, 1, 5))
    assert (cm.skip, lcm.skip, cm.boundary, lcm.boundary, cm.solver_rule, lcm.solver_rule) == (
        1,
        4,
        "edm",
        "lcm",
        "heun",
        "ddim",
    )


def test_distances():
    a, b = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    torch.testing.assert_close(method(distance="l1").distance(a, b), (a - b).abs().mean((1, 2)))
    c = 0.00054 * math.sqrt(6)
    wanted = torch.sqrt((a - b).square().sum((1, 2)) + c**2) - c
    torch.testing.assert_close(method(distance="pseudo-huber").distance(a, b), wanted)
    own = Consistency(network(), LABELS, metric=lambda x, y: F.mse_loss(x, y, reduction="none").flatten(1).sum(1))
    torch.testing.assert_close(own.distance(a, b), (a - b).square().sum((1, 2)))


def test_a_student_can_be_told_the_guidance():
    made = method(form="lcm", guidance_range=(1.0, 5.0), guidance=3.0)
    inner = made.student.module
    assert isinstance(inner, GuidanceScale) and inner.usual == 3.0
    torch.nn.init.normal_(inner.embed[2].weight)
    made.ema.update(made.student.module, 0.0)
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    usual, strong = made.sampler(1).sample(z, c).x, made.sampler(1, guidance=5.0).sample(z, c).x
    assert not torch.allclose(usual, strong)
    torch.testing.assert_close(made.sampler(1, guidance=3.0).sample(z, c).x, usual)
    t = torch.full((4,), 1.0)
    with inner.told(torch.full((4,), 5.0)):
        torch.testing.assert_close(strong, made.student.predict(z, t, c))
    with pytest.raises(InputError, match="one guidance"):
        method().sampler(1, guidance=2.0)


def test_sampling_renoises_between_steps():
    made = method(sampling_steps=2)
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    found = made.sampler().sample(z, c, torch.Generator().manual_seed(5))
    first = made.averaged.predict(z, 1.0, c)
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(5))
    x = made.teacher.schedule.add_noise(first, noise, torch.tensor(0.5))
    torch.testing.assert_close(found.x, made.averaged.predict(x, 0.5, c))
    assert found.nfe == 2 and list(made.contestants())[:3] == ["student", "student, 1 step", "student, 4 steps"]


def test_adapters_alone_are_trained():
    made = method(lora_rank=2, form="lcm")
    assert isinstance(made.student.module, LoRA)
    base = {k: v.clone() for k, v in made.student.module.base.state_dict().items()}
    run(made)
    assert all(torch.equal(v, base[k]) for k, v in made.student.module.base.state_dict().items())
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    sampler = made.sampler(1)
    assert isinstance(sampler.denoiser.module, DiffusionMLP)  # merged
    torch.testing.assert_close(sampler.sample(z, c).x, made.averaged.predict(z, 1.0, c), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"form": "lcm", "guidance_range": (1.0, 4.0)}])
def test_the_artifact_samples_alike(tmp_path: Path, settings: dict[str, Any]):
    made = run(method(**settings))
    made.save_artifact(tmp_path, {})
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    again = limbeck.load(tmp_path).content
    torch.testing.assert_close(
        again.sample(z, c, torch.Generator().manual_seed(0)).x,
        made.sampler().sample(z, c, torch.Generator().manual_seed(0)).x,
    )


def test_training_lowers_the_loss_on_a_mixture():
    teacher = network(Flow(), "flow")
    made = method(teacher, form="lcm", points=16, skip=4, steps=150, lr=3e-3, batch_size=24, target_ema=0.9)
    z, c = torch.randn(200, 2), torch.arange(200) % 3
    fine = ode_solve(teacher, z, teacher.schedule.times(64), cond=c).x
    before = (made.sampler(1).sample(z, c).x - fine).square().mean()
    after = (run(made).sampler(1).sample(z, c).x - fine).square().mean()
    assert after < 0.5 * before


@pytest.mark.parametrize(
    "settings",
    [{"discretisation": "growing", "points": 9}, {"form": "lcm", "guidance_range": (1.0, 3.0), "lora_rank": 2}],
)
def test_resume_is_exact(tmp_path: Path, settings: dict[str, Any]):
    resumed_equals_uninterrupted(lambda: method(steps=24, **settings), data(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"points": 4, "skip": 4}, "skip must be less than the 4 points"),
        ({"guidance_range": (3.0, 1.0)}, "guidance_range must rise"),
        ({"distance": "l3"}, "distance must be"),
        ({"points": 1}, "points must be"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], line: str):
    with pytest.raises(InputError, match=line):
        method(**settings)


def test_samples_are_needed():
    with pytest.raises(InputError, match="needs samples"):
        method().losses(Batch({"cond": LABELS}))
