"""What a run by name distils: a task's reference teacher, or a pipeline of diffusers with a list of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.data import Data, TensorData
from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import Conditions
from limbeck.tasks.base import TaskConfig
from limbeck.tasks.diffusion_teachers import diffusion_teacher, reference_schedule
from limbeck.tasks.generation import MIXTURES, from_images, load_generation

PROMPTS_AT_ONCE = 64


class GeneratorSetup(TaskConfig):
    """Which many-step teacher, and on which task."""

    task: str = Field(
        "digits",
        description="digits, mnist, cifar10, any data set that --data explains, or a mixture in the plane: ring, grid, classes-2d",
    )
    teacher: tuple[str, ...] = Field(
        (), description="a pipeline of diffusers, as folder or hub name; none: a network is trained on the task first"
    )
    prompts: str | None = Field(
        None,
        description="text file with a prompt on each line, for a teacher from text; none: its classes, or no condition",
    )
    student: str | None = Field(
        None, description="the student's network, such as mlp-w48-b1; none: a copy of the teacher"
    )
    noise_schedule: str = Field(
        "flow", description="schedule of the reference teacher: flow, vp-discrete, vp-cosine, edm or trig"
    )
    predicts: str | None = Field(
        None, description="what it predicts: x0, eps, v, flow or score; none: what is usual with the schedule"
    )
    teacher_network: str = Field(
        "mlp-w160-b3", description="its network: mlp-w<width>-b<blocks> or unet-w<width>-l<levels>"
    )
    teacher_steps: int = Field(5000, ge=1, description="updates of its training")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of conditions it is trained without")


@dataclass
class PipelineTask:
    """A pipeline in the place of a task: conditions to learn from, and no real samples to judge by.

    Attributes:
        name: of the pipeline.
        train: conditions, or samples with their conditions where images were given.
        conditions: all of them.
        shape: of one sample.
        val, test: the conditions again; results are compared with the teacher.
    """

    name: str
    train: Data
    conditions: Conditions
    shape: tuple[int, ...]
    class_names: list[str]
    val: Data | None = None
    test: Data | None = None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "source": "a diffusers pipeline",
            "conditions": len(self.conditions),
            "sample_shape": list(self.shape),
        }


def load_generator(setup: GeneratorSetup, *, needs_images: bool = False, progress: bool = True) -> tuple[Any, Any]:
    """The teacher and the task that a setup describes.

    Returns:
        a denoiser and a :class:`~limbeck.tasks.generation.GenerationTask`, or a loaded pipeline and a :class:`PipelineTask`.

    Raises:
        InputError, UnknownNameError: something does not exist or does not fit.
    """
    if len(setup.teacher) > 1:
        raise InputError(f"one teacher is distilled, not {len(setup.teacher)}: {', '.join(setup.teacher)}")
    if setup.teacher:
        return load_pipeline(setup, needs_images=needs_images)
    if setup.prompts is not None:
        raise InputError("--prompts goes with a teacher from text: name its pipeline with --teacher")
    task = load_generation(setup)
    if setup.task in MIXTURES and setup.data is None and setup.teacher_network == "exact":
        return task.exact_teacher(reference_schedule(setup.noise_schedule)), task
    teacher = diffusion_teacher(
        task,
        setup.noise_schedule,
        setup.predicts,
        network=setup.teacher_network,
        steps=setup.teacher_steps,
        dropout=setup.dropout,
        progress=progress,
    )
    return teacher, task


def load_pipeline(setup: GeneratorSetup, *, needs_images: bool = False) -> tuple[Any, PipelineTask]:
    """A pipeline of diffusers and the conditions to distil it with."""
    from limbeck.adapters.diffusers_pipelines import load_teacher

    pipeline = load_teacher(setup.teacher[0])
    names: list[str] = []
    if setup.prompts is not None:
        prompts = read_prompts(setup.prompts)
        conditions = Conditions(encoded(pipeline, prompts), names=prompts)
    elif pipeline.num_classes is not None:
        conditions = Conditions(torch.arange(pipeline.num_classes))
        named = pipeline.class_names or {}
        names = [str(named.get(c, c)) for c in range(pipeline.num_classes)]
    elif pipeline.denoiser.conditional:
        raise InputError(
            f"{setup.teacher[0]} makes pictures from text: give a file with a prompt on each line (--prompts)"
        )
    else:
        conditions = Conditions(None, 1024)
    train: Data = conditions
    if needs_images and setup.data is not None:
        train = encoded_images(setup, pipeline)
    made = PipelineTask(Path(setup.teacher[0]).name, train, conditions, pipeline.shape, names, test=conditions)
    return pipeline, made


def read_prompts(path: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        InputError: no such file, not text, or no line.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"no file {path}: --prompts names a text file with a prompt on each line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InputError(f"{path} holds no prompt: write one on each line")
    return found


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Embedded prompts, encoded a few at a time, on the CPU."""
    parts = [
        pipeline.encode_prompts(prompts[start : start + PROMPTS_AT_ONCE])
        for start in range(0, len(prompts), PROMPTS_AT_ONCE)
    ]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def encoded_images(setup: GeneratorSetup, pipeline: Any) -> TensorData:
    """A task's images as latents, with their classes where the pipeline takes classes.

    Raises:
        InputError: the pipeline takes text, and images without texts cannot stand beside prompts.
    """
    if setup.prompts is not None:
        raise InputError(
            "images for a teacher from text need texts of their own, which --data does not hold: leave --data out "
            "(the teacher's own samples are used), or use the method as an object with {'x0': latents, 'cond': …}"
        )
    size = pipeline.image_size[0]
    task = from_images(_images(setup, size))
    latents = [pipeline.encode(batch.inputs).detach().cpu() for batch in task.train.batches(32)]
    return TensorData(torch.cat(latents), task.train.labels if pipeline.num_classes is not None else None)


def _images(setup: GeneratorSetup, size: int) -> Any:
    from limbeck.tasks.base import load_task

    return load_task(setup.replace(augment=False, image_size=size))
