"""A perceptron's answers for nodes against those of the graph network that taught it, as the graph grows.

Three things are timed: answers for all nodes; for one node, the network gathering what it reaches of the graph; and for one node, the network running on
the whole graph. Run it alone for a table over sizes: ``python -m benchmarks.graph_latency``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from limbeck.methods.graphs.vqgraph import VQGraph
from limbeck.metrics.turns import time_in_turns
from limbeck.tasks.judging_nodes import NodeModel
from limbeck.tasks.node_classification import NodeSetup, load_nodes

Asked = Literal["all", "gathered", "one of all"]
ALLOWED: dict[Asked, float] = {"all": 0.3, "gathered": 0.2, "one of all": 0.02}
REPEATS: dict[Asked, int] = {"all": 1, "gathered": 16, "one of all": 1}
SIZE, SIZES = 10_000, (1_000, 10_000, 100_000)
MEMORY = 4 * 2**30


def ways(nodes: int) -> dict[Asked, dict[str, Callable[[int], Any]]]:
    """Network and perceptron, fresh and in evaluation mode, on a block model of so many nodes; all that depends on the graph alone is made before."""
    task = load_nodes(NodeSetup.make(task="sbm", generated_nodes=nodes))
    method = VQGraph(task).eval()
    student, teacher = NodeModel(method.student, False), NodeModel(method.teacher, True)
    chosen = torch.randint(nodes, (64,), generator=torch.Generator().manual_seed(0))

    def one(turn: int) -> torch.Tensor:
        return chosen[turn % 64 : turn % 64 + 1]

    def single(turn: int) -> torch.Tensor:
        return student.single(task, one(turn))

    teacher.whole(task)
    return {
        "all": {"network": lambda _: teacher.whole(task), "perceptron": lambda _: student.whole(task)},
        "gathered": {"network": lambda turn: teacher.single(task, one(turn)), "perceptron": single},
        "one of all": {"network": lambda turn: teacher.whole(task)[one(turn)], "perceptron": single},
    }


def measure(asked: Asked, nodes: int = SIZE, rounds: int = 15) -> dict[str, float]:
    """Perceptron / network: the median over rounds and its quartiles."""
    found = time_in_turns(ways(nodes)[asked], rounds, repeats=REPEATS[asked])["perceptron"]
    return {
        "ratio": found["ratio"],
        "best": found["ratio_low"],
        "worst": found["ratio_high"],
        "allowed": ALLOWED[asked],
    }


def measure_memory(nodes: int = SIZES[-1]) -> dict[str, float]:
    """The largest resident set of a process of its own that trains tokenizer and perceptron for two updates each, over 4 GiB."""
    code = f"""
import resource
from limbeck.core.engine import Engine, EngineConfig
from limbeck.methods.graphs.vqgraph import VQGraph
from limbeck.tasks.node_classification import NodeSetup, load_nodes
method = VQGraph(load_nodes(NodeSetup.make(task="sbm", generated_nodes={nodes})), epochs=2, teacher_epochs=2)
Engine(None, EngineConfig(progress=False), seed=0).run(method, method.stages())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    scale = 1 if sys.platform == "darwin" else 1024
    share = int(said.split()[-1]) * scale / MEMORY
    return {"ratio": share, "best": share, "worst": share, "allowed": 1.0}


def table(sizes: Sequence[int] = SIZES, rounds: int = 15) -> str:
    """How many times sooner the perceptron answers, by size and by what is asked."""
    lines = ["| nodes | " + " | ".join(ALLOWED) + " |", "| --- " * (len(ALLOWED) + 1) + "|"]
    for nodes in sizes:
        made = ways(nodes)
        times = [
            1 / time_in_turns(made[asked], rounds, repeats=REPEATS[asked])["perceptron"]["ratio"] for asked in ALLOWED
        ]
        lines.append(f"| {nodes:,} | " + " | ".join(f"{t:.1f}" for t in times) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
