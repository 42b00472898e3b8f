"""Does matching attention in all layers give better synthetic images than matching the last representation alone?

Digits, one and five images per class, as the method's specification asks for: equal numbers of steps, real batches and
augmentation in all arms, networks of three blocks. The learning rate of the images is chosen among the same three for distribution
matching and for DataDAM, on validation data and seeds of their own. The exponent of the attention maps is fixed at 1 for the
headline, from the specification's pilot; 4, the value of the paper's table, and attention without the last representation are
reported at DataDAM's default rate. Networks are judged alike: the best of three learning rates on validation data, for every arm.

A first measurement, with networks half as wide, half the real images in a batch, and learning rates of the networks up to 0.1 (which
was chosen nearly always), found +8.6 points [+4.2, +11.1] over distribution matching at one image per class, and +2.6 [-1.7, +5.1] at
five: undecided. It was made so for speed; this is the width and the batch that the specification asks for, with rates up to 0.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.datasets import common
from limbeck.methods.datasets.base import network_factory

NETWORK = "convnet-w32-d3"
STEPS = 300
JUDGES = (0.03, 0.1, 0.3)
"""Learning rates of the networks to choose from."""
RATES = [{"lr_images": r} for r in (0.3, 1.0, 3.0)]


def claim(data_root: str | None = None) -> Claim:
    """The digits: 1,000 training, 297 validation and 500 test images."""
    on = common.task(None, "digits", None)
    factory = network_factory(NETWORK, on.in_shape, on.num_classes)

    def matched(method: str, ipc: int, **settings: Any) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            config = {"ipc": ipc, "steps": STEPS, **settings, **chosen}
            made = common.distil(method, on, config, seed, network=NETWORK)
            return common.worth(made.distilled(), on, factory, seed, rates=JUDGES)

        return train

    def drawn(ipc: int) -> Callable[[Mapping[str, Any], int], Outcome]:
        return lambda chosen, seed: common.worth(
            common.chosen_at_random(on, factory, ipc, seed), on, factory, seed, rates=JUDGES
        )

    arms, checks = {}, []
    for ipc in (1, 5):
        dam = f"datadam, {ipc}"
        arms[dam] = Arm(
            "method", f"attention (p = 1) and last representation, {ipc} per class", matched("datadam", ipc), RATES
        )
        arms[f"dm, {ipc}"] = Arm(
            "baseline", f"the last representation alone, {ipc} per class", matched("dm", ipc), RATES
        )
        arms[f"random, {ipc}"] = Arm("control", f"random real images, {ipc} per class", drawn(ipc))
        arms[f"attention, {ipc}"] = Arm(
            "control", f"attention alone, {ipc} per class", matched("datadam", ipc, lambda_mmd=0.0)
        )
        arms[f"power 4, {ipc}"] = Arm(
            "control", f"as DataDAM, p = 4, {ipc} per class", matched("datadam", ipc, power=4.0)
        )
        checks += [
            Check(f"with {ipc} per class it beats distribution matching", dam, f"dm, {ipc}", "accuracy"),
            Check(f"with {ipc} per class it beats random real images", dam, f"random, {ipc}", "accuracy"),
            Check(
                f"the last representation adds to attention, {ipc} per class",
                dam,
                f"attention, {ipc}",
                "accuracy",
                headline=False,
            ),
            Check(f"p = 1 beats p = 4, {ipc} per class", dam, f"power 4, {ipc}", "accuracy", headline=False),
        ]
    return Claim(
        name="datadam",
        arms=arms,
        checks=checks,
        data=on.describe(),
        seeds=4,
        note=(
            "A first measurement with smaller networks and batches was undecided at five images per class (+2.6 points [-1.7, +5.1]); "
            "this one has the sizes that were asked for. Small networks on 8x8 images; the paper's image sets were not run."
        ),
        settings={"steps": STEPS, "network": NETWORK, "rates": JUDGES},
    )
