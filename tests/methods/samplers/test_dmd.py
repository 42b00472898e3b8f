from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import EDM
from limbeck.losses.perceptual import FeatureDistance
from limbeck.methods.samplers.dmd import DMD
from limbeck.networks.diffusion_mlp import DiffusionMLP
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)


def teacher() -> Denoiser:
    torch.manual_seed(0)
    network = DiffusionMLP((4,), width=16, blocks=1, num_classes=3, time_features=8, time_scale=1.0)
    nn.init.normal_(network.last.weight, std=0.3)
    return Denoiser(network, EDM(0.02, 20.0), precond="edm", sigma_data=0.7, null_cond=torch.tensor(3))


def labels(n: int = 30) -> Tensor:
    return torch.arange(n) % 3


def make(**settings: Any) -> DMD:
    torch.manual_seed(3)
    given = {"batch_size": 6, "steps": 25, "pairs": 40, "regression_batch": 5, "teacher_nfe": 4, **settings}
    return DMD(teacher(), labels(), **given)


def test_the_loss_is_the_score_difference_and_the_regression() -> None:
    method = make(regression=0.5, guidance=2.0, matching=3.0)
    method.make_pairs()
    with torch.no_grad():
        method.online.module.last.weight.mul_(0.8)
    x = method.generate(labels(6)).detach().requires_grad_()
    torch.manual_seed(9)
    losses = method.generator_losses(x, labels(6))
    losses.total.backward()
    torch.manual_seed(9)
    sigma = method.generator_times(6)
    noise = torch.randn(6, 4)
    x_t = x.detach() + sigma[:, None] * noise
    with torch.no_grad():
        real = method.teacher.predict(x_t, sigma, labels(6), "x0", 2.0)
        fake = method.online.predict(x_t, sigma, labels(6), "x0")  # not guided
    gradient = (fake - real) / (x.detach() - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(x.grad, 3 * gradient / x.numel())
    torch.testing.assert_close(losses["scores"], 0.5 * gradient.square().mean())
    assert method.store is not None
    ids = torch.randint(40, (5,))
    z, wanted, cond = method.store.batch(ids)
    expected = F.mse_loss(method.student.predict(2.5 * z, 2.5, cond, "x0"), wanted)
    torch.testing.assert_close(losses["regression"], expected)
    torch.testing.assert_close(losses.total, 3 * losses["scores"] + 0.5 * expected)


def test_pairs_are_where_the_teachers_ode_ends() -> None:
    method = make(guidance=2.0)
    method.make_pairs(seed=1)
    assert method.store is not None and len(method.store) == 40
    z, x, cond = method.store.batch(torch.arange(40))
    torch.testing.assert_close(method.teacher_sampler().sample(z, cond).x, x)


def test_the_regression_alone_follows_the_pairs() -> None:
    method = make(
        fake="none", matching=0.0, regression=1.0, regression_batch=20, lr=5e-3, steps=150, pairs=20, clip_grad=None
    )

    def error() -> float:
        assert method.store is not None
        z, wanted, cond = method.store.batch(torch.arange(20))
        return float(F.mse_loss(method.generate(cond, z), wanted).detach())

    method.make_pairs()
    before = error()
    Engine(None, EngineConfig(progress=False), seed=0).run(method, method.stages())
    assert error() < 0.3 * before


def test_stages_and_the_case_without_regression() -> None:
    assert [s.name for s in make().stages()] == ["pairs", "distillation"]
    assert [s.name for s in make(regression=0.0).stages()] == ["distillation"]
    with pytest.raises(InputError, match="call make_pairs"):
        make().generator_losses(torch.zeros(6, 4, requires_grad=True), labels(6))
    with pytest.raises(InputError, match="nothing would be learned"):
        make(regression=0.0, matching=0.0)
    assert set(make(regression=0.0).generator_losses(torch.zeros(6, 4), labels(6))) == {"scores"}


def test_a_distance_of_features_takes_the_place_of_pixels() -> None:
    torch.manual_seed(0)
    judge = FeatureDistance(nn.Linear(4, 3), name="a linear layer")
    method = DMD(teacher(), labels(), pairs=10, regression_batch=4, teacher_nfe=2, distance=judge)
    method.make_pairs()
    torch.manual_seed(1)
    losses = method.generator_losses(method.generate(labels(6)), labels(6))
    assert float(losses["regression"].detach()) > 0
    losses["regression"].backward()
    assert all(p.grad is None for p in judge.parameters())
    assert any(float(p.grad.abs().max()) > 0 for p in method.student.parameters() if p.grad is not None)
    assert not [k for k in method.training_state()["tensors"] if k.startswith("distance")]


def test_resume_is_exact(tmp_path: Path) -> None:
    method = resumed_equals_uninterrupted(make, Conditions(labels()), tmp_path)
    assert method.counters["pairs_made"] == 40
