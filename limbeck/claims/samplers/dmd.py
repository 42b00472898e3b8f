"""Does one step need both: matching distributions, and regression on the teacher's pairs?

Digits; a class-conditional teacher in EDM form, guided by 1.5, and a student for which its map from noise to digits is hard: a network of 20 thousand
parameters (a fifteenth of the teacher's) with random weights, asked once at noise 2.5. Every arm makes 800 updates from the same weights, those with pairs
see the same 2,000 (10 steps of Heun), and each is at the best of the same learning rates by the Fréchet distance in a classifier's features to
validation digits. Regression alone sees as many samples in an update (192 pairs) as the method (128 fresh ones and 64 pairs).

A student of the teacher's size that starts from its weights learns the pairs within a few dozen updates: regression alone is hard to beat there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.samplers import common
from limbeck.diffusion.samplers import Sampler

STEPS = 800
STUDENT = "mlp-w48-b1"
PAIRS = 2000
SOLVER_STEPS = 10
GUIDANCE = 1.5
RATES = ({"lr": 1e-3}, {"lr": 2e-3})
REGRESSION = 2.0  # squared errors of pixels are smaller than LPIPS, which the paper weighs with 0.25


def claim(data_root: str | None = None) -> Claim:
    """The digits: 1,000 training, 297 validation and 500 test images; the method sees labels only."""
    on = common.task("digits")

    def fine(steps: int = SOLVER_STEPS) -> Sampler:
        return Sampler.ode(common.teacher(on, "edm"), steps, "heun", GUIDANCE)

    def trained(**settings: Any) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            config = {
                "steps": STEPS,
                "pairs": PAIRS,
                "guidance": GUIDANCE,
                "regression": REGRESSION,
                "teacher_nfe": SOLVER_STEPS,
                "teacher_solver": "heun",
                **settings,
                **chosen,
            }
            student = common.fresh(on, "edm", STUDENT, seed)
            made = common.build("dmd", on, common.teacher(on, "edm"), seed, config, student)
            sampler = common.run(made, on, seed).sampler()
            pairs = common.measures(sampler, on, seed, "test", fine=fine(), count=500)
            return common.worth(sampler, on, seed, more={k: pairs[k] for k in ("paired_mse", "log_paired_mse")})

        return train

    def many_steps(chosen: Mapping[str, Any], seed: int) -> Outcome:
        return common.worth(fine(18), on, seed, tuned=False)

    return Claim(
        name="dmd",
        arms={
            "dmd": Arm("method", "both terms", trained(), RATES),
            "regression": Arm(
                "baseline",
                "regression on the pairs alone",
                trained(matching=0.0, fake="none", regression=1.0, regression_batch=192),
                RATES,
            ),
            "matching": Arm("control", "the score difference alone, without pairs", trained(regression=0.0), RATES),
            "teacher, 18 steps": Arm("control", "the teacher in 18 steps of Heun, guided", many_steps),
        },
        checks=[
            Check(
                "its one-step samples are nearer to data (classifier features) than those of regression, by a tenth at least",
                "dmd",
                "regression",
                "log_frechet_features",
                margin=-math.log(0.9),
                higher_is_better=False,
            ),
            Check(
                "and at three quarters of the distance of matching alone, or nearer",
                "dmd",
                "matching",
                "log_frechet_features",
                margin=math.log(4 / 3),
                higher_is_better=False,
            ),
            Check(
                "regression brings it nearer to the teacher's solution from the same noise",
                "dmd",
                "matching",
                "log_paired_mse",
                higher_is_better=False,
                headline=False,
            ),
            Check(
                "samples are more often of the class asked for than those of regression",
                "dmd",
                "regression",
                "condition_agreement",
                headline=False,
            ),
            Check(
                "it is nearer to data in pixels than regression",
                "dmd",
                "regression",
                "log_frechet_pixels",
                higher_is_better=False,
                headline=False,
            ),
        ],
        data=on.describe(),
        seeds=4,
        select="-log_frechet_features",
        note="Small networks on 8x8 images; squared error in the place of LPIPS. The paper's image sets were not run.",
        settings={
            "student": STUDENT,
            "steps": STEPS,
            "regression": REGRESSION,
            "pairs": PAIRS,
            "solver_steps": SOLVER_STEPS,
            "guidance": GUIDANCE,
            "rates": [r["lr"] for r in RATES],
        },
    )
