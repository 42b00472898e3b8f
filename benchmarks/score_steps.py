"""A step of score distillation against the bare passes that its equations need, and one step of sampling against twenty-five."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import catalogue
from limbeck.core.allocator import keep_freed_memory
from limbeck.core.batch import Batch, Losses
from limbeck.diffusion.denoisers import Denoiser, params_frozen
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM
from limbeck.networks.diffusion_mlp import DiffusionMLP

ALLOWED_STEP, ALLOWED_SAMPLING = 1.1, 0.05
SHAPE, BATCH, CLASSES = (3, 16, 16), 256, 10


def denoiser() -> Denoiser:
    """A class-conditional teacher of three million parameters."""
    torch.manual_seed(0)
    network = DiffusionMLP(SHAPE, width=512, blocks=4, num_classes=CLASSES, time_scale=1.0)
    nn.init.normal_(network.last.weight, std=0.02)
    return Denoiser(network, EDM(0.02, 20.0), "x0", precond="edm", null_cond=torch.tensor(CLASSES))


class Plain:
    """What the engine gives a step: optimisers to step."""

    def __init__(self, optimisers: Mapping[str, Any]) -> None:
        self.optimisers, self.step = optimisers, 0

    def minimise(self, losses: Losses | Tensor, *names: str) -> None:
        total = losses.total if isinstance(losses, Losses) else losses
        for name in names:
            self.optimisers[name].optimizer.zero_grad(set_to_none=True)
        total.backward()
        for name in names:
            made = self.optimisers[name]
            if made.clip is not None:
                torch.nn.utils.clip_grad_norm_(made.parameters(), made.clip)
            made.optimizer.step()


def steps(method: str) -> dict[str, Callable[[], None]]:
    """One step of the method, and the same number of passes through networks of the same kind by hand.

    Student: forward and backward. SwiftBrush: the guided teacher and the guided fake network forward, without gradients; then the fake network forward
    and backward to its adapters. SIM: both networks forward and backward to their inputs (the teacher guided); then samples of the student,
    and the fake network forward and backward.
    """
    labels = torch.arange(BATCH) % CLASSES
    cls: Any = catalogue.get(method).load()
    made = cls(denoiser(), labels, guidance=1.5, batch_size=BATCH)
    stepper = Plain(made.score_optimisers(1000))
    batch = Batch({"cond": labels})
    other = cls(denoiser(), labels, guidance=1.5, batch_size=BATCH)
    bare = Plain(other.score_optimisers(1000))
    student, teacher, fake = other.student.module, other.teacher.module, other.fake.module
    x = torch.randn(BATCH, *SHAPE)
    time_ = torch.zeros(BATCH)
    twice = (torch.cat([x, x]), torch.cat([time_, time_]), torch.cat([labels, labels]))

    def passes() -> None:
        sample = student(x, time_, labels)
        if method == "swiftbrush":
            with torch.no_grad():
                teacher(*twice)
                fake(*twice)
            loss = sample.square().sum()
        else:
            with params_frozen(fake):
                loss = (
                    teacher(torch.cat([sample, sample]), twice[1], twice[2]).sum() + fake(sample, time_, labels).sum()
                )
        bare.minimise(loss, "student")
        if method == "sim":
            with torch.no_grad():
                student(x, time_, labels)
        with other.adapted():
            bare.minimise(fake(x, time_, labels).square().sum(), "fake")

    def step() -> None:
        made.update(batch, stepper)

    return {"method": step, "passes": passes}


def sampling() -> dict[str, Callable[[], None]]:
    """One step of a student, and 25 of its teacher, of one size."""
    teacher = denoiser()
    one, many = Sampler.one_step(teacher), Sampler.ode(teacher, 25, "dpm2m")
    z, labels = torch.randn(BATCH, *SHAPE), torch.arange(BATCH) % CLASSES
    return {"method": lambda: _sample(one, z, labels), "passes": lambda: _sample(many, z, labels)}


def _sample(sampler: Sampler, z: Tensor, labels: Tensor) -> None:
    sampler.sample(z, labels)


def measure(
    ways: Mapping[str, Callable[[], None]], allowed: float, rounds: int = 7, repeats: int = 6
) -> dict[str, float]:
    """The median over rounds of method / passes, both in every round, in turn first."""
    keep_freed_memory()  # as the engine does: page faults would be counted for whoever allocates more
    ratios = []
    for number in range(rounds + 1):
        spent = {}
        for name in ("method", "passes")[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            for _ in range(repeats):
                ways[name]()
            spent[name] = time.perf_counter() - began
        if number:  # the first round warms up
            ratios.append(spent["method"] / spent["passes"])
    return {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": allowed}
