"""The row in 8-bit integers, and pictures of weights with their levels."""

from __future__ import annotations

import base64

import pytest
import torch
from torch import Tensor, nn

from limbeck.blocks.quantizers import encode
from limbeck.core.data import TensorData
from limbeck.tasks.judging_quantised import judge_int8, picture_levels
from limbeck.tasks.teachers import predictions


class Twisted(nn.Module):
    """No layer that runs in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if x.sum() > 0 else x


def test_a_row_is_measured_on_the_test_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    test = TensorData(torch.randn(80, 4), torch.arange(80) % 4)
    found = judge_int8(model, None, test)
    (row,) = found["rows"]
    logits, labels = predictions(model, test)
    assert row["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=0.1)
    assert found["int8_scheme"].startswith("dynamic")
    assert found["int8_agreement"] >= 0.95
    assert found["int8_difference"] < 0.02


def test_what_cannot_run_in_integers_is_left_out_with_a_word() -> None:
    test = TensorData(torch.randn(8, 4), torch.arange(8) % 4)
    with pytest.warns(UserWarning, match="not measured in 8-bit integers: Twisted has no layer"):
        assert judge_int8(Twisted(), test.inputs, test) == {"rows": []}


def test_pictures_are_pngs() -> None:
    weights = {name: torch.randn(300) for name in "abcdefgh"}
    tensors = {name: encode(w, torch.tensor([0.0, 0.3, 1.2]), 64) for name, w in weights.items()}
    picture = picture_levels(tensors, weights)
    assert base64.b64decode(picture["png"]).startswith(b"\x89PNG")
    assert picture["title"] == "Weights and their levels"
