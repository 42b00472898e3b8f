"""Does greedy k-centre cover the data better than random selection, and do networks trained on it gain from that?

Digits, five and twenty images per class, features of a reference network that learnt from the training part alone; and by raw pixels
as a control. Two headline checks at twenty per class: the largest distance of a training image to the nearest chosen one of its
class, in the space in which samples were chosen, is smaller than that of random images (which the algorithm promises); and networks
trained on the choice are at least as accurate as those trained on random images, within a point (which it does not promise: what is
far from everything else may be an outlier). The choice is the same on all seeds; networks and random images differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from limbeck.blocks.coresets import covering_radius
from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.datasets import common
from limbeck.core.data import mix_seed
from limbeck.methods.datasets.base import network_factory
from limbeck.methods.datasets.k_center import KCenter
from limbeck.methods.datasets.random_selection import RandomSelection

NETWORK = "convnet-w32-d2"
SIZES = (20, 5)


@functools.lru_cache(maxsize=4)
def chosen(ipc: int, embedding: str) -> KCenter:
    """The choice, which no seed changes."""
    config = KCenter.Config.make(ipc=ipc, embedding=embedding)
    task = common.task(None, "digits", None)
    made = KCenter.on_task(task, KCenter.Setup.make(encoder=NETWORK), config, progress=False)
    made.select()
    return made


def radius(space: KCenter, ids: torch.Tensor) -> float:
    """The mean over classes of the covering radius, in the space that a method compares samples in."""
    rows, labels = space.embeddings(), space.classes.labels
    radii = []
    for c in range(space.num_classes):
        own = (labels == c).nonzero().flatten()
        radii.append(covering_radius(rows[own], torch.isin(own, ids).nonzero().flatten()))
    return sum(radii) / len(radii)


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
            return common.worth(made, on, factory, seed, radius=radius(space, made.index))

        return train

    arms, checks = {}, []
    for ipc in SIZES:
        arms[f"k-center, {ipc}"] = Arm("method", f"greedy k-centre on features, {ipc} per class", arm(ipc, "features"))
        arms[f"random, {ipc}"] = Arm("baseline", f"random images, {ipc} per class", arm(ipc, None))
        arms[f"pixels, {ipc}"] = Arm("control", f"greedy k-centre on raw pixels, {ipc} per class", arm(ipc, "pixels"))
        first = ipc == SIZES[0]
        pair = f"k-center, {ipc}", f"random, {ipc}"
        checks += [
            Check(
                f"with {ipc} per class: no less accurate than random by a point", *pair, "accuracy", -0.01, True, first
            ),
            Check(f"with {ipc} per class: a smaller covering radius than random", *pair, "radius", 0.0, False, first),
            Check(f"with {ipc} per class: more accurate than random", *pair, "accuracy", headline=False),
            Check(
                f"with {ipc} per class: features are the better space than pixels",
                f"k-center, {ipc}",
                f"pixels, {ipc}",
                "accuracy",
                headline=False,
            ),
        ]
    return Claim(
        name="k-center",
        arms=arms,
        checks=checks,
        data=on.describe(),
        seeds=4,
        note="Small networks on 8x8 images. The paper's setting, thousands of images chosen in rounds of active learning, was not run.",
        settings={"network": NETWORK, "encoder": NETWORK, "rates": common.RATES},
    )
