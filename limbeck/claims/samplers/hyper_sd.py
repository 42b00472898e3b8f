"""Does distilling trajectory segments, from coarse to fine, keep to the teacher's trajectories better than one direct distillation?

In the plane (a 4 x 4 grid of Gaussians; a teacher that predicts v on the cosine schedule, 64 points) every student starts from the teacher and
gets the same updates, batches, averages and learning rates to choose from. What counts is the distance to the end of the teacher's own ODE in 64
steps from the same noise. The students of segmented training are taken at the end of the stage of k segments and asked for k steps, as the
published weights are used; so the student for 8 steps has had a quarter of the updates that direct training had.

A prototype (and a pilot on validation noise) had shown before that with a squared error alone segmented training is behind direct
training at 1 and 2 steps; there it is asked to beat the teacher only. The paper's answer at one step is score distillation, which is measured by
itself: as many further updates on the segmented student, compared with as many more of segmented training. A pilot on validation noise set its
weights, and showed what to expect of 4 steps afterwards: a student that is not told where a jump ends cannot serve one step and, without new
noise, four; with new noise in each step, as the one-step weights are published to be used, it can. Both are recorded.

On real digits the first comparison is repeated with margin 0, and feedback is looked at: rewards (log-odds of the class) from one classifier, up to
their mean on real validation digits or without end, judged in the features of another. The adversary is reported.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.samplers import common
from limbeck.core.data import mix_seed
from limbeck.diffusion.samplers import Sampler
from limbeck.metrics.generative import kernel_mmd
from limbeck.tasks.generation import GenerationTask, real_samples

KS = (8, 4, 2, 1)
POINTS = 64
SIZES: Mapping[str, Mapping[str, Any]] = {
    "grid": {"network": "mlp-w64-b3", "teacher_steps": 2500, "steps": 1000, "batch_size": 256},
    "digits": {"network": "mlp-w160-b3", "teacher_steps": 5000, "steps": 1200, "batch_size": 128},
}
ONE_STEP = 400
FEEDBACK = 200
RATES = ({"lr": 1e-3}, {"lr": 3e-3})
RATE = {"lr": 1e-3}
COUNT = 2000


def base(on: str) -> dict[str, Any]:
    """Settings of every arm on a task."""
    sizes = SIZES[on]
    return {
        "points": POINTS,
        "adversary": "none",
        "steps": sizes["steps"],
        "batch_size": sizes["batch_size"],
        "ema": 0.95,
    }


@functools.cache
def teacher(on: str) -> Any:
    return common.teacher(common.task(on), "vp-cosine", network=SIZES[on]["network"], steps=SIZES[on]["teacher_steps"])


def trained(on: str, seed: int, settings: Mapping[str, Any]) -> Any:
    """A run of the method on a task."""
    task = common.task(on)
    return common.run(common.build("hyper-sd", task, teacher(on), seed, {**base(on), **settings}), task, seed)


@functools.lru_cache(maxsize=4)
def segmented(on: str, seed: int) -> Any:
    """The student of segmented training at the usual rate, from which later stages go on."""
    return trained(on, seed, RATE)


def gone_on(on: str, seed: int, settings: Mapping[str, Any], stages: tuple[str, ...], prepare: Any = None) -> Any:
    """Later stages of the method from the student of segmented training."""
    task, known = common.task(on), segmented(on, seed)
    made = common.build("hyper-sd", task, teacher(on), seed, {**base(on), **RATE, **settings})
    weights = known.ema.module.state_dict()
    for part in (made.student.module, made.ema.module, made.target.module):
        part.load_state_dict(weights)
    if prepare is not None:
        prepare(made)
    every = made.stages(task.train, task.val, seed=seed)
    made.stages = lambda *_, **__: [stage for stage in every if stage.name in stages]
    return common.run(made, task, seed)


def noise(on: GenerationTask, seed: int, part: str) -> tuple[Tensor, Any]:
    """Noise and classes for a part of a task."""
    number = mix_seed(seed, 61 if part == "val" else 67)
    z = torch.randn((COUNT, *on.shape), generator=torch.Generator().manual_seed(number))
    if on.num_classes is None:
        return z, None
    return z, on.conditions.draw(COUNT, torch.Generator().manual_seed(mix_seed(number, 71)))


@functools.lru_cache(maxsize=8)
def ends(on: str, seed: int, part: str) -> Tensor:
    """Where the teacher's own trajectories end."""
    z, c = noise(common.task(on), seed, part)
    return Sampler.ode(teacher(on), POINTS, "ddim").sample(z, c).x


def measured(on: str, seed: int, part: str, samplers: Mapping[int, Sampler]) -> dict[str, float]:
    """Distances to the ends of the teacher's trajectories and, in the plane, to data, by number of steps; also as logarithms."""
    task, fine = common.task(on), ends(on, seed, part)
    z, c = noise(task, seed, part)
    real = real_samples(getattr(task, part))[0]
    found: dict[str, float] = {}
    for k, sampler in samplers.items():
        made = sampler.sample(z, c, torch.Generator().manual_seed(mix_seed(seed, k, 73))).x
        found[f"endpoint_{k}"] = float((made - fine).flatten(1).norm(dim=1).mean())
        if task.shape == (2,):
            found[f"mmd_{k}"] = kernel_mmd(made, real)
    logs = {f"log_{name}": math.log(max(value, 1e-6)) for name, value in found.items()}
    mean = sum(logs[f"log_endpoint_{k}"] for k in samplers) / len(samplers)
    return {**found, **logs, "log_endpoint": mean}


def outcome(on: str, seed: int, samplers: Mapping[int, Sampler], more: Mapping[str, float] | None = None) -> Outcome:
    return Outcome(measured(on, seed, "val", samplers), {**measured(on, seed, "test", samplers), **(more or {})})


def by_stage(made: Any) -> dict[int, Sampler]:
    """Each stage's student in its own number of steps."""
    return {k: made.stage_sampler(k) for k in KS}


def at_the_end(made: Any) -> dict[int, Sampler]:
    """The last student in every number of steps."""
    return {k: made.few_step(k, gamma=float(made.config.gamma or 0.0)) for k in KS}


def anew(made: Any, seed: int) -> dict[str, float]:
    """Distances to data with all noise anew in each step, as is published for one-step weights."""
    found = measured("grid", seed, "test", {k: made.few_step(k, gamma=1.0) for k in (2, 4)})
    return {f"{name}_anew": value for name, value in found.items() if "mmd" in name}


def claim(data_root: str | None = None) -> Claim:
    """The grid in the plane, and the digits: 1,000 training, 297 validation and 500 test images."""

    def arm(
        role: Any, words: str, on: str = "grid", pick: Any = at_the_end, candidates: Any = (RATE,), **settings: Any
    ) -> Arm:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            return outcome(on, seed, pick(trained(on, seed, {**settings, **chosen})))

        return Arm(role, words, train, candidates)

    def longer(chosen: Mapping[str, Any], seed: int) -> Outcome:
        made = trained("grid", seed, {**RATE, "steps": SIZES["grid"]["steps"] + ONE_STEP})
        return outcome("grid", seed, at_the_end(made), anew(made, seed))

    def untrained(on: str) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            return outcome(on, seed, {k: Sampler.ode(teacher(on), k, "ddim") for k in KS})

        return train

    def one_step(share: float) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            settings = {"one_step_steps": ONE_STEP, "one_step_share": share}
            made = gone_on("grid", seed, settings, ("few-step", "one-step"))
            return outcome("grid", seed, at_the_end(made), anew(made, seed))

        return train

    def feedback(bounded: bool) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            reward = class_reward(bounded)

            def prepare(made: Any) -> None:
                made.rewards = [reward]

            settings = {"feedback_steps": FEEDBACK}
            made = gone_on("digits", seed, settings, ("feedback",), prepare)
            return liked(made, seed)

        return train

    def no_feedback(chosen: Mapping[str, Any], seed: int) -> Outcome:
        return liked(segmented("digits", seed), seed)

    told: dict[str, Any] = {"s_embedding": True}
    arms = {
        "segmented": arm("method", "segments 8-4-2-1, each stage in its own steps", pick=by_stage, candidates=RATES),
        "direct": arm(
            "baseline", "one segment from the start (direct trajectory consistency)", segments=(1,), candidates=RATES
        ),
        "teacher": Arm("baseline", "the teacher in as few steps of DDIM", untrained("grid")),
        "phased": arm(
            "control",
            "segments 8-4-2-1, jumps to borders only (phased consistency, squared error)",
            pick=by_stage,
            ends="boundary",
        ),
        "latent": arm(
            "control",
            "one segment, jumps to data only, new noise in each step (latent consistency)",
            segments=(1,),
            ends="zero",
            gamma=1.0,
        ),
        "segmented, told": arm("control", "segments 8-4-2-1, told where jumps end, last student", **told),
        "direct, told": arm("control", "one segment, told where jumps end", segments=(1,), **told),
        "segmented, longer": Arm(
            "baseline",
            "segments 8-4-2-1 with the updates of the one-step stage added, last student",
            longer,
        ),
        "one step": Arm("method", "segments, then score distillation for one step mixed with them", one_step(0.5)),
        "one step alone": Arm("control", "segments, then score distillation alone", one_step(1.0)),
        "segmented, digits": arm("method", "digits: segments 8-4-2-1, each stage in its own steps", "digits", by_stage),
        "direct, digits": arm("baseline", "digits: one segment from the start", "digits", segments=(1,)),
        "teacher, digits": Arm("baseline", "digits: the teacher in as few steps of DDIM", untrained("digits")),
        "adversary, digits": arm(
            "control", "digits: segments 8-4-2-1 with the adversary", "digits", by_stage, adversary="pair"
        ),
        "no feedback": Arm("control", "digits, 2 steps: segments only", no_feedback),
        "feedback": Arm("method", "digits, 2 steps: rewarded up to a threshold", feedback(True)),
        "feedback, no threshold": Arm("control", "digits, 2 steps: rewarded without end", feedback(False)),
    }

    def nearer(words: str, method: str, baseline: str, k: int, factor: float, headline: bool = True) -> Check:
        return Check(
            words, method, baseline, f"log_endpoint_{k}", math.log(factor), higher_is_better=False, headline=headline
        )

    checks = []
    for k in (8, 4):
        checks += [
            nearer(
                f"in {k} steps it is at 0.6 of direct training's distance to the trajectories' ends, or nearer",
                "segmented",
                "direct",
                k,
                1 / 0.6,
            ),
            nearer(f"in {k} steps it is at half the teacher's distance, or nearer", "segmented", "teacher", k, 2.0),
            nearer(
                f"on digits it is nearer than direct training in {k} steps",
                "segmented, digits",
                "direct, digits",
                k,
                1.0,
            ),
            nearer(
                f"on digits it is nearer than the teacher in {k} steps", "segmented, digits", "teacher, digits", k, 1.0
            ),
            nearer(
                f"in {k} steps, jumps to any point of the segment do better than jumps to its border",
                "segmented",
                "phased",
                k,
                1.0,
                False,
            ),
        ]
    checks += [
        nearer("in 2 steps it is at half the teacher's distance, or nearer", "segmented", "teacher", 2, 2.0),
        nearer("in 1 step it is at two thirds of the teacher's distance, or nearer", "segmented", "teacher", 1, 1.5),
        nearer("in 1 step it is nearer than direct training", "segmented", "direct", 1, 1.0, False),
        nearer(
            "told where jumps end, coarse to fine is nearer than direct training in 4 steps",
            "segmented, told",
            "direct, told",
            4,
            1.0,
            False,
        ),
        nearer("told where jumps end, it is nearer in 1 step", "segmented, told", "segmented", 1, 1.0, False),
        Check(
            "score distillation brings one step to three quarters of the distance to data (MMD) of longer segmented training, or nearer",
            "one step",
            "segmented, longer",
            "log_mmd_1",
            math.log(4 / 3),
            higher_is_better=False,
        ),
        Check(
            "mixed with segments, 4 steps with new noise are at most a tenth further from data than before",
            "one step",
            "segmented, longer",
            "log_mmd_4_anew",
            -math.log(1.1),
            higher_is_better=False,
            headline=False,
        ),
        Check(
            "mixed with segments, 4 steps without noise are at most a tenth further from data than before",
            "one step",
            "segmented, longer",
            "log_mmd_4",
            -math.log(1.1),
            higher_is_better=False,
            headline=False,
        ),
        Check(
            "mixing keeps 4 steps without noise nearer to data than score distillation alone",
            "one step",
            "one step alone",
            "log_mmd_4",
            higher_is_better=False,
            headline=False,
        ),
        Check("feedback raises the reward", "feedback", "no feedback", "reward", headline=False),
        Check(
            "up to a threshold it costs less than 15 % of the distance to data",
            "feedback",
            "no feedback",
            "log_frechet_features",
            -math.log(1.15),
            higher_is_better=False,
            headline=False,
        ),
        Check(
            "without a threshold it costs more",
            "feedback",
            "feedback, no threshold",
            "log_frechet_features",
            higher_is_better=False,
            headline=False,
        ),
        nearer(
            "the adversary does not take 1 step further from the ends",
            "adversary, digits",
            "segmented, digits",
            1,
            0.9,
            False,
        ),
    ]
    described = {on: common.task(on).describe() for on in SIZES}
    return Claim(
        name="hyper-sd",
        arms=arms,
        checks=checks,
        data={"name": "grid, digits", "parts": described},
        seeds=3,
        select="-log_endpoint",
        note="Points in the plane and 8x8 images; text-to-image models, human preference models and the user study of the paper were not run.",
        settings={
            "sizes": {k: dict(v) for k, v in SIZES.items()},
            "one_step": ONE_STEP,
            "feedback": FEEDBACK,
            "rates": [r["lr"] for r in RATES],
        },
    )


@functools.cache
def class_reward(bounded: bool) -> Any:
    """The log-odds of the class by a classifier that does not judge; the threshold is their mean on real validation digits."""
    from limbeck.methods.samplers.feedback_base import class_reward as reward

    on = common.task("digits")
    free = reward(on, None, odds=True, progress=False)
    if not bounded:
        return free
    x, labels = real_samples(on.val)
    with torch.no_grad():
        return replace(free, threshold=float(free(x, labels).mean()))


def liked(made: Any, seed: int) -> Outcome:
    """What two-step samples are worth: to the classifier that rewarded them, and in the features of the one that judges."""
    on, sampler = common.task("digits"), made.few_step(2)
    z, c = noise(on, seed, "test")
    asked = class_reward(False)
    with torch.no_grad():
        reward = float(asked(sampler.sample(z, c).x, c).mean())
    return common.worth(sampler, on, seed, tuned=False, more={"reward": reward})
