"""Does a field that sees nothing but the scores of a 2-D diffusion model come to look like that model's pictures?

Voxels 24^3 under a small network that was trained on 16x16 renders of four scenes and is asked for one of them. Renders from 24 cameras are compared with
the pictures of that scene which the network was trained on, beside the field it started from and one that was asked for another scene.
The baseline of the family: methods that claim more are compared with it in their own claims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.fields import common
from limbeck.core.data import mix_seed
from limbeck.core.seeding import seed_everything
from limbeck.methods.fields.sds import SDS
from limbeck.tasks.judging_generation import judge_generation
from limbeck.tasks.view_priors import load_prior

SCENE, OTHER = "three_blobs", "split_sphere"
STEPS = 600
GUIDANCE = ({"guidance": 1.0}, {"guidance": 7.5}, {"guidance": 25.0})


def claim(data_root: str | None = None) -> Claim:
    """An analytic scene and a network trained on renders of it."""

    def arm(asked: str, steps: int) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            config = SDS.Config.make(steps=max(1, steps), **chosen)
            setup = SDS.Setup.make(task=asked)
            seed_everything(mix_seed(seed, 37))
            prior = load_prior(setup, setup, progress=False)
            made = SDS(prior, SDS.fresh(setup, config), config, seed=seed)
            made = common.run(made, seed) if steps else made.eval()
            wanted = SDS.Setup.make(task=SCENE)
            judged = judge_generation(made.particles.renderers(), load_prior(wanted, wanted, progress=False), 24, seed)
            found = {k: float(v) for k, v in judged.items()}
            return Outcome(found, common.logs(found))

        return train

    def nearer(words: str, baseline: str, factor: float) -> Check:
        return Check(words, "sds", baseline, "log_nearest_distance", math.log(factor), higher_is_better=False)

    return Claim(
        name="sds",
        arms={
            "sds": Arm("method", f"asked for {SCENE}", arm(SCENE, STEPS), GUIDANCE),
            "untrained": Arm("control", "the field it starts from", arm(SCENE, 0)),
            "other": Arm("baseline", f"asked for {OTHER}", arm(OTHER, STEPS), GUIDANCE),
        },
        checks=[
            nearer(
                "renders are at two thirds of the start's distance to the network's pictures, or nearer",
                "untrained",
                1.5,
            ),
            nearer("and nearer than those of a field that was asked for another scene", "other", 1.0),
        ],
        data={"name": SCENE, "source": "analytic scene", "prior": "a network trained on renders of four scenes"},
        seeds=3,
        select="-nearest_distance",
        note="Guidance is chosen by the distance to the network's own pictures on tuning seeds; there is no data to overfit.",
        settings={"steps": STEPS, "guidance": [g["guidance"] for g in GUIDANCE]},
    )
