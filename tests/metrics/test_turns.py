from __future__ import annotations

import time

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.metrics.turns import time_in_turns


def test_ways_take_turns_and_ratios_are_of_the_same_round() -> None:
    order: list[tuple[str, int]] = []

    def way(name: str, seconds: float) -> object:
        def work(turn: int) -> None:
            order.append((name, turn))
            time.sleep(seconds)

        return work

    found = time_in_turns({"a": way("a", 0.002), "b": way("b", 0.02)}, rounds=4, warmup=1)  # type: ignore[dict-item]
    assert order[:4] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)] and len(order) == 10
    assert found["a"]["ratio"] == 1 and found["b"]["ratio"] > 2
    assert found["b"]["ratio_low"] <= found["b"]["ratio"] <= found["b"]["ratio_high"]
    assert found["b"]["median_seconds"] >= 0.02


def test_several_calls_make_a_turn_and_times_are_of_one() -> None:
    calls: list[tuple[str, int]] = []

    def slow(call: int) -> None:
        calls.append(("slow", call))
        time.sleep(0.01)

    ways = {"quick": lambda call: calls.append(("quick", call)), "slow": slow}
    found = time_in_turns(ways, rounds=2, warmup=1, repeats=3)
    assert calls[:6] == [(who, call) for who in ways for call in range(3)]
    assert calls[6:9] == [("slow", call) for call in range(3, 6)] and len(calls) == 18
    assert 0.01 <= found["slow"]["best_seconds"] <= found["slow"]["median_seconds"] < 0.03


def test_no_gradient_is_taken() -> None:
    flags: list[bool] = []
    time_in_turns({"it": lambda _: flags.append(torch.is_grad_enabled())}, rounds=2, warmup=0)
    assert flags == [False, False]


def test_too_little_to_time_is_named() -> None:
    with pytest.raises(InputError, match="2 or more rounds"):
        time_in_turns({}, 5)
    with pytest.raises(InputError, match="2 or more rounds"):
        time_in_turns({"it": lambda _: None}, 1)
    with pytest.raises(InputError, match="a call in each turn"):
        time_in_turns({"it": lambda _: None}, 2, repeats=0)
