"""A perceptron against the hypergraph network that taught it, 55,000 vertices: all answers at once, single requests, and memory.

The network is the published one (HGNN, two layers, 32 wide), its sparse matrices are made before. For a single request it gathers the vertex'
two-hop neighbourhood, of which it needs nothing else; where it would be faster to answer for the whole hypergraph, that time counts. All answers at once are
no gain: the perceptron's hidden layer is four times as wide, which costs more than the network's sparse products; the bound is on how much more.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from limbeck.methods.graphs.lighthgnn import LightHGNN
from limbeck.networks.node_networks import HGNN
from limbeck.tasks.judging_nodes import NodeModel
from limbeck.tasks.node_classification import NodeSetup, NodeTask, load_nodes

VERTICES = 55_000
ALLOWED_WHOLE, ALLOWED_SINGLE = 1.5, 0.1
MEMORY = 4 * 2**30


def models(vertices: int = VERTICES) -> tuple[NodeTask, NodeModel, NodeModel]:
    """A generated hypergraph of 0.7 hyperedges of 3 to 7 members for each vertex and 50 features; student and teacher."""
    task = load_nodes(NodeSetup.make(task="hypergraph-sbm", generated_nodes=vertices))
    student = LightHGNN.fresh_student(task, LightHGNN.default_student, 0).eval()
    return task, NodeModel(student, False), NodeModel(HGNN(task.features.shape[1], task.num_classes).eval(), True)


def measure(vertices: int = VERTICES, rounds: int = 9, requests: int = 20) -> dict[str, dict[str, float]]:
    """``whole`` and ``single``: the median over rounds of student / teacher, both in every round, in turn first.

    A round of ``single`` asks for ``requests`` different vertices, one after the other.
    """
    task, student, teacher = models(vertices)
    chosen = torch.randperm(vertices, generator=torch.Generator().manual_seed(0))[: requests * (rounds + 1)]

    def asked(model: NodeModel, number: int) -> Callable[[], Any]:
        nodes: tuple[Tensor, ...] = chosen[number * requests : (number + 1) * requests].split(1)
        return lambda: [model.single(task, node) for node in nodes]

    whole, single = [], []
    for number in range(rounds + 1):
        found: dict[tuple[str, str], float] = {}
        for who, model in (("student", student), ("teacher", teacher))[:: 1 if number % 2 else -1]:
            found[who, "whole"] = seconds(lambda model=model: model.whole(task))  # type: ignore[misc]
            found[who, "single"] = seconds(asked(model, number)) / requests
        if number:  # the first round warms up
            whole.append(found["student", "whole"] / found["teacher", "whole"])
            single.append(found["student", "single"] / min(found["teacher", "single"], found["teacher", "whole"]))
    return {"whole": summary(whole, ALLOWED_WHOLE), "single": summary(single, ALLOWED_SINGLE)}


def measure_memory(vertices: int = VERTICES) -> dict[str, float]:
    """The largest resident set of a process of its own that trains teacher and student for two updates each, over 4 GiB."""
    code = f"""
import resource, torch
from benchmarks.hypergraph_latency import models
from limbeck.core.engine import Engine, EngineConfig
from limbeck.methods.graphs.lighthgnn import LightHGNN
task = models({vertices})[0]
method = LightHGNN(task, "hgnn", epochs=2, teacher_epochs=2)
Engine(None, EngineConfig(progress=False), seed=0).run(method, method.stages())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    scale = 1 if sys.platform == "darwin" else 1024
    share = int(said.split()[-1]) * scale / MEMORY
    return {"ratio": share, "best": share, "worst": share, "allowed": 1.0}


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    with torch.no_grad():
        work()
    return time.perf_counter() - began


def summary(ratios: list[float], allowed: float) -> dict[str, float]:
    return {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": allowed}
