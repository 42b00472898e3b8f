"""Do flat experts make the error that adds up over a training smaller, and the images better, than plain experts do?

Both arms match with the same number of experts from the same initial weights and orders, the same steps and learning rates; the
method's experts look for flat regions (rho 0.5 relative to the parameters, alpha 0.3, fixed beforehand: the published 0.01 changes
nothing in networks this small) and its images are averaged. The accumulated error is measured on experts that were not matched, each
arm's on experts of its own kind, and divided by how far those moved. Learning rates of the networks are chosen on validation data for
every arm by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from limbeck.blocks.sharpness import sharpness
from limbeck.blocks.trajectories import TrajectoryBuffer
from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.datasets import common
from limbeck.methods.datasets.base import network_factory
from limbeck.tasks.base import Task
from limbeck.tasks.experts import ExpertTraining, build_experts, expert_accuracies
from limbeck.tasks.judging_datasets import everything

NETWORK = "convnet-w16-d2"
STEPS = 150
IPC = 1
SHARED: dict[str, Any] = {"ipc": IPC, "steps": STEPS, "expert_count": 4, "expert_epochs": 20}
FLAT = {"rho": 0.5, "alpha": 0.3, "ema": 0.99}
HELD_OUT = 3  # experts for measuring
RADIUS = 0.5  # of the sharpness
CHAINS = (1, 2, 4)


def claim(data_root: str | None = None) -> Claim:
    """The digits: 1,000 training, 297 validation and 500 test images."""
    on = common.task(None, "digits", None)
    factory = network_factory(NETWORK, on.in_shape, on.num_classes)

    def matched(method: str, own: Mapping[str, Any]) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            made = common.distil(method, on, {**SHARED, **own, "expert_seed": seed}, seed, network=NETWORK)
            measured: dict[str, Any] = {"sharpness": mean_sharpness(made, on), **accumulated(made, on, seed)}
            theta = made.trajectories().stacked(-1)
            measured["expert_accuracy"] = float(expert_accuracies(made.student, theta, on.val).mean())
            if method == "ftd":
                measured["average_chosen"] = float(made.use_average)
            return common.worth(made.distilled(), on, factory, seed, **measured)

        return train

    def drawn(chosen: Mapping[str, Any], seed: int) -> Outcome:
        return common.worth(common.chosen_at_random(on, factory, IPC, seed * 10), on, factory, seed)

    return Claim(
        name="ftd",
        arms={
            "ftd": Arm("method", "flat experts, average of the images", matched("ftd", FLAT)),
            "mtt": Arm("baseline", "plain experts", matched("mtt", {})),
            "random": Arm("control", "random real images", drawn),
        },
        checks=[
            Check("networks trained on the images are more accurate than with plain experts", "ftd", "mtt", "accuracy"),
            Check("the error after four chained segments is smaller", "ftd", "mtt", "error_4", higher_is_better=False),
            Check("its experts are flatter", "ftd", "mtt", "sharpness", higher_is_better=False, headline=False),
            Check("the error after one segment is smaller", "ftd", "mtt", "error_1", 0.0, False, headline=False),
            Check("it beats random real images", "ftd", "random", "accuracy", headline=False),
            Check("so do plain experts", "mtt", "random", "accuracy", headline=False),
        ],
        data=on.describe(),
        seeds=5,
        note=note,
        settings={**SHARED, **FLAT, "network": NETWORK, "rates": common.RATES, "radius": RADIUS, "held_out": HELD_OUT},
    )


def mean_sharpness(made: Any, on: Task) -> float:
    """How much the loss on real images rises within a radius, over all snapshots of the matched experts."""
    experts: TrajectoryBuffer = made.trajectories()
    training = ExpertTraining(made.factory, made.expert_config(), seed=made.config.expert_seed)
    inputs, labels = everything(on.train)
    x, y = (t[:300].expand(experts.experts, *t[:300].shape) for t in (inputs, labels))
    found = [
        sharpness(lambda theta: training.gradients(theta, x, y), experts.stacked(epoch), RADIUS)
        for epoch in range(experts.epochs + 1)
    ]
    return float(torch.stack(found).mean())


def accumulated(made: Any, on: Task, seed: int) -> dict[str, float]:
    """The accumulated error on experts of the same kind that were not matched."""
    held_out = build_experts(
        made.real,
        made.factory,
        made.expert_config().replace(experts=HELD_OUT),
        seed=seed + 5000,
        augment=made.augment,
        progress=False,
    )
    errors = made.accumulated_errors(held_out, CHAINS).mean(0)
    return {f"error_{k}": float(e) for k, e in zip(CHAINS, errors, strict=True)}


def note(result: Mapping[str, Any]) -> str:
    """What the experts cost, and whether the average was kept."""
    metrics = {arm: result["arms"][arm]["metrics"] for arm in ("ftd", "mtt")}
    mean = {arm: sum(v := m["expert_accuracy"]) / len(v) for arm, m in metrics.items()}
    kept = int(sum(metrics["ftd"]["average_chosen"]))
    return (
        f"Flat experts have {mean['ftd']:.1%} accuracy on validation data, plain ones {mean['mtt']:.1%}. The average of the images was "
        f"kept in {kept} of {len(metrics['ftd']['average_chosen'])} runs. Small networks on 8x8 images; the paper's image sets were not run."
    )
