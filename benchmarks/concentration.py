"""Concentration by random projections against counting walks, as the graph grows; and the memory that 100,000 nodes take."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.metrics.concentration import approximate_concentration, topological_concentration

ALLOWED_DENSE, ALLOWED_GROWTH, ALLOWED_MEMORY = 0.1, 0.5, 1.0
NODES, HOPS, DIM = 3000, 2, 64
DEGREES = (8, 64)
LARGE, BYTES = 100_000, 4 << 30


def links(nodes: int, degree: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random training links (2, nodes degree / 2), and a fifth as many of another part."""
    generator = torch.Generator().manual_seed(seed)
    count = nodes * degree // 2
    found = torch.randint(nodes, (2, count + count // 5), generator=generator)
    return found[:, :count], found[:, count:]


def _spent(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _ratio(degree: int, number: int) -> float:
    """Projections / counting in one round, in turn first."""
    train, test = links(NODES, degree)
    ways = {
        "near": lambda: approximate_concentration(train, NODES, test, hops=HOPS, dim=DIM, draws=1),
        "exact": lambda: topological_concentration(train, NODES, test, hops=HOPS),
    }
    order = ("near", "exact") if number % 2 else ("exact", "near")
    spent = {name: _spent(ways[name]) for name in order}
    return spent["near"] / spent["exact"]


def measure(rounds: int = 3, degree: int = DEGREES[1]) -> dict[str, float]:
    """The median over rounds of projections / counting at the larger degree, K = 2."""
    ratios = [_ratio(degree, number) for number in range(rounds + 1)][1:]  # the first round warms up
    return _found(ratios, ALLOWED_DENSE)


def measure_growth(rounds: int = 3) -> dict[str, float]:
    """The median over rounds of the ratio at the larger degree / the ratio at the smaller: below 1 where counting grows faster."""
    ratios = [_ratio(DEGREES[1], number) / _ratio(DEGREES[0], number) for number in range(rounds + 1)][1:]
    return _found(ratios, ALLOWED_GROWTH)


def measure_memory() -> dict[str, float]:
    """Peak memory of a process that approximates the concentration of 100,000 nodes with a million links, against 4 GB."""
    code = (
        "import json, resource, sys; from benchmarks import concentration as c; c.large();"
        "print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return _found([json.loads(done.stdout) / BYTES], ALLOWED_MEMORY)


def large() -> None:
    """Training and test concentration of 100,000 nodes, 256 columns, K = 2."""
    train, test = links(LARGE, 20)
    for pairs in (None, test):
        approximate_concentration(train, LARGE, pairs, hops=HOPS, dim=256, draws=1)


def _found(ratios: list[float], allowed: float) -> dict[str, float]:
    return {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": allowed}


if __name__ == "__main__":
    for name, found in (("dense", measure()), ("growth", measure_growth()), ("memory", measure_memory())):
        print(name, found)
