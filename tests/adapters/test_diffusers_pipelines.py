from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMPipeline, DDIMScheduler, EulerDiscreteScheduler, ScoreSdeVeScheduler

from limbeck.adapters.diffusers_pipelines import Teacher, load_teacher, teacher_of
from limbeck.core.errors import InputError, RunError
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import Flow, VPDiscrete
from tests.adapters import tiny_pipelines as tiny

torch.set_num_threads(1)

PROMPTS = ["a photo of a cat", "a red dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    tiny.stable_diffusion(folder).save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.fixture(scope="module")
def teacher(saved: Path) -> Teacher:
    return load_teacher(saved)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_a_teacher_from_a_folder(teacher: Teacher) -> None:
    assert teacher.shape == (4, 8, 8) and teacher.image_size == (16, 16) and teacher.num_classes is None
    assert teacher.denoiser.schedule == VPDiscrete("scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert teacher.denoiser.prediction == "eps"
    assert not any(p.requires_grad for p in teacher.denoiser.parameters()) and not teacher.denoiser.training
    cond, pipeline = teacher.encode_prompts(PROMPTS), teacher.pipeline
    expected, empty = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    torch.testing.assert_close(cond["encoder_hidden_states"], expected)
    assert isinstance(teacher.null_cond, dict)
    torch.testing.assert_close(teacher.null_cond["encoder_hidden_states"], empty[0])


def test_samples_are_those_of_the_pipeline(teacher: Teacher) -> None:
    z = noise(2, *teacher.shape)
    cond = teacher.encode_prompts(PROMPTS)
    index = [900, 500, 200]
    times = torch.tensor([(k + 1) / 1000 for k in index] + [0.0], dtype=torch.float64)
    mine = Sampler(teacher.denoiser, times, guidance=4.0).sample(z, cond)
    assert mine.nfe == 6
    pipeline = teacher.pipeline
    before = pipeline.scheduler
    pipeline.scheduler = EulerDiscreteScheduler.from_config(before.config, timestep_spacing="leading")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPTS, latents=z, timesteps=index, guidance_scale=4.0, output_type="latent").images
    pipeline.scheduler = before
    torch.testing.assert_close(mine.x, theirs, rtol=1e-4, atol=1e-4)


def test_pictures_to_latents_and_back(teacher: Teacher) -> None:
    latents = noise(1, 4, 8, 8).requires_grad_()
    vae = teacher.pipeline.vae
    images = teacher.decode(latents)
    torch.testing.assert_close(images, vae.decode(latents / vae.config.scaling_factor).sample)
    images.square().mean().backward()
    assert latents.grad is not None and float(latents.grad.abs().sum()) > 0
    assert all(p.grad is None for p in vae.parameters())
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(teacher.encode(images), posterior.mode() * vae.config.scaling_factor)
    drawn = teacher.encode(images, torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, posterior.sample(torch.Generator().manual_seed(1)) * vae.config.scaling_factor)
    with pytest.raises(InputError, match=r"latents must be \(B, 4, H, W\)"):
        teacher.decode(images)
    with pytest.raises(InputError, match=r"images must be \(B, 3, H, W\)"):
        teacher.encode(latents)


def test_latents_with_a_shift_or_with_statistics(folder: Path) -> None:
    shifted = teacher_of(tiny.sd3(folder))
    vae, latents = shifted.pipeline.vae, noise(1, 4, 8, 8)
    torch.testing.assert_close(shifted.decode(latents), vae.decode(latents / 1.5 + 0.1).sample)
    images = shifted.decode(latents)
    torch.testing.assert_close(shifted.encode(images), (vae.encode(images).latent_dist.mode() - 0.1) * 1.5)
    vae.register_to_config(shift_factor=None, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    mean, std = (torch.tensor(v).reshape(1, 4, 1, 1) for v in ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(shifted.decode(latents), vae.decode(latents * std / 1.5 + mean).sample)


def test_half_precision_leaves_the_vae_in_single(saved: Path) -> None:
    half = load_teacher(saved, dtype=torch.bfloat16)
    assert half.network.network.dtype == torch.bfloat16 and half.pipeline.vae.dtype == torch.float32
    found = half.denoiser.predict(noise(1, 4, 8, 8), 0.5, half.encode_prompts(["a cat"]))
    assert found.dtype == torch.float32 and half.decode(found.bfloat16()).dtype == torch.float32


def test_sdxl_has_sizes_and_a_null_condition_of_zeros(folder: Path) -> None:
    teacher = teacher_of(tiny.sdxl(folder))
    cond = teacher.encode_prompts(PROMPTS)
    text, _, pooled, _ = teacher.pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(cond["encoder_hidden_states"], text)
    torch.testing.assert_close(cond["text_embeds"], pooled)
    assert cond["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    null: Any = teacher.null_cond
    assert set(null) == {"encoder_hidden_states", "text_embeds"}  # sizes stay those of the condition
    assert all(float(value.abs().sum()) == 0 for value in null.values())
    assert Sampler.ode(teacher.denoiser, 1, guidance=2.0).sample(noise(2, 4, 8, 8), cond).nfe == 2
    teacher.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    plain: Any = teacher_of(teacher.pipeline).null_cond
    empty = teacher.pipeline.encode_prompt([""], device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(plain["encoder_hidden_states"], empty[0][0])


def test_transformers_with_prompts(folder: Path) -> None:
    for pipeline, parts in (
        (tiny.pixart(folder), {"encoder_hidden_states", "encoder_attention_mask"}),
        (tiny.sd3(folder), {"encoder_hidden_states", "pooled_projections"}),
        (tiny.flux(folder), {"encoder_hidden_states", "pooled_projections"}),
    ):
        teacher = teacher_of(pipeline, image_size=(16, 12) if "Flux" in type(pipeline).__name__ else None)
        cond = teacher.encode_prompts(PROMPTS)
        assert set(cond) == parts and set(teacher.null_cond) == parts  # type: ignore[arg-type]
        found = Sampler.ode(teacher.denoiser, 2, guidance=2.0).sample(noise(2, *teacher.shape), cond)
        assert found.nfe == 4 and bool(torch.isfinite(found.x).all())
    assert teacher.shape == (4, 8, 6)
    # 4 x 3 tokens: the dynamic shift of the pipeline
    mu = 0.5 + (1.15 - 0.5) * (12 - 256) / (4096 - 256)
    schedule = teacher.denoiser.schedule
    assert isinstance(schedule, Flow) and schedule.shift == pytest.approx(torch.tensor(mu).exp().item(), rel=1e-5)


def test_classes_and_their_null() -> None:
    teacher = teacher_of(tiny.dit())
    assert teacher.num_classes == 1000 and int(teacher.null_cond) == 1000  # type: ignore[arg-type]
    assert teacher.class_names == {0: "cat", 1: "dog"}
    with pytest.raises(InputError, match="conditioned on classes: it has no prompts"):
        teacher.encode_prompts(["a cat"])
    plain = teacher_of(tiny.ddpm(4))
    assert plain.num_classes == 4 and plain.null_cond is None
    guided = teacher_of(tiny.ddpm(4), null_class=3)
    assert guided.num_classes == 3 and int(guided.null_cond) == 3  # type: ignore[arg-type]
    with pytest.raises(InputError, match="null_class 4 is no class"):
        teacher_of(tiny.ddpm(4), null_class=4)


def test_pixels_need_no_autoencoder(tmp_path: Path) -> None:
    tiny.ddpm(scheduler=DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    assert teacher.shape == teacher.denoiser.module(torch.zeros(1, 1, 8, 8), torch.zeros(1)).shape[1:]
    x = noise(1, 1, 8, 8)
    assert teacher.decode(x) is x and teacher.encode(x) is x
    with pytest.raises(InputError, match="conditioned on nothing"):
        teacher.encode_prompts(["a cat"])
    # "trailing" is the uniform grid of the schedule
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipeline = DDIMPipeline(teacher.network.network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = torch.as_tensor(
        pipeline(1, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="pt").images
    )
    mine = Sampler.ode(teacher.denoiser, 5).sample(x).x
    torch.testing.assert_close((mine / 2 + 0.5).clamp(0, 1), theirs, rtol=1e-4, atol=1e-4)


def test_a_retrained_flow_with_its_old_scheduler(folder: Path) -> None:
    teacher = teacher_of(tiny.stable_diffusion(folder), schedule=Flow(), prediction="flow", sign=-1)
    z, cond = noise(2, 4, 8, 8), teacher.encode_prompts(PROMPTS)
    output = teacher.network.network(z, torch.full((2,), 1000.0), cond["encoder_hidden_states"]).sample
    one = Sampler.one_step(teacher.denoiser).sample(z, cond).x  # z - u with u = -output
    torch.testing.assert_close(one, z + output, rtol=1e-5, atol=1e-5)


def test_says_what_is_wrong_in_one_line(
    saved: Path, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no folder .*nothing-here"):
        load_teacher(tmp_path / "nothing-here")
    with pytest.raises(InputError, match=r"no pipeline of diffusers: it has no model_index\.json"):
        load_teacher(tmp_path)
    with pytest.raises(InputError, match=r"no pipeline of diffusers"):
        load_teacher(saved, subfolder="unet")
    with pytest.raises(InputError, match="is a file: load single-file checkpoints"):
        load_teacher(saved / "model_index.json")
    with pytest.raises(InputError, match="image_size must be multiples of 2"):
        teacher_of(teacher.pipeline, image_size=17)
    with pytest.raises(InputError, match="prompts must be a list"):
        teacher.encode_prompts("a cat")
    with pytest.raises(InputError, match="ScoreSdeVeScheduler is not known"):
        teacher_of(tiny.ddpm(scheduler=ScoreSdeVeScheduler()))
    broken = tmp_path / "broken"
    tiny.ddpm().save_pretrained(broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"cannot load the pipeline .*broken: ") as caught:
        load_teacher(broken)
    assert "\n" not in str(caught.value)
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    with pytest.raises(RunError, match="cannot load the pipeline"):
        load_teacher(broken)


def test_the_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for options in ({}, {"subfolder": "small"}):
        with pytest.raises(
            RunError, match="cannot load the pipeline nobody/nothing from the Hugging Face hub"
        ) as caught:
            load_teacher("nobody/nothing", **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_a_pipeline_in_a_subfolder(saved: Path) -> None:
    assert load_teacher(saved.parent, subfolder="sd").shape == (4, 8, 8)
