"""Sparsity over training: values of each growth, events, stages."""

from __future__ import annotations

import pytest

from limbeck.blocks.sparsity_schedules import SparsitySchedule, stages
from limbeck.core.errors import InputError


def test_growths_have_their_values() -> None:
    assert [SparsitySchedule(0.8).at(p) for p in (0, 0.5, 1)] == [0.8] * 3
    linear = SparsitySchedule(0.8, "linear", start=0.2, end=0.5)
    assert [linear.at(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.2, 0.5, 0.8, 0.8])
    cubic = SparsitySchedule(0.8, "cubic", end=1.0)
    assert [cubic.at(p) for p in (0, 0.5, 1)] == pytest.approx([0, 0.8 - 0.8 / 8, 0.8])


def test_events_rise_to_the_target() -> None:
    assert SparsitySchedule(0.8).events(100, 8) == {0: 0.8}
    for growth in ("linear", "cubic"):
        events = SparsitySchedule(0.9, growth, end=0.6).events(100, 6)
        assert list(events) == [0, 10, 20, 30, 40, 50]
        values = list(events.values())
        assert values == sorted(values) and values[0] > 0 and values[-1] == pytest.approx(0.9)
    few = SparsitySchedule(0.9, "linear", end=1.0).events(2, 8)
    assert list(few) == [0, 1, 2][: len(few)] and list(few.values())[-1] == pytest.approx(0.9)


def test_stages_rise() -> None:
    assert stages([0, 0.5, 0.75]) == (0, 0.5, 0.75)
    for wrong in ([], [0.5, 0.5], [0.7, 0.5], [0.5, 1.0]):
        with pytest.raises(InputError, match="must rise and lie in"):
            stages(wrong)


def test_wrong_values_are_named() -> None:
    with pytest.raises(InputError, match="0 <= start <= target < 1"):
        SparsitySchedule(1.0)
    with pytest.raises(InputError, match=r"fraction of training in \(0, 1\]"):
        SparsitySchedule(0.5, "cubic", end=0)
    with pytest.raises(InputError, match="at least 2 prunings"):
        SparsitySchedule(0.5, "cubic").events(10, 1)
