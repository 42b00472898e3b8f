"""CDA: the curriculum is the only difference to SRe2L, and it is the published one."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.engine import Engine
from limbeck.core.errors import InputError
from limbeck.methods.datasets.cda import CDA
from limbeck.methods.datasets.sre2l import SRe2L
from tests.helpers import resumed_equals_uninterrupted
from tests.methods.datasets.test_sre2l import QUIET, data, run, student, teacher

torch.set_num_threads(1)


def method(**settings) -> CDA:
    return CDA(data(), student, teacher(), **{"ipc": 2, "iterations": 10, **settings})


def test_the_crops_go_from_the_whole_to_parts():
    made = method(lowest_crop=0.08)
    assert made.crops(0) == (1.0, 1.0)
    assert made.crops(5)[0] == pytest.approx(0.54)
    assert made.curriculum.bound(10, 10) == pytest.approx(0.08)
    assert method(milestone=0.5).crops(5)[0] == 0.35
    assert [method(curriculum=c).crops(0)[0] for c in ("linear", "step", "none", "whole", "reversed")] == [
        1.0,
        1.0,
        0.35,
        1.0,
        0.35,
    ]


def test_without_a_curriculum_it_is_sre2l():
    plain = run(SRe2L(data(), student, teacher(), ipc=2, iterations=10))
    assert torch.equal(run(method(curriculum="none")).images, plain.images)
    assert not torch.equal(run(method()).images, plain.images)
    whole = run(SRe2L(data(), student, teacher(), ipc=2, iterations=10, crops=False))
    assert torch.equal(run(method(curriculum="whole")).images, whole.images)


def test_the_bound_is_logged_and_recorded():
    made = method(milestone=0.7)
    rows = Engine(None, QUIET, seed=1).run(made, made.stages())
    logged = [r["crop"] for r in rows if r["split"] == "train"]
    assert logged == pytest.approx([made.crops(i)[0] for i in range(10)])
    assert made.distilled().recipe["recovered"] == {"curriculum": "cosine", "lowest_crop": 0.35, "milestone": 0.7}


def test_the_first_view_is_the_whole_image_and_later_ones_are_not():
    made = method(jitter=0)
    group = made.blocks[0][0]
    whole = torch.tensor([0.0, 0, 1, 1])
    assert torch.equal(made.draw(group, 0)[:4], whole)
    assert sum(not torch.equal(made.draw(group, i)[:4], whole) for i in range(5, 10)) >= 4


def test_resume_is_exact(tmp_path):
    resumed_equals_uninterrupted(lambda: method(images_together=4), data(), tmp_path, stops=(6, 13), every=5)


def test_settings_are_checked():
    for wrong, line in (({"milestone": 0}, "milestone must be"), ({"curriculum": "fast"}, "curriculum must be one of")):
        with pytest.raises(InputError, match=line):
            method(**wrong)
    assert CDA.Config.make("paper").iterations == 4000 and CDA.Config.make("tiny").r_bn == 0.05
