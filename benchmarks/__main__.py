"""Run every benchmark and write ``benchmarks/README.md``."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from benchmarks import (
    candidate_scores,
    causal_order,
    concentration,
    engine_overhead,
    experts,
    field_conversion,
    graph_latency,
    hypergraph_latency,
    inner_loop,
    int8_latency,
    matching,
    score_steps,
    sparse_layers,
    splatting,
    subnetworks,
    teacher_cache,
)

_HEAD = """# Benchmarks

`make bench` runs these and rewrites this page. Seconds mean nothing from one machine to the next, so every number is a ratio
of two things that ran side by side in one process, the median over rounds; best and worst round in brackets.

| what | against | ratio | bound | |
| --- | --- | --- | --- | --- |
"""


def main() -> None:
    vertices = f"{hypergraph_latency.VERTICES:,} vertices"
    answers = hypergraph_latency.measure()
    rows = [
        ("a step of `kd` through the engine", "the same step by hand in plain PyTorch", engine_overhead.measure()),
        ("an epoch with the teacher cache", "the same epoch without it", teacher_cache.measure()),
        (
            f"an epoch of {experts.EXPERTS} experts together (batches of {experts.BATCH})",
            "the same experts one by one",
            experts.measure(),
        ),
        ("exact gradient through 20 inner steps by the adjoint", "by unrolling", inner_loop.measure_time()),
        ("bytes that its graphs hold, 40 inner steps", "the same with 5", inner_loop.measure_growth()),
        ("a step of `datadam`", "a step of `dm`", matching.measure("dm", matching.ALLOWED_DM)),
        (
            "a step of `datadam`",
            f"trajectory matching with {matching.INNER} inner steps",
            matching.measure("trajectory", matching.ALLOWED_TRAJECTORY),
        ),
        *(
            (
                f"a step of `{name}`",
                "the passes that its equations need, bare",
                score_steps.measure(score_steps.steps(name), score_steps.ALLOWED_STEP),
            )
            for name in ("swiftbrush", "sim")
        ),
        (
            "a sample of a one-step student",
            "one of its teacher in 25 steps",
            score_steps.measure(score_steps.sampling(), score_steps.ALLOWED_SAMPLING),
        ),
        (
            f"a picture of {splatting.COUNT:,} Gaussians, {splatting.SIZE}x{splatting.SIZE}, without gradients",
            "blending one Gaussian after the other",
            splatting.measure(),
        ),
        (
            "`pvd` of a hash field into a deep perceptron",
            "training that on the pictures until it is as good",
            field_conversion.measure(),
        ),
        *(
            (
                f"`{int8_latency.CASES[kind][0]}` in 8-bit integers ({kind})",
                "the same in float32, normalisations folded",
                int8_latency.measure(kind),
            )
            for kind in int8_latency.CASES
        ),
        ("a 2048x2048 linear layer with 90 % zeros, one row", "the same layer dense", sparse_layers.measure()),
        ("scoring a candidate of `diswot`", "450 updates of distilling it", candidate_scores.measure()),
        (
            "a step of `deps`, four networks",
            "the same networks by hand",
            subnetworks.measure(subnetworks.steps(), subnetworks.ALLOWED_STEP),
        ),
        (
            "judging a sub-network of a super-network",
            "an epoch of training it alone",
            subnetworks.measure(subnetworks.judging(), subnetworks.ALLOWED_JUDGING),
        ),
        (f"a perceptron's answers for all of {vertices}", "those of its hypergraph network", answers["whole"]),
        (f"its answer for one of {vertices}", "the network's, its neighbourhood gathered", answers["single"]),
        (f"memory of `lighthgnn` on {vertices}", "4 GB", hypergraph_latency.measure_memory()),
        *(
            (
                f"a perceptron's answers on {graph_latency.SIZE:,} nodes: {asked}",
                "those of its tokenizer",
                graph_latency.measure(asked),
            )
            for asked in graph_latency.ALLOWED
        ),
        (f"memory of `vqgraph` on {graph_latency.SIZES[-1]:,} nodes", "4 GB", graph_latency.measure_memory()),
        (f"an order of {causal_order.NODES} variables by swaps", "NOTEARS", causal_order.measure()),
        (
            f"approximated concentration, {concentration.NODES:,} nodes of degree {concentration.DEGREES[1]}",
            "counting its walks",
            concentration.measure(),
        ),
        (
            f"that ratio at degree {concentration.DEGREES[1]}",
            f"the same at degree {concentration.DEGREES[0]}",
            concentration.measure_growth(),
        ),
        (
            f"memory of approximating the concentration of {concentration.LARGE:,} nodes with a million links",
            "4 GB",
            concentration.measure_memory(),
        ),
    ]
    text = _HEAD
    for what, rival, found in rows:
        kept = "kept" if found["ratio"] <= found["allowed"] else "**missed**"
        extra = f" (teacher/student FLOPs {found['flops_ratio']:.1f})" if "flops_ratio" in found else ""
        text += f"| {what}{extra} | {rival} | {found['ratio']:.3f} [{found['best']:.3f}, {found['worst']:.3f}] | {found['allowed']} | {kept} |\n"
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    text += f"\nMeasured on {platform.machine()}, {device}, PyTorch {torch.__version__.split('+')[0]}.\n"
    Path(__file__).with_name("README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
