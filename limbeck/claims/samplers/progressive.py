"""Does halving the steps again and again keep what the teacher makes in 32 steps?

Digits; a teacher with a cosine schedule that predicts v. Two steps: four rounds (16, 8, 4, 2), against the teacher itself in two DDIM steps, whose middle time is
the best of four (the student's is 1/2). One step: five rounds, against regression of the teacher's ends in 32 steps from their noise, with as many updates.
Students and regression choose between the same two learning rates. Everything is chosen by the Fréchet distance in a classifier's features to
validation digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.samplers import common
from limbeck.diffusion.samplers import Sampler

START = 32
UPDATES = {2: 1400, 1: 1600}
PAIRS = 4096
RATES = ({"lr": 5e-4}, {"lr": 2e-3})
MIDDLES = ({"middle": 0.35}, {"middle": 0.5}, {"middle": 0.65}, {"middle": 0.8})
SCHEDULE = "vp-cosine"


def claim(data_root: str | None = None) -> Claim:
    """The digits: 1,000 training, 297 validation and 500 test images."""
    on = common.task("digits")

    def outcome(sampler: Sampler, seed: int, *, tuned: bool = True, **more: float) -> Outcome:
        fine = Sampler.ode(common.teacher(on, SCHEDULE), START, "ddim")
        return common.worth(sampler, on, seed, fine=fine, tuned=tuned, more=more)

    def halved(steps: int) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            config = {"start_steps": START, "student_steps": steps, "steps": UPDATES[steps], **chosen}
            made = common.run(common.build("progressive", on, common.teacher(on, SCHEDULE), seed, config), on, seed)
            evaluations = float(made.counters["teacher_evaluations"])
            return outcome(made.sampler(), seed, teacher_evaluations=evaluations)

        return train

    def teacher(steps: int) -> Callable[[Mapping[str, Any], int], Outcome]:
        def sample(chosen: Mapping[str, Any], seed: int) -> Outcome:
            return outcome(Sampler.ode(common.teacher(on, SCHEDULE), steps, "ddim"), seed, tuned=False)

        return sample

    def two_steps(chosen: Mapping[str, Any], seed: int) -> Outcome:
        times = torch.tensor([1.0, chosen["middle"], 0.0], dtype=torch.float64)
        return outcome(Sampler(common.teacher(on, SCHEDULE), times), seed)

    def regressed(chosen: Mapping[str, Any], seed: int) -> Outcome:
        config = {
            "direct": True,
            "steps": UPDATES[1] // 2,
            "distil_steps": UPDATES[1] - UPDATES[1] // 2,
            "pairs": PAIRS,
            "teacher_nfe": START,
            "teacher_solver": "ddim",
            "ema": 0.99,
            **chosen,
        }
        made = common.run(common.build("instaflow", on, common.teacher(on, SCHEDULE), seed, config), on, seed)
        return outcome(made.sampler(), seed, teacher_evaluations=float(PAIRS * START))

    return Claim(
        name="progressive",
        arms={
            "progressive, 2": Arm("method", f"from {START} to 2 steps, {UPDATES[2]} updates", halved(2), RATES),
            "teacher, 2": Arm("baseline", "the teacher in 2 DDIM steps, by the best middle time", two_steps, MIDDLES),
            "progressive, 1": Arm("method", f"from {START} steps to 1, {UPDATES[1]} updates", halved(1), RATES),
            "regression, 1": Arm(
                "baseline", f"one step regressed to the ends of {START} steps, {UPDATES[1]} updates", regressed, RATES
            ),
            "teacher, 1": Arm("control", "the teacher in one step", teacher(1)),
            f"teacher, {START}": Arm("control", f"the teacher in {START} DDIM steps", teacher(START)),
        },
        checks=[
            Check(
                "in two steps the student's samples are at three quarters of the teacher's distance to data (classifier features), or nearer",
                "progressive, 2",
                "teacher, 2",
                "log_frechet_features",
                margin=math.log(4 / 3),
                higher_is_better=False,
            ),
            Check(
                f"in two steps they are at most half as far again from data as the teacher's in {START}",
                "progressive, 2",
                f"teacher, {START}",
                "log_frechet_features",
                margin=-math.log(1.5),
                higher_is_better=False,
            ),
            Check(
                f"in two steps they are nearer to the teacher's samples of {START} steps from the same noise",
                "progressive, 2",
                "teacher, 2",
                "log_paired_mse",
                higher_is_better=False,
                headline=False,
            ),
            Check(
                "in one step they are at most a tenth farther from data than those of regression with as many updates",
                "progressive, 1",
                "regression, 1",
                "log_frechet_features",
                margin=-math.log(1.1),
                higher_is_better=False,
                headline=False,
            ),
            Check(
                "in one step they are at half of the teacher's distance to data, or nearer",
                "progressive, 1",
                "teacher, 1",
                "log_frechet_features",
                margin=math.log(2),
                higher_is_better=False,
                headline=False,
            ),
        ],
        data=on.describe(),
        seeds=3,
        select="-log_frechet_features",
        note="Small networks on 8x8 images. Halving asks the teacher twice per sample and update, which is recorded; regression makes its pairs once.",
        settings={
            "start": START,
            "updates": UPDATES,
            "pairs": PAIRS,
            "rates": [r["lr"] for r in RATES],
            "middles": [m["middle"] for m in MIDDLES],
        },
    )
