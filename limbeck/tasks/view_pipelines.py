"""Pipelines of diffusers as priors over pictures of one object."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.adapters.diffusers_pipelines import Teacher, load_teacher
from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import take
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.view_words import WORDS, angles_of, view_word_ids, with_view
from limbeck.tasks.view_priors import ViewPrior, check_count
from limbeck.tasks.view_renders import render_orbit

LEAST_RENDER = 64
"""Side of renders at least, unless the pipeline's pictures are smaller."""
CAMERA_PLACES = ("time_embedding", "time_text_embed")
"""Where networks of diffusers embed their time in one vector a sample: U-Nets; Stable Diffusion 3 and Flux."""


def pipeline_prior(
    name: str, prompt: str | None, *, words: bool = True, view_size: int = LEAST_RENDER, **options: Any
) -> ViewPrior:
    """A pipeline as a prior.

    Prompts are encoded once, one for each view's word ("a lighthouse, back view") and the plain one.

    Args:
        name: a folder or the name of a repository.
        prompt: a text; a class's name or number for class-conditional networks; None for unconditional ones.
        words: whether the prompt says which side is seen.
        view_size: side of the renders, at least 64, at most that of the pipeline's pictures; they are resized to those.
        options: of :func:`~limbeck.adapters.diffusers_pipelines.load_teacher`.

    Raises:
        InputError, RunError: no such pipeline, pictures that are not square or not in colour, a prompt missing, unknown or given in vain.
    """
    teacher = load_teacher(name, **options)
    height, width = teacher.image_size
    colours = teacher.shape[0] if teacher.vae is None else int(teacher.vae.config.in_channels)
    if height != width or colours != 3:
        raise InputError(
            f"the pipeline {name} draws pictures of {height} x {width} in {colours} channels: a prior draws square ones in 3"
        )
    size = min(height, max(LEAST_RENDER, view_size))
    table = condition_table(teacher, prompt, words)

    def encode(renders: Tensor) -> Tensor:
        vae = teacher.vae
        if vae is not None and next(vae.parameters()).device != renders.device:
            vae.to(renders.device)
        return teacher.encode(2 * resized(renders, height) - 1)

    def condition(cameras: Cameras | None, count: int) -> tuple[Any, Any]:
        if table is None:
            return None, None
        ids = torch.zeros(count, dtype=torch.long)
        if cameras is not None:
            check_count(cameras, count)
            ids = ids.to(cameras.c2w.device)
        plain = _on(take(table, ids), ids.device)
        if cameras is None or not words or _rows(table) == 1:
            return plain, plain
        return _on(take(table, view_word_ids(*angles_of(cameras))), ids.device), plain

    return ViewPrior(
        name if prompt is None else f"{name}: {prompt}",
        teacher.denoiser,
        teacher.shape,
        size,
        encode,
        condition,
        render_orbit(size),
        camera_path=camera_place(teacher),
    )


def condition_table(teacher: Teacher, prompt: str | None, words: bool) -> Any:
    """Conditions with a row for each view's word (0: none), or with a single row for a class, or None.

    Raises:
        InputError: a prompt missing, unknown, or given in vain.
    """
    network = teacher.network
    if teacher.num_classes is not None:
        return torch.tensor([_class(teacher, prompt)])
    if not network.parts:
        if prompt is not None:
            raise InputError(f"the pipeline's {network.name} is unconditional: leave the prompt out")
        return None
    if prompt is None or not prompt.strip():
        raise InputError("a pipeline from text needs a prompt: say what to draw with --prompt")
    return teacher.encode_prompts([with_view(prompt.strip(), word) for word in (WORDS if words else WORDS[:1])])


def _class(teacher: Teacher, prompt: str | None) -> int:
    assert teacher.num_classes is not None
    names = {name: number for number, name in (teacher.class_names or {}).items()}
    if prompt is not None and prompt in names:
        return names[prompt]
    if prompt is not None and prompt.isdigit() and int(prompt) < teacher.num_classes:
        return int(prompt)
    known = f" or a name such as {', '.join(list(names)[:3])}" if names else ""
    raise InputError(
        f"the pipeline knows classes: its prompt is a number below {teacher.num_classes}{known} (got {prompt!r})"
    )


def resized(renders: Tensor, size: int) -> Tensor:
    """Renders (B, 3, S, S) at another size, bilinearly, with averaging where they shrink."""
    if renders.shape[-1] == size and renders.shape[-2] == size:
        return renders
    return F.interpolate(renders, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def camera_place(teacher: Teacher) -> str | None:
    """Where a camera can be told to the network, as a path in the denoiser's module."""
    inner: Any = teacher.network.network
    return next((f"network.{place}" for place in CAMERA_PLACES if hasattr(inner, place)), None)


def _rows(table: Any) -> int:
    return len(table) if isinstance(table, Tensor) else len(next(iter(table.values())))


def _on(cond: Any, device: torch.device) -> Any:
    return cond.to(device) if isinstance(cond, Tensor) else {k: v.to(device) for k, v in cond.items()}
