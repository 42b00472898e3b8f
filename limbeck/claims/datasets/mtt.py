"""Do images that lead a network where real training leads it train better networks than as many random real images?

The least that trajectory matching must do. Digits, one and ten images per class; the experts of every seed are its own. Settings are
fixed beforehand, those of the small-scale defaults, so the method has nothing to choose; random selection, which has nothing either,
is also drawn three times with one image per class, and the best draw on validation data counts (``best of three``). Learning rates
of the networks are chosen on validation data for every arm by itself, from the same list and the rate that came with the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.datasets import common
from limbeck.methods.datasets.base import network_factory

NETWORK = "convnet-w16-d2"
STEPS = 150
EXPERTS = {"expert_count": 5, "expert_epochs": 20}
IMAGE_RATES = {1: 3.0, 10: 10.0}  # more images share the gradient of one distance


def claim(data_root: str | None = None) -> Claim:
    """The digits: 1,000 training, 297 validation and 500 test images."""
    on = common.task(None, "digits", None)
    factory = network_factory(NETWORK, on.in_shape, on.num_classes)

    def matched(ipc: int) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            settings = {"ipc": ipc, "steps": STEPS, "expert_seed": seed, "lr_images": IMAGE_RATES[ipc], **EXPERTS}
            made = common.distil("mtt", on, settings, seed, network=NETWORK)
            distance = sum(float(made.match(STEPS + n).loss) for n in range(10)) / 10
            learnt = float(made.step_size.detach())
            return common.worth(made.distilled(), on, factory, seed, distance=distance, learnt_step_size=learnt)

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
    for ipc in (1, 10):
        arms[f"mtt, {ipc}"] = Arm("method", f"trajectory matching, {ipc} per class", matched(ipc))
        arms[f"random, {ipc}"] = Arm("baseline", f"random real images, {ipc} per class", drawn(ipc, 1))
        words = f"with {ipc} per class it beats random real images"
        checks.append(Check(words, f"mtt, {ipc}", f"random, {ipc}", "accuracy"))
    arms["best of three, 1"] = Arm("baseline", "the best of three random draws, 1 per class", drawn(1, 3))
    words = "with 1 per class it beats the best of three random draws"
    checks.append(Check(words, "mtt, 1", "best of three, 1", "accuracy", headline=False))
    return Claim(
        name="mtt",
        arms=arms,
        checks=checks,
        data=on.describe(),
        seeds=4,
        note=note,
        settings={"steps": STEPS, "network": NETWORK, "rates": common.RATES, "lr_images": IMAGE_RATES, **EXPERTS},
    )


def note(result: Mapping[str, Any]) -> str:
    """How near training on the images comes to the experts."""
    means = {ipc: sum(v := result["arms"][f"mtt, {ipc}"]["metrics"]["distance"]) / len(v) for ipc in (1, 10)}
    return (
        f"In the end, training on the images misses an expert's next point by {means[1]:.0%} (1 per class) and {means[10]:.0%} "
        "(10 per class) of the squared length of the segment. Small networks on 8x8 images; the paper's image sets were not run."
    )
