"""The course of shrinking: the ramp's rate, phases, forward passes."""

from __future__ import annotations

import math

import pytest

from limbeck.blocks.later_stream import LaterStream
from limbeck.blocks.shrinking import ShrinkingPlan, same_passes
from limbeck.core.data import Stream, TensorData
from limbeck.core.errors import InputError


def test_effective_rate_of_sub_networks_rises_linearly_to_the_rate_at_full_speed() -> None:
    plan = ShrinkingPlan.of(240, start=0.5, ramp=1 / 12, networks=4)
    assert (plan.begins, plan.full_speed) == (100, 120)

    def rate(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / 240))

    for step in range(100, 120):
        assert plan.weight(step, rate) * rate(step) == pytest.approx(rate(120) * (step - 100) / 20)
    assert plan.weight(99, rate) == 0 and plan.weight(120, rate) == plan.weight(239, rate) == 1


def test_passes_are_those_of_the_published_small_check() -> None:
    """24 epochs of 14 steps, four networks."""
    for start, ramp, passes in [(0.5, 1 / 12, 924), (0.5, 0, 840), (0.0, 0, 1344)]:
        assert ShrinkingPlan.of(336, start=start, ramp=ramp, networks=4).passes == passes
    assert ShrinkingPlan.of(336, start=19 / 24, ramp=0, networks=4).passes == 546
    with_teacher = ShrinkingPlan.of(100, start=0.5, ramp=0, networks=4, teacher=True)
    assert with_teacher.passes == 50 + 50 * 5


def test_another_plan_of_equal_cost() -> None:
    def late(steps: int) -> ShrinkingPlan:
        return ShrinkingPlan.of(steps, start=0.8, ramp=0, networks=4)

    steps = same_passes(924, late)
    assert late(steps).passes == pytest.approx(924, abs=3) and steps > 336


def test_phases_open_kernels_then_depths_then_widths() -> None:
    plan = ShrinkingPlan.of(
        100, start=0.4, ramp=0.1, networks=2, teacher=True, options={"width": 3, "kernel": 3, "depth": 2}
    )
    assert [(p.name, dict(p.least)) for p in plan.phases] == [
        ("kernel", {"width": 2, "kernel": 0, "depth": 1}),
        ("depth 1", {"width": 2, "kernel": 0, "depth": 0}),
        ("width 1", {"width": 1, "kernel": 0, "depth": 0}),
        ("width 2", {"width": 0, "kernel": 0, "depth": 0}),
    ]
    assert [(p.first, p.end) for p in plan.phases] == [(40, 55), (55, 70), (70, 85), (85, 100)]
    assert plan.begins == plan.full_speed == 40
    assert plan.phase(39) is None and plan.phase(40).name == "kernel" and plan.phase(400).name == "width 2"
    with pytest.raises(InputError, match="each of 4 phases"):
        ShrinkingPlan.of(5, start=0.4, ramp=0, networks=2, options={"width": 3, "kernel": 3, "depth": 2})


def test_a_later_stream_goes_on() -> None:
    import torch

    whole = Stream(TensorData(torch.arange(20.0)[:, None]), 4, seed=1)
    later = LaterStream(whole, 7)
    assert all(torch.equal(later.batch(s).inputs, whole.batch(s + 7).inputs) for s in range(6))
    assert later.epoch(0) == whole.epoch(7)
    half = later.shard(1, 2)
    assert torch.equal(half.batch(2).inputs, whole.shard(1, 2).batch(9).inputs)
