"""Does a perceptron that a hypergraph network taught come near to it, and how much sooner does it answer?

Generated hypergraphs (block models, whose vertices' own features say little) and, where their files are given, real ones: papers of Cora and
Citeseer joined by co-citation, of Cora by co-authorship. 20 labels a class, 100 validation vertices, the rest for testing; a new split (and
hypergraph, where it is generated) for each seed. The teacher, an HGNN, is trained once for each split and shared by the arms. Teacher and students
have the published settings and no candidates; the baseline, the same perceptron trained on the labels alone, chooses among four. It sees the labelled
vertices only: with the others in its batches, for their normalisation, it was worse. In the production
setting a fifth of the test vertices is not there in training; the teacher answers for them on the whole hypergraph.

Time: all answers and single ones on hypergraphs of growing size up to the paper's 55,000 vertices, with fresh weights. The teacher may answer a
single request in the faster of two ways: from the two-hop neighbourhood, gathered for the request, or for the whole hypergraph at once. Requests to one
model come four at a time; the fastest of many rounds counts, since whatever else the machine does only adds to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from limbeck.claims.base import MINUS, Arm, Check, Claim, Outcome
from limbeck.claims.graphs import common
from limbeck.core.batch import Losses
from limbeck.methods.graphs.lighthgnn import LightHGNN
from limbeck.metrics.turns import time_in_turns
from limbeck.networks.node_networks import node_network
from limbeck.tasks.judging_nodes import NodeModel
from limbeck.tasks.node_classification import NodeTask

REAL = {
    "cocitation-cora": "transductive",
    "cocitation-citeseer": "transductive",
    "coauthorship-cora": "inductive",
}
REALS = "accuracy on real hypergraphs"
SIZES = (1_000, 10_000, 55_000)
LABELS = tuple(
    {"lr": lr, "weight_decay": decay} for lr, decay in ((0.01, 5e-4), (0.01, 5e-3), (0.003, 5e-3), (0.003, 5e-2))
)


def claim(data_root: str | None = None) -> Claim:
    """Block models of 1,000 vertices in both settings, and those real hypergraphs that are there."""
    generated = {"blocks": ("hypergraph-sbm", "transductive"), "blocks, production": ("hypergraph-sbm", "inductive")}
    real = {
        name + (", production" if setting == "inductive" else ""): (name, setting)
        for name, setting in REAL.items()
        if common.available(f"hypergraphs/{name}.npz", data_root)
    }
    grounds = {**generated, **real}

    def on(ground: str, seed: int) -> NodeTask:
        name, setting = grounds[ground]
        return common.task(name, data_root, seed, setting)

    def teacher(ground: str, seed: int) -> nn.Module:
        return trained_teacher(grounds[ground], data_root, seed)

    def trained(config: Mapping[str, Any], where: Sequence[str]) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            found = {}
            for ground in where:
                task = on(ground, seed)
                if config:
                    made = LightHGNN(task, teacher(ground, seed), seed=seed, **config)
                else:
                    made = Labels(task, seed=seed, train_teacher=False, **chosen)
                found[ground] = common.accuracies(NodeModel(common.run(made, seed).student, False), task)
            return with_mean(common.together(found), real)

        return train

    def taught(chosen: Mapping[str, Any], seed: int) -> Outcome:
        models = {ground: NodeModel(teacher(ground, seed), True) for ground in grounds}
        return with_mean(common.together({g: common.accuracies(m, on(g, seed)) for g, m in models.items()}), real)

    return Claim(
        name="lighthgnn",
        arms={
            "lighthgnn+": Arm("method", "soft labels and reliable hyperedges", trained({"plus": True}, list(grounds))),
            "lighthgnn": Arm("method", "soft labels alone", trained({"plus": False}, list(grounds))),
            "perceptron": Arm(
                "baseline", "the same perceptron, from the labels alone", trained({}, list(grounds)), LABELS
            ),
            "teacher": Arm("control", "the HGNN, which needs the hypergraph", taught),
            "all hyperedges": Arm(
                "control",
                "from all hyperedges in every update, reliable or not",
                trained({"plus": True, "sampling": False}, ["blocks"]),
            ),
            **{f"{who}, {size:,}": Arm("control", *timed(who, size)) for size in SIZES for who in ("student", "HGNN")},
        },
        checks=[*accuracy_checks(bool(real)), *time_checks()],
        data={"generated": "hypergraph block model of 1,000 vertices", "real": sorted(real)},
        seeds=10,
        note=lambda result: note(result, list(real)),
        settings={"updates": 200, "labels_per_class": 20, "sizes": list(SIZES)},
    )


class Labels(LightHGNN):
    """The perceptron on its own: cross-entropy on the labelled vertices; its teacher is not asked."""

    def student_losses(self) -> Losses:
        nodes = self.watched.train
        return Losses(labels=self.labelled_loss(self.student_logits(nodes), nodes))


@functools.cache
def trained_teacher(ground: tuple[str, str], data_root: str | None, seed: int) -> nn.Module:
    """The HGNN of a split, trained once per process."""
    made = LightHGNN(common.task(ground[0], data_root, seed, ground[1]), seed=seed)
    found: nn.Module = common.run(made, seed, [made.teacher_stage()]).teacher
    return found


def with_mean(outcome: Outcome, real: Mapping[str, Any]) -> Outcome:
    """The outcome with the mean accuracy over real hypergraphs, where there are any."""
    known = [outcome.test[f"accuracy on {ground}"] for ground in real if f"accuracy on {ground}" in outcome.test]
    more = {REALS: sum(known) / len(known)} if known else {}
    return Outcome(outcome.val, {**outcome.test, **more})


def accuracy_checks(real: bool) -> list[Check]:
    """Students against the perceptron and their teacher."""
    found = [
        Check(
            f"{who} is {margin * 100:.0f} points above a perceptron trained on the labels, on {ground}",
            who,
            "perceptron",
            f"accuracy on {ground}",
            margin,
        )
        for ground, margin in (("blocks", 0.12), *((("real hypergraphs", 0.10),) if real else ()))
        for who in ("lighthgnn+", "lighthgnn")
    ]
    found += [
        Check(f"{who} is within 3 points of its teacher, on {ground}", who, "teacher", f"accuracy on {ground}", -0.03)
        for ground in ("blocks", *(("real hypergraphs",) if real else ()))
        for who in ("lighthgnn+", "lighthgnn")
    ]
    found.append(
        Check(
            "reliable hyperedges do not cost more than a point, on blocks",
            "lighthgnn+",
            "lighthgnn",
            "accuracy on blocks",
            -0.01,
        )
    )
    found += [
        Check(
            "reliable hyperedges help, on real hypergraphs",
            "lighthgnn+",
            "lighthgnn",
            REALS,
            headline=False,
        )
    ] * real
    found += [
        Check(
            "in production it is 5 points above the perceptron on vertices that were not there in training",
            "lighthgnn+",
            "perceptron",
            "accuracy_hidden on blocks, production",
            0.05,
            headline=False,
        ),
        Check(
            "drawing hyperedges by reliability beats taking all of them",
            "lighthgnn+",
            "all hyperedges",
            "accuracy on blocks",
            headline=False,
        ),
    ]
    return found


def time_checks() -> list[Check]:
    """Students against their teacher, in logarithms of seconds."""
    small, middle, large = (f"{size:,}" for size in SIZES)

    def against(size: str, times: float, metric: str, headline: bool, words: str) -> Check:
        return Check(words, f"student, {size}", f"HGNN, {size}", metric, math.log(times), False, headline)

    return [
        against(middle, 10, "log_single", True, f"a single request is answered 10 times sooner at {middle} vertices"),
        Check(
            f"that ratio is larger at {large} vertices than at {small}",
            f"student, {large}{MINUS}student, {small}",
            f"HGNN, {large}{MINUS}HGNN, {small}",
            "log_single",
            higher_is_better=False,
        ),
        against(large, 100, "log_single", False, f"100 times sooner at {large} vertices"),
        against(
            large, 100, "log_one_of_all", False, "100 times sooner there than a teacher that answers for all vertices"
        ),
        against(large, 1, "log_whole", False, f"all answers at once come sooner too, at {large} vertices"),
    ]


def timed(who: str, size: int) -> tuple[str, Callable[[Mapping[str, Any], int], Outcome]]:
    """An arm's description, and the arm: the times of student or teacher, both taken in one run."""

    def measure(chosen: Mapping[str, Any], seed: int) -> Outcome:
        return Outcome({}, times(size, seed)[who])

    return f"the time of the {who} on {size:,} vertices", measure


@functools.cache
def times(size: int, seed: int) -> dict[str, dict[str, float]]:
    """Logarithms of seconds by model: ``log_whole`` for all answers; for one ``log_gathered``, ``log_one_of_all``, and ``log_single``, the faster of these."""
    on = common.task("hypergraph-sbm", None, seed, generated_nodes=size)
    features = on.features.shape[1]
    student = NodeModel(LightHGNN.fresh_student(on, LightHGNN.default_student, seed).eval(), False)
    teacher = NodeModel(node_network("hgnn", features, on.num_classes).eval(), True)
    nodes = on.test[:64]
    single = time_in_turns(
        {
            "student": lambda call: student.single(on, nodes[call % 64 : call % 64 + 1]),
            "HGNN": lambda call: teacher.single(on, nodes[call % 64 : call % 64 + 1]),
        },
        60,
        repeats=4,
    )
    whole = time_in_turns({"student": lambda _: student.whole(on), "HGNN": lambda _: teacher.whole(on)}, 30)
    every = {who: math.log(found["best_seconds"]) for who, found in whole.items()}
    one = {who: math.log(found["best_seconds"]) for who, found in single.items()}
    computed = {"student": one["student"], "HGNN": every["HGNN"]}
    return {
        who: {
            "log_whole": every[who],
            "log_gathered": one[who],
            "log_one_of_all": computed[who],
            "log_single": min(one[who], computed[who]),
        }
        for who in every
    }


def note(result: Mapping[str, Any], real: Sequence[str]) -> str:
    """What a reader must know, in numbers of this result."""

    def mean(arm: str, metric: str) -> float:
        values = result["arms"][arm]["metrics"][metric]
        return float(sum(values) / len(values))

    def times_sooner(size: int, metric: str) -> str:
        return f"{math.exp(mean(f'HGNN, {size:,}', metric) - mean(f'student, {size:,}', metric)):.1f}"

    who = ("perceptron", "lighthgnn", "lighthgnn+", "teacher")
    told = [
        f"{ground}: " + ", ".join(f"{mean(arm, f'accuracy on {ground}'):.3f}" for arm in who)
        for ground in ("blocks", "blocks, production", *real)
    ]
    small, middle, large = SIZES
    texts = [
        f"Accuracies of {', '.join(who)}: " + "; ".join(told) + ".",
        f"A single request is answered {times_sooner(small, 'log_single')}, {times_sooner(middle, 'log_single')} and "
        f"{times_sooner(large, 'log_single')} times sooner at {small:,}, {middle:,} and {large:,} vertices, the teacher in its faster way; the "
        "neighbourhood does not grow with the hypergraph, and where it is the faster way the ratio does not either. Against a teacher that answers for all vertices to answer for one it is "
        f"{times_sooner(large, 'log_one_of_all')} times at {large:,}.",
        f"All answers at once: {times_sooner(large, 'log_whole')} times as soon at {large:,}; the student's hidden layer is four times as wide as the "
        "teacher's, and sparse products cost little. Ratios of time depend on the machine, its load and the number of features (50 here): a first measurement, "
        "by medians of calls that found the caches cold and with five seeds, gave 9.7 times at 10,000 vertices and 10.3 at 55,000.",
    ]
    if real:
        texts.append(
            f"On the real hypergraphs the teacher itself is {100 * (mean('teacher', REALS) - mean('perceptron', REALS)):.1f} points above the tuned "
            "perceptron (half of the vertices of the co-citation files are in no hyperedge): a student that is as good as its teacher is no further above. "
            "The paper's 16.3 points are a mean over eight hypergraphs, most of which are not here."
        )
    return " ".join(texts)
