"""Weights come back into the module that they are from; tied ones may be stored once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from limbeck.core.artifacts import load_weights, save_weights
from limbeck.core.errors import RunError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_may_be_stored_once(tmp_path: Path) -> None:
    whole, once = Tied(), Tied()
    save_weights(whole, tmp_path / "twice.safetensors")
    save_file({"embedding.weight": whole.embedding.weight.detach()}, tmp_path / "once.safetensors")
    for name in ("twice", "once"):
        loaded = load_weights(Tied(), tmp_path / f"{name}.safetensors")
        assert loaded.head.weight is loaded.embedding.weight
        assert torch.equal(loaded.head.weight, whole.head.weight)
    once.head.weight = nn.Parameter(torch.ones(5, 3))  # tied no longer: then both must be there
    with pytest.raises(RunError, match=r"head\.weight"):
        load_weights(once, tmp_path / "once.safetensors")
