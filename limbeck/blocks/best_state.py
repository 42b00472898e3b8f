"""The state of a module when it was best, kept through checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class BestState:
    """Keeps a copy of a module's state at the highest score so far; the first of equal ones.

    Attributes:
        score: the highest so far; minus infinity at the beginning.
        tensors: the state at that score.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.score = module, -float("inf")
        self.tensors: dict[str, Tensor] = {}

    def offer(self, score: float) -> None:
        """The module as it is now has this score."""
        if score > self.score:
            self.score = score
            self.tensors = {k: v.detach().clone() for k, v in self.module.state_dict().items()}

    def restore(self) -> None:
        """Put the best state back; nothing if there never was a score."""
        if self.tensors:
            self.module.load_state_dict(self.tensors)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "tensors": self.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.score, self.tensors = state["score"], dict(state["tensors"])
