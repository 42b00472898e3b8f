"""Time of several ways of doing the same thing, taken in turns so that a machine's drift hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from limbeck.core.errors import InputError


def time_in_turns(
    ways: Mapping[str, Callable[[int], Any]],
    rounds: int = 30,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    *,
    repeats: int = 1,
) -> dict[str, dict[str, float]]:
    """Wall time of each way's calls, without gradients.

    Args:
        ways: by name, the first being the reference; called with the number of the call, so that all can answer the same request of many.
        rounds: measured rounds, at least 2. warmup: rounds thrown away before.
        device: where they work; an accelerator is synchronised around every turn.
        repeats: calls in a turn, one after the other. Short calls need several: the first after another way's turn finds the caches cold.

    Returns:
        By name, of one call: ``median_seconds``; ``best_seconds``, of the fastest turn, which whatever else runs on the machine disturbed least; and
        ``ratio``, ``ratio_low``, ``ratio_high``, median and quartiles over rounds of this way's time divided by the reference's in the same round.

    Raises:
        InputError: no ways, or too few rounds.
    """
    if not ways or rounds < 2 or warmup < 0 or repeats < 1:
        raise InputError(
            f"timing needs ways, 2 or more rounds, no negative warmup and a call in each turn, not {len(ways)}, {rounds}, {warmup}, {repeats}"
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
                for call in range(turn * repeats, (turn + 1) * repeats):
                    ways[name](call)
                wait()
                if turn >= warmup:
                    spent[name].append((time.perf_counter() - began) / repeats)
    found = {}
    for name, times in spent.items():
        ratios = [a / b for a, b in zip(times, spent[names[0]], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found[name] = {
            "median_seconds": statistics.median(times),
            "best_seconds": min(times),
            "ratio": median,
            "ratio_low": low,
            "ratio_high": high,
        }
    return found
