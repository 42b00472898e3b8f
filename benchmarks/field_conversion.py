"""A deep field distilled from a trained one, against the same field trained on pictures until it is as good."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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

ALLOWED = 0.2
DEEP = {"depth": 8, "width": 128, "skip": 4}
STEPS, EVERY = 600, 10


class Reached(Exception):
    """The quality asked for is there."""


def quality(field: VolumeField, task: SceneTask) -> float:
    """PSNR on the validation views."""
    was = field.training
    found = float(psnr(drawn(VolumeRenderer(field.eval(), 32), task.val.cameras), task.val.images).mean())
    field.train(was)
    return found


def until(method: Any, train: Any, judged: Callable[[], VolumeField], task: SceneTask, goal: float, seed: int) -> float:
    """Seconds of training (judging it left out) until a field has a PSNR, looking every few steps; infinite if it never has."""
    stages = method.stages(train, None, seed=seed)
    began, lost = time.perf_counter(), 0.0

    def look(step: int) -> None:
        nonlocal lost
        if step % EVERY:
            return
        paused = time.perf_counter()
        enough = quality(judged(), task) >= goal
        lost += time.perf_counter() - paused
        if enough:
            raise Reached

    stages[0].after_step = look
    try:
        Engine(None, EngineConfig(progress=False, log_every=1000), seed=seed).run(method, stages)
    except Reached:
        return time.perf_counter() - began - lost
    return float("inf")


def measure(rounds: int = 3, steps: int = STEPS) -> dict[str, float]:
    """The median over rounds of seconds by distillation / seconds on pictures, both to the PSNR that the latter ends with.

    The teacher's own training counts for neither: it is there, as the pictures are. The rival learns at the better of its usual rate and half
    of it, by the quality of the first round.
    """
    task = analytic("spheres_box")
    teacher = reference_field(task, "hash", steps=1000, progress=False)

    def scratch(lr: float, seed: int) -> tuple[VolumeField, float]:
        seed_everything(seed)
        field = heir(teacher, "mlp", DEEP)
        training = FieldTraining(field, task.background, steps=steps, lr=lr)
        began = time.perf_counter()
        Engine(None, EngineConfig(progress=False, log_every=1000), seed=seed).run(training, training.stages(task.train))
        return field, time.perf_counter() - began

    rates = (2e-3, 1e-3)
    best = max(rates, key=lambda lr: quality(scratch(lr, 100)[0], task))
    ratios = []
    for seed in range(rounds):
        field, spent = scratch(best, seed)
        seed_everything(seed)
        pvd = PVD(teacher, heir(teacher, "mlp", DEEP), task.train.cameras, steps=steps, seed=seed)
        ratios.append(until(pvd, None, lambda made=pvd: made.result, task, quality(field, task), seed) / spent)  # type: ignore[misc]
    return {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": ALLOWED}


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(measure())
