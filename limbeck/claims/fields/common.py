"""What the claims of the ``fields`` family share: how a method is run quietly, and how clouds of samples are compared."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from limbeck.core.data import Data, mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.seeding import seed_everything

QUIET = EngineConfig(progress=False, log_every=1000)


def run(made: Any, seed: int, train: Data | None = None, val: Data | None = None) -> Any:
    """Run a method that is built, quietly and in memory, and return it in evaluation mode."""
    seed_everything(mix_seed(seed, 3))
    made.show_progress = False
    Engine(None, QUIET, seed=mix_seed(seed, 2)).run(made, made.stages(train, val, seed=seed))
    return made.eval()


def logs(values: dict[str, float], least: float = 1e-3) -> dict[str, float]:
    """The values, and their natural logarithms as ``log_…``: differences of these are ratios. Values below ``least`` count as it."""
    return {**values, **{f"log_{k}": math.log(max(v, least)) for k, v in values.items()}}


def pairwise(x: Tensor) -> float:
    """Mean distance between different rows of x (n, ...)."""
    flat = x.flatten(1).double()
    n = len(flat)
    return float(torch.cdist(flat, flat).sum() / (n * (n - 1)))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples (n, ...) and (m, ...), without bias; near 0 where both have one law."""
    a, b = x.flatten(1).double(), y.flatten(1).double()
    return 2 * float(torch.cdist(a, b).mean()) - pairwise(a) - pairwise(b)
