"""The inner loop of trajectory matching: time and memory of its three gradients."""

from __future__ import annotations

import statistics
import time

import torch

from limbeck import networks
from limbeck.blocks.flat import draw_flat
from limbeck.blocks.trajectory_matching import MODES, Mode, match_trajectory
from limbeck.metrics.autograd_memory import SavedTensorMeter

ALLOWED_TIME = 1.7  # adjoint / unroll: one more forward and backward pass of each step
ALLOWED_GROWTH = 1.1  # saved bytes of 40 steps / of 5
STEPS = (5, 10, 20, 40)
IMAGES = 10


class Problem:
    """Ten images of 8x8 pixels and a small network."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network, theta = draw_flat(lambda: networks.build("convnet-w16-d2", in_shape=(1, 8, 8), num_classes=10), 2)
        self.start, self.target = theta
        self.images, self.labels = torch.randn(IMAGES, 1, 8, 8), torch.arange(IMAGES) % 10
        self.beta = torch.tensor(0.02)

    def run(self, mode: Mode, steps: int) -> None:
        batches = [torch.arange(IMAGES)] * steps
        match_trajectory(self.network, self.images, self.labels, self.beta, self.start, self.target, batches, mode=mode)


def memory() -> dict[str, dict[int, int]]:
    """Peak bytes that graphs keep alive, by mode and number of steps. The T P numbers of the stored states come on top of
    ``adjoint`` and ``tesla``: see :func:`stored`."""
    problem = Problem()
    found: dict[str, dict[int, int]] = {}
    for mode in MODES:
        found[mode] = {}
        for steps in STEPS:
            with SavedTensorMeter() as meter:
                problem.run(mode, steps)
            found[mode][steps] = meter.peak
    return found


def stored(steps: int) -> int:
    """Bytes of the states that ``adjoint`` and ``tesla`` keep."""
    return 4 * steps * Problem().network.size


def measure_growth() -> dict[str, float]:
    """Saved bytes of the adjoint with 40 steps against 5."""
    found = memory()["adjoint"]
    ratio = found[STEPS[-1]] / found[STEPS[0]]
    return {"ratio": ratio, "best": ratio, "worst": ratio, "allowed": ALLOWED_GROWTH}


def measure_time(rounds: int = 7, steps: int = 20, mode: Mode = "adjoint") -> dict[str, float]:
    """The median over rounds of ``mode`` / unroll, both in every round, in turn first."""
    problem = Problem()
    ratios = []
    for number in range(rounds + 1):
        spent = {}
        order: list[Mode] = [mode, "unroll"]
        for name in order[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            problem.run(name, steps)
            spent[name] = time.perf_counter() - began
        if number:  # the first round warms up
            ratios.append(spent[mode] / spent["unroll"])
    return {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": ALLOWED_TIME}


def main() -> None:
    """Print the whole table; ``python -m benchmarks.inner_loop``."""
    sizes = memory()
    print(f"{'mode':>8} {'time / unroll':>14}  saved MB for {', '.join(map(str, STEPS))} steps (stored states apart)")
    for mode in MODES:
        ratio = 1.0 if mode == "unroll" else measure_time(mode=mode)["ratio"]
        print(f"{mode:>8} {ratio:>14.2f}  {', '.join(f'{sizes[mode][s] / 1e6:.2f}' for s in STEPS)}")
    print(f"stored states: {', '.join(f'{stored(s) / 1e6:.2f}' for s in STEPS)} MB")


if __name__ == "__main__":
    main()
