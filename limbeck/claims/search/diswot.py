"""Do scores of untrained networks rank students as distillation does, better than other zero-cost scores and counting parameters, and how much sooner?

Two kinds of truth. (1) The published accuracies on CIFAR-100 of 64 residual networks after distillation; nothing is trained here. Inputs are images of CIFAR-10 where
they are given (their labels spread over 100 classes), else smooth noise. (2) 30 random cells for every seed, other ones each time, distilled here on the digits and on small
images of CIFAR-10 from the cell of 3x3 convolutions; their accuracies on test data are the truth, kept under the arm ``trained`` (``cell``: the digits in the network's name).
Nothing is chosen by these accuracies: standardised scores are the method's default, the paper's plain sum stands beside it.

Settings are fixed beforehand: all scores see the same batch; one draw of weights; one recipe of distillation for all cells. Seconds are of the processor, of one process.
Before the measurement, on a seed that is none of its own, the semantic score was brought in line with the published code (classes with negligible gradients say nothing).
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.scored_search import Combination, combine_scores
from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.models import common
from limbeck.core.batch import Batch
from limbeck.core.data import Stream, mix_seed
from limbeck.core.files import write_json
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.losses.logits import forward_kl
from limbeck.metrics.distillability import PairScorer, draw_batches
from limbeck.metrics.rank_correlations import rank_correlations
from limbeck.metrics.zero_cost import zero_cost
from limbeck.networks import build
from limbeck.networks.spaces import cell_space, depth_space
from limbeck.tasks.base import Task, cache_folder, hash_of
from limbeck.tasks.s0_accuracies import DISTILLED
from limbeck.tasks.teachers import predictions, reference_teacher

STUDENTS, WIDTH, STAGES = 30, 8, 2
TEACHER = f"cell-444444-w{WIDTH}-n1-s{STAGES}"
RECIPE: Mapping[str, Any] = {"steps": 120, "batch_size": 64, "lr": 5e-3, "temperature": 4.0, "alpha": 0.9}
SCORE_BATCH, TABLE_BATCH = 64, 16
GROUNDS: Mapping[str, Mapping[str, Any]] = {
    "digits": {"name": "digits", "train_size": None, "augment": False},
    "cifar": {"name": "cifar10", "train_size": 1000, "augment": False, "image_size": 16},
}
PROXIES = ("parameters", "flops", "naswot", "synflow", "snip", "gradient-norm", "fisher", "grasp", "zen")
ON_TABLE = ("parameters", "flops", "naswot", "synflow", "snip")
"""Proxies that are held against the published table too; the others take minutes there."""
JOINED: Mapping[str, Combination] = {"diswot": "zscore", "diswot-sum": "sum", "diswot-rank": "rank"}

Table = dict[str, list[float]]


def ground(data_root: str | None, name: str) -> Task:
    return common.task(data_root, **GROUNDS[name])


# ---- scores --------------------------------------------------------------------------------------------------------------


def scored(
    members: Sequence[str], teacher: str, batch: Batch, classes: int, seed: int, proxies: Sequence[str]
) -> tuple[Table, Table]:
    """Scores of members by name, and the processor's seconds that each score took for each of them."""
    shape = tuple(batch.inputs.shape[1:])
    scorer = PairScorer(fresh(teacher, shape, classes, seed), [batch], seed=mix_seed(seed, 1))
    pairs: dict[int, dict[str, float]] = {}
    table: Table = {name: [] for name in proxies}
    seconds: Table = {name: [] for name in ("diswot", *proxies)}
    assert batch.labels is not None
    for number, member in enumerate(members):
        began = time.process_time()
        pairs[number] = scorer(fresh(member, shape, classes, mix_seed(seed, 2, number)), number)
        seconds["diswot"].append(time.process_time() - began)
        for name in proxies:
            began = time.process_time()
            network = fresh(member, shape, classes, mix_seed(seed, 2, number))
            table[name].append(zero_cost(network, batch.inputs, batch.labels, name)[name])
            seconds[name].append(time.process_time() - began)
    for name in ("relation", "semantic"):
        table[name] = [pairs[n][name] for n in pairs]
    for name, how in JOINED.items():
        joined = combine_scores(pairs, how)
        table[name] = [joined[n] for n in pairs]
    return table, seconds


def fresh(name: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    with preserved_random_state():
        seed_everything(seed)
        return build(name, in_shape=shape, num_classes=classes)


@functools.lru_cache(maxsize=8)
def on_published(data_root: str | None, seed: int) -> dict[str, dict[str, float]]:
    """Rank correlations with the published table, by score."""
    space = depth_space((3, 32, 32), 100)
    members = [f"stageresnet-{a}-{b}-{c}-w16" for a, b, c in DISTILLED]
    assert space.teacher is not None
    table, _ = scored(members, space.teacher, table_batch(data_root, seed), 100, mix_seed(seed, 11), ON_TABLE)
    return rank_correlations(table, list(DISTILLED.values()), table["parameters"])


def table_batch(data_root: str | None, seed: int) -> Batch:
    """16 images (3, 32, 32) with labels of 100 classes."""
    generator = torch.Generator().manual_seed(mix_seed(seed, 12))
    spread = torch.randint(10, (TABLE_BATCH,), generator=generator)
    if common.available("cifar10", data_root):
        drawn = draw_batches(common.task(data_root, "cifar10", None, augment=False).train, TABLE_BATCH, 1, seed)[0]
        assert drawn.labels is not None
        return Batch(drawn.inputs, 10 * drawn.labels + spread)
    coarse = torch.randn(TABLE_BATCH, 3, 8, 8, generator=generator)
    labels = 10 * torch.randint(10, (TABLE_BATCH,), generator=generator) + spread
    return Batch(F.interpolate(coarse, size=(32, 32), mode="bicubic"), labels)


# ---- students that are distilled here ------------------------------------------------------------------------------------


def students(seed: int, shape: tuple[int, ...]) -> list[str]:
    """Different random cells with a way from the input to the output."""
    space = cell_space(shape, 10, width=WIDTH, stages=STAGES).space
    generator = torch.Generator().manual_seed(mix_seed(seed, 21))
    names: dict[str, None] = {}
    x = torch.ones(1, *shape)
    while len(names) < STUDENTS:
        network = space.build(space.sample(generator)).eval()
        paths: Any = network.get_submodule("stages.0.0")
        if bool(paths(torch.ones(1, WIDTH, *x.shape[2:])).abs().sum() > 0):
            names[str(vars(network)["limbeck_name"])] = None
    return list(names)


def distil(name: str, on: Task, taught: Tensor, seed: int) -> nn.Module:
    """A cell trained from the teacher's logits (n, N) of all training samples."""
    network = fresh(name, on.in_shape, on.num_classes, seed).train()
    stream = Stream(on.train, RECIPE["batch_size"], seed=seed)
    optimizer = torch.optim.AdamW(network.parameters(), RECIPE["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, RECIPE["steps"])
    for step in range(RECIPE["steps"]):
        batch = stream.batch(step)
        assert batch.index is not None and batch.labels is not None
        logits = network(batch.inputs)
        kd = RECIPE["temperature"] ** 2 * forward_kl(logits, taught[batch.index], RECIPE["temperature"])
        loss = (1 - RECIPE["alpha"]) * F.cross_entropy(logits, batch.labels) + RECIPE["alpha"] * kd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@functools.lru_cache(maxsize=16)
def trained(data_root: str | None, where: str, seed: int) -> Table:
    """``test`` and ``val`` accuracies of the students of a seed, and the processor's ``seconds`` of each; kept in the cache folder."""
    on = ground(data_root, where)
    names = students(seed, on.in_shape)
    key = hash_of(dict(RECIPE), TEACHER, names, on.fingerprint, seed)
    path = cache_folder() / "claims" / f"diswot-students-{where}-{seed}-{key}.json"
    found: Table = json.loads(path.read_text()) if path.exists() else {"test": [], "val": [], "seconds": []}
    teacher = reference_teacher(on, TEACHER, progress=False)
    taught = predictions(teacher, on.train)[0]
    for number in range(len(found["test"]), len(names)):
        began = time.process_time()
        network = distil(names[number], on, taught, mix_seed(seed, 22, number))
        found["seconds"].append(time.process_time() - began)
        for part in ("val", "test"):
            logits, labels = predictions(network, getattr(on, part))
            found[part].append(float((logits.argmax(1) == labels).double().mean()))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return found


@functools.lru_cache(maxsize=16)
def on_trained(data_root: str | None, where: str, seed: int) -> tuple[dict[str, dict[str, float]], Table]:
    """Rank correlations with accuracies after distillation here, by score, and the seconds that scores took."""
    on = ground(data_root, where)
    names = students(seed, on.in_shape)
    batch = draw_batches(on.train, SCORE_BATCH, 1, mix_seed(seed, 23))[0]
    table, seconds = scored(names, TEACHER, batch, on.num_classes, mix_seed(seed, 24), PROXIES)
    truth = trained(data_root, where, seed)
    table["trained"] = truth["val"]
    return rank_correlations(table, truth["test"], table["parameters"]), {**seconds, "trained": truth["seconds"]}


# ---- the claim -----------------------------------------------------------------------------------------------------------


def claim(data_root: str | None = None) -> Claim:
    """The digits, and CIFAR-10 where it is given."""
    grounds = ["digits", *(["cifar"] if common.available("cifar10", data_root) else [])]

    def by(score: str) -> Callable[[Mapping[str, Any], int], Outcome]:
        def measure(chosen: Mapping[str, Any], seed: int) -> Outcome:
            test: dict[str, float] = {}
            if score in (*JOINED, "relation", "semantic", *ON_TABLE):
                found = on_published(data_root, seed)[score]
                test |= {"published_tau": found["kendall"], "published_rho": found["spearman"]}
                test |= {"published_picked": found["picked"] / 100}
                if score != "parameters":
                    test["published_partial"] = found["partial"]
            for where in grounds:
                ranks, seconds = on_trained(data_root, where, seed)
                names = {"tau": "kendall", "rho": "spearman", "picked": "picked"}
                test |= {f"{where}_{short}": ranks[score][long] for short, long in names.items()}
                if score != "parameters":
                    test[f"{where}_partial"] = ranks[score]["partial"]
                spent = seconds.get("diswot" if score in (*JOINED, "relation", "semantic") else score)
                assert spent is not None
                test[f"{where}_log10_seconds"] = math.log10(max(float(np.mean(spent)), 1e-6))
            test["trained_tau"] = float(np.mean([test[f"{where}_tau"] for where in grounds]))
            if score == "trained":
                for where in grounds:
                    names_of = students(seed, ground(data_root, where).in_shape)
                    accuracies = trained(data_root, where, seed)["test"]
                    for number, (name, accuracy) in enumerate(zip(names_of, accuracies, strict=True), 1):
                        test[f"{where} cell {number:02}"] = float(name.split("-")[1])
                        test[f"{where} accuracy {number:02}"] = accuracy
            return Outcome({}, test)

        return measure

    def chance(chosen: Mapping[str, Any], seed: int) -> Outcome:
        test = {
            "published_tau": 0.0,
            "trained_tau": 0.0,
            "published_picked": float(np.mean(list(DISTILLED.values()))) / 100,
        }
        for where in grounds:
            test[f"{where}_picked"] = float(np.mean(trained(data_root, where, seed)["test"]))
        return Outcome({}, test)

    described = {
        "diswot": "relation and semantic scores, each standardised, summed (the default)",
        "diswot-sum": "their plain sum (the paper)",
        "diswot-rank": "the sum of their ranks",
        "relation": "relations between samples alone",
        "semantic": "semantics of classes alone",
    }
    roles: dict[str, Any] = {"diswot": "method"}
    arms = {name: Arm(roles.get(name, "control"), text, by(name)) for name, text in described.items()}
    arms |= {name: Arm("baseline", f"zero-cost score: {name}", by(name)) for name in PROXIES}
    arms["trained"] = Arm("baseline", "every student distilled, ranked by validation accuracy", by("trained"))
    arms["chance"] = Arm("control", "what a random order gives on average", chance)
    faster: dict[str, Any] = {"metric": "digits_log10_seconds", "higher_is_better": False}
    return Claim(
        name="diswot",
        arms=arms,
        checks=[
            Check("it ranks the students distilled here better than NASWOT", "diswot", "naswot", "trained_tau"),
            Check("… than SynFlow", "diswot", "synflow", "trained_tau"),
            Check("… than their numbers of parameters", "diswot", "parameters", "trained_tau"),
            Check("on the published table its tau is above 0.4", "diswot", "chance", "published_tau", margin=0.4),
            Check(
                "a score takes less than a tenth of distilling the student", "diswot", "trained", margin=1.0, **faster
            ),
            Check("… less than a 180th", "diswot", "trained", margin=math.log10(180), headline=False, **faster),
            *(
                Check(f"here: tau against {name}", "diswot", name, "trained_tau", headline=False)
                for name in ("snip", "gradient-norm", "fisher", "grasp", "zen", "flops", "diswot-sum", "diswot-rank")
            ),
            *(
                Check(f"published: tau against {name}", "diswot", name, "published_tau", headline=False)
                for name in ("parameters", "flops", "naswot", "synflow", "snip", "diswot-sum")
            ),
            *(
                Check(
                    f"its pick on {where} is better than the mean student",
                    "diswot",
                    "chance",
                    f"{where}_picked",
                    headline=False,
                )
                for where in grounds
            ),
        ],
        data={where: ground(data_root, where).describe() for where in grounds},
        seeds=3,
        note=note,
        settings={
            **RECIPE,
            "students": STUDENTS,
            "teacher": TEACHER,
            "score_batch": SCORE_BATCH,
            "table_batch": TABLE_BATCH,
        },
    )


def note(result: Mapping[str, Any]) -> str:
    """What the numbers say, honest baselines first."""
    arms = result["arms"]

    def mean(arm: str, metric: str) -> float:
        return float(np.mean(arms[arm]["metrics"][metric]))

    def row(metric: str, names: Sequence[str]) -> str:
        return ", ".join(f"{name} {mean(name, metric):.2f}" for name in names)

    ratio = 10 ** (mean("trained", "digits_log10_seconds") - mean("diswot", "digits_log10_seconds"))
    return (
        f"Kendall's tau with the published accuracies: {row('published_tau', ('diswot', 'diswot-sum', 'relation', 'semantic', *ON_TABLE))}; "
        f"given the number of parameters DisWOT keeps {mean('diswot', 'published_partial'):.2f}. With the students distilled here: "
        f"{row('trained_tau', ('diswot', 'diswot-sum', 'relation', 'semantic', *PROXIES, 'trained'))}. Scoring a cell on the digits took "
        f"{ratio:.0f} times less of the processor than distilling it for {RECIPE['steps']} updates; published recipes are some hundred times longer. Small cells on small images: "
        "the benchmark spaces of the paper were not trained here."
    )
