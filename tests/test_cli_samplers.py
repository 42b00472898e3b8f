"""Samplers from the command line: a run and its report, pipelines of diffusers, and mistakes that get one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from limbeck.cli import main

torch.set_num_threads(1)
FEW = [
    "--teacher-steps",
    "40",
    "--teacher-network",
    "mlp-w16-b1",
    "--judge-count",
    "40",
    "--teacher-nfe",
    "4",
    "--batch-size",
    "16",
]


@pytest.fixture(autouse=True)
def _small_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    from limbeck.tasks import generation, teachers

    monkeypatch.setattr(teachers, "MIN_STEPS", 10)
    monkeypatch.setitem(generation.PLANE, "test", 100)


def test_a_run_reports_at_equal_noise_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    few = [*FEW, "--pairs", "32", "--steps", "4", "--distil-steps", "4"]
    assert main(["run", "instaflow", "--task", "ring", *few, "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "teacher, 1 step" in said and "in 1 network evaluation (" in said and "modes" in said
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and "fewer network evaluations" in page
    assert main(["resume", str(folder)]) == 0
    made = limbeck.load(folder).content
    assert made.sample(torch.randn(3, 2), torch.tensor([0, 1, 2])).nfe == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--noise-schedule", "cosine"], "unknown noise schedule 'cosine'"),
        (["--predicts", "v"], "the prediction 'v' needs alpha^2 + sigma^2 = 1"),
        (["--teacher", "no/such/folder/at-all"], "no/such/folder/at-all"),
        (["--teacher-network", "cnn-w8"], "unknown denoising network 'cnn-w8'"),
        (["--task", "wine"], "holds no images to generate"),
        (["--prompts", "x.txt"], "--prompts goes with a teacher from text"),
        (["--flow-guidance", "-1"], "--flow-guidance must be"),
    ],
)
def test_mistakes_get_one_line(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    assert main(["run", "instaflow", *FEW, *flags, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1


def pipeline_folder(tmp_path: Path) -> Path:
    pytest.importorskip("diffusers")
    from tests.adapters import tiny_pipelines

    torch.manual_seed(0)
    folder = tmp_path / "pipeline"
    tiny_pipelines.stable_diffusion(tmp_path).save_pretrained(folder)
    return folder


SETTINGS = {
    "instaflow": ["--steps", "2", "--distil-steps", "2", "--pairs", "4"],
    "swiftbrush": ["--steps", "2", "--rank", "2"],
    "sim": ["--steps", "2"],
    "hyper-sd": [
        "--steps",
        "4",
        "--segments",
        "2",
        "1",
        "--points",
        "4",
        "--lora-rank",
        "2",
        "--pairs",
        "4",
        "--adversary",
        "none",
    ],
    "agd": ["--steps", "2", "--trajectories", "2"],
}


def run_on_pipeline(method: str, source: Path, tmp_path: Path) -> Path:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na blue dog\na small house\n")
    folder = tmp_path / "run"
    flags = ["--teacher", str(source), "--prompts", str(prompts), "--batch-size", "2", "--teacher-nfe", "2"]
    assert main(["run", method, *flags, "--judge-count", "10", *SETTINGS[method], "--out", str(folder)]) == 0
    return folder


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("method", ["instaflow", "swiftbrush", "sim", "hyper-sd"])
def test_a_pipeline_from_text_comes_back_as_one(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    folder = run_on_pipeline(method, pipeline_folder(tmp_path), tmp_path)
    from diffusers import DiffusionPipeline

    again = quiet(DiffusionPipeline.from_pretrained(folder / "artifact"))
    z = torch.randn(1, *limbeck.load(folder).content.teacher.shape)
    asked: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": z, "output_type": "latent"}
    found = again("a red cat", **asked).images
    student = limbeck.load(folder).content
    wanted = student.sampler.sample(z, student.teacher.encode_prompts(["a red cat"])).x
    assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.slow
def test_adapters_guide_a_pipeline_that_diffusers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    source = pipeline_folder(tmp_path)
    folder = run_on_pipeline("agd", source, tmp_path)
    from diffusers import DiffusionPipeline

    from limbeck.blocks.guidance_injection import listen

    adapters = limbeck.load(folder).content
    for parameter in adapters.parameters():  # two updates hardly move them
        torch.nn.init.normal_(parameter, std=0.5) if parameter.ndim > 1 else None
    pipeline = quiet(DiffusionPipeline.from_pretrained(source))
    asked: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    latents = torch.randn(1, pipeline.unet.config.in_channels, 8, 8)
    alone = pipeline("a red cat", latents=latents, **asked).images
    stop = listen(pipeline.unet, adapters, guidance=4.0)
    guided = pipeline("a red cat", latents=latents, **asked).images
    stop()
    assert not torch.allclose(alone, guided) and bool(torch.isfinite(guided).all())
    assert torch.equal(alone, pipeline("a red cat", latents=latents, **asked).images)
