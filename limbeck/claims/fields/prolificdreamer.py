"""Do particles follow the prior's law with the score of their own law, where score distillation sampling collapses them onto its modes?

Three grounds. *Points*: 128 particles in the plane, an exact prior of eight Gaussians (standard deviation 0.15, radius 1.5) in two interleaved
classes, half of the particles asked for each; the energy distance to fresh draws of their class. *Digits*: 32 particles for each of three classes as images,
the prior being a kernel density (width 0.1) over the training digits; the mean distance inside a class beside that of held-out digits. *Scenes*: four voxel
fields of one object seen by the small trained network, from different starts.

Both methods have as many updates of the particles, the same batches, times and guidance. Score distillation sampling chooses between two learning
rates by the energy distance to fresh draws and to validation digits; the method has the first of them. Particles start from noise, never from data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.fields import common
from limbeck.core.data import mix_seed
from limbeck.core.seeding import seed_everything
from limbeck.diffusion.oracles import Oracle, gaussian_mixture, kernel_density
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import VPCosine
from limbeck.methods.fields.prolificdreamer import ProlificDreamer
from limbeck.methods.fields.sds import SDS
from limbeck.rendering.particles import SampleParticles
from limbeck.tasks.base import TaskConfig
from limbeck.tasks.generation import GenerationTask, load_generation, real_samples
from limbeck.tasks.judging_generation import judge_generation
from limbeck.tasks.view_priors import load_prior

RATES = ({"lr": 0.01}, {"lr": 0.03})
CLASSES = (0, 1, 2)
POINTS, EACH = 128, 32
POINT_STEPS, DIGIT_STEPS, SCENE_STEPS = 3000, 1500, 800


def mixture() -> Oracle:
    """Eight Gaussians on a circle, classes 0 and 1 in turn."""
    angle = torch.arange(8) * (math.pi / 4)
    means = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    return gaussian_mixture(means, 0.15, labels=torch.arange(8) % 2, schedule=VPCosine())


def points(cls: Any, seed: int, guidance: float, chosen: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Particles in the plane: energy distance to their class, spread within a mode, distance from the origin."""
    law, labels = mixture(), torch.arange(POINTS) % 2
    seed_everything(mix_seed(seed, 11))
    more = {"fake_width": 128} if cls is ProlificDreamer else {}
    made = cls(
        law,
        SampleParticles(torch.randn(POINTS, 2)),
        conditions=labels,
        steps=POINT_STEPS,
        batch_size=POINTS,
        guidance=guidance,
        t_high_late=None,
        clip_grad=None,
        **more,
        **chosen,
    )
    found = common.run(made, seed).particles.samples.detach()
    parts = {}
    for part, own in (("val", 1), ("test", 2)):
        g = torch.Generator().manual_seed(mix_seed(seed, 500 + own) % 2**31)
        drawn, classes = law.sample(8000, g)
        assert classes is not None
        energy = sum(common.energy_distance(found[labels == c], drawn[classes == c][:3000]) for c in (0, 1)) / 2
        parts[part] = {"point_energy": energy}
    near = (found[:, None] - law.module.means).norm(dim=2).argmin(1)
    spreads = [float(found[near == k].std(0).mean()) for k in range(8) if int((near == k).sum()) > 2]
    parts["test"] |= {
        "spread_within_modes": sum(spreads) / max(1, len(spreads)),
        "radius": float(found.norm(dim=1).mean()),
    }
    return parts


@functools.cache
def digits() -> GenerationTask:
    return load_generation(TaskConfig.make(task="digits"))


def of_classes(part: str) -> tuple[Tensor, Tensor]:
    """Real digits of the classes in question, in [-1, 1], and which they are."""
    images, labels = real_samples(getattr(digits(), part))
    assert isinstance(labels, Tensor)
    kept = torch.isin(labels, torch.tensor(CLASSES))
    return images[kept], labels[kept]


def prior_of_digits() -> Oracle:
    images, labels = real_samples(digits().train)
    return kernel_density(images, 0.1, VPCosine(), labels)


def described(x: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """Digits as particles: distances inside classes, to real ones, contrast, and whether they are of their class."""
    judge = digits().classifier(progress=False)
    assert judge is not None
    with torch.no_grad():
        right = float((judge(x).argmax(1) == labels).float().mean())
    parts: dict[str, dict[str, float]] = {}
    for part in ("val", "test"):
        real, own = of_classes(part)
        energy = sum(common.energy_distance(x[labels == c], real[own == c]) for c in CLASSES) / len(CLASSES)
        parts[part] = {"digit_energy": energy}
    inside = sum(common.pairwise(x[labels == c]) for c in CLASSES) / len(CLASSES)
    real, own = of_classes("test")
    true = sum(common.pairwise(real[own == c]) for c in CLASSES) / len(CLASSES)
    contrast = float(x.flatten(1).std(1).mean())
    parts["test"] |= {
        "distance_in_class": inside,
        "share_of_real_distance": inside / true,
        "label_accuracy": right,
        "contrast": contrast,
    }
    return parts


def images(cls: Any, seed: int, guidance: float, chosen: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Particles as digits."""
    labels = torch.tensor(CLASSES).repeat_interleave(EACH)
    seed_everything(mix_seed(seed, 13))
    more = {"fake_steps": 2} if cls is ProlificDreamer else {}
    made = cls(
        prior_of_digits(),
        SampleParticles(0.5 * torch.randn(len(labels), 1, 8, 8)),
        conditions=labels,
        steps=DIGIT_STEPS,
        batch_size=len(labels),
        guidance=guidance,
        t_high_late=0.6,
        t_switch=0.3,
        clip_grad=None,
        **more,
        **chosen,
    )
    return described(common.run(made, seed).particles.samples.detach(), labels)


def scenes(cls: Any, seed: int) -> dict[str, float]:
    """Four voxel fields of one object."""
    config = cls.Config.make(steps=SCENE_STEPS, guidance=7.5, t_high_late=0.6, t_switch=0.4)
    setup = cls.Setup.make(task="faced_sphere", particles=4)
    seed_everything(mix_seed(seed, 17))
    prior = load_prior(setup, setup, progress=False)
    made = common.run(cls(prior, cls.fresh(setup, config), config, seed=seed), seed)
    found = judge_generation(made.particles.renderers(), prior, 12)
    return {f"scene_{k}": float(v) for k, v in found.items()}


def claim(data_root: str | None = None) -> Claim:
    """Points, digits (1,000 training, 297 validation, 500 test images) and renders of an analytic scene."""

    def law(cls: Any, guidance: float, ground: str) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            parts: dict[str, dict[str, float]] = {"val": {}, "test": {}}
            for name, made in (("points", points), ("digits", images)):
                if name in ground:
                    for part, values in made(cls, seed, guidance, chosen).items():
                        parts[part] |= values
            parts["val"]["energy"] = sum(parts["val"].values())
            return Outcome(parts["val"], common.logs(parts["test"]))

        return train

    def ancestral(chosen: Mapping[str, Any], seed: int) -> Outcome:
        labels = torch.tensor(CLASSES).repeat_interleave(EACH)
        known = prior_of_digits()
        z = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(mix_seed(seed, 19) % 2**31))
        return Outcome({}, common.logs(described(Sampler.ode(known, 50, "ddim").sample(z, labels).x, labels)["test"]))

    def real(chosen: Mapping[str, Any], seed: int) -> Outcome:
        shown, own = of_classes("test")
        return Outcome({}, common.logs(described(shown, own)["test"]))

    def objects(cls: Any) -> Callable[[Mapping[str, Any], int], Outcome]:
        return lambda chosen, seed: Outcome({}, common.logs(scenes(cls, seed)))

    def ratio(words: str, method: str, baseline: str, metric: str, factor: float, **more: Any) -> Check:
        return Check(words, method, baseline, f"log_{metric}", math.log(factor), **more)

    fewer: dict[str, Any] = {"higher_is_better": False}
    return Claim(
        name="prolificdreamer",
        arms={
            "vsd": Arm("method", "w = 1: points and digits", law(ProlificDreamer, 1.0, "points digits"), RATES[:1]),
            "vsd 7.5": Arm("method", "w = 7.5: digits", law(ProlificDreamer, 7.5, "digits"), RATES[:1]),
            "vsd scenes": Arm("method", "w = 7.5: four voxel fields, adapters on the prior", objects(ProlificDreamer)),
            "sds": Arm("baseline", "w = 1: points and digits", law(SDS, 1.0, "points digits"), RATES),
            "sds 100": Arm("baseline", "w = 100: points", law(SDS, 100.0, "points"), RATES),
            "sds 7.5": Arm("baseline", "w = 7.5: digits", law(SDS, 7.5, "digits"), RATES),
            "sds scenes": Arm("baseline", "w = 7.5: four voxel fields", objects(SDS)),
            "real": Arm("control", "held-out digits themselves", real),
            "ancestral": Arm("control", "digits drawn from the prior itself in 50 steps", ancestral),
        },
        checks=[
            ratio(
                "points: a tenth of the distance to the class's law, or less, at w = 1",
                "vsd",
                "sds",
                "point_energy",
                10.0,
                **fewer,
            ),
            ratio("points: a twentieth of that of w = 100, or less", "vsd", "sds 100", "point_energy", 20.0, **fewer),
            ratio(
                "digits: twice the distance inside a class, or more, at w = 1", "vsd", "sds", "distance_in_class", 2.0
            ),
            ratio(
                "digits: twice the distance inside a class, or more, at w = 7.5",
                "vsd 7.5",
                "sds 7.5",
                "distance_in_class",
                2.0,
            ),
            ratio(
                "digits: 0.65 of the real distance inside a class, or more, at w = 1",
                "vsd",
                "real",
                "distance_in_class",
                0.65,
            ),
            Check("digits: they keep their class", "vsd", "sds", "label_accuracy", -0.05),
            ratio(
                "scenes: four fields differ more from each other",
                "vsd scenes",
                "sds scenes",
                "scene_particle_distance",
                1.0,
                headline=False,
            ),
            ratio(
                "scenes: and are no further than 1.2 times from the prior's images",
                "vsd scenes",
                "sds scenes",
                "scene_nearest_distance",
                1 / 1.2,
                headline=False,
                **fewer,
            ),
        ],
        data={"name": "a mixture, digits, and an analytic scene", "digits": digits().describe()},
        seeds=3,
        select="-energy",
        note=(
            "Exact priors in two dimensions and over 8x8 digits, a small trained one over renders; no text-to-image model was run. What fails is one "
            "threshold: at w = 7.5 digits differ 1.9 times as much as by score distillation sampling, and 2 times was asked for; all else holds."
        ),
        settings={
            "points": POINT_STEPS,
            "digits": DIGIT_STEPS,
            "scenes": SCENE_STEPS,
            "rates": [r["lr"] for r in RATES],
        },
    )
