"""The claim machinery: statistics, selection on validation data only, ledgers that resume, honest verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from limbeck.claims import claim_names, load_claim
from limbeck.claims import verify as verifying
from limbeck.claims.base import TUNING_SEEDS, Arm, Check, Claim, Outcome
from limbeck.claims.compare import compare
from limbeck.claims.statistics import overall, paired_difference
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.report.compare import write_comparison
from limbeck.tasks import generation


def test_intervals_of_three_seeds_are_the_range():
    d = paired_difference([1.0, 2.0, 6.0], [0.0, 0.0, 0.0])
    assert (d.low, d.high) == (1.0, 6.0) and d.mean == 3.0


def test_intervals_cover_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    for n in (5, 10):
        hits = 0
        for _ in range(300):
            d = paired_difference(generator.normal(0.3, 1, n), np.zeros(n))
            hits += d.low <= 0.3 <= d.high
        assert 0.88 <= hits / 300 <= 1.0


def test_differences_are_signed_so_that_positive_is_better():
    assert paired_difference([0.1, 0.2], [0.3, 0.5], higher_is_better=False).mean == pytest.approx(0.25)
    assert paired_difference([1.0, 1.0], [0.5, 0.5]).verdict() == "holds"
    assert paired_difference([1.0, 1.0], [0.5, 0.5]).verdict(0.6) == "fails"
    assert paired_difference([1.0, -1.0], [0.0, 0.0]).verdict() == "undecided"
    assert overall(["holds", "undecided", "fails"]) == "fails"
    assert overall(["holds", "undecided"]) == "undecided"


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict, int]]:
    """A claim without training, whose arms record their calls. Candidate 1 is best on validation and worst on test data."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    calls: list[tuple[str, dict, int]] = []

    def arm(name: str, base: float):
        def train(settings, seed):
            calls.append((name, dict(settings), seed))
            level = base + 0.01 * (seed % 10)
            return Outcome({"accuracy": level + settings.get("x", 0)}, {"accuracy": level - settings.get("x", 0)})

        return train

    claim = Claim(
        "kd",
        {
            "kd": Arm("method", "m", arm("kd", 0.9), ({"x": 0.0}, {"x": 0.2}, {"x": 0.1})),
            "supervised": Arm("baseline", "b", arm("supervised", 0.5)),
        },
        [Check("better", "kd", "supervised", "accuracy")],
        {"name": "made up"},
        seeds=3,
    )
    monkeypatch.setattr(verifying, "load_claim", lambda name, root=None: claim)
    return calls


def test_candidates_are_chosen_on_validation_data_of_tuning_seeds(made_up, tmp_path: Path):
    result = verifying.verify("kd", out=tmp_path, quiet=True)
    assert result["arms"]["kd"]["settings"] == {"x": 0.2}
    assert {s for n, _, s in made_up if n == "supervised"} == {0, 1, 2}
    tuned = [(settings["x"], seed) for n, settings, seed in made_up if n == "kd" and seed in TUNING_SEEDS]
    assert sorted(tuned) == sorted((x, s) for x in (0.0, 0.1, 0.2) for s in TUNING_SEEDS)
    assert result["arms"]["kd"]["metrics"]["accuracy"] == pytest.approx([0.7, 0.71, 0.72])
    assert result["verdict"] == "holds" and result["difference"]["mean"] == pytest.approx(0.2)
    stored = json.loads((tmp_path / "kd.json").read_text())
    for key in ("name", "claim", "verdict", "arms", "difference", "seeds", "data", "seconds", "commit", "note"):
        assert key in stored


def test_a_killed_check_goes_on_where_it_was(made_up, tmp_path: Path):
    verifying.verify("kd", quiet=True)
    count = len(made_up)
    ledger = next((tmp_path / "cache" / "claims").glob("kd-*.jsonl"))
    lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join(lines[:-2]) + "\n" + lines[-1][:20])  # one lost, one cut off in the middle
    verifying.verify("kd", quiet=True)
    assert len(made_up) == count + 2
    verifying.verify("kd", quiet=True, fresh=True)
    assert len(made_up) == 2 * count + 2


def test_few_seeds_give_no_verdict(made_up):
    result = verifying.verify("kd", seeds=2, quiet=True)
    assert result["verdict"] == "undecided" and result["note"].startswith("Only 2 seed(s)")
    with pytest.raises(InputError, match="at least 1"):
        verifying.verify("kd", seeds=0)


def test_every_claim_can_be_built_on_bundled_data(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    names = claim_names()
    assert {"kd", "bd-kd", "ofa-kd", "meal-v2"} <= set(names)
    for name in names:
        claim = load_claim(name)
        assert claim.name == name and claim.seeds >= 3
        assert any(c.headline for c in claim.checks)
        sides = {side for c in claim.checks for side in (c.method, c.baseline)}
        assert {arm for side in sides for arm in side.split(" - ")} <= set(claim.arms)
        tuned = [len(a.candidates) for a in claim.arms.values() if a.role == "baseline"]
        methods = [len(a.candidates) for a in claim.arms.values() if a.role == "method"]
        assert min(tuned) >= min(methods), f"{name}: a baseline has fewer candidates than the method"
    with pytest.raises(InputError, match="no claim to verify"):
        load_claim("supervised")


def test_comparison_gives_equal_budgets_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("limbeck.tasks.teachers.MIN_STEPS", 1)
    setup = {"student": "mlp-8", "teacher": ("mlp-32",), "train_size": 100, "teacher_epochs": 5.0, "augment": False}
    found = compare(["kd", "supervised"], setup, seeds=2, steps=20, out=tmp_path / "c", quiet=True)
    assert found["steps"] == 20 and set(found["methods"]) == {"kd", "supervised"}
    assert found["methods"]["kd"]["curve"][-1][0] == found["methods"]["supervised"]["curve"][-1][0] == 20
    (d,) = found["differences"]
    own = found["methods"]["kd"]["metrics"]["accuracy"][0] - found["methods"]["supervised"]["metrics"]["accuracy"][0]
    assert d["per_seed"][0] == pytest.approx(own)
    again = compare(["kd", "supervised"], setup, seeds=2, steps=20, out=tmp_path / "c", quiet=True)
    assert again["methods"]["kd"]["seconds"] == found["methods"]["kd"]["seconds"]
    with pytest.raises(UnknownNameError, match="unknown metric 'acuracy'; did you mean accuracy"):
        compare(["kd", "supervised"], setup, seeds=2, steps=20, metric="acuracy", out=tmp_path / "c", quiet=True)
    with pytest.raises(InputError, match="at least two"):
        compare(["kd", "KD"], setup)


def test_further_stages_count_towards_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("limbeck.tasks.teachers.MIN_STEPS", 1)
    setup = {
        "student": "mlp-8",
        "teacher": ("mlp-16",),
        "train_size": 100,
        "teacher_epochs": 1.0,
        "student_epochs": 10.0,
    }
    with pytest.raises(InputError, match="meal-v2 needs 10 updates before its last stage"):
        compare(["meal-v2", "supervised"], setup, seeds=2, steps=10, quiet=True)
    found = compare(["supervised", "meal-v2"], setup, seeds=2, steps=15, quiet=True)
    assert found["methods"]["meal-v2"]["curve"][-1][0] == 5  # ten updates went into the student's own stage


def test_methods_of_several_trainings_are_not_compared_by_one_budget() -> None:
    setup = {"task": "digits", "train_size": 60, "student": "mlp-8"}
    with pytest.raises(InputError, match="gt-self-distillation is 7 trainings"):
        compare(["gt-self-distillation", "supervised"], setup, seeds=2, steps=200, quiet=True)


def test_a_check_may_compare_two_differences():
    from limbeck.claims.verify import _per_seed

    arms = {name: {"metrics": {"accuracy": values}} for name, values in {"a": [3.0, 5.0], "b": [1.0, 1.0]}.items()}
    assert _per_seed(arms, "a", "accuracy") == [3.0, 5.0]
    assert _per_seed(arms, "a - b", "accuracy") == [2.0, 4.0]


def test_methods_that_distil_data_are_compared_at_equal_size(tmp_path: Path):
    setup = {
        "ipc": 2,
        "judge_seeds": 2,
        "judge_steps": 4,
        "judge_networks": ("mlp-16",),
        "batch_real": 4,
        "network": "convnet-w4-d2",
    }
    found = compare(["datadam", "dm"], setup, seeds=2, steps=3, out=tmp_path, quiet=True)
    assert found["budget"] == "2 samples per class"
    assert set(found["methods"]) == {"datadam", "dm"} and len(found["methods"]["dm"]["metrics"]["accuracy"]) == 2
    assert found["methods"]["dm"]["metrics"]["samples"] == [20, 20]
    assert "2 samples per class" in write_comparison(found, tmp_path).read_text()


def test_samplers_are_compared_with_one_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(generation.PLANE, "test", 100)
    setup = {
        "task": "ring",
        "teacher_network": "mlp-w8-b1",
        "teacher_steps": 20,
        "teacher_nfe": 3,
        "pairs": 16,
        "batch_size": 8,
        "judge_count": 30,
        "distil_steps": 2,
    }
    found = compare(["instaflow", "swiftbrush"], setup, seeds=2, steps=2, out=tmp_path / "c", quiet=True)
    assert found["metric"] == "sliced_wasserstein" and not found["higher_is_better"]
    assert found["budget"] == "one teacher (flow), batches of 8"
    assert found["methods"]["swiftbrush"]["metrics"]["nfe"] == [1.0, 1.0]
    assert len(list((tmp_path / "cache" / "diffusion").glob("*/model.safetensors"))) == 1
    with pytest.raises(InputError, match="not on a pipeline"):
        compare(["instaflow", "swiftbrush"], {**setup, "teacher": ("x",)}, seeds=2, steps=2, quiet=True)


def test_a_measurement_depends_on_the_bases_of_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = load_claim("swiftbrush")
    read = verifying.inspect.getsource
    before = verifying.source_key("swiftbrush", claim)
    changed = "limbeck.methods.samplers.score_base"
    monkeypatch.setattr(verifying.inspect, "getsource", lambda m: read(m) + "#" * (m.__name__ == changed))
    assert verifying.source_key("swiftbrush", claim) != before
    changed = "limbeck.methods.datasets.base"
    assert verifying.source_key("swiftbrush", claim) == before


def test_methods_over_graphs_are_compared_with_as_many_passes(tmp_path: Path) -> None:
    setup = {"task": "sbm", "generated_nodes": 300, "epochs": "3", "teacher_epochs": "3", "val_size": 40}
    found = compare(["lighthgnn", "vqgraph"], setup, seeds=2, out=tmp_path / "c", quiet=True)
    assert found["metric"] == "accuracy" and found["budget"] == "3 passes of the student, 3 of its teacher"
    assert [len(m["metrics"]["accuracy"]) for m in found["methods"].values()] == [2, 2]
    with pytest.raises(InputError, match="use --epochs"):
        compare(["lighthgnn", "vqgraph"], setup, seeds=2, steps=4, quiet=True)
    with pytest.raises(InputError, match="topological-concentration does not distil into a network on nodes"):
        compare(["lighthgnn", "topological-concentration"], setup, seeds=2, quiet=True)
    with pytest.raises(InputError, match="no common measure"):
        compare(["invgc", "notears-topo"], seeds=2, quiet=True)
