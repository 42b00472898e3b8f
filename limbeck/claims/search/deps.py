"""Do sub-networks that join halfway, slowly, become better than ones trained from the start or late, at the cost of training counted in forward passes?

An elastic residual perceptron (hidden widths 64 … 512 in each of up to three blocks) on the digits, 24 epochs for the full network in the arms of equal epochs;
the arms of equal cost train for as many more or fewer epochs as come to the forward passes of the method (all networks of a step counted, a frozen teacher's too).
Judged are all twelve uniform sub-networks of each training, every one with calibrated batch-norm statistics, in every arm alike: their mean accuracy, the
smallest one's and the full one's. Fixed beforehand: batch, schedule, four networks a step, start at half of training with a ramp of a twelfth. The peak
learning rate is chosen for every arm alike among three, by the mean accuracy of the uniform sub-networks on validation data, with seeds of their own.

The ramp is judged, without a say in the verdict, on the perceptron and on a residual convolutional super-network, that one for 12 epochs at one learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from limbeck.blocks.shrinking import same_passes
from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.models import common
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine
from limbeck.methods.search.deps import DepS
from limbeck.tasks.base import Task

EPOCHS, BATCH = 24, 64
RATES = ({"lr": 0.02}, {"lr": 0.05}, {"lr": 0.1})
STUDENT = "elasticmlp-d128-m512-l3"
CONVOLUTIONAL, CONVOLUTIONAL_SETTINGS = "elasticcnn-w8-s2-d2", {"epochs": 12, "lr": 0.05}


def claim(data_root: str | None = None) -> Claim:
    """The digits, with shifts."""
    on = common.task(None, "digits", None)
    full = EPOCHS * (len(on.train) // BATCH)
    reference = DepS.Config.make(steps=full)

    def arm(preset: str, *, equal_cost: bool = False) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            return _train(on, STUDENT, preset, {**chosen, "steps": full}, seed, equal_cost)

        return train

    def convolutional(preset: str) -> Callable[[Mapping[str, Any], int], Outcome]:
        return lambda chosen, seed: _train(on, CONVOLUTIONAL, preset, {**CONVOLUTIONAL_SETTINGS, **chosen}, seed, False)

    def mean(statement: str, rival: str, margin: float = 0.0, **others: Any) -> Check:
        return Check(statement, "deps", rival, "accuracy", margin, **others)

    return Claim(
        name="deps",
        arms={
            "deps": Arm("method", "sub-networks join at half of training, with a ramp", arm("small"), RATES),
            "bignas": Arm("baseline", "all sub-networks from the first step, equal epochs", arm("bignas"), RATES),
            "bignas-equal-cost": Arm(
                "baseline",
                "all sub-networks from the first step, equal forward passes",
                arm("bignas", equal_cost=True),
                RATES,
            ),
            "late-equal-cost": Arm(
                "baseline",
                "sub-networks join after 80 % of training, equal forward passes",
                arm("late", equal_cost=True),
                RATES,
            ),
            "ofa-equal-cost": Arm(
                "baseline",
                "the full network to its end, then depths and widths opened in turn before a frozen teacher, equal forward passes",
                arm("ofa", equal_cost=True),
                RATES,
            ),
            "no-ramp": Arm("control", "sub-networks join at half of training at full speed", arm("no-ramp"), RATES),
            "deps-conv": Arm("control", "the method on a convolutional super-network", convolutional("small")),
            "no-ramp-conv": Arm("control", "the same without the ramp", convolutional("no-ramp")),
        },
        checks=[
            mean("its sub-networks are more accurate by 0.3 points than if all train from the start", "bignas", 0.003),
            Check(
                "at equal cost its smallest sub-network is more accurate than after a late start",
                "deps",
                "late-equal-cost",
                "smallest_accuracy",
            ),
            Check(
                "its full network is more accurate than if all train from the start", "deps", "bignas", "full_accuracy"
            ),
            mean("at equal cost its sub-networks are more accurate than after a late start", "late-equal-cost"),
            mean(
                "at equal cost they are more accurate than if all train from the start",
                "bignas-equal-cost",
                headline=False,
            ),
            mean(
                "at equal cost they are more accurate than by progressive shrinking", "ofa-equal-cost", headline=False
            ),
            Check(
                "it takes less than 0.75 of the forward passes",
                "deps",
                "bignas",
                "relative_passes",
                0.25,
                higher_is_better=False,
                headline=False,
            ),
            mean("the ramp makes its sub-networks more accurate", "no-ramp", headline=False),
            Check("the ramp makes its full network more accurate", "deps", "no-ramp", "full_accuracy", headline=False),
            Check("the ramp helps convolutional sub-networks", "deps-conv", "no-ramp-conv", "accuracy", headline=False),
            Check(
                "the ramp helps the full convolutional network",
                "deps-conv",
                "no-ramp-conv",
                "full_accuracy",
                headline=False,
            ),
        ],
        data=on.describe(),
        seeds=5,
        note=note,
        settings={
            "student": STUDENT,
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "networks": reference.networks,
            "start": reference.start,
            "ramp": reference.ramp,
            "convolutional_student": CONVOLUTIONAL,
            "convolutional_settings": CONVOLUTIONAL_SETTINGS,
        },
    )


def _train(on: Task, student: str, preset: str, config: Mapping[str, Any], seed: int, equal_cost: bool) -> Outcome:
    """Train one super-network in one way, and judge its uniform sub-networks."""
    settings = {"batch_size": BATCH, "evaluations": 0, "search": 0, **config}
    setup = DepS.Setup.make(student=student, rivals=())
    method = DepS.on_task(on, setup, DepS.Config.make(preset, **settings), seed=seed, progress=False)
    reference = DepS(method.supernet, DepS.Config.make(**settings))
    steps = reference.config.total_steps(len(on.train) // BATCH)
    goal, from_the_start = reference.plan_for(steps).passes, reference.config.networks * steps
    if equal_cost:
        own = method.config.replace(steps=same_passes(goal, method._plan))
        method = DepS(method.supernet, own)
    Engine(None, common.QUIET, seed=mix_seed(seed, 2)).run(method, method.stages(on.train, None, seed=seed))
    cost = {
        "relative_passes": method.counters["network_passes"] / (BATCH * from_the_start),
        "forward_gigaflops": method.counters["forward_flops"] / 1e9,
    }
    return Outcome(_measures(method, on, "val"), {**_measures(method, on, "test"), **cost})


def _measures(method: DepS, on: Task, part: str) -> dict[str, float]:
    net = method.supernet
    codes = list(net.uniform())
    accuracy = {code: method.quality(code, getattr(on, part))["accuracy"] for code in codes}
    return {
        "accuracy": sum(accuracy.values()) / len(codes),
        "smallest_accuracy": accuracy[net.smallest],
        "full_accuracy": accuracy[net.largest],
    }


def note(result: Mapping[str, Any]) -> str:
    """What the arms cost, where the late start stands, and what the ramp did."""
    arms, checks = result["arms"], result["checks"]

    def mean(arm: str, metric: str) -> float:
        values = arms[arm]["metrics"][metric]
        return float(sum(values) / len(values))

    def against_late(metric: str) -> str:
        return f"{mean('late-equal-cost', metric):.1%} against {mean('deps', metric):.1%}"

    passes = ", ".join(f"{name} {mean(name, 'relative_passes'):.2f}" for name in arms if not name.endswith("conv"))
    dearer = mean("late-equal-cost", "forward_gigaflops") / mean("deps", "forward_gigaflops")
    late = next(c for c in checks if c["baseline"] == "late-equal-cost" and c["metric"] == "accuracy")
    ramp = {(c["method"], c["metric"]): c["verdict"] for c in checks if "no-ramp" in c["baseline"]}
    return (
        "Accuracy is the mean over twelve uniform sub-networks, all calibrated alike; learning rates tuned alike for every arm. "
        f"Forward passes, in parts of training all sub-networks from the start: {passes}. "
        f"Better on average than a late start of as many passes: {late['verdict']}. Such a start takes {dearer:.2f} times the method's forward FLOPs, since "
        f"most of its passes are the full network's; its full network has {against_late('full_accuracy')}, its smallest {against_late('smallest_accuracy')}. "
        f"The ramp alone: sub-networks of the perceptron {ramp[('deps', 'accuracy')]}, its full network {ramp[('deps', 'full_accuracy')]}; "
        f"convolutional sub-networks {ramp[('deps-conv', 'accuracy')]}, the full one {ramp[('deps-conv', 'full_accuracy')]}. "
        "Small networks on small images; the paper's ImageNet setting was not run."
    )
