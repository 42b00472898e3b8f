"""DisWOT: the search, the student, resume in every stage, users' own modules, mistakes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck.blocks.search_spaces import Budget, SearchSpace
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.method import fingerprint
from limbeck.losses.channels import inter_channel_correlation
from limbeck.losses.logits import forward_kl
from limbeck.losses.relations import similarity_preserving
from limbeck.methods.search import DisWOT
from limbeck.metrics.cost import count_parameters
from limbeck.networks import build
from limbeck.networks.spaces import cell_space
from tests.helpers import lines, resumed_equals_uninterrupted

SHAPE = {"in_shape": (1, 8, 8), "num_classes": 4}
QUICK = {
    "candidates": 12,
    "population": 6,
    "sample": 3,
    "parents": 2,
    "recheck": 2,
    "recheck_repeats": 1,
    "score_batch": 16,
}


def data(count: int = 48) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    return TensorData(torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 4)


def own_space() -> SearchSpace:
    """Networks that no registry knows."""

    def make(depth: int, norm: bool) -> nn.Module:
        body = [
            layer
            for n in range(depth)
            for layer in (
                nn.Conv2d(1 if n == 0 else 6, 6, 3, padding=1),
                nn.BatchNorm2d(6) if norm else nn.Identity(),
                nn.ReLU(),
            )
        ]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    return SearchSpace("own", {"depth": (1, 2, 3), "norm": (True, False)}, make)


def method(**settings) -> DisWOT:
    torch.manual_seed(1)
    teacher = build("cell-444444-w4-n2-s2", **SHAPE)
    space = cell_space(SHAPE["in_shape"], 4, width=4, stages=2).space
    return DisWOT(space, teacher, **{**QUICK, "steps": 6, "batch_size": 16, "evaluations": 0, **settings})


def test_the_best_of_the_history_within_the_budget_is_the_student():
    made = method(recheck=0, combine="sum")
    made.budget = {"parameters": 4000}
    teacher = fingerprint(made.teachers)
    student = made.search(data(), seed=3)
    assert fingerprint(made.teachers) == teacher
    joined = {code: sum(scores.values()) for code, scores in made.record.scores.items()}
    assert made.members == {"student": max(joined, key=joined.__getitem__)}
    assert max(made.sizes.values()) <= 4000 and count_parameters(student) == made.sizes[made.members["student"]]
    assert student.limbeck_name.startswith("cell-")
    again = method(recheck=0, combine="sum")
    again.budget = {"parameters": 4000}
    assert fingerprint(again.search(data(), seed=3)) == fingerprint(student)


def test_scores_do_not_depend_on_the_teachers_weights_unless_asked():
    one, two = method(), method()
    with torch.no_grad():
        for parameter in two.teachers.parameters():
            parameter.add_(0.1)
    one.search(data())
    two.search(data())
    assert one.record.scores == two.record.scores
    three = method(teacher_init="own")
    three.search(data())
    assert three.record.scores != one.record.scores


def test_the_loss_is_the_sum_of_its_terms():
    made = method(temperature=2.0, alpha=0.6, relation_weight=3.0, semantic_weight=2.0)
    student = made.search(data())
    batch = data().fetch(torch.arange(16), None)
    losses = made.losses(batch)
    teacher = made.teachers.models[0]
    maps = {}
    hooks = [n.last.register_forward_hook(lambda m, _, out: maps.__setitem__(m, out)) for n in (student, teacher)]
    zs, zt = student(batch.inputs), teacher(batch.inputs)
    for hook in hooks:
        hook.remove()
    expected = (
        0.4 * F.cross_entropy(zs, batch.labels)
        + 0.6 * 4 * forward_kl(zs, zt, 2.0)
        + 3 * similarity_preserving(maps[student.last], maps[teacher.last])
        + 2 * inter_channel_correlation(maps[student.last], maps[teacher.last])
    )
    torch.testing.assert_close(losses.total, expected)
    losses.total.backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.head.weight.grad is not None
    plain = method(temperature=2.0, alpha=0.6)
    plain.search(data())
    assert set(plain.losses(batch)) == {"ce", "kd"}


def test_works_in_a_bare_loop():
    made = method()
    with pytest.raises(InputError, match="no student yet"):
        made(data().fetch(torch.arange(4), None))
    x, y = data().inputs, data().labels
    made.search((x, y))
    optimizer = torch.optim.Adam(made.trainable_parameters(), lr=0.01)
    first = made((x, y)).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss = made((x, y))
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    made.search((x, y), seed=1)  # a second search forgets the first
    assert len(made.record.searcher.history) == QUICK["candidates"] and set(made.networks) == {"student"}


def beside_random() -> DisWOT:
    made = method()
    made.with_random = True
    return made


def test_resume_within_the_search_is_exact(tmp_path: Path):
    """Steps 12 and 13 are the second look at the best."""
    made = resumed_equals_uninterrupted(beside_random, data(), tmp_path, (7, 13), every=2)
    assert set(made.networks) == {"student", "random member"}
    assert made.members["student"] != made.members["random member"]


def test_resume_within_the_trainings_is_exact(tmp_path: Path):
    settings = EngineConfig(progress=False, checkpoint_steps=2)

    def crash(step: int) -> None:
        if step == 5:
            raise RuntimeError("crash")

    whole = beside_random()
    Engine(tmp_path / "whole", settings, seed=3).run(whole, whole.stages(data(), None, seed=0))
    for number in (1, 2):
        broken = beside_random()
        stages = broken.stages(data(), None, seed=0)
        stages[number].after_step = crash
        with pytest.raises(RuntimeError, match="crash"):
            Engine(tmp_path / "broken", settings, seed=3).run(broken, stages, resume=True)
    other = beside_random()
    Engine(tmp_path / "broken", settings, seed=3).run(other, other.stages(data(), None, seed=0), resume=True)
    assert fingerprint(other.networks) == fingerprint(whole.networks)
    assert other.record.scores == whole.record.scores and other.sizes == whole.sizes
    assert other.counters == whole.counters and lines(tmp_path / "broken") == lines(tmp_path / "whole")


def test_own_modules_through_fit(tmp_path: Path):
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(1, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4)
    )
    train = (data().inputs, data().labels)
    budget = Budget(lambda code: {"blocks": code[0] + 1}, {"blocks": 2})
    run = limbeck.fit(
        "diswot", train, student=(own_space(), budget), teacher=teacher, test=train, out=tmp_path, epochs=2, batch_size=16,
        engine={"progress": False}, **QUICK,
    )  # fmt: skip
    assert [row["who"] for row in run.result["rows"]] == ["student", "teacher"]
    assert isinstance(run.result["rows"][0]["score"], float)
    assert [p["title"] for p in run.result["pictures"]] == [
        "The search",
        "What candidates scored",
        "Cost and score",
        "Cost and accuracy",
    ]
    options = json.loads((tmp_path / "artifact" / "artifact.json").read_text())["options"]
    assert options["depth"] <= 2
    table = json.loads((tmp_path / "artifact" / "search.json").read_text())
    assert {row["options"]["depth"] for row in table["candidates"]} <= {1, 2}
    empty = own_space().build(own_space().code(**options))
    loaded = limbeck.load(tmp_path, model=empty).content
    torch.testing.assert_close(loaded(train[0]), run.method.student.eval()(train[0]))


def test_a_run_by_name_judges_a_random_member_too(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    run = limbeck.fit(
        "diswot", task="digits", space="mlp-8,mlp-16,mlp-24,mlp-32-8", teacher="mlp-32", teacher_epochs=1, train_size=100, compare="classes",
        teacher_init="own", init="own", max_parameters=2500, out=tmp_path / "run", epochs=2, engine={"progress": False}, **QUICK,
    )  # fmt: skip
    rows = {row["who"]: row for row in run.result["rows"]}
    assert list(rows) == ["student", "teacher", "random member"]
    assert max(rows["student"]["parameters"], rows["random member"]["parameters"]) <= 2500
    assert run.result["chosen"].startswith("mlp-")
    assert type(limbeck.load(tmp_path / "run").content).__name__ == "MLP"


def test_dead_candidates_never_win():
    made = method()
    made.search(data())
    dead = made.judge((0, 0, 0, 0, 0, 0))
    assert dead == {"relation": -math.inf, "semantic": -math.inf}
    nothing = SearchSpace("nothing", {"edge": ("none",)}, lambda edge: build("cell-111111-w4-s2", **SHAPE))
    lost = DisWOT(nothing, build("cell-444444-w4-s2", **SHAPE), **{**QUICK, "algorithm": "random"})
    with pytest.raises(InputError, match="says anything"):
        lost.search(data())


def test_mistakes_are_named():
    teacher = build("cell-444444-w4-s2", **SHAPE)
    space = cell_space(SHAPE["in_shape"], 4, width=4, stages=2).space
    batch = data().fetch(torch.arange(8), None)
    with pytest.raises(InputError, match="searches a SearchSpace, not a CellNetwork"):
        DisWOT(teacher, teacher)
    with pytest.raises(InputError, match="for one teacher, not 2"):
        DisWOT(space, [teacher, copy.deepcopy(teacher)])
    with pytest.raises(InputError, match=r"parameters <= 10 \(the least seen is 88\)"):
        DisWOT(own_space(), teacher, budget={"parameters": 10}).check(batch)
    with pytest.raises(UnknownNameError, match="cost 'joules'"):
        DisWOT(space, teacher, budget={"joules": 10}).check(batch)
    with pytest.raises(InputError, match="no labels"):
        DisWOT(space, teacher).check(Batch(batch.inputs))
    with pytest.raises(InputError, match=r"\(8, 4\) and the teacher \(8, 5\)"):
        DisWOT(space, build("cell-444444-w4-s2", in_shape=(1, 8, 8), num_classes=5)).check(batch)
    with pytest.raises(InputError, match="'beauty' is none of relation"):
        DisWOT(space, teacher, scores=("beauty",))
    with pytest.raises(InputError, match="no linear layer"):
        DisWOT(space, nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())).check(batch)
    with pytest.raises(InputError, match="builds a int"):
        DisWOT(SearchSpace("numbers", {"n": (1, 2)}, lambda n: n), teacher).check(batch)


def test_a_check_leaves_everything_as_it_was():
    made = method()
    before, state, counters = fingerprint(made), torch.get_rng_state(), dict(made.counters)
    made.check(data().fetch(torch.arange(8), None))
    assert (fingerprint(made), dict(made.counters)) == (before, counters)
    assert torch.equal(torch.get_rng_state(), state) and made.record is None
