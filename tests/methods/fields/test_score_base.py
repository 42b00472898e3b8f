from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.schedules import VPCosine
from limbeck.methods.fields.score_base import OMEGAS
from limbeck.methods.fields.sds import SDS
from limbeck.rendering.particles import SampleParticles
from tests.helpers import resumed_equals_uninterrupted
from tests.methods.fields.worlds import moved, prior, scenes, state

torch.set_num_threads(1)


def points(**settings: Any) -> SDS:
    law = gaussian_mixture(
        torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.3, labels=torch.tensor([0, 1]), schedule=VPCosine()
    )
    torch.manual_seed(2)
    return SDS(law, SampleParticles(torch.randn(6, 2)), conditions=torch.tensor([0, 1] * 3), batch_size=6, **settings)


def test_the_pull_is_the_weighted_difference_of_guided_and_drawn_noise():
    method = points(guidance=3.0)
    seen = method.look(0)
    law, t, w = method.teacher, seen.t, 3.0
    with torch.no_grad():
        asked = law.predict(seen.x_t, t, seen.of_view, "eps")
        free = law.predict(seen.x_t, t, torch.full((6,), -1), "eps")
    wanted = method.schedule.sigma(t)[:, None] ** 2 * (free + w * (asked - free) - seen.noise)
    torch.testing.assert_close(method.score_gradient(seen), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_are_a_sum_over_dimensions_and_a_mean_over_images():
    method = points()
    seen = method.look(0)
    pull = method.score_gradient(seen)
    method.particle_losses(seen).total.backward()
    torch.testing.assert_close(method.particles.samples.grad, pull / 6)


def test_a_pull_that_is_not_finite_counts_as_none_and_a_limit_holds(monkeypatch: pytest.MonkeyPatch):
    method = points(clip_pull=0.01)
    assert method.score_gradient(method.look(0)).abs().max() <= 0.01
    monkeypatch.setattr(Denoiser, "predict", lambda self, x, *a, **k: torch.full_like(x, math.nan))
    assert not method.score_gradient(method.look(0)).any()


def test_weights_of_the_times():
    schedule, t = VPCosine(), torch.tensor([0.1, 0.5, 0.9])
    a, s = torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
    assert torch.allclose(OMEGAS["sigma2"](schedule, t), s**2, atol=1e-5)
    assert torch.allclose(OMEGAS["sqrt_a_sigma2"](schedule, t), a * s**2, atol=1e-5)
    assert torch.allclose(OMEGAS["alpha"](schedule, t), a, atol=1e-5)
    assert OMEGAS["uniform"](schedule, t).eq(1).all()


@pytest.mark.parametrize(("course", "at"), [("switch", {0: 0.98, 39: 0.98, 40: 0.5, 99: 0.5}), ("linear", {0: 0.98, 20: 0.74, 40: 0.5, 80: 0.5})])  # fmt: skip
def test_the_largest_noise_falls(course: str, at: dict[int, float]):
    method = points(steps=100, t_switch=0.4, t_high=0.98, t_high_late=0.5, t_course=course)
    for step, high in at.items():
        times = method.times(step)(4000)
        span = method.schedule.t_max - method.schedule.t_min
        assert times.max() <= method.schedule.t_min + high * span + 1e-6
        assert times.max() > method.schedule.t_min + (high - 0.02) * span


def test_scenes_move_and_the_prior_does_not():
    method = SDS(prior("network"), scenes(), batch_size=2, guidance=2.0)
    teacher = state(method.teacher)
    assert not any(p.requires_grad for p in method.teacher.parameters())
    seen = method.look(0)
    assert seen.x.shape == (2, 3, 8, 8) and seen.camera is not None and seen.camera.shape == (2, 16)
    assert seen.of_view.tolist() == [1, 1] and seen.plain.tolist() == [0, 0]
    method.particle_losses(seen).total.backward()
    grad = method.particles.fields[0].data.grad
    assert grad is not None and grad.abs().sum() > 0
    assert not moved(method.teacher, teacher) and all(p.grad is None for p in method.teacher.parameters())


def test_a_step_reaches_one_particle_only():
    method = SDS(prior(), scenes(3), batch_size=2)
    torch.manual_seed(5)
    method.particle_losses(method.look(0)).total.backward()
    reached = [f.data.grad is not None for f in method.particles.fields]
    assert sum(reached) == 1


def test_regularisers_are_added_with_their_weights_and_courses():
    method = SDS(
        prior(), scenes(), batch_size=2, sparsity=2.0, z_variance=0.5, orient=0.1, variation=3.0, entropy=0.2, smooth=0.3,
        opaque=(10.0, 0.0, 4.0, 20.0),
    )  # fmt: skip
    seen = method.look(15)
    terms = method.particle_losses(seen).terms
    assert set(terms) == {"scores", "sparsity", "z_variance", "orient", "variation", "entropy", "smooth", "opaque"}
    opacity = seen.terms["opacity"]
    torch.testing.assert_close(terms["sparsity"], 2 * (opacity**2 + 0.01).sqrt().mean())
    o = opacity.clamp(1e-3, 1 - 1e-3)
    torch.testing.assert_close(terms["opaque"], -2.0 * (o * o.log() + (1 - o) * (1 - o).log()).mean())
    assert "opaque" not in method.particle_losses(method.look(5)).terms
    with pytest.raises(InputError, match="no grid"):
        SDS(prior(), scenes(family="mlp"), batch_size=1, variation=1.0).look(0)


def test_early_renders_are_small_and_noise_and_backgrounds_are_random():
    method = SDS(
        prior(),
        scenes(),
        batch_size=1,
        steps=10,
        early_size=4,
        early_share=0.5,
        random_background=1.0,
        density_noise=1.0,
    )
    assert method.particles.fields[0].density_noise == 1.0
    method.train()
    torch.manual_seed(0)
    one = method.look(0)
    assert one.terms["opacity"].shape == (1, 4, 4) and one.x.shape == (1, 3, 8, 8)
    assert method.look(5).terms["opacity"].shape == (1, 8, 8)
    corner = one.x[0, :, 0, 0]
    assert not torch.allclose(corner, torch.ones(3))  # nothing but the background there


def test_it_resumes_exactly(tmp_path: Path):
    resumed_equals_uninterrupted(lambda: SDS(prior(), scenes(2), batch_size=2, steps=25), None, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SDS(prior().denoiser, scenes()), "need a prior that says how their renders are encoded"),
        (lambda: SDS("sd", scenes()), "the prior is a ViewPrior or a Denoiser, not str"),
        (lambda: SDS(prior(), scenes(), t_low=0.7), "t_high_late must be above t_low"),
        (lambda: SDS(prior().denoiser, SampleParticles(torch.zeros(3, 2)), conditions=torch.zeros(2)), "3 particles need as many"),
        (lambda: SampleParticles(torch.full((2, 2), math.nan)), "particles are .n, ...."),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_line(make: Any, message: str):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
