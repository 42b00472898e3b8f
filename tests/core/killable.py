"""A run in a process of its own, for tests that kill it. ``python -m tests.core.killable FOLDER [steps]``.

Two stages, two optimisers, dropout, batch-norm buffers, augmentation, a memory bank with its own state, and an update that
alternates: everything whose state a checkpoint has to carry.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Stream, TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.method import Method
from limbeck.core.optim import TrainingConfig, make_optimised
from limbeck.core.stage import Stage, Stepper
from limbeck.tasks.augment import ShiftFlip

STEPS = 120


class Bank:
    """A running mean of logits, with state."""

    def __init__(self) -> None:
        self.mean = torch.zeros(3)

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean = state["mean"]


class TwoStages(Method):
    """Stage one trains a network by gradients; stage two alternates it with a critic."""

    name = "two-stages"

    class Config(TrainingConfig):
        pass

    def __init__(self) -> None:
        super().__init__(steps=STEPS, batch_size=16, lr=1e-2)
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(512, 3),
        )
        self.critic = nn.Linear(3, 1)
        self.add_frozen("teacher", nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
        self.bank = Bank()

    def losses(self, batch: Batch) -> Losses:
        logits = self.network(batch.inputs)
        return Losses(
            ce=F.cross_entropy(logits, batch.labels), match=(0.1, F.mse_loss(logits, self.teacher(batch.inputs)))
        )

    def alternate(self, batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
        assert batch is not None
        logits = self.network(batch.inputs)
        critic = self.critic(logits.detach() + torch.randn_like(logits)).square().mean()
        stepper.minimise(critic, "critic")
        losses = Losses(ce=F.cross_entropy(logits, batch.labels), critic=(0.1, self.critic(logits).mean()))
        stepper.minimise(losses, "network")
        self.bank.mean = 0.9 * self.bank.mean + 0.1 * logits.detach().mean(0)
        return losses.logged()

    def stages(self, data: Any, val: Any = None, *, seed: int = 0) -> list[Stage]:
        stream = Stream(data, 16, seed=seed)
        return [
            Stage(
                "first",
                STEPS,
                stream,
                losses=self.losses,
                optimisers=lambda: {"main": make_optimised(self.network.parameters(), self.config, STEPS)},
            ),
            Stage(
                "second",
                STEPS,
                stream,
                update=self.alternate,
                begin=lambda: self.critic.reset_parameters(),
                state={"bank": self.bank},
                optimisers=lambda: {
                    "network": make_optimised(self.network.parameters(), self.config, STEPS),
                    "critic": make_optimised(self.critic.parameters(), self.config, STEPS, lr=1e-3),
                },
            ),
        ]


def data() -> TensorData:
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(100, 1, 8, 8, generator=generator) * 255).to(torch.uint8)
    return TensorData(
        images, torch.randint(0, 3, (100,), generator=generator), mean=[0.5], std=[0.3], augment=ShiftFlip(1)
    )


def run(folder: Path, checkpoint_steps: int = 10) -> TwoStages:
    torch.set_num_threads(1)
    method = TwoStages()
    settings = EngineConfig(progress=False, checkpoint_steps=checkpoint_steps, log_every=7, device="cpu")
    Engine(folder, settings, seed=5).run(method, method.stages(data()), resume=True)
    return method


if __name__ == "__main__":
    target = Path(sys.argv[1])
    torch.save(run(target).state_dict(), target / "final.pt")
    print("done")
