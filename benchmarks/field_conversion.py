"""A deep perceptron distilled from a hash field, against the same one trained on pictures until it is as good."""

from __future__ import annotations

import statistics
import time
from contextlib import suppress
from typing import Any

import torch

from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.seeding import seed_everything
from limbeck.methods.fields.pvd import PVD
from limbeck.metrics.image_quality import psnr
from limbeck.rendering.fields import VolumeField
from limbeck.rendering.inheritance import heir
from limbeck.rendering.renderers import VolumeRenderer
from limbeck.tasks.judging_fields import drawn
from limbeck.tasks.reference_fields import FieldTraining, reference_field
from limbeck.tasks.scenes import SceneTask, analytic

ALLOWED = 0.2  # the paper: a tenth, at full resolution, against a rate that is not tuned
DEEP = {"depth": 8, "width": 128, "skip": 4}
STEPS, LONGER, EVERY, RAYS = 160, 5, 40, 128
RATES = (2e-3, 4e-3)
QUIET = EngineConfig(progress=False, log_every=1000)


class Reached(Exception):
    """The quality asked for is there."""


@torch.no_grad()
def quality(field: VolumeField, task: SceneTask) -> float:
    """PSNR on the validation views."""
    was = field.training
    found = float(psnr(drawn(VolumeRenderer(field.eval(), 32), task.val.cameras), task.val.images).mean())
    field.train(was)
    return found


def distilled(teacher: VolumeField, task: SceneTask, seed: int) -> tuple[float, float]:
    """PSNR that distillation ends with, and the seconds that it takes."""
    seed_everything(seed)
    made = PVD(
        teacher, heir(teacher, "mlp", DEEP), task.train.cameras, steps=STEPS, rays=RAYS, lr=RATES[1], seed=seed
    )  # fmt: skip
    began = time.perf_counter()
    Engine(None, QUIET, seed=seed).run(made, made.stages())
    spent = time.perf_counter() - began
    return quality(made.result.eval(), task), spent


def on_pictures(task: SceneTask, lr: float, goal: float, seed: int) -> tuple[float, float]:
    """The best PSNR on the way to ``goal``, and the seconds until it is reached or the updates are used up; judging is left out."""
    seed_everything(seed)
    field = heir(reference_field(task, "hash", steps=1000, progress=False), "mlp", DEEP)
    training = FieldTraining(field, task.background, steps=LONGER * STEPS, rays=RAYS, lr=lr)
    stages: Any = training.stages(task.train)
    best, lost, began = 0.0, 0.0, time.perf_counter()

    def look(step: int) -> None:
        nonlocal best, lost
        if step % EVERY == 0:
            paused = time.perf_counter()
            best = max(best, quality(field, task))
            lost += time.perf_counter() - paused
            if best >= goal:
                raise Reached

    stages[0].after_step = look
    with suppress(Reached):
        Engine(None, QUIET, seed=seed).run(training, stages)
    return best, time.perf_counter() - began - lost


def measure(rounds: int = 3) -> dict[str, float]:
    """The median over rounds of the seconds of distillation over those on pictures, to the PSNR that distillation ends with.

    The rival may make five times as many updates; where it still is not as good, its whole time counts, so that the ratio is too high if
    anything. Its rate is the one of two that served it best before. The teacher's training counts for neither: it is there, as the pictures are.
    """
    task = analytic("spheres_box")
    teacher = reference_field(task, "hash", steps=1000, progress=False)
    goal = distilled(teacher, task, 100)[0]
    tried = {lr: on_pictures(task, lr, goal, 100) for lr in RATES}
    rate = max(RATES, key=lambda lr: (min(tried[lr][0], goal), -tried[lr][1]))
    ratios, short = [], 0
    for seed in range(rounds):
        goal, spent = distilled(teacher, task, seed)
        best, rival = on_pictures(task, rate, goal, seed)
        ratios.append(spent / rival)
        short += best < goal
    found = {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": ALLOWED}
    return {**found, "rivals_short": float(short)}
