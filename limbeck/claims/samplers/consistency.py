"""Does a consistency model make better samples in one and two steps than its teacher does in as few?

Digits, a flow teacher without guidance, whose middle time in two steps is the best of four on validation digits (the student's is 1/2). The student starts from the teacher; every trained arm has as many updates, and chooses among the same
learning rates by the Fréchet distance in a classifier's features to validation digits. Plain regression of the teacher's ends on its noise (8,000
pairs, made before) is recorded and no part of the verdict. The baseline of the family: methods that claim more are compared with it in their
own claims. Both published recipes are run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.samplers import common
from limbeck.diffusion.samplers import Sampler

STEPS = 1200
RATES = ({"lr": 5e-4}, {"lr": 2e-3})
MIDDLES = ({"middle": 0.35}, {"middle": 0.5}, {"middle": 0.65}, {"middle": 0.8})
BASE = {"steps": STEPS, "batch_size": 128}
_KEPT = (
    "frechet_features",
    "log_frechet_features",
    "frechet_pixels",
    "coverage",
    "condition_agreement",
    "paired_mse",
    "nfe",
)


def claim(data_root: str | None = None) -> Claim:
    """The digits: 1,000 training, 297 validation and 500 test images."""
    on = common.task("digits")

    def judged(samplers: Mapping[int, Sampler], seed: int) -> Outcome:
        fine = Sampler.ode(common.teacher(on), 64, "ddim")
        parts: dict[str, dict[str, float]] = {"val": {}, "test": {}}
        for part, found in parts.items():
            for k, sampler in samplers.items():
                values = common.measures(sampler, on, seed, part, fine=fine)
                found |= {f"{name}_{k}": values[name] for name in _KEPT}
            found["log_frechet"] = sum(found[f"log_frechet_features_{k}"] for k in samplers) / len(samplers)
        return Outcome(parts["val"], parts["test"])

    def consistency(**settings: Any) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            made = common.build("consistency", on, common.teacher(on), seed, {**BASE, **settings, **chosen})
            common.run(made, on, seed)
            return judged({k: made.sampler(k) for k in (1, 2)}, seed)

        return train

    def regression(chosen: Mapping[str, Any], seed: int) -> Outcome:
        # Without reflow the updates of both stages go to distillation.
        config = {"steps": 1, "distil_steps": STEPS - 1, "direct": True, "pairs": 8000, "batch_size": 128, **chosen}
        made = common.build("instaflow", on, common.teacher(on), seed, config)
        one = common.run(made, on, seed).sampler()
        return judged({1: one}, seed)

    def untrained(chosen: Mapping[str, Any], seed: int) -> Outcome:
        known = common.teacher(on)
        two = Sampler(known, torch.tensor([1.0, chosen["middle"], 0.0], dtype=torch.float64))
        return judged({1: Sampler.ode(known, 1, "ddim"), 2: two, 8: Sampler.ode(known, 8, "ddim")}, seed)

    def better(words: str, baseline: str, metric: str, factor: float = 1.0, headline: bool = True) -> Check:
        return Check(words, "cm", baseline, metric, math.log(factor), higher_is_better=False, headline=headline)

    return Claim(
        name="consistency",
        arms={
            "cm": Arm("method", "consistency distillation: 18 points, Heun", consistency(), RATES),
            "lcm": Arm("method", "the latent recipe: 64 points, DDIM, jumps over 4", consistency(form="lcm"), RATES),
            "regression": Arm(
                "baseline", "regression of the teacher's ends on its noise, as many updates", regression, RATES
            ),
            "teacher": Arm(
                "baseline",
                "the teacher in as few steps of DDIM, two of them by the best middle time",
                untrained,
                MIDDLES,
            ),
            "no average": Arm(
                "control", "the target is the student itself, not its slow average", consistency(target_ema=0.0)
            ),
        },
        checks=[
            better(
                "in one step it is at half the teacher's distance to data (classifier features), or nearer",
                "teacher",
                "log_frechet_features_1",
                2.0,
            ),
            better(
                "in two steps it is at two thirds of the teacher's distance, or nearer",
                "teacher",
                "log_frechet_features_2",
                1.5,
            ),
            better(
                "in one step it is nearer to data than regression on pairs",
                "regression",
                "log_frechet_features_1",
                1.0,
                False,
            ),
            better("the slow average helps", "no average", "log_frechet_features_1", 1.0, False),
            better(
                "it is nearer to data than the latent recipe in one step", "lcm", "log_frechet_features_1", 1.0, False
            ),
            Check(
                "the latent recipe, too, is at half the teacher's distance in one step, or nearer",
                "lcm",
                "teacher",
                "log_frechet_features_1",
                math.log(2),
                higher_is_better=False,
                headline=False,
            ),
            Check("one step keeps the class", "cm", "teacher", "condition_agreement_1", headline=False),
        ],
        data=on.describe(),
        seeds=3,
        select="-log_frechet",
        note="Small networks on 8x8 images, without a perceptual metric; the image sets of the papers were not run.",
        settings={**BASE, "rates": [r["lr"] for r in RATES], "middles": [m["middle"] for m in MIDDLES]},
    )
