"""Fields trained on posed pictures: from scratch as a baseline, and once as reference teachers, kept in the cache by content hash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.artifacts import WEIGHTS, load_weights, save_weights
from limbeck.core.batch import Batch
from limbeck.core.data import Data, mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.core.files import write_json
from limbeck.core.method import Method
from limbeck.core.optim import OptimiserConfig, make_optimised
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage, Stepper
from limbeck.rendering.fields import VolumeField, build_field
from limbeck.rendering.volume import render_rays
from limbeck.tasks.base import cache_folder, hash_of
from limbeck.tasks.scenes import PosedImages, SceneTask
from limbeck.tasks.teachers import alone

RECIPE = 1  # part of the cache key: raise it when the way fields are trained changes
RATES = {"mlp": 2e-3, "hash": 1e-2, "vm": 2e-2, "voxels": 5e-2, "triplane": 2e-2}
"""The usual learning rate of each family's encoding, at small scale; decoders of tables and planes learn at a fifth of it at most."""
DECODER_RATE = 2e-3


def field_groups(field: VolumeField, lr: float | None = None) -> list[dict[str, Any]]:
    """Optimiser groups with the family's usual rates, or with ``lr`` for the encoding and in proportion for the decoder."""
    usual = RATES.get(field.family, 1e-2)
    rate = usual if lr is None else lr
    return field.param_groups(rate, min(usual, DECODER_RATE) * rate / usual)


class FieldTraining(Method):
    r"""A field from posed pictures: the mean squared error of rendered pixels.

    .. math:: L = \frac{1}{3R} \sum_r \|C(r) - C^*(r)\|^2

    with R random rays over all pictures at each step, S stratified samples on each.

    Args:
        field: what is trained.
        background: grey value behind it, as in the pictures.

    Source: "NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis".
    """

    name = "field"

    class Config(OptimiserConfig):
        steps: int = Field(500, ge=1, description="updates")
        rays: int = Field(256, ge=1, description="rays per update")
        samples: int = Field(32, ge=1, description="samples on each ray")
        optimizer: Literal["adamw", "adam", "sgd"] = Field("adam", description="update rule")
        lr: float | None = Field(
            None, gt=0, description="peak learning rate of the encoding; none: the family's usual one"
        )  # type: ignore[assignment]
        weight_decay: float = Field(0.0, ge=0, description="weight decay (decoupled for adamw)")
        betas: tuple[float, float] = Field((0.9, 0.99), description="decay of adam's and adamw's two running means")

    def __init__(self, field: VolumeField, background: float = 1.0, config: Any = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.field, self.background = field, background

    def pixels(self, views: PosedImages, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Random pixels over all pictures: camera numbers (R,), (column, row) (R, 2), colours (R, 3)."""
        cameras = views.cameras
        ids = torch.randint(len(cameras), (count,))
        place = torch.stack([torch.randint(cameras.width, (count,)), torch.randint(cameras.height, (count,))], 1)
        return ids, place, views.images[ids, place[:, 1], place[:, 0]].to(device)

    def stages(self, train: PosedImages, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One loop."""
        config, cameras = self.config, train.cameras

        def update(_: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            device = self.field.aabb.device
            ids, place, wanted = self.pixels(train, config.rays, device)
            rays = cameras.rays(ids, place)
            rays = type(rays)(rays.origins.to(device), rays.directions.to(device))
            found = render_rays(
                self.field, rays, near=cameras.near, far=cameras.far, samples=config.samples, background=self.background,
                perturb=True,
            )  # fmt: skip
            loss = (found["rgb"] - wanted).square().mean()
            stepper.minimise(loss, "field")
            return {"loss": loss}

        return [
            Stage(
                "reconstruction",
                config.steps,
                update=update,
                optimisers=lambda: {
                    "field": make_optimised(field_groups(self.field, config.lr), _rated(config), config.steps)
                },
            )
        ]


def _rated(config: Any) -> Any:
    """The config with a number for a rate, which every group overrides."""
    return config if config.lr is not None else config.replace(lr=1e-2)


def reference_field(
    task: SceneTask,
    family: str = "hash",
    config: Mapping[str, Any] | None = None,
    *,
    steps: int = 500,
    rays: int = 256,
    samples: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> VolumeField:
    """A field trained on a task's training views, from the cache where it is there.

    The random state of the caller is left alone, so a run does not depend on whether its teacher came from the cache.

    Args:
        task: the scene.
        family, config: what :func:`~limbeck.rendering.fields.build_field` takes; the box is the task's unless the config says otherwise.
        steps, rays, samples: of its training.
        seed: seeds initialisation and training.
        progress: show a bar while training.

    Returns:
        the field, frozen and in evaluation mode.
    """
    if not task.train.has_images:
        raise InputError(f"'{task.name}' has no pictures to train a field on")
    with preserved_random_state():
        seed_everything(mix_seed(seed, 151))
        field = build_field(family, {"aabb": task.aabb.tolist(), **dict(config or {})})
        about = {
            "family": family,
            "config": field.config(),
            "steps": steps,
            "rays": rays,
            "samples": samples,
            "seed": seed,
        }
        key = hash_of(RECIPE, task.fingerprint, task.background, sorted(about.items(), key=str))
        folder = cache_folder() / "fields" / f"{task.name}-{family}-{key}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if not (folder / WEIGHTS).exists():
                training = FieldTraining(field, task.background, steps=steps, rays=rays, samples=samples)
                engine = Engine(folder, EngineConfig(progress=progress), seed=mix_seed(seed, 157))
                engine.run(training, training.stages(task.train, None, seed=seed), resume=True)
                save_weights(field.cpu(), folder / WEIGHTS)
                write_json(folder / "about.json", {"task": task.describe(), **about})
                (folder / "checkpoint.pt").unlink(missing_ok=True)
        load_weights(field, folder / WEIGHTS)
    return field.cpu().eval().requires_grad_(False)
