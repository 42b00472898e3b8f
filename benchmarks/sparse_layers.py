"""A linear layer whose zeros are skipped against the same layer dense, over sizes and sparsities, on one thread and on two.

One request (a vector, as in decoding token by token) and many (a batch, as in reading a prompt) are different things: the former waits for memory, of which
a sparse layer needs less; the latter for arithmetic, at which dense kernels are many times better. Run it alone for the whole table:
``python -m benchmarks.sparse_layers``.

With two threads on a machine that has something else to do, a dense product waits for the thread that is not running: only an idle machine gives numbers
that mean something there, and :func:`measure` takes one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.blocks.one_shot_pruning import Pattern, magnitude
from limbeck.blocks.sparse_containers import pack
from limbeck.blocks.sparse_linear import SparseLinear
from limbeck.metrics.turns import time_in_turns

SIZE, SPARSITY, ALLOWED = 2048, 0.9, 0.8
SIZES, SPARSITIES, ROWS, THREADS = (256, 512, 1024, 2048, 4096), (0.5, 0.75, 0.8, 0.9, 0.95), (1, 16), (1, 2)
COLD = 64 << 20
"""Bytes of different layers that take turns, so that weights come from memory, as in a network that does not fit the caches."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ways(size: int, sparsity: float, rows: int) -> dict[str, Callable[[int], Any]]:
    """The dense layer and each sparse execution of it, each on as many copies as fill :data:`COLD` bytes when dense."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(size, size, bias=False).requires_grad_(False)
    weight = torch.randn(size, size, generator=generator)
    layer.weight.copy_(weight * magnitude(weight, Pattern(sparsity)))
    x = torch.randn(rows, size, generator=generator)
    copies = max(1, COLD // (4 * size * size))
    made = {"dense": [SparseLinear(layer, "dense") for _ in range(copies)]}
    for backend in ("scipy", "torch"):
        made[backend] = [SparseLinear(layer, backend) for _ in range(copies)]  # type: ignore[arg-type]

    def call(layers: list[SparseLinear]) -> Callable[[int], Tensor]:
        return lambda turn: layers[turn % copies](x)

    return {name: call(layers) for name, layers in made.items()}


def times(size: int, sparsity: float, rows: int, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """See :func:`limbeck.metrics.turns.time_in_turns`; short calls are repeated within a turn."""
    with threads(count):
        repeats = max(1, min(64, (1 << 21) // (size * size * rows)))
        return time_in_turns(ways(size, sparsity, rows), rounds, repeats=repeats)


def measure(
    size: int = SIZE, sparsity: float = SPARSITY, rows: int = 1, count: int = 1, rounds: int = 15
) -> dict[str, float]:
    """Best sparse / dense: the median over rounds and its quartiles."""
    found = times(size, sparsity, rows, count, rounds)
    best = min(("scipy", "torch"), key=lambda name: found[name]["ratio"])
    ratio = found[best]
    return {"ratio": ratio["ratio"], "best": ratio["ratio_low"], "worst": ratio["ratio_high"], "allowed": ALLOWED}


def bytes_ratio(size: int, sparsity: float) -> float:
    """What the smallest container takes, as a share of the dense matrix."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return pack(weight * magnitude(weight, Pattern(sparsity))).bits / (32 * size * size)


def table(sizes: Sequence[int] = SIZES, rounds: int = 15) -> str:
    """Times of each sparse execution as ratios to dense (below 1: faster), by threads, rows, size and sparsity; and where it is not faster."""
    lines = []
    for count in THREADS:
        for rows in ROWS:
            lines += [
                "",
                f"{count} thread{'s' * (count > 1)}, {rows} row{'s' * (rows > 1)}: scipy / torch, against dense",
                "",
            ]
            lines += ["| size | " + " | ".join(f"{100 * s:g} %" for s in SPARSITIES) + " |"]
            lines += ["| --- " * (len(SPARSITIES) + 1) + "|"]
            for size in sizes:
                found = [times(size, s, rows, count, rounds) for s in SPARSITIES]
                cells = [f"{f['scipy']['ratio']:.2f} / {f['torch']['ratio']:.2f}" for f in found]
                slower = [
                    f"{100 * s:g} %"
                    for s, f in zip(SPARSITIES, found, strict=True)
                    if min(f["scipy"]["ratio"], f["torch"]["ratio"]) >= 1
                ]
                lines.append(
                    f"| {size} | " + " | ".join(cells) + f" | {'slower at ' + ', '.join(slower) if slower else ''}"
                )
    stored = ", ".join(f"{100 * s:g} %: {bytes_ratio(1024, s):.3f}" for s in SPARSITIES)
    return "\n".join([*lines, "", f"Bytes as a share of dense (float32, smallest container): {stored}."]).strip()


if __name__ == "__main__":
    print(table())
