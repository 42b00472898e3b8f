"""Random selection, and what all selections share: counts, artifacts, errors."""

from __future__ import annotations

import pytest
import torch

import limbeck
from limbeck.core.errors import InputError
from limbeck.methods.datasets.random_selection import RandomSelection
from tests.helpers import resumed_equals_uninterrupted
from tests.methods.datasets.selections import SHORT, build, data, images


def test_so_many_of_each_class_without_repetition():
    made = RandomSelection(images(), ipc=4).select()
    assert torch.bincount(made.labels).tolist() == [4, 4, 4] and len(made.index.unique()) == 12
    x, y = images()
    assert torch.equal(made.inputs, x[made.index]) and torch.equal(made.labels, y[made.index])
    again = RandomSelection(images(), ipc=4).select()
    other = RandomSelection(images(), ipc=4, seed=1).select()
    assert torch.equal(made.index, again.index) and not torch.equal(made.index, other.index)


def test_a_ratio_keeps_proportions_and_the_total():
    x, y = images(100)
    y = torch.where(torch.arange(100) < 70, 0, y)
    counts = torch.bincount(y)
    made = RandomSelection((x, y), ratio=0.25).select()
    got = torch.bincount(made.labels)
    assert len(made) == 25 and bool(((got - 0.25 * counts).abs() < 1).all())
    # a ratio does not ask that every class has ipc samples
    assert RandomSelection((x, y), ratio=0.25, ipc=50).counts.tolist() == got.tolist()
    random = RandomSelection((x, y), ratio=0.25).random_selection(10**6)
    assert torch.equal(torch.bincount(random.labels), got) and not torch.equal(random.index, made.index)


def test_uniform_over_seeds():
    hits = torch.zeros(12)
    for seed in range(600):
        hits[RandomSelection(images(12), ipc=1, seed=seed).select().index] += 1 / 600
    assert (hits - 0.25).abs().max() < 0.08


def test_nothing_is_given_before_choosing():
    with pytest.raises(InputError, match="has not chosen yet"):
        RandomSelection(images(), ipc=2).distilled()
    with pytest.raises(InputError, match="ipc 21 is more than the 20"):
        RandomSelection(images(), ipc=21)
    with pytest.raises(InputError, match="ratio"):
        RandomSelection(images(), ratio=1.5)


def test_a_run_and_its_artifact(tmp_path):
    run = limbeck.fit(
        RandomSelection,
        data(),
        student=build,
        test=data(30),
        ipc=3,
        out=tmp_path / "run",
        engine={"progress": False},
        **SHORT,
    )
    assert [row["who"] for row in run.result["rows"]] == ["distilled", "whole set"]
    made = limbeck.load(tmp_path / "run").content
    assert torch.equal(made.index, run.method.chosen) and made.bits == 8
    torch.testing.assert_close(made.inputs, data().fetch(made.index, None).inputs)


def test_resume_is_exact(tmp_path):
    resumed_equals_uninterrupted(lambda: RandomSelection(images(), ipc=3), images(), tmp_path, stops=(), every=1)
