"""Does matching scores by a distance with an exact gradient make better one-step samples than variational score distillation, and pull more evenly than squared L2?

Digits: a class-conditional EDM teacher is distilled into one step, student and online network starting from it. Score implicit matching with the
pseudo-Huber distance and variational score distillation (distribution matching's weight, no regression) get 1,000 updates of the student, as many of the
online network, and the same learning rates to choose from by the Fréchet distance in a classifier's features to validation digits. How near the
samples come to the teacher's own (18 steps of Heun) is recorded, too: held-out digits are few, so that even the teacher is a distance away from them.

Evenness: with five times the usual rates, from the teacher's weights and from random ones, the size of the gradient on the samples over the first 200
updates; its coefficient of variation is compared with that of squared L2, whose gradient grows with the distance from the target.

In the plane: a ring of eight modes whose score is exact, from a student that makes a wide Gaussian and from one that makes a single mode. Score distillation
sampling, which has no online network, is what collapses there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.samplers import common
from limbeck.core.data import mix_seed
from limbeck.core.seeding import seed_everything
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.losses import denoising_loss, edm_weight
from limbeck.diffusion.onestep import OneStepGenerator
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.time_samplers import LogNormal
from limbeck.methods.samplers.dmd import DMD
from limbeck.methods.samplers.score_base import ScoreDistiller
from limbeck.methods.samplers.sim import SIM
from limbeck.methods.samplers.swiftbrush import SwiftBrush
from limbeck.metrics.generative import frechet_distance
from limbeck.tasks.diffusion_teachers import fresh_denoiser, reference_schedule
from limbeck.tasks.generation import GenerationTask
from limbeck.tasks.judging_samplers import draw

STEPS = 1000
RATES = ({"lr": 5e-4}, {"lr": 1.5e-3})
HURRIED = {"steps": 200, "lr": 2.5e-3, "lr_fake": 5e-3}
"""Five times the usual rates."""
VSD = {"regression": 0.0}
SDS = {"fake": "none", "guidance": 1.0}
PLANE = {"steps": 500, "lr": 1e-3, "lr_fake": 2e-3}
START_SIZE = {"wide": 1.0, "one mode": 0.05}
COUNT = 2000


def claim(data_root: str | None = None) -> Claim:
    """The digits (1,000 training, 297 validation and 500 test images) and the ring."""
    on, ring = common.task("digits"), common.task("ring")

    def digits(cls: type[ScoreDistiller], **settings: Any) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            made, _ = distilled(cls, on, seed, {"steps": STEPS, **settings, **chosen})
            return outcome(made.sampler(), seed, tuned=True)

        return train

    def hurried(start: str, **settings: Any) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            student = None if start == "teacher" else common.fresh(on, "edm", "mlp-w160-b3", seed)
            made, pulls = distilled(SIM, on, seed, {**HURRIED, **settings}, student)
            unevenness = float(pulls.std() / pulls.mean())
            return outcome(made.sampler(), seed, unevenness=unevenness, log_unevenness=math.log(unevenness))

        return train

    def known(sampler: Callable[[], Sampler]) -> Callable[[Mapping[str, Any], int], Outcome]:
        return lambda chosen, seed: outcome(sampler(), seed)

    def outcome(sampler: Sampler, seed: int, tuned: bool = False, **more: float) -> Outcome:
        ours = draw({"it": sampler}, on.shape, COUNT, on.test.labels, seed=mix_seed(seed, 53)).samples["it"]
        distance = frechet_distance(ours, teachers_samples(seed))
        about = {"frechet_teacher": distance, "log_frechet_teacher": math.log(distance)}
        return common.worth(sampler, on, seed, count=COUNT, tuned=tuned, more={**about, **more})

    def plane(cls: type[ScoreDistiller], start: str, **settings: Any) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            student, online = started(ring, start, seed)
            given = None if settings.get("fake") == "none" else online
            made, _ = distilled(cls, ring, seed, {**PLANE, **settings}, student, given)
            return common.worth(made.sampler(), ring, seed, tuned=False)

        return train

    arms = {
        "sim": Arm("method", "score implicit matching, pseudo-Huber", digits(SIM), RATES),
        "vsd": Arm(
            "baseline", "variational score distillation, distribution matching's weight", digits(DMD, **VSD), RATES
        ),
        "start": Arm(
            "control", "the teacher asked once, where students begin", known(lambda: Sampler.one_step(edm(on)))
        ),
        "teacher": Arm("control", "the teacher, 18 steps of Heun", known(lambda: fine(on))),
    }
    for start in ("teacher", "random"):
        for divergence in ("pseudo-huber", "l2"):
            arms[f"{divergence}, five times the rate, {start}"] = Arm(
                "control",
                f"{divergence} for 200 updates at five times the rates, from {start} weights",
                hurried(start, divergence=divergence),
            )
    for start, name, cls, settings in (
        ("wide", "sim", SIM, {}),
        ("wide", "sds", SwiftBrush, SDS),
        ("one mode", "sim", SIM, {}),
        ("one mode", "vsd", DMD, VSD),
        ("one mode", "sds", SwiftBrush, SDS),
    ):
        made = plane(cls, start, **settings)
        arms[f"{name}, ring, {start}"] = Arm("control", f"{name} on the ring, start: {start}", made)

    def lower(statement: str, method: str, baseline: str, metric: str, margin: float, headline: bool = False) -> Check:
        return Check(statement, method, baseline, metric, margin, higher_is_better=False, headline=headline)

    def more_modes(statement: str, start: str, baseline: str, margin: float, headline: bool = False) -> Check:
        return Check(statement, f"sim, ring, {start}", f"{baseline}, ring, {start}", "modes", margin, headline=headline)

    checks = [
        lower(
            "one-step samples are nearer to held-out digits (classifier features) than those of variational score distillation",
            "sim",
            "vsd",
            "log_frechet_features",
            0.0,
            True,
        ),
        lower(
            "from random weights at five times the rate the gradient's size varies a third as much as with squared L2, or less",
            "pseudo-huber, five times the rate, random",
            "l2, five times the rate, random",
            "log_unevenness",
            math.log(3),
            True,
        ),
        more_modes(
            "from a single mode of the ring it finds four modes more than score distillation sampling",
            "one mode",
            "sds",
            4.0,
            True,
        ),
        lower(
            "it is nearer to the teacher's samples than variational score distillation",
            "sim",
            "vsd",
            "log_frechet_teacher",
            0.0,
        ),
        lower(
            "it comes to 0.15 of the start's distance from the teacher's samples, or nearer",
            "sim",
            "start",
            "log_frechet_teacher",
            -math.log(0.15),
        ),
        Check("its samples keep 98 % of the teacher's spread", "sim", "teacher", "spread_ratio", -0.02, headline=False),
        lower(
            "from the teacher's weights at five times the rate the gradient's size varies a third as much, or less",
            "pseudo-huber, five times the rate, teacher",
            "l2, five times the rate, teacher",
            "log_unevenness",
            math.log(3),
        ),
        lower(
            "at five times the rate its samples are no further from the teacher's than with squared L2, to 10 %",
            "pseudo-huber, five times the rate, teacher",
            "l2, five times the rate, teacher",
            "log_frechet_teacher",
            -math.log(1.1),
        ),
        more_modes("from a wide start it finds four modes more than score distillation sampling", "wide", "sds", 4.0),
        more_modes(
            "from a single mode it finds as many modes as variational score distillation", "one mode", "vsd", -0.5
        ),
    ]
    return Claim(
        name="sim",
        arms=arms,
        checks=checks,
        data={**on.describe(), "also": ring.describe()},
        seeds=4,
        select="-log_frechet_features",
        note="Small networks on 8x8 images and points in the plane. Squared L2 does not diverge at this size, with Adam's steps; the paper's CIFAR-10 and "
        "text-to-image scale were not run.",
        settings={"updates": STEPS, "rates": [r["lr"] for r in RATES], "hurried": HURRIED, "ring": PLANE},
    )


def edm(on: GenerationTask) -> Denoiser:
    """The digits' teacher."""
    return common.teacher(on, "edm")


def fine(on: GenerationTask) -> Sampler:
    """It in 18 steps."""
    return Sampler.ode(edm(on), 18, "heun")


@functools.lru_cache(maxsize=2)
def teachers_samples(seed: int) -> Tensor:
    """What it makes of other noise than that of students."""
    on = common.task("digits")
    made = draw({"it": fine(on)}, on.shape, COUNT, on.test.labels, seed=mix_seed(seed, 59))
    return made.samples["it"]


def distilled(
    cls: type[ScoreDistiller],
    on: GenerationTask,
    seed: int,
    config: Mapping[str, Any],
    student: Denoiser | None = None,
    online: Denoiser | None = None,
) -> tuple[Any, Tensor]:
    """A method that has run, and the size of the gradient on its samples in every update."""
    if on.exact is None:
        real, conditions = edm(on), on.conditions
    else:
        real, conditions = on.exact_teacher(reference_schedule("edm")), None
    seed_everything(mix_seed(seed, 3))
    made: Any = cls(
        real, conditions, student, cls.Config.make(**config), shape=on.shape, seed=seed, fake_denoiser=online
    )
    made.on, made.show_progress = on, False
    pulls: list[Tensor] = []
    inner = made.generator_losses

    def watched(x: Tensor, cond: Any) -> Any:
        losses = inner(x, cond)
        pulls.append(losses.observed["pull"])
        return losses

    made.generator_losses = watched
    common.run(made, on, seed)
    return made, torch.stack(pulls)


def started(on: GenerationTask, start: str, seed: int) -> tuple[Denoiser, Denoiser]:
    """A student that makes a wide Gaussian or the ring's first mode alone, and an online network that knows its score."""
    assert on.exact is not None
    schedule = reference_schedule("edm")
    seed_everything(mix_seed(seed, 61))
    student, online = (fresh_denoiser(on, schedule, None, "mlp-w64-b2", classes=False) for _ in range(2))
    generator = OneStepGenerator(student)
    middle = on.exact.module.means[0] if start == "one mode" else torch.zeros(2)
    times = LogNormal(-0.4, 1.2, schedule.t_min, schedule.t_max)
    for network in (student, online):
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        for _ in range(300):
            z = torch.randn(128, 2)
            wanted = middle + START_SIZE[start] * z
            loss = (
                (generator(z) - wanted).square().mean()
                if network is student
                else denoising_loss(online, wanted, times(128), space="x0", weight=edm_weight(online.sigma_data))
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student, online
