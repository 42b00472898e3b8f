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


def test_no_gradient_is_taken() -> None:
    flags: list[bool] = []
    time_in_turns({"it": lambda _: flags.append(torch.is_grad_enabled())}, rounds=2, warmup=0)
    assert flags == [False, False]


def test_too_little_to_time_is_named() -> None:
    with pytest.raises(InputError, match="2 or more rounds"):
        time_in_turns({}, 5)
    with pytest.raises(InputError, match="2 or more rounds"):
        time_in_turns({"it": lambda _: None}, 1)
