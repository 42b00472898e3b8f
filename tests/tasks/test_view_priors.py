"""Priors of score distillation: the closed form, the trained network, pipelines of diffusers; their cameras and conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.blocks.camera_embedding import CameraEmbedding
from limbeck.core.batch import Batch
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.rendering.cameras import Cameras, orbit
from limbeck.rendering.scenes import scene
from limbeck.rendering.volume import render_image
from limbeck.tasks.scenes import SceneSetup
from limbeck.tasks.view_priors import PriorSetup, ViewPrior, load_prior
from limbeck.tasks.view_renders import drawn_cameras, reference_views, render_orbit, render_views
from limbeck.tasks.view_teachers import PRIOR_SCENES, ViewTraining, class_id, view_data

torch.set_num_threads(1)


class Setup(PriorSetup, SceneSetup):
    """As a run by name has it."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path_factory.getbasetemp() / "view-priors"))


def load(**values: Any) -> ViewPrior:
    setup = Setup.make(**{"prior_views": 16, "task": "faced_sphere", **values})
    return load_prior(setup, setup, progress=False)


def sides() -> Cameras:
    """Front, side, back, overhead."""
    return orbit([0.0, 90.0, 180.0, 0.0], torch.tensor([0.0, 0.0, 0.0, 70.0]), 3.0, 45.0, 16, 16)


# ---- renders ---------------------------------------------------------------------------------------------------------------


def test_renders_are_the_scene_as_volume_rendering_draws_it() -> None:
    truth, cameras = scene("split_sphere"), sides()
    surface = render_views(truth, cameras)
    with torch.no_grad():
        fine = render_image(truth, cameras.resized(64, 64), samples=96)["rgb"]
    volume = torch.nn.functional.avg_pool2d(fine.movedim(-1, 1), 4).movedim(1, -1)
    assert surface.shape == (4, 16, 16, 3) and float((surface - volume).abs().mean()) < 0.02
    assert torch.equal(render_views(truth, cameras, at_once=3), surface)


def test_a_share_of_the_cameras_stands_in_front() -> None:
    around, generator = render_orbit(), torch.Generator().manual_seed(0)
    for share, ahead in ((0.6, 60), (1.0, 100), (0.0, 25)):
        cameras = drawn_cameras(around, 100, generator, share)
        away = ((cameras.azimuth + 180) % 360 - 180).abs()
        assert int((away < 45).sum()) == pytest.approx(ahead, abs=1) and len(cameras) == 100
        assert bool(((cameras.elevation >= -10) & (cameras.elevation <= 45)).all())
        assert torch.allclose(cameras.positions.norm(dim=1), torch.tensor(3.0), atol=1e-4)
    with pytest.raises(InputError, match="1 view or more"):
        drawn_cameras(around, 0, generator)


def test_references_go_once_around() -> None:
    azimuth = reference_views(scene("faced_sphere"), 8).cameras.azimuth
    assert (
        azimuth is not None
        and bool((azimuth.diff() >= 0).all())
        and float(azimuth[0]) == 0
        and float(azimuth[-1]) < 360
    )


# ---- the closed form ---------------------------------------------------------------------------------------------------------


def test_the_closed_form_denoises_to_its_support() -> None:
    prior = load(prior="closed-form", kernel=0.01)
    assert prior.support is not None and prior.support.shape == (16, 3, 16, 16) and prior.references is not None
    x0 = prior.encode(prior.support)
    t = torch.full((16,), 0.1)
    x_t = prior.denoiser.schedule.add_noise(x0, torch.randn_like(x0), t)
    assert float((prior.denoiser.predict(x_t, t, None, "x0") - x0).abs().max()) < 0.1
    assert float(x0.min()) >= -1 and float(x0.max()) == 1
    assert prior.condition(sides(), 4) == (None, None) and prior.camera_path is None and not prior.denoiser.conditional
    assert prior.describe()["support"] == 16 and prior.render_size == prior.orbit.height == 16


def test_the_closed_form_depends_on_seed_prompt_and_front_share_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, same = load(prior="closed-form"), load(prior="closed-form", task="spheres_box", prompt="faced sphere")
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(first.support, same.support)
    setup = Setup.make(prior="closed-form", task="faced_sphere", prior_views=16)
    assert not torch.equal(load_prior(setup, setup, seed=1).support, first.support)
    assert not torch.equal(load(prior="closed-form", front_share=0.6).support, first.support)


# ---- the trained prior -------------------------------------------------------------------------------------------------------


def test_the_trained_prior_is_asked_by_scene_and_side() -> None:
    prior = load(prior_steps=3)
    words, plain = prior.condition(sides(), 4)
    base = class_id("faced_sphere")
    assert plain.tolist() == [base] * 4 and words.tolist() == [base + k for k in (1, 2, 3, 4)]
    assert words[2] == class_id("faced_sphere", "back") and class_id("split_sphere", "overhead") == 19
    for first, second in (prior.condition(None, 2), load(prior_steps=3, view_words=False).condition(sides(), 4)):
        assert torch.equal(first, second) and set(first.tolist()) == {base}
    with pytest.raises(InputError, match="4 cameras but 3 conditions"):
        prior.condition(sides(), 3)
    x = torch.randn(4, 3, 16, 16)
    guided = prior.denoiser.predict(x, 0.7, words, "eps", guidance=5.0)
    one, none = (prior.denoiser.predict(x, 0.7, c, "eps") for c in (words, torch.full((4,), 20)))
    assert torch.allclose(guided, none + 5 * (one - none), atol=1e-4)
    assert prior.support is not None and prior.support.shape == (32, 3, 16, 16) and prior.camera_path is not None
    embedding = CameraEmbedding(prior.denoiser.module, prior.camera_path)
    with embedding.seeing(sides().c2w.flatten(1)):
        assert prior.denoiser.predict(x, 0.7, words, "eps", guidance=5.0).shape == x.shape
    assert prior.orbit.elevation[1] > 60 and not any(p.requires_grad for p in prior.denoiser.parameters())


def test_it_is_trained_once_for_all_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first = load(prior_steps=4)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(ViewTraining, "stage", lambda *_: pytest.fail("it was trained again"))
    second = load(prior_steps=4, task="three_blobs")
    for a, b in zip(first.denoiser.parameters(), second.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(bool(p.any()) for p in first.denoiser.module.last.parameters())  # it has learned something
    assert not torch.equal(first.support, second.support)


def test_its_pictures_carry_the_classes_that_say_most() -> None:
    data = view_data(16)
    assert len(data) == 64 and data is view_data(16)
    labels = data.labels_tensor()
    assert torch.equal(labels // 5, torch.arange(4).repeat_interleave(16)) and not bool((labels % 5 == 0).any())


def test_half_of_the_words_are_withheld_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from limbeck.tasks import diffusion_teachers

    prior = load(prior_steps=3)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(diffusion_teachers, "denoising_loss", lambda d, x, t, cond, **_: seen.append(cond) or x.sum())
    training = ViewTraining(prior.denoiser, diffusion_teachers.training_times(prior.denoiser.schedule), dropout=0.15)
    labels = torch.arange(20).repeat(500)
    training.losses(Batch(torch.zeros(10000, 3, 1, 1), labels))
    (found,) = seen
    assert float((found == 20).float().mean()) == pytest.approx(0.15, abs=0.02)
    kept = found != 20
    assert torch.equal(found[kept] // 5, labels[kept] // 5)
    worded = kept & (labels % 5 > 0)
    assert float((found[worded] == labels[worded]).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert bool(((found == labels) | (found % 5 == 0))[kept].all())


@pytest.mark.slow
def test_a_trained_prior_draws_what_it_is_asked_for() -> None:
    prior = load(prior_steps=120, prior_views=32)
    assert prior.references is not None and prior.support is not None
    generator = torch.Generator().manual_seed(0)
    t = torch.full((32,), 0.85)
    losses = {}
    for name in PRIOR_SCENES:
        x0 = prior.encode(prior.support[:32])
        x_t = prior.denoiser.schedule.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        found = prior.denoiser.predict(x_t, t, torch.full((32,), class_id(name)), "x0")
        losses[name] = float((found - x0).square().mean())
    assert min(losses, key=losses.__getitem__) == "faced_sphere", losses


# ---- pipelines ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    from tests.adapters.tiny_pipelines import ddpm, stable_diffusion

    folder = tmp_path_factory.mktemp("pipelines")
    stable_diffusion(folder / "tokens").save_pretrained(folder / "text")
    ddpm(in_channels=3, out_channels=3).save_pretrained(folder / "plain")
    ddpm(5, in_channels=3, out_channels=3).save_pretrained(folder / "classes")
    ddpm().save_pretrained(folder / "grey")
    return folder


def test_a_pipeline_from_text(pipelines: Path) -> None:
    prior = load(prior=str(pipelines / "text"), prompt="a red cat")
    assert prior.shape == (4, 8, 8) and prior.render_size == 16 and prior.camera_path == "network.time_embedding"
    words, plain = prior.condition(sides(), 4)
    table = {k: v for k, v in plain.items()}
    assert table["encoder_hidden_states"].shape[0] == 4
    hidden, without = words["encoder_hidden_states"], plain["encoder_hidden_states"]
    assert torch.equal(without[0], without[3]) and not torch.allclose(hidden[0], hidden[2])
    same, again = prior.condition(None, 2)
    assert torch.equal(same["encoder_hidden_states"], again["encoder_hidden_states"])
    assert torch.equal(again["encoder_hidden_states"][0], without[0])
    renders = torch.rand(4, 3, 10, 10, requires_grad=True)  # resized before they are encoded
    latents = prior.encode(renders)
    assert latents.shape == (4, 4, 8, 8)
    latents.square().sum().backward()
    assert renders.grad is not None and bool(renders.grad.abs().sum((1, 2, 3)).gt(0).all())
    noisy = torch.randn(4, 4, 8, 8)
    guided = prior.denoiser.predict(noisy, 0.5, words, "eps", guidance=7.5)
    one = prior.denoiser.predict(noisy, 0.5, words, "eps")
    assert guided.shape == noisy.shape and not torch.allclose(guided, one)
    assert prior.references is None and prior.support is None and prior.orbit.width == 16
    embedding = CameraEmbedding(prior.denoiser.module, prior.camera_path)
    with embedding.seeing(sides().c2w.flatten(1)):
        assert torch.allclose(prior.denoiser.predict(noisy, 0.5, words, "eps"), one, atol=1e-6)


def test_other_pipelines(pipelines: Path) -> None:
    plain = load(prior=str(pipelines / "plain"))
    assert plain.shape == (3, 8, 8) and plain.render_size == 8 and plain.condition(sides(), 4) == (None, None)
    white = torch.ones(2, 3, 8, 8)
    assert torch.equal(plain.encode(white), white)
    assert plain.denoiser.predict(torch.randn(2, 3, 8, 8), 0.5).shape == (2, 3, 8, 8)
    classes = load(prior=str(pipelines / "classes"), prompt="3")
    assert classes.condition(sides(), 4)[0].tolist() == [3] * 4
    for name, prompt, said in (
        ("text", None, "needs a prompt"),
        ("plain", "a cat", "unconditional"),
        ("classes", "9", "a number below 5"),
        ("classes", None, "a number below 5"),
        ("grey", None, "in 1 channels"),
    ):
        with pytest.raises(InputError, match=said):
            load(prior=str(pipelines / name), prompt=prompt)


def test_mistakes() -> None:
    with pytest.raises(UnknownNameError, match="did you mean trained"):
        load(prior="trainned")
    with pytest.raises(UnknownNameError, match="closed-form prior 'terrain'"):
        load(prior="closed-form", task="terrain")
    with pytest.raises(UnknownNameError, match="trained prior 'textured_shapes'"):
        load(task="textured_shapes")
    with pytest.raises(UnknownNameError, match="did you mean three_blobs"):
        load(prompt="three blob")
    with pytest.raises(InputError, match="knows no photographs"):
        load(data="somewhere")
    with pytest.raises(InputError, match="no folder"):
        load(prior="no/such/folder", prompt="a cat")
    with pytest.raises(InputError, match="kernel must be"):
        load(kernel=0)
