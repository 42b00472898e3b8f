"""Does a small student gain from a teacher's softened probabilities, over the same student trained on labels alone?

Few labelled images, so that there is something to gain; both arms get the same updates, batches, augmentation and initial
weights. The learning rate of each is chosen from the same list on validation data; temperature 4 and weight 0.9 are fixed
beforehand to the usual values, so the method has no candidate that the baseline lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.models import common
from limbeck.tasks.base import Task
from limbeck.tasks.teachers import reference_teacher

RATES = ({"lr": 2e-3}, {"lr": 5e-3}, {"lr": 1e-2})
STEPS = 2000
SETUP: dict[str, Any] = {"student": "mlp-32-32", "teacher": ("mlp-256-256",), "teacher_epochs": 200.0}


def claim(data_root: str | None = None) -> Claim:
    """1,000 training images of MNIST where it is given, else 300 of the digits, with random shifts."""
    on_mnist = common.available("mnist", data_root)
    on = common.task(data_root, "mnist", 1000) if on_mnist else common.task(None, "digits", 300)

    def alone(settings: Mapping[str, Any], seed: int) -> Outcome:
        return common.train("supervised", on, {"steps": STEPS, **settings}, seed, student=SETUP["student"])

    def distilled(settings: Mapping[str, Any], seed: int) -> Outcome:
        return common.train("kd", on, {"steps": STEPS, **settings}, seed, **SETUP)

    return Claim(
        name="kd",
        arms={
            "kd": Arm("method", "KD, temperature 4, weight of the teacher 0.9", distilled, RATES),
            "supervised": Arm("baseline", "the same student on labels alone", alone, RATES),
        },
        checks=[
            Check("the distilled student is more accurate than the student alone", "kd", "supervised", "accuracy"),
            Check("its likelihood is better", "kd", "supervised", "nll", higher_is_better=False, headline=False),
        ],
        data=on.describe(),
        seeds=5,
        note=lambda result: note(result, on),
        settings={"steps": STEPS, **SETUP},
    )


def note(result: Mapping[str, Any], on: Task) -> str:
    """How much the teacher had to give."""
    mean = {arm: sum(v := found["metrics"]["accuracy"]) / len(v) for arm, found in result["arms"].items()}
    teacher = reference_teacher(on, SETUP["teacher"][0], epochs=SETUP["teacher_epochs"], progress=False)
    known = common.measures(teacher, on, "val")["accuracy"]
    return (
        f"Mean test accuracy: distilled {mean['kd']:.1%}, alone {mean['supervised']:.1%}. The teacher, trained on the same images, has "
        f"{known:.1%} on validation data, so there is little to gain. Softened targets (temperature 4) leave the student "
        "under-confident, which costs likelihood; no temperature was fitted afterwards."
    )
