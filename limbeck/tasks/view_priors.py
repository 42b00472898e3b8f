"""Priors over pictures of one object: what score distillation distils into a scene.

Three kinds, behind one face: a small network trained on renders of the analytic scenes, the closed form of a kernel density over renders
of one of them, and pipelines of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.config import Config
from limbeck.core.data import mix_seed
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.seeding import preserved_random_state
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import kernel_density
from limbeck.diffusion.schedules import VPCosine
from limbeck.rendering.cameras import Cameras, RandomOrbit
from limbeck.rendering.scenes import SCENES, scene
from limbeck.rendering.view_words import angles_of, view_word_ids
from limbeck.tasks.scenes import PosedImages, SceneSetup
from limbeck.tasks.view_renders import SIZE, drawn_cameras, reference_views, render_orbit, render_views
from limbeck.tasks.view_teachers import PRIOR_SCENES, class_id, view_teacher

EMBEDDED = ("trained", "closed-form")


class PriorSetup(Config):
    """Which prior, and what it is asked for."""

    prior: str = Field(
        "trained",
        description="trained (a small network on renders of the analytic scenes), closed-form (a kernel density over renders of the "
        "scene), or a diffusers pipeline: its folder, or its name on the hub",
    )
    prompt: str | None = Field(
        None, description="what a pipeline is asked for; for the embedded priors a scene, and none means that of --task"
    )
    view_words: bool = Field(True, description="tell the prior which side a camera sees (', front view' and so on)")
    prior_steps: int = Field(2500, ge=1, description="updates of the trained prior")
    prior_views: int = Field(
        384, ge=8, description="renders behind the closed form; the trained prior sees twice as many of each scene"
    )
    front_share: float = Field(
        0.0, ge=0, le=1, description="share of the closed form's renders from within 45 degrees of the front; 0: evenly around"
    )  # fmt: skip
    elevation: tuple[float, float] = Field(
        (-10.0, 45.0), description="elevations of the closed form's renders, and of a pipeline's cameras, in degrees"
    )
    kernel: float = Field(
        0.05, gt=0, description="standard deviation of the closed form's kernels, on pixels in [-1, 1]"
    )


@dataclass
class ViewPrior:
    """A prior over pictures, and what a scene needs to be distilled from it and judged by it.

    Attributes:
        name: for reports.
        denoiser: of samples of ``shape``.
        shape: (C, H, W).
        render_size: side of the square renders that ``encode`` is given.
        encode: renders (B, 3, S, S) in [0, 1] to samples (B, *shape), differentiable: pixels in [-1, 1], or scaled latents.
        condition: ``(cameras or None, count)`` to two conditions of ``count`` rows, with view words and plain, on the cameras' device;
            both are equal without cameras or words, and None where the prior takes none.
        orbit: cameras as the prior's pictures show the object.
        references: true views of what is asked for, by rising azimuth, for judging; None where there is no truth.
        support: (n, 3, S, S) in [0, 1], pictures of what is asked for that the prior was made from; None where they are not known.
        camera_path: where a :class:`~limbeck.blocks.camera_embedding.CameraEmbedding` acts on ``denoiser.module``; None: nowhere.
    """

    name: str
    denoiser: Denoiser
    shape: tuple[int, int, int]
    render_size: int
    encode: Callable[[Tensor], Tensor]
    condition: Callable[[Cameras | None, int], tuple[Any, Any]]
    orbit: RandomOrbit
    references: PosedImages | None = None
    support: Tensor | None = None
    camera_path: str | None = None

    def describe(self) -> dict[str, Any]:
        """Plain values, for the record of a run."""
        return {
            "name": self.name,
            "sample": list(self.shape),
            "render": self.render_size,
            "guidance": self.denoiser.conditional,
            "schedule": self.denoiser.schedule.name,
            "prediction": self.denoiser.prediction,
            "support": None if self.support is None else len(self.support),
            "references": None if self.references is None else len(self.references),
        }


def load_prior(setup: PriorSetup, scene_setup: SceneSetup, *, progress: bool = True, seed: int = 0) -> ViewPrior:
    """The prior that a setup names; the random state of the caller is left alone.

    Args:
        setup: which prior. scene_setup: the scene, where ``setup.prompt`` names none.
        progress: show a bar while training.
        seed: of the renders' cameras and of the trained prior's weights.

    Raises:
        InputError, RunError: a scene that the prior does not know, no such pipeline, a pipeline without its prompt.
    """
    with preserved_random_state():
        if setup.prior == "closed-form":
            return closed_form_prior(setup, subject(setup, scene_setup), seed=seed, scene_seed=scene_setup.scene_seed)
        if setup.prior == "trained":
            return trained_prior(setup, subject(setup, scene_setup), progress=progress, seed=seed)
        if "/" not in setup.prior and "\\" not in setup.prior and not _is_folder(setup.prior):
            raise UnknownNameError(
                "prior", setup.prior, EMBEDDED, hint="It is trained, closed-form, or a pipeline's folder or hub name."
            )
        from limbeck.tasks.view_pipelines import pipeline_prior

        return pipeline_prior(setup.prior, setup.prompt, words=setup.view_words, view_size=scene_setup.view_size)


def subject(setup: PriorSetup, scene_setup: SceneSetup) -> str:
    """The analytic scene that an embedded prior is asked for: the prompt's, spaces for underscores, or else the task's.

    Raises:
        InputError: photographs, which no embedded prior knows. UnknownNameError: no such scene.
    """
    if setup.prompt is None and scene_setup.data is not None:
        raise InputError(
            f"the {setup.prior} prior knows no photographs: name an analytic scene with --task, or a pipeline with --prior"
        )
    name = (setup.prompt or scene_setup.task).strip().replace(" ", "_")
    known = PRIOR_SCENES if setup.prior == "trained" else tuple(n for n in SCENES if n != "terrain")
    if name not in known:
        raise UnknownNameError(f"scene of the {setup.prior} prior", name, known, hint=f"It knows {', '.join(known)}.")
    return name


def to_pixels(renders: Tensor) -> Tensor:
    """Renders in [0, 1] as samples in [-1, 1]."""
    return 2 * renders - 1


def closed_form_prior(setup: PriorSetup, name: str, *, seed: int = 0, scene_seed: int = 0) -> ViewPrior:
    """The exact denoiser of a kernel density over renders of a scene, without conditions: it never knows where the camera is.

    The noise is the cosine schedule, as for the trained prior, so that a time means the same for both.

    Args:
        name: of an analytic scene. scene_seed: of ``textured_shapes``.
    """
    truth, around = scene(name, scene_seed), render_orbit(elevation=setup.elevation)
    generator = torch.Generator().manual_seed(mix_seed(seed, 167) % 2**31)
    cameras = drawn_cameras(around, setup.prior_views, generator, setup.front_share)
    support = render_views(truth, cameras).movedim(-1, 1).contiguous()
    denoiser = kernel_density(to_pixels(support), setup.kernel, VPCosine())
    return ViewPrior(
        f"closed form of {name}",
        denoiser.eval(),
        (3, SIZE, SIZE),
        SIZE,
        to_pixels,
        lambda cameras, count: (None, None),
        around,
        reference_views(truth),
        support,
    )


def trained_prior(setup: PriorSetup, name: str, *, progress: bool = True, seed: int = 0) -> ViewPrior:
    """The small network that was trained on renders of all small scenes, asked for one of them; see :mod:`limbeck.tasks.view_teachers`."""
    teacher = view_teacher(setup.prior_steps, 2 * setup.prior_views, seed=seed, progress=progress)

    def condition(cameras: Cameras | None, count: int) -> tuple[Tensor, Tensor]:
        plain = torch.full((count,), class_id(name))
        if cameras is None:
            return plain, plain
        check_count(cameras, count)
        plain = plain.to(cameras.c2w.device)
        return (plain + view_word_ids(*angles_of(cameras)) if setup.view_words else plain), plain

    return ViewPrior(
        f"trained on {len(PRIOR_SCENES)} scenes, asked for {name}",
        teacher.denoiser,
        (3, SIZE, SIZE),
        SIZE,
        to_pixels,
        condition,
        teacher.orbit,
        reference_views(scene(name)),
        teacher.pictures(name),
        "time_embedding",
    )


def check_count(cameras: Cameras, count: int) -> None:
    """Conditions are as many as cameras.

    Raises:
        InputError: they are not.
    """
    if len(cameras) != count:
        raise InputError(f"{len(cameras)} cameras but {count} conditions are asked for: they must be as many")


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()
