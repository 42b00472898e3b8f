"""Does the score of a generator's own samples keep one-step distillation from collapsing, where no image is seen?

Digits; a class-conditional teacher in EDM form, guided by 1.5, and a student that starts from its weights, asked once at noise 2.5. With the score
(SwiftBrush) and without it (score distillation sampling, SDS): 500 updates each from the same weights and noise, at the same rate, each at the best
of the same two weights of the score difference by the Fréchet distance to validation digits. Neither sees a digit in training.

Two references are not trained: the teacher in one step, from where both start, and in 18 steps of Heun. A full copy of the teacher in the place of the
adapters is the control of their rank. In the plane, with the exact teacher of a ring of eight modes and students with random weights, the
modes that samples reach are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.samplers import common
from limbeck.core.data import mix_seed
from limbeck.core.seeding import seed_everything
from limbeck.diffusion.samplers import Sampler
from limbeck.methods.samplers.swiftbrush import SwiftBrush
from limbeck.tasks.diffusion_teachers import fresh_denoiser, reference_schedule

STEPS, RING_STEPS = 500, 1000
GUIDANCE = 1.5
RANK = 8
WEIGHTS = ({"weight": "sigma2"}, {"weight": "dmd"})
RING_NETWORK = "mlp-w64-b2"


def claim(data_root: str | None = None) -> Claim:
    """The digits: 1,000 training, 297 validation and 500 test images, of which training sees the labels only; the ring."""
    on = common.task("digits")

    def trained(fake: str) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            config = {"steps": STEPS, "guidance": GUIDANCE, "rank": RANK, "fake": fake, **chosen}
            made = common.run(common.build("swiftbrush", on, common.teacher(on, "edm"), seed, config), on, seed)
            extra = 0 if made.fake is None else sum(p.numel() for p in made.fake.parameters())
            share = extra / sum(p.numel() for p in made.teacher.parameters())
            return common.worth(made.sampler(), on, seed, more={"trained_share_of_teacher": share})

        return train

    def reference(steps: int | None) -> Callable[[Mapping[str, Any], int], Outcome]:
        def measure(chosen: Mapping[str, Any], seed: int) -> Outcome:
            teacher = common.teacher(on, "edm")
            made = Sampler.one_step(teacher) if steps is None else Sampler.ode(teacher, steps, "heun", GUIDANCE)
            return common.worth(made, on, seed, tuned=False)

        return measure

    return Claim(
        name="swiftbrush",
        arms={
            "swiftbrush": Arm("method", f"adapters of rank {RANK} on the teacher", trained("lora"), WEIGHTS),
            "sds": Arm("baseline", "score distillation sampling: no second score", trained("none"), WEIGHTS),
            "full copy": Arm("control", "a trained copy of the teacher in the place of adapters", trained("copy")),
            "teacher, one step": Arm(
                "control", "the teacher itself in one step: where training starts", reference(None)
            ),
            "teacher, 18 steps": Arm("control", "the teacher in 18 steps of Heun, guided", reference(18)),
            "ring": Arm("control", "the ring, with a second score", on_ring("copy")),
            "ring, sds": Arm("control", "the ring, without", on_ring("none")),
        },
        checks=[
            Check(
                "its one-step samples are at a quarter of the distance to data of those without the second score, or nearer",
                "swiftbrush",
                "sds",
                "log_frechet_pixels",
                margin=math.log(4),
                higher_is_better=False,
            ),
            Check(
                "and at a quarter of the distance of the teacher's own one-step samples, or nearer",
                "swiftbrush",
                "teacher, one step",
                "log_frechet_pixels",
                margin=math.log(4),
                higher_is_better=False,
            ),
            Check(
                "adapters are at no more than twice the distance that a full copy reaches",
                "swiftbrush",
                "full copy",
                "log_frechet_pixels",
                margin=-math.log(2),
                higher_is_better=False,
                headline=False,
            ),
            Check(
                "samples are of the class asked for as often as the teacher's in 18 steps, up to 3 points",
                "swiftbrush",
                "teacher, 18 steps",
                "condition_agreement",
                margin=-0.03,
                headline=False,
            ),
            Check(
                "it covers more of the data than without the second score",
                "swiftbrush",
                "sds",
                "coverage",
                margin=0.1,
                headline=False,
            ),
            Check(
                "it comes within twice the distance of the teacher in 18 steps",
                "swiftbrush",
                "teacher, 18 steps",
                "log_frechet_pixels",
                margin=-math.log(2),
                higher_is_better=False,
                headline=False,
            ),
            Check(
                "on the ring it reaches four modes more than without the second score",
                "ring",
                "ring, sds",
                "modes",
                margin=4,
                headline=False,
            ),
        ],
        data=on.describe(),
        seeds=5,
        select="-log_frechet_pixels",
        note="Small networks on 8x8 images; labels stand for prompts. The text-to-image scale of the paper was not run.",
        settings={
            "steps": STEPS,
            "guidance": GUIDANCE,
            "rank": RANK,
            "weights": [w["weight"] for w in WEIGHTS],
            "ring_steps": RING_STEPS,
        },
    )


def on_ring(fake: str) -> Callable[[Mapping[str, Any], int], Outcome]:
    """The ring of eight modes with its exact teacher; student and fake network start from random weights, and nothing is conditional."""

    def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
        on, schedule = common.task("ring"), reference_schedule("edm")
        seed_everything(mix_seed(seed, 41))
        student, online = (fresh_denoiser(on, schedule, None, RING_NETWORK, classes=False) for _ in range(2))
        config = SwiftBrush.Config.make(steps=RING_STEPS, guidance=1.0, weight="dmd", fake=fake)
        made = SwiftBrush(
            on.exact_teacher(schedule),
            None,
            student,
            config,
            shape=on.shape,
            seed=seed,
            fake_denoiser=online if fake == "copy" else None,
        )
        return common.worth(common.run(made, on, seed).sampler(), on, seed, tuned=False)

    return train
