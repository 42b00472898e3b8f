"""Does a small student gain from a teacher's softened probabilities, over the same student trained on labels alone?

Few labelled images, so that there is something to gain; equal updates, batch size and augmentation; learning rate chosen on
validation data from the same list for both, temperature and weight from two more candidates each for neither: they are fixed
beforehand to the usual values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.models import common

RATES = ({"lr": 2e-3}, {"lr": 5e-3}, {"lr": 1e-2})
STEPS = 1200


def claim(data_root: str | None = None) -> Claim:
    """MNIST with 1,000 training images where it is given, else all 1,000 digits; a 0.9 k-parameter student."""
    on_mnist = common.available("mnist", data_root)
    on = common.task(data_root, "mnist", 1000) if on_mnist else common.task(None, "digits", 300)
    setup = (
        {"student": "cnn-w4-s3", "teacher_epochs": 60.0}
        if on_mnist
        else {"student": "cnn-w4-s2", "teacher_epochs": 60.0}
    )

    def alone(settings: Mapping[str, Any], seed: int) -> Outcome:
        return common.train("supervised", on, {"steps": STEPS, **settings}, seed, student=setup["student"])

    def distilled(settings: Mapping[str, Any], seed: int) -> Outcome:
        return common.train("kd", on, {"steps": STEPS, **settings}, seed, **setup)

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
        settings={"steps": STEPS, **setup},
    )
