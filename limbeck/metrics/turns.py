"""Time of several ways of doing the same thing, taken in turns so that a machine's drift hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from limbeck.core.errors import InputError


def time_in_turns(
    ways: Mapping[str, Callable[[int], Any]], rounds: int = 30, warmup: int = 3, device: torch.device | str = "cpu"
) -> dict[str, dict[str, float]]:
    """Wall time of each way, without gradients.

    Args:
        ways: by name, the first being the reference; called with the number of the round, so that all can answer the same request of many.
        rounds: measured rounds, at least 2. warmup: rounds thrown away before.
        device: where they work; an accelerator is synchronised around every call.

    Returns:
        By name ``median_seconds``, and ``ratio``, ``ratio_low``, ``ratio_high``: median and quartiles over rounds of this way's time divided by
        the reference's in the same round.

    Raises:
        InputError: no ways, or too few rounds.
    """
    if not ways or rounds < 2 or warmup < 0:
        raise InputError(
            f"timing needs ways, 2 or more rounds and no negative warmup, not {len(ways)}, {rounds}, {warmup}"
        )
    kind = torch.device(device).type
    wait = getattr(torch, kind).synchronize if kind in ("cuda", "xpu", "mps") else lambda: None
    names = list(ways)
    spent: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for turn in range(warmup + rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                wait()
                began = time.perf_counter()
                ways[name](turn)
                wait()
                if turn >= warmup:
                    spent[name].append(time.perf_counter() - began)
    found = {}
    for name, times in spent.items():
        ratios = [a / b for a, b in zip(times, spent[names[0]], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found[name] = {
            "median_seconds": statistics.median(times),
            "ratio": median,
            "ratio_low": low,
            "ratio_high": high,
        }
    return found
