"""Do mirror images in the loss help where classes are symmetric, and only there?

The premise is made to hold: every digit, for training and for testing, is mirrored with probability one half, so that each class
looks the same in a mirror. The control is the digits as they are, whose mirror images belong to no class. On both, distribution
matching with and without the plug-in, everything else equal; networks are judged on the stored images alone, with random flips
among the augmentations where the data is mirrored, without them where it is not, the same for both arms. The learning rate of the
images is chosen among the same two for every arm, on validation data and seeds of their own. One and three images per class, as
the method's specification asks for; the paper expects a gain at one, and none at three is reported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from limbeck.blocks.diffaug import DiffAug
from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.datasets import common
from limbeck.core.data import TensorData, mix_seed
from limbeck.methods.datasets.base import network_factory
from limbeck.methods.datasets.fyi import left_right_similarity
from limbeck.tasks.base import Task

NETWORK = "convnet-w16-d3"
STEPS = 300
RATES = [{"lr_images": r} for r in (1.0, 3.0)]


@functools.lru_cache(maxsize=1)
def mirrored() -> Task:
    """The digits, each mirrored with probability one half."""
    plain = common.task(None, "digits", None)

    def part(data: Any, number: int) -> TensorData:
        flips = torch.rand(len(data), generator=torch.Generator().manual_seed(mix_seed(5, number))) < 0.5
        inputs = torch.where(flips[:, None, None, None], data.inputs.flip(-1), data.inputs)
        return TensorData(inputs, data.labels, mean=data.mean, std=data.std)

    parts = [part(data, number) for number, data in enumerate((plain.train, plain.val, plain.test))]
    return replace(plain, name="mirrored digits", train=parts[0], val=parts[1], test=parts[2])


def claim(data_root: str | None = None) -> Claim:
    """The digits: 1,000 training, 297 validation and 500 test images."""
    plain = common.task(None, "digits", None)
    factory = network_factory(NETWORK, plain.in_shape, plain.num_classes)

    def arm(on: str, ipc: int, flip: bool) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            data, augment = (mirrored(), DiffAug("crop_flip")) if on == "mirrored" else (plain, DiffAug("crop"))
            settings = {"ipc": ipc, "steps": STEPS, "batch_real": 32, "diffaug": "crop", **chosen}
            if flip:
                pairs = tuple(f"{k}={v}" for k, v in settings.items() if k != "ipc")
                made = common.distil(
                    "fyi", data, {"host": "dm", "ipc": ipc, "settings": pairs}, seed, network=NETWORK
                ).host
            else:
                made = common.distil("dm", data, settings, seed, network=NETWORK)
            similarity = float(left_right_similarity(made.images.detach()).mean())
            return common.worth(made.distilled(), data, factory, seed, augment=augment, similarity=similarity)

        return train

    arms = {}
    for on in ("mirrored", "plain"):
        for ipc in (1, 3):
            words = f"{on} digits, {ipc} per class"
            arms[f"fyi, {on}, {ipc}"] = Arm(
                "method", f"distribution matching with mirror images, {words}", arm(on, ipc, True), RATES
            )
            arms[f"dm, {on}, {ipc}"] = Arm("baseline", f"distribution matching, {words}", arm(on, ipc, False), RATES)
    pair = {(on, ipc): (f"fyi, {on}, {ipc}", f"dm, {on}, {ipc}") for on in ("mirrored", "plain") for ipc in (1, 3)}
    one, control = pair["mirrored", 1], pair["plain", 1]
    return Claim(
        name="fyi",
        arms=arms,
        checks=[
            Check("on mirrored digits it helps, one image per class", *one, "accuracy"),
            Check("it helps more where classes are symmetric", " - ".join(one), " - ".join(control), "accuracy"),
            Check("an image is less like its mirror image", *one, "similarity", higher_is_better=False),
            Check(
                "on mirrored digits it helps, three images per class", *pair["mirrored", 3], "accuracy", headline=False
            ),
            Check("on plain digits it helps, one image per class", *control, "accuracy", headline=False),
            Check("on plain digits it helps, three images per class", *pair["plain", 3], "accuracy", headline=False),
        ],
        data={**plain.describe(), "mirrored": mirrored().train.fingerprint()},
        seeds=5,
        note="The premise of symmetric classes is made to hold by mirroring half of the digits; the paper's image sets were not run.",
        settings={"steps": STEPS, "network": NETWORK, "batch_real": 32, "host": "dm", "rates": common.RATES},
    )
