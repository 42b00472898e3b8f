"""A pass in 8-bit integers by torch's kernels against the same network in float32, normalisations folded in, one thread."""

from __future__ import annotations

import statistics

import torch
from torch.fx.experimental.optimization import fuse

from limbeck import networks
from limbeck.adapters.int8 import to_int8
from limbeck.metrics.cost import measure_latency

ALLOWED = 0.8
CASES = {"static": ("cnn-w64-s3-b2", (3, 32, 32), 16), "dynamic": ("mlp-2048-2048", (1, 28, 28), 64)}
"""By kind: network, input, batch size."""


def measure(kind: str, rounds: int = 5) -> dict[str, float]:
    """The median over rounds of integers / floats; in each round the two take turns."""
    name, shape, batch = CASES[kind]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model = networks.build(name, in_shape=shape, num_classes=10).eval()
        inputs = torch.randn(batch, *shape)
        folded = fuse(model)
        made = to_int8(model, inputs if kind == "static" else None)
        assert made.kind == kind
        ratios = [
            measure_latency({"float": folded, "int8": made.network}, inputs, repeats=15)["int8"]["ratio"]
            for _ in range(rounds)
        ]
    finally:
        torch.set_num_threads(threads)
    return {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": ALLOWED}
