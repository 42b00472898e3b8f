"""Do synthetic images whose mean features match train better networks than as many random real images?

The least that a method of dataset distillation must do. Digits, one and ten images per class. Nothing is tuned: the learning rate
of the images is the published 1. Random selection is also drawn three times, and the draw that is best on validation data counts
(``best of three``). Learning rates of the networks are chosen on validation data for every arm by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.datasets import common
from limbeck.methods.datasets.base import network_factory

NETWORK = "convnet-w16-d2"
STEPS = 300


def claim(data_root: str | None = None) -> Claim:
    """The digits: 1,000 training, 297 validation and 500 test images."""
    on = common.task(None, "digits", None)
    factory = network_factory(NETWORK, on.in_shape, on.num_classes)

    def matched(ipc: int) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            settings = {"ipc": ipc, "steps": STEPS, "batch_real": 32, **chosen}
            made = common.distil("dm", on, settings, seed, network=NETWORK)
            return common.worth(made.distilled(), on, factory, seed)

        return train

    def drawn(ipc: int, draws: int) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            found = []
            for draw in range(draws):
                made = common.chosen_at_random(on, factory, ipc, seed * 10 + draw)
                found.append(common.worth(made, on, factory, seed))
            return max(found, key=lambda outcome: outcome.val["accuracy"])

        return train

    arms = {}
    checks = []
    for ipc in (10, 1):
        arms[f"dm, {ipc}"] = Arm("method", f"distribution matching, {ipc} per class", matched(ipc))
        arms[f"random, {ipc}"] = Arm("baseline", f"random real images, {ipc} per class", drawn(ipc, 1))
        arms[f"best of three, {ipc}"] = Arm(
            "control", f"the best of three random draws, {ipc} per class", drawn(ipc, 3)
        )
        for name, words in (("random", "random real images"), ("best of three", "the best of three random draws")):
            checks.append(
                Check(
                    f"with {ipc} per class it beats {words}",
                    f"dm, {ipc}",
                    f"{name}, {ipc}",
                    "accuracy",
                    headline=name == "random",
                )
            )
    return Claim(
        name="dm",
        arms=arms,
        checks=checks,
        data=on.describe(),
        seeds=4,
        note="Small networks on 8x8 images; the paper's image sets were not run.",
        settings={"steps": STEPS, "network": NETWORK, "batch_real": 32, "rates": common.RATES},
    )
