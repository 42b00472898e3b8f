"""Small language models and data that the tests of sparse fine-tuning share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import networks
from limbeck.core.batch import Batch
from limbeck.core.engine import Engine, EngineConfig
from limbeck.methods.compression import SquareHead
from limbeck.tasks.text_windows import TokenWindows

QUIET = EngineConfig(progress=False, log_every=1)
TEXT = torch.randint(11, (400,), generator=torch.Generator().manual_seed(0))
DATA = TokenWindows(TEXT, 8)


def gpt(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return networks.build("gpt-d16-l2-h2", in_shape=(8,), num_classes=11)


def made(student: nn.Module | None = None, teacher: nn.Module | None = None, **settings: Any) -> SquareHead:
    student = gpt() if student is None else student
    return SquareHead(student, copy.deepcopy(student) if teacher is None else teacher, **settings)


def batch(size: int = 4, **more: Any) -> Batch:
    found = DATA.fetch(torch.arange(size), None)
    return Batch({**found.inputs, **more}, found.labels)


def run(method: SquareHead, folder: Path | None = None, val: Any = None) -> SquareHead:
    Engine(folder, QUIET, seed=1).run(method, method.stages(DATA, val, seed=0))
    return method
