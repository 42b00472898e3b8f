"""Does it matter which part of the experts' trajectories is matched, and must a large synthetic set match late segments?

First experiment: the range alone. Thirty images per class (a third of the data) and one, with early segments (epochs 0 to 3) and late
ones (16 to 19), everything else fixed and labels hard. Second: the whole method with thirty per class, whose range follows from the
size of the set and whose labels are soft and trained, against matching the early range, as trajectory matching does, against random
real images, and against those with the soft labels that the experts give them, which are a strong baseline. Ranges, rates and steps
are fixed beforehand; learning rates of the networks are chosen on validation data for every arm by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.datasets import common
from limbeck.core.data import mix_seed
from limbeck.methods.datasets.base import network_factory

NETWORK = "convnet-w16-d2"
STEPS = 150
LARGE = 30
NETWORKS = 2  # trained on every result
EXPERTS: dict[str, Any] = {"expert_count": 5, "expert_epochs": 24}
EARLY = {"min_start": 0, "max_start": 4}
LATE = {"min_start": 16, "max_start": 20}
IMAGE_RATES = {1: 3.0, LARGE: 30.0}


def claim(data_root: str | None = None) -> Claim:
    """The digits: 1,000 training, 297 validation and 500 test images."""
    on = common.task(None, "digits", None)
    factory = network_factory(NETWORK, on.in_shape, on.num_classes)

    def distilled(method: str, ipc: int, seed: int, own: Mapping[str, Any]) -> Any:
        settings = {"ipc": ipc, "steps": STEPS, "lr_images": IMAGE_RATES[ipc], "expert_seed": seed, **EXPERTS, **own}
        return common.distil(method, on, settings, seed, network=NETWORK)

    def matched(ipc: int, where: Mapping[str, Any]) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            return common.worth(distilled("mtt", ipc, seed, where).distilled(), on, factory, seed, networks=NETWORKS)

        return train

    def whole(chosen: Mapping[str, Any], seed: int) -> Outcome:
        made = distilled("datm", LARGE, seed, {"rho": 0.0})  # the same experts for all arms
        return common.worth(made.distilled(), on, factory, seed, networks=NETWORKS, skipped=float(made.skipped))

    def drawn(chosen: Mapping[str, Any], seed: int) -> Outcome:
        return common.worth(
            common.chosen_at_random(on, factory, LARGE, seed * 10), on, factory, seed, networks=NETWORKS
        )

    def labelled(chosen: Mapping[str, Any], seed: int) -> Outcome:
        cls: Any = common.catalogue.get("datm").load()
        made = cls(on.train, factory, ipc=LARGE, seed=mix_seed(seed, 1), rho=0.0, expert_seed=seed, **EXPERTS)
        made.show_progress = False
        made.prepare_run(on.train, None)
        return common.worth(made.random_with_expert_labels(), on, factory, seed, networks=NETWORKS)

    arms = {
        "datm": Arm("method", f"range by the size of the set, trained soft labels, {LARGE} per class", whole),
        "late": Arm("method", f"late segments, hard labels, {LARGE} per class", matched(LARGE, LATE)),
        "early": Arm("baseline", f"early segments, hard labels, {LARGE} per class", matched(LARGE, EARLY)),
        "random": Arm("control", f"random real images, {LARGE} per class", drawn),
        "random, soft": Arm("control", f"random real images with the experts' labels, {LARGE} per class", labelled),
        "late, 1": Arm("control", "late segments, hard labels, 1 per class", matched(1, LATE)),
        "early, 1": Arm("control", "early segments, hard labels, 1 per class", matched(1, EARLY)),
    }
    return Claim(
        name="datm",
        arms=arms,
        checks=[
            Check("a large set should match late segments, not early ones", "late", "early", "accuracy", 0.02),
            Check(
                "late segments gain more over early ones the larger the set",
                "late - early",
                "late, 1 - early, 1",
                "accuracy",
            ),
            Check("the whole method beats matching early segments", "datm", "early", "accuracy"),
            Check(
                "early segments make a large set worse than random images",
                "random",
                "early",
                "accuracy",
                headline=False,
            ),
            Check("the whole method is no worse than random images by a point", "datm", "random", "accuracy", -0.01),
            Check("the whole method beats random images", "datm", "random", "accuracy", headline=False),
            Check("… and random images with the experts' labels", "datm", "random, soft", "accuracy", headline=False),
            Check("a small set should match early segments", "early, 1", "late, 1", "accuracy", headline=False),
        ],
        data=on.describe(),
        seeds=3,
        note=note,
        settings={
            "steps": STEPS,
            "network": NETWORK,
            "networks": NETWORKS,
            "rates": common.RATES,
            "early": EARLY,
            "late": LATE,
            "lr_images": IMAGE_RATES,
            **EXPERTS,
        },
    )


def note(result: Mapping[str, Any]) -> str:
    """What the two effects are, and how many steps changed nothing."""
    accuracy = {arm: found["metrics"]["accuracy"] for arm, found in result["arms"].items()}
    mean = {arm: sum(v) / len(v) for arm, v in accuracy.items()}
    skipped = result["arms"]["datm"]["metrics"]["skipped"]
    return (
        f"Late minus early segments: {100 * (mean['late'] - mean['early']):+.1f} points with {LARGE} images per class, "
        f"{100 * (mean['late, 1'] - mean['early, 1']):+.1f} with one. Random real images: {mean['random']:.1%}, with the experts' labels "
        f"{mean['random, soft']:.1%}. The threshold skipped {sum(skipped) / len(skipped):.0f} of {STEPS} steps on average. Digits leave "
        f"little room above {LARGE} real images per class. Small networks on 8x8 images; the paper's image sets were not run."
    )
