from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import limbeck
from limbeck.adapters.diffusers_networks import SmallUNet
from limbeck.adapters.diffusers_pipelines import Teacher, load_teacher, teacher_of
from limbeck.adapters.diffusers_plans import plan_of
from limbeck.adapters.diffusers_students import save_student
from limbeck.blocks.lora import LoRA
from limbeck.core.errors import InputError, RunError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, Flow, Trig
from limbeck.diffusion.transforms import InSchedule
from tests.adapters import tiny_pipelines as tiny

torch.set_num_threads(1)

PROMPTS = ["a photo of a cat", "a red dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def teachers(folder: Path) -> dict[str, Teacher]:
    flow = {"schedule": Flow(), "prediction": "flow"}
    return {
        "sd": teacher_of(tiny.stable_diffusion(folder, tiny.scaled_linear(prediction_type="v_prediction"))),
        "sd-eps": teacher_of(tiny.stable_diffusion(folder)),
        "sd-zero": teacher_of(
            tiny.stable_diffusion(
                folder, tiny.scaled_linear(prediction_type="v_prediction", rescale_betas_zero_snr=True)
            )
        ),
        "sd-flow": teacher_of(tiny.stable_diffusion(folder), sign=-1, **flow),
        "sdxl": teacher_of(tiny.sdxl(folder, tiny.scaled_linear(prediction_type="v_prediction"))),
        "sdxl-flow": teacher_of(tiny.sdxl(folder), **flow),
        "pixels": teacher_of(tiny.ddpm(scheduler=tiny.scaled_linear(prediction_type="sample"))),
        "pixels-flow": teacher_of(tiny.ddpm(scheduler=FlowMatchEulerDiscreteScheduler())),
        "classes": teacher_of(tiny.ddpm(4, tiny.scaled_linear(prediction_type="sample")), null_class=3),
        "edm": teacher_of(tiny.edm()),
        "dit": teacher_of(tiny.dit()),
        "dit-few": teacher_of(tiny.dit(10)),
        "pixart": teacher_of(tiny.pixart(folder)),
        "sd3": teacher_of(tiny.sd3(folder)),
        "flux": teacher_of(tiny.flux(folder, guided=True), image_size=(16, 12)),
    }


def at(*index: int) -> torch.Tensor:
    """The times of these indices, and 0."""
    return torch.tensor([*((k + 1) / 1000 for k in index), 0.0], dtype=torch.float64)


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


Make = Callable[[Denoiser], Sampler]
EVEN, ODD = (999, 499), (900, 100)
# name of the teacher, sampler, scheduler, call of the pipeline (None: there is none)
CASES: list[tuple[str, Make, str, dict[str, Any] | None]] = [
    (
        "sd-eps",
        lambda d: Sampler(d, at(399), "one-step"),
        "DDIMScheduler",
        {"num_inference_steps": 1, "guidance_scale": 1.0},
    ),
    (
        "sd",
        lambda d: Sampler.ode(d, 2, guidance=3.0),
        "DDIMScheduler",
        {"num_inference_steps": 2, "guidance_scale": 3.0},
    ),
    ("sd", lambda d: Sampler(d, at(*ODD)), "EulerDiscreteScheduler", {"timesteps": list(ODD), "guidance_scale": 1.0}),
    (
        "sd",
        lambda d: Sampler(d, at(*EVEN), "renoise"),
        "LCMScheduler",
        {"num_inference_steps": 2, "guidance_scale": 1.0},
    ),
    (
        "sd",
        lambda d: Sampler(d, at(*ODD), "tcd", gamma=1.0),
        "LCMScheduler",
        {"timesteps": list(ODD), "guidance_scale": 1.0},
    ),
    ("sd", lambda d: Sampler(d, at(*ODD), "renoise", noise="initial"), "DDIMScheduler", None),
    ("sd", lambda d: Sampler.ode(d, 2, "euler", guidance=0.5), "DDIMScheduler", None),
    ("sd", lambda d: Sampler.ode(InSchedule(d, Flow()), 2, guidance=2.0), "DDIMScheduler", None),
    ("sd-zero", lambda d: Sampler.ode(d, 2), "DDIMScheduler", {"num_inference_steps": 2, "guidance_scale": 1.0}),
    (
        "sd-flow",
        lambda d: Sampler.one_step(d),
        "FlowMatchEulerDiscreteScheduler",
        {"num_inference_steps": 1, "guidance_scale": 1.0},
    ),
    (
        "sd-flow",
        lambda d: Sampler(d, times(1.0, 0.5, 0.2, 0), "renoise"),
        "FlowMatchEulerDiscreteScheduler",
        {"sigmas": [1.0, 0.5, 0.2], "guidance_scale": 1.0},
    ),
    (
        "sdxl",
        lambda d: Sampler.ode(d, 2, guidance=2.0),
        "DDIMScheduler",
        {"num_inference_steps": 2, "guidance_scale": 2.0},
    ),
    (
        "sdxl-flow",
        lambda d: Sampler.ode(d, 2, "euler"),
        "FlowMatchEulerDiscreteScheduler",
        {"sigmas": [1.0, 0.5], "guidance_scale": 1.0},
    ),
    ("pixels", lambda d: Sampler.ode(d, 2), "DDIMScheduler", {"num_inference_steps": 2}),
    ("pixels", lambda d: Sampler(d, at(*EVEN), "renoise"), "LCMScheduler", {"num_inference_steps": 2}),
    ("pixels-flow", lambda d: Sampler.one_step(d), "FlowMatchEulerDiscreteScheduler", {"num_inference_steps": 1}),
    ("pixels-flow", lambda d: Sampler.ode(d, 2), "FlowMatchEulerDiscreteScheduler", None),
    ("classes", lambda d: Sampler.ode(d, 2, guidance=2.0), "DDIMScheduler", None),
    ("edm", lambda d: Sampler.one_step(d), "EDMEulerScheduler", None),
    ("edm", lambda d: Sampler.ode(d, 3), "EDMEulerScheduler", None),
    (
        "dit",
        lambda d: Sampler.ode(d, 2, guidance=2.0),
        "DDIMScheduler",
        {"num_inference_steps": 2, "guidance_scale": 2.0},
    ),
    ("dit-few", lambda d: Sampler.ode(d, 2, guidance=2.0), "DDIMScheduler", None),
    (
        "pixart",
        lambda d: Sampler(d, at(*ODD), guidance=2.0),
        "EulerDiscreteScheduler",
        {"timesteps": list(ODD), "guidance_scale": 2.0},
    ),
    (
        "sd3",
        lambda d: Sampler.ode(d, 2, guidance=2.0),
        "FlowMatchEulerDiscreteScheduler",
        {"sigmas": [1.0, 0.75], "guidance_scale": 2.0},
    ),
    (
        "flux",
        lambda d: Sampler(d, times(1.0, 0.4, 0)),
        "FlowMatchEulerDiscreteScheduler",
        {"sigmas": [1.0, 0.4], "guidance_scale": 3.5},
    ),
]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize(("name", "make", "scheduler", "call"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_the_folder_samples_as_the_sampler_without_the_library(
    name: str,
    make: Make,
    scheduler: str,
    call: dict[str, Any] | None,
    teachers: dict[str, Teacher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = teachers[name]
    sampler = make(teacher.denoiser)
    before = teacher.pipeline.scheduler
    weights = [p.clone() for p in teacher.network.parameters()]
    plan = save_student(tmp_path, teacher, sampler, {"title": "Small", "method": "dmd"})
    assert type(plan.scheduler).__name__ == scheduler and plan.call == call and plan.exact == (call is not None)
    assert teacher.pipeline.scheduler is before
    assert all(torch.equal(p, w) for p, w in zip(teacher.network.parameters(), weights, strict=True))

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)
    assert len(blocks) == (1 if call is None else 2) and not any("limbeck" in block for block in blocks)
    once = cache(DiffusionPipeline.from_pretrained)  # both blocks load the same folder
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", once)
    found: dict[str, Any] = {}
    exec(blocks[-1], found)  # the usage at its end makes pictures
    assert found["images"].shape[2:] == teacher.image_size

    z = torch.randn(2, *teacher.shape, generator=generator())
    argument: Any = ()
    cond: Any = None
    if teacher.num_classes is not None:
        cond = torch.tensor([0, 2])
        argument = (cond,)
    elif teacher.network.parts:
        cond, argument = teacher.encode_prompts(PROMPTS), (PROMPTS,)
    expected = sampler.sample(z, cond, generator()).x
    # The tolerance is relative to the samples' size: noise-predicting networks divide by a small alpha.
    size = max(1.0, float(expected.abs().max()))
    plain = found["sample"](z, *argument, generator=generator())
    assert float((plain - expected).abs().max()) < 1e-5 * size
    if call is not None:
        exec(blocks[0], found)
        ours, theirs = _called(found["pipe"], teacher, sampler, call, z, cond)
        assert float((ours - theirs).abs().max()) < 1e-5 * max(1.0, float(ours.abs().max()))


def _called(
    pipe: Any, teacher: Teacher, sampler: Sampler, call: dict[str, Any], z: torch.Tensor, cond: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples or pictures of the sampler and of the pipeline's call."""
    pipe.set_progress_bar_config(disable=True)
    name = type(pipe).__name__
    if cond is None or isinstance(cond, torch.Tensor):  # these pipelines draw the noise themselves, and give pictures
        source = generator()
        first = {"batch_size": 2} if cond is None else {"class_labels": cond.tolist()}
        theirs = torch.as_tensor(pipe(**first, generator=source, output_type="pt", **call).images)
        source = generator()
        ours = teacher.decode(sampler.sample(torch.randn(z.shape, generator=source), cond, source).x)
        return (ours / 2 + 0.5).clamp(0, 1), theirs
    packed = pipe._pack_latents(z, *z.shape) if name == "FluxPipeline" else z
    extra = {"use_resolution_binning": False} if "PixArt" in name else {}
    height, width = teacher.image_size
    theirs = pipe(
        PROMPTS,
        latents=packed.clone(),
        generator=generator(),
        output_type="latent",
        height=height,
        width=width,
        **extra,
        **call,
    ).images
    if name == "FluxPipeline":
        theirs = pipe._unpack_latents(theirs, height, width, pipe.vae_scale_factor)
    return sampler.sample(z, cond, generator()).x, theirs


@pytest.mark.parametrize("case", [1, 7, 17, 19, 23])
def test_the_folder_is_read_back(case: int, teachers: dict[str, Teacher], tmp_path: Path) -> None:
    name, make, _, _ = CASES[case]
    teacher = teachers[name]
    sampler = make(teacher.denoiser)
    save_student(tmp_path, teacher, sampler)
    student = limbeck.load(tmp_path).content
    z = torch.randn(2, *teacher.shape, generator=generator())
    cond: Any = teacher.encode_prompts(PROMPTS) if teacher.num_classes is None and teacher.network.parts else None
    if teacher.num_classes is not None:
        cond = torch.tensor([0, 2])
    found = student.sampler.sample(z, cond, generator()).x
    torch.testing.assert_close(found, sampler.sample(z, cond, generator()).x)
    assert student.sampler.describe() == sampler.describe() and student.teacher.shape == teacher.shape


def test_an_exported_flow_needs_no_further_line_for_one_step(teachers: dict[str, Teacher], tmp_path: Path) -> None:
    teacher = teachers["sd-flow"]
    sampler = Sampler.one_step(teacher.denoiser)
    save_student(tmp_path, teacher, sampler)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    z, cond = torch.randn(2, *teacher.shape, generator=generator()), teacher.encode_prompts(PROMPTS)
    found = pipe(PROMPTS, latents=z, num_inference_steps=1, guidance_scale=0, output_type="latent").images
    torch.testing.assert_close(found, sampler.sample(z, cond).x, rtol=1e-4, atol=1e-4)
    # The folder is a teacher again: the sign is in the weights, the schedule in the scheduler.
    back = load_teacher(tmp_path)
    assert back.network.sign == 1 and back.denoiser.schedule == Flow() and back.denoiser.prediction == "flow"
    torch.testing.assert_close(Sampler.one_step(back.denoiser).sample(z, cond).x, sampler.sample(z, cond).x)


def test_trajectory_sampling_is_close_and_says_so(teachers: dict[str, Teacher], tmp_path: Path) -> None:
    teacher = teachers["sd"]
    sampler = Sampler(teacher.denoiser, at(*EVEN), "tcd", gamma=0.3)
    plan = save_student(tmp_path, teacher, sampler)
    assert type(plan.scheduler).__name__ == "TCDScheduler" and not plan.exact and plan.call is not None
    text = (tmp_path / "README.md").read_text()
    assert "close, not exact: TCDScheduler rounds" in text
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    z, cond = torch.randn(2, *teacher.shape, generator=generator()), teacher.encode_prompts(PROMPTS)
    ours, theirs = _called(pipe, teacher, sampler, plan.call, z, cond)
    assert 0 < float((ours - theirs).abs().mean()) < 0.05 * float(ours.abs().mean())


def test_a_smaller_student_and_adapters(teachers: dict[str, Teacher], tmp_path: Path) -> None:
    teacher = teachers["sd"]
    student = Sampler.one_step(teacher.denoiser.with_module(deepcopy(teacher.network)))
    z, cond = torch.randn(1, *teacher.shape, generator=generator()), teacher.encode_prompts(["a cat"])
    plain = student.sample(z, cond).x
    lora = LoRA(student.denoiser, 2, targets=["to_q", "to_v"])
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = student.sample(z, cond).x
    assert not torch.allclose(expected, plain, atol=1e-3)
    with pytest.raises(InputError, match=r"carries adapters, which would be lost: give them \(lora=…\)"):
        save_student(tmp_path, teacher, student)
    save_student(tmp_path, teacher, student, lora=lora)
    torch.testing.assert_close(limbeck.load(tmp_path).content.sampler.sample(z, cond).x, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(student.sample(z, cond).x, expected)  # the student itself is as it was
    with pytest.raises(InputError, match="does not hold the student's network"):
        save_student(tmp_path, teacher, student, lora=LoRA(nn.Linear(2, 2), 1))


def test_networks_told_a_scaled_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of(tiny.edm())
    network = SmallUNet((1, 8, 8), width=8, time_scale=250.0).eval()
    sampler = Sampler.ode(Denoiser(network, EDM(0.02, 20.0), precond="edm", sigma_data=0.7), 2)
    plan = save_student(tmp_path, teacher, sampler)
    assert plan.call is None and "250-fold" in plan.why
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)[-1], found)
    z = torch.randn(2, 1, 8, 8, generator=generator())
    torch.testing.assert_close(found["sample"](z), sampler.sample(z).x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(limbeck.load(tmp_path).content.sampler.sample(z).x, sampler.sample(z).x)


def test_refuses_what_cannot_be_exported(teachers: dict[str, Teacher], tmp_path: Path) -> None:
    teacher = teachers["pixels"]
    for solver in ("heun", "dpm2m", "rk45"):
        with pytest.raises(InputError, match=f"the solver '{solver}' cannot be exported"):
            save_student(tmp_path, teacher, Sampler.ode(teacher.denoiser, 2, solver))
    with pytest.raises(InputError, match="only networks of diffusers are saved"):
        save_student(tmp_path, teacher, Sampler.ode(Denoiser(nn.Identity(), Flow(), "flow"), 2))
    with pytest.raises(InputError, match="is a DiTTransformer2DModel, the teacher's pipeline has a UNet2DModel"):
        save_student(tmp_path, teacher, Sampler.ode(teachers["dit"].denoiser, 2))

    class Own(Denoiser):
        pass

    with pytest.raises(InputError, match="Own has rules of its own"):
        save_student(tmp_path, teacher, Sampler.ode(Own(teacher.network, Flow(), "flow"), 2))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        save_student(tmp_path / "file", teacher, Sampler.ode(teacher.denoiser, 2))
    plan = plan_of(Sampler.ode(Denoiser(teacher.network, Trig(), "v"), 2), teacher.network, teacher.pipeline.scheduler)
    assert plan.call is None and "'trig'" in plan.why and plan.scheduler is teacher.pipeline.scheduler
    save_student(tmp_path / "ok", teacher, Sampler.ode(teacher.denoiser, 2))
    (tmp_path / "ok" / "artifact.json").write_text('{"kind": "diffusers-pipeline", "denoiser": {}}')
    with pytest.raises(RunError, match="does not describe a student's sampler"):
        limbeck.load(tmp_path / "ok")
