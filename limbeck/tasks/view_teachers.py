"""The trained prior of score distillation: one small diffusion model of renders of the small analytic scenes, kept in the cache.

Its class says which scene it is and which side is seen: id 5 * scene + word, with the words of :mod:`limbeck.rendering.view_words` (0: no
word); the null class, one more, says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from limbeck.adapters.denoising import build_network
from limbeck.core.artifacts import WEIGHTS, load_weights, save_weights
from limbeck.core.batch import Batch, Losses
from limbeck.core.data import TensorData, mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import UnknownNameError
from limbeck.core.files import write_json
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import VPCosine
from limbeck.rendering.cameras import RandomOrbit
from limbeck.rendering.scenes import scene
from limbeck.rendering.view_words import WORDS, angles_of, view_word_ids
from limbeck.tasks.base import cache_folder, hash_of
from limbeck.tasks.diffusion_teachers import DenoiserTraining, training_times
from limbeck.tasks.teachers import alone
from limbeck.tasks.view_renders import SIZE, render_orbit, render_views

RECIPE = 1  # part of the cache key: raise it when the way the prior is trained changes
PRIOR_SCENES = ("spheres_box", "faced_sphere", "three_blobs", "split_sphere")
ELEVATIONS = (-10.0, 75.0)
"""Reaches above 60 degrees, so that there are views from overhead."""
NETWORK = "view-unet-w24"
NO_LABEL, NO_WORD = 0.15, 0.5


def class_id(name: str, word: str = "") -> int:
    """The class of a scene and a view's word.

    Raises:
        UnknownNameError: a scene or word that the prior does not know.
    """
    if name not in PRIOR_SCENES:
        raise UnknownNameError("scene of the trained prior", name, PRIOR_SCENES)
    if word not in WORDS:
        raise UnknownNameError("view word", word, WORDS[1:])
    return len(WORDS) * PRIOR_SCENES.index(name) + WORDS.index(word)


class ViewTraining(DenoiserTraining):
    """Denoising of renders, whose view's word is withheld half the time, and the whole class for some."""

    name = "view-prior"

    def losses(self, batch: Batch) -> Losses:
        labels = batch.labels
        assert labels is not None
        plain = labels - labels % len(WORDS)
        withheld = torch.rand(len(labels), device=labels.device) < NO_WORD
        return super().losses(replace(batch, labels=torch.where(withheld, plain, labels)))


@dataclass
class ViewTeacher:
    """The trained prior.

    Attributes:
        denoiser: of pictures (3, 16, 16) in [-1, 1], conditioned on class ids.
        orbit: cameras of the renders.
        data: the renders (N, 3, 16, 16) in [-1, 1], with the classes that say most.
    """

    denoiser: Denoiser
    orbit: RandomOrbit
    data: TensorData

    def pictures(self, name: str) -> Tensor:
        """The renders (n, 3, 16, 16) in [0, 1] of one scene."""
        which = self.data.labels_tensor() // len(WORDS) == PRIOR_SCENES.index(name)
        return (self.data.inputs[which] + 1) / 2


@lru_cache(maxsize=2)
def view_data(views: int, seed: int = 0) -> TensorData:
    """Renders of every scene with their classes; those drawn last are kept in memory.

    Args:
        views: of each scene.
    """
    around, pictures, classes = render_orbit(elevation=ELEVATIONS), [], []
    generator = torch.Generator().manual_seed(mix_seed(seed, 173) % 2**31)
    for name in PRIOR_SCENES:
        cameras = around.sample(views, generator)
        pictures.append(2 * render_views(scene(name), cameras).movedim(-1, 1) - 1)
        classes.append(class_id(name) + view_word_ids(*angles_of(cameras)))
    return TensorData(torch.cat(pictures), torch.cat(classes))


def view_teacher(steps: int = 2500, views: int = 768, *, seed: int = 0, progress: bool = True) -> ViewTeacher:
    """The trained prior, from the cache where it is there; the random state of the caller is left alone.

    Cosine schedule, v-prediction, Adam at 2e-3 falling along a cosine, batches of 32, weights averaged. It takes two minutes or so of one
    processor core.

    Args:
        steps: updates. views: renders of each scene. seed: of cameras and weights.
        progress: show a bar while training.
    """
    schedule = VPCosine()
    count = len(WORDS) * len(PRIOR_SCENES)
    with preserved_random_state():
        data = view_data(views, seed)
        seed_everything(mix_seed(seed, 179))
        network = build_network(NETWORK, (3, SIZE, SIZE), count, schedule)
        denoiser = Denoiser(network, schedule, "v", null_cond=torch.tensor(count))
        about: dict[str, Any] = {
            **denoiser.describe(),
            "network": NETWORK,
            "scenes": list(PRIOR_SCENES),
            "views": views,
            "steps": steps,
            "no_label": NO_LABEL,
            "no_word": NO_WORD,
            "seed": seed,
        }
        key = hash_of(RECIPE, data.fingerprint(), sorted(about.items(), key=str))
        folder = cache_folder() / "view_priors" / f"scenes-{key}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if not (folder / WEIGHTS).exists():
                training = ViewTraining(
                    denoiser,
                    training_times(schedule),
                    dropout=NO_LABEL,
                    optimizer="adam",
                    lr=2e-3,
                    weight_decay=0.0,
                    batch_size=32,
                    warmup=0.02,
                    clip_grad=1.0,
                )
                engine = Engine(folder, EngineConfig(progress=progress), seed=mix_seed(seed, 181))
                engine.run(training, [training.stage(data, seed, steps)], resume=True)
                save_weights(training.average.module.cpu(), folder / WEIGHTS)
                write_json(folder / "about.json", about)
                (folder / "checkpoint.pt").unlink(missing_ok=True)
        load_weights(denoiser.module, folder / WEIGHTS)
    return ViewTeacher(denoiser.cpu().eval().requires_grad_(False), render_orbit(elevation=ELEVATIONS), data)
