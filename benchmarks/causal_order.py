"""Learning a graph by topological swaps against NOTEARS, on the same samples: processor time, and the score after refitting along each order.

``python -m benchmarks.causal_order 20 50 100`` prints a line for each number of variables; NOTEARS takes many minutes with 100 of them.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from limbeck.methods.structures.notears import NOTEARS
from limbeck.methods.structures.notears_topo import TopoSwap
from limbeck.metrics.dags import edge_errors, order_score
from limbeck.tasks.causal import CausalSetup, load_causal

ALLOWED = 0.1
NODES, DENSITY, SAMPLES = 20, 2.0, 1000


def measure(nodes: int = NODES, rounds: int = 3, density: float = DENSITY) -> dict[str, float]:
    """The median over models of swaps / NOTEARS in processor time, both on every model, in turn first.

    Returns:
        ``ratio``, ``best``, ``worst``, ``allowed``; ``score_ratio`` and ``worst_score_ratio`` of the refitted scores (below 1: swaps are better); ``shd`` and
        ``notears_shd``, mean wrong edges of both graphs.
    """

    def seconds(estimator: Any, samples: Any) -> float:
        began = time.process_time()
        estimator.fit(samples)
        return time.process_time() - began

    ratios, scores, errors, others = [], [], [], []
    for number in range(rounds):
        task = load_causal(CausalSetup(nodes=nodes, edges_per_node=density, samples=SAMPLES, sem_seed=number))
        assert task.truth is not None
        x = task.train.inputs.numpy()
        ways: dict[str, Any] = {"swaps": TopoSwap(random_state=number), "notears": NOTEARS(0.1)}
        names = list(ways) if number % 2 else list(reversed(ways))
        spent = {name: seconds(ways[name], x) for name in names}
        ratios.append(spent["swaps"] / spent["notears"])
        scores.append(order_score(ways["swaps"].order_, x) / order_score(ways["notears"].order_, x))
        errors.append(edge_errors(ways["swaps"].adjacency_, task.truth)["shd"])
        others.append(edge_errors(ways["notears"].adjacency_, task.truth)["shd"])
    return {
        "ratio": statistics.median(ratios),
        "best": min(ratios),
        "worst": max(ratios),
        "allowed": ALLOWED,
        "score_ratio": statistics.median(scores),
        "worst_score_ratio": max(scores),
        "shd": statistics.fmean(errors),
        "notears_shd": statistics.fmean(others),
    }


if __name__ == "__main__":
    for count in [int(a) for a in sys.argv[1:]] or [NODES]:
        found = measure(count, rounds=1 if count > 50 else 3)
        print(count, {name: round(value, 5) for name, value in found.items()}, flush=True)
