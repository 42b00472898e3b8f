"""Does herding give better training images than random selection of the same size?

Digits, one and ten images per class, features of a reference network that learnt from the training part alone, scaled to unit length;
raw pixels as a control. The headline checks: at both sizes the mean of the chosen features is nearer to the class mean than that of
random images; and with one image per class networks trained on them are more accurate. Accuracy at ten is reported: papers on
dataset distillation find herding ahead of random selection at some sizes and behind it at others. The choice is the same on all
seeds; networks and random images differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from limbeck.blocks.similarity_kernels import unit_rows
from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.datasets import common
from limbeck.core.data import mix_seed
from limbeck.methods.datasets.base import network_factory
from limbeck.methods.datasets.herding import Herding
from limbeck.methods.datasets.random_selection import RandomSelection

NETWORK = "convnet-w32-d2"
SIZES = (1, 10)


@functools.lru_cache(maxsize=4)
def chosen(ipc: int, embedding: str) -> Herding:
    """The choice, which no seed changes."""
    config = Herding.Config.make(ipc=ipc, embedding=embedding)
    task = common.task(None, "digits", None)
    made = Herding.on_task(task, Herding.Setup.make(encoder=NETWORK), config, progress=False)
    made.select()
    return made


def distance(space: Herding, ids: torch.Tensor) -> float:
    """The mean over classes of the distance of the chosen mean to the class mean, on unit features."""
    rows, labels = unit_rows(space.embeddings()), space.classes.labels
    apart = []
    for c in range(space.num_classes):
        own = ids[labels[ids] == c]
        apart.append(float((rows[own].mean(0) - rows[labels == c].mean(0)).norm()))
    return sum(apart) / len(apart)


def claim(data_root: str | None = None) -> Claim:
    """The digits: 1,000 training, 297 validation and 500 test images."""
    on = common.task(None, "digits", None)
    factory = network_factory(NETWORK, on.in_shape, on.num_classes)

    def arm(ipc: int, embedding: str | None) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(settings: Mapping[str, Any], seed: int) -> Outcome:
            space = chosen(ipc, "features")
            if embedding is None:
                made = RandomSelection(on.train, factory, ipc=ipc, seed=mix_seed(seed, 37)).select()
            else:
                made = chosen(ipc, embedding).distilled()
            assert made.index is not None
            return common.worth(made, on, factory, seed, distance=distance(space, made.index))

        return train

    arms, checks = {}, []
    for ipc in SIZES:
        arms[f"herding, {ipc}"] = Arm("method", f"herding on features, {ipc} per class", arm(ipc, "features"))
        arms[f"random, {ipc}"] = Arm("baseline", f"random images, {ipc} per class", arm(ipc, None))
        arms[f"pixels, {ipc}"] = Arm("control", f"herding on raw pixels, {ipc} per class", arm(ipc, "pixels"))
        pair = f"herding, {ipc}", f"random, {ipc}"
        checks += [
            Check(f"with {ipc} per class: more accurate than random", *pair, "accuracy", headline=ipc == SIZES[0]),
            Check(f"with {ipc} per class: means nearer to the class means", *pair, "distance", 0.0, False),
            Check(
                f"with {ipc} per class: features are the better space than pixels",
                f"herding, {ipc}",
                f"pixels, {ipc}",
                "accuracy",
                headline=False,
            ),
        ]
    return Claim(
        name="herding",
        arms=arms,
        checks=checks,
        data=on.describe(),
        seeds=4,
        note="Small networks on 8x8 images; other image sets were not run.",
        settings={"network": NETWORK, "encoder": NETWORK, "rates": common.RATES},
    )
