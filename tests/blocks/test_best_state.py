from __future__ import annotations

import torch
from torch import nn

from limbeck.blocks.best_state import BestState


def test_the_best_state_comes_back_through_a_checkpoint() -> None:
    module = nn.Linear(2, 1)
    best = BestState(module)
    best.restore()  # nothing yet
    kept = module.weight.detach().clone()
    best.offer(0.5)
    nn.init.zeros_(module.weight)
    best.offer(0.5)  # the first of equal ones stays
    other = nn.Linear(2, 1)
    resumed = BestState(other)
    resumed.load_state_dict(best.state_dict())
    resumed.offer(0.4)
    resumed.restore()
    assert torch.equal(other.weight, kept) and resumed.score == 0.5
