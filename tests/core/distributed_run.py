"""Started by ``accelerate launch`` in a test: trains a small student on however many processes there are."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from limbeck.core.engine import Engine, EngineConfig
from limbeck.methods.models import BDKD, KD
from tests.core.killable import data


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 3))


def run(folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = network(8), network(32)
    settings = {"steps": 25, "batch_size": 24, "lr": 1e-2, "evaluations": 0, "clip_grad": 1.0}
    method = KD(student, teacher, **settings) if kind == "kd" else BDKD(student, teacher, **settings)
    engine = Engine(folder, EngineConfig(progress=False, log_every=1, device="cpu", checkpoint_steps=10), seed=1)
    engine.run(method, method.stages(data()))
    if engine.accelerator.is_main_process:
        torch.save(method.student.state_dict(), folder / "final.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
