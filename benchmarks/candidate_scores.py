"""Scoring an untrained candidate against distilling it, and candidates a second, for students of digits.

The candidates are random cells (8 channels, 3 stages) as ``limbeck run diswot`` searches them, each scored with batches of 64; distilling stands for as many
updates as that run gives its student. ``python -m benchmarks.candidate_scores`` prints the numbers.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.methods.search.diswot import DisWOT
from limbeck.networks import build
from limbeck.networks.spaces import cell_space

ALLOWED = 0.005
UPDATES = 450
TIMED_UPDATES = 10


def measure(rounds: int = 9) -> dict[str, float]:
    """The median over candidates of scoring / distilling one, both in every round, in turn first; processor time.

    Returns:
        ``ratio``, ``best``, ``worst``, ``allowed``; ``per_second``: candidates that are built and scored in a second of the processor.
    """
    space = cell_space((1, 8, 8), 10, width=8)
    assert space.teacher is not None
    teacher = build(space.teacher, in_shape=(1, 8, 8), num_classes=10)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(torch.randn(640, 1, 8, 8, generator=generator), torch.randint(10, (640,), generator=generator))
    method = DisWOT(space.space, teacher, candidates=1, recheck=0)
    method.search((batch.inputs, batch.labels))
    code = space.space.sample(generator)

    def score() -> None:
        method.judge(code)

    def distil() -> None:
        train(method, space.space.build(code), batch)

    ratios, seconds = [], []
    for number in range(rounds + 1):
        code = space.space.sample(generator)
        spent = {}
        for work in (score, distil)[:: 1 if number % 2 else -1]:
            began = time.process_time()
            work()
            spent[work.__name__] = time.process_time() - began
        if number:  # the first round warms up
            seconds.append(spent["score"])
            ratios.append(spent["score"] / (spent["distil"] * UPDATES / TIMED_UPDATES))
    return {
        "ratio": statistics.median(ratios),
        "best": min(ratios),
        "worst": max(ratios),
        "allowed": ALLOWED,
        "per_second": 1 / statistics.median(seconds),
    }


def train(method: DisWOT, network: nn.Module, batch: Batch) -> None:
    """A few updates of the distillation."""
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for part in batch.chunks(TIMED_UPDATES):
        optimizer.zero_grad()
        method.losses_of(network.train(), part).total.backward()
        optimizer.step()


if __name__ == "__main__":
    print({name: round(value, 5) for name, value in measure().items()})
