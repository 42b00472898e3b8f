"""Started by ``torchrun`` in a test: blocks of a scene, divided among the processes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from limbeck.core.engine import Engine, EngineConfig
from tests.methods.fields.test_momentum_gs import make, views


def run(folder: Path) -> None:
    torch.set_num_threads(1)
    seen = views()
    method = make(seen, steps=12, interval=3, coarse_steps=3, grow_every=2, grow_from=1, grow_until=9, min_opacity=0.3)
    before = [a.state_dict() for a in method.blocks]
    engine = Engine(folder / "run", EngineConfig(progress=False, device="cpu", checkpoint_steps=5), seed=1)
    engine.run(method, method.stages(seen))
    rank = engine.accelerator.process_index
    torch.save({"before": before, "after": method.state_dict()}, folder / f"{rank}.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
