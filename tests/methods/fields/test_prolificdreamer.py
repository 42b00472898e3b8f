from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.schedules import VPCosine
from limbeck.methods.fields.prolificdreamer import ProlificDreamer
from limbeck.methods.fields.sds import SDS
from limbeck.rendering.fields import TexturedField
from limbeck.rendering.particles import SampleParticles
from tests.helpers import resumed_equals_uninterrupted
from tests.methods.fields.worlds import moved, prior, scenes, state

torch.set_num_threads(1)


def points(cls: Any = ProlificDreamer, **settings: Any) -> Any:
    law = gaussian_mixture(
        torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), 0.3, labels=torch.tensor([0, 1]), schedule=VPCosine()
    )
    torch.manual_seed(2)
    start = torch.randn(6, 2)
    return cls(law, SampleParticles(start), conditions=torch.tensor([0, 1] * 3), batch_size=6, **settings)


def test_with_the_drawn_noise_as_the_learned_score_it_is_score_distillation_sampling(monkeypatch: pytest.MonkeyPatch):
    ours, theirs = points(guidance=2.0), points(SDS, guidance=2.0)
    torch.manual_seed(4)
    seen = ours.look(0)
    monkeypatch.setattr(ours.fake, "eps", lambda *a, **k: seen.noise)
    torch.manual_seed(4)
    other = theirs.look(0)
    torch.testing.assert_close(ours.score_gradient(seen), theirs.score_gradient(other))


@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_an_untrained_network_on_the_priors_weights_pulls_nowhere_without_guidance(kind: str):
    known = prior("network")
    method = ProlificDreamer(known, scenes(), batch_size=2, guidance=1.0, fake=kind)
    seen = method.look(0)
    seen.of_view = seen.plain  # the same words for both
    torch.testing.assert_close(method.score_gradient(seen), torch.zeros_like(seen.x), atol=1e-6, rtol=0)


def test_the_perceptron_starts_as_the_prior():
    method = points(guidance=1.0)
    assert method.fake.base is method.teacher
    assert not method.score_gradient(method.look(0)).any()


def test_the_priors_answer_knows_neither_adapters_nor_camera():
    method = ProlificDreamer(prior("network"), scenes(), batch_size=2)
    torch.manual_seed(0)
    seen = method.look(0)
    with torch.no_grad():
        before = method.teacher.predict(seen.x_t, seen.t, seen.of_view, "eps")
        for parameter in method.fake.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        after = method.teacher.predict(seen.x_t, seen.t, seen.of_view, "eps")
        fake = method.fake.eps(seen.x_t, seen.t, seen.of_view, seen.camera)
        blind = method.fake.eps(seen.x_t, seen.t, seen.of_view, None)
    assert torch.equal(before, after)
    assert not torch.allclose(fake, before, atol=1e-3) and not torch.allclose(fake, blind, atol=1e-4)


def test_camera_guidance_mixes_both_answers():
    method = ProlificDreamer(prior("network"), scenes(), batch_size=2, camera_guidance=0.3)
    with torch.no_grad():
        for parameter in method.fake.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        seen = method.look(0)
        with_camera = method.fake.eps(seen.x_t, seen.t, seen.plain, seen.camera)
        without = method.fake.eps(seen.x_t, seen.t, seen.plain, None)
        torch.testing.assert_close(method.own_eps(seen), 0.3 * with_camera + 0.7 * without, rtol=1e-4, atol=1e-5)


def test_each_loss_reaches_its_own_parameters():
    method = ProlificDreamer(prior("network"), scenes(), batch_size=2)
    teacher = state(method.teacher)
    seen = method.look(0)
    method.particle_losses(seen).total.backward()
    assert all(p.grad is None for p in method.fake.parameters())
    assert method.particles.fields[0].data.grad is not None
    method.particles.zero_grad(set_to_none=True)
    method.fake_losses(seen).total.backward()
    assert method.particles.fields[0].data.grad is None
    assert any(p.grad is not None and p.grad.any() for p in method.fake.parameters())
    assert not moved(method.teacher, teacher)


def test_a_step_updates_the_particles_once_and_the_network_k_times():
    method = points(steps=3, fake_steps=2)
    calls: list[tuple[str, ...]] = []

    class Stepper:
        step = 0

        def minimise(self, losses: Any, *names: str) -> None:
            calls.append(names)

    method.update(None, Stepper())
    assert calls == [("particles",), ("fake",), ("fake",)]


def test_the_network_learns_over_the_whole_schedule_though_particles_see_a_part(monkeypatch: pytest.MonkeyPatch):
    method = points(t_low=0.4, t_high=0.5, t_high_late=None)
    times: list[torch.Tensor] = []
    own = method.fake.loss
    monkeypatch.setattr(method.fake, "loss", lambda x, t, *a: (times.append(t), own(x, t, *a))[1])
    seen = method.look(0)
    for _ in range(60):
        method.fake_losses(seen)
    found = torch.cat(times)
    assert found.min() < 0.05 and found.max() > 0.95
    assert seen.t.min() > 0.39 and seen.t.max() < 0.51


def test_it_learns_from_recent_renders_where_there_is_a_buffer():
    method = points(buffer=12)
    assert method.past is not None
    for _ in range(3):
        seen = method.look(0)
        method.past.add(seen.x, seen.camera, seen.plain)
    assert int(method.past.count) == 18
    x, camera, plain = method.past.draw(5)
    assert x.shape == (5, 2) and camera is None and plain.shape == (5,)
    assert method.fake_losses(method.look(0)).total.item() > 0


def test_particles_find_both_the_mean_and_the_spread_of_a_gaussian():
    law = gaussian_mixture(torch.tensor([[0.7, -0.4]]), 0.5, schedule=VPCosine())
    torch.manual_seed(0)
    method = ProlificDreamer(
        law, SampleParticles(1.5 * torch.randn(64, 2)), batch_size=64, steps=500, lr=0.03, fake_width=64, lr_fake=2e-3,
        t_high_late=None,
    )  # fmt: skip
    Engine(None, EngineConfig(progress=False), seed=1).run(method, method.stages())
    found = method.particles.samples.detach()
    assert torch.allclose(found.mean(0), torch.tensor([0.7, -0.4]), atol=0.2)
    assert 0.3 < float(found.std(0).mean()) < 0.75


def test_geometry_moves_densities_and_texture_moves_colours():
    method = ProlificDreamer(
        prior("network"), scenes(), batch_size=2, steps=2, refine=True, geometry_steps=2, texture_steps=2,
        normal_smoothness=0.1, laplacian=0.1,
    )  # fmt: skip
    losses = method.geometry_losses()
    assert set(losses.terms) == {"scores", "smooth", "laplacian"}
    method.config = method.config.replace(laplacian=0.0)
    method.geometry_losses().total.backward()
    grad = method.particles.fields[0].data.grad
    assert grad[:, 0].any() and not grad[:, 1:].any()
    stages = method.stages()
    assert [s.name for s in stages] == ["distillation", "geometry", "texture"]
    stages[-1].prepare()  # type: ignore[misc]
    field = method.particles.fields[0]
    assert isinstance(field, TexturedField)
    method.particles.zero_grad(set_to_none=True)
    method.particle_losses(method.look(0)).total.backward()
    assert field.shape_field.data.grad is None
    grad = field.texture_field.data.grad
    assert grad[:, 1:].any() and not grad[:, 0].any()
    method.split_fields()
    assert method.particles.fields[0] is field


@pytest.mark.parametrize("refine", [False, True])
def test_it_resumes_exactly(refine: bool, tmp_path: Path):
    settings = {"refine": True, "geometry_steps": 10, "texture_steps": 25} if refine else {"buffer": 8}
    resumed_equals_uninterrupted(
        lambda: ProlificDreamer(prior("network"), scenes(2), batch_size=2, steps=22, rank=2, **settings), None, tmp_path
    )


def test_mistakes_get_one_clear_line():
    with pytest.raises(InputError, match="the prior has no layers to adapt or copy"):
        points(fake="lora")
    with pytest.raises(InputError, match="bare samples have no geometry"):
        points(refine=True).stages()
    config = ProlificDreamer.Config.make(**ProlificDreamer.Config.preset_values("paper"))
    assert config.guidance == 7.5 and config.refine
