"""Storage counts every tensor once, to the bit; layers are chosen by patterns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.blocks.storage import Storage, Stored, chosen_layers
from limbeck.core.errors import InputError

MODEL = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def test_sizes_are_counted_to_the_bit() -> None:
    storage = Storage.of(MODEL, {"0.weight": Stored(32, 32 * 2 + 64, "quantised")})
    plain = 4 * (4 + 4 * 4 + 8) + 8  # bias, four of the normalisation, last weight; its counter is a 64-bit integer
    assert storage.bytes == 16 + plain
    assert storage.bits_per_number == 4
    assert storage.by_form() == {"quantised": 16, "plain": plain}
    assert storage.ratio() == pytest.approx(storage.numbers * 4 / (16 + plain))


def test_shared_tensors_count_once() -> None:
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    assert Storage.of(tied, {}).bytes == 36


def test_layers_are_chosen_by_patterns() -> None:
    def linear(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    assert list(chosen_layers(MODEL, linear)) == ["0", "2"]
    assert list(chosen_layers(MODEL, linear, exclude=("^0$",))) == ["2"]
    assert list(chosen_layers(MODEL, linear, include=("[02]",), exclude=("2",))) == ["0"]
    with pytest.raises(InputError, match="BatchNorm1d, which cannot be compressed"):
        chosen_layers(MODEL, linear, include=("1",))
    with pytest.raises(InputError, match="no layer's name fits 'attention'"):
        chosen_layers(MODEL, linear, include=("attention",))
    with pytest.raises(InputError, match="no regular expression"):
        chosen_layers(MODEL, linear, include=("(",))
    with pytest.raises(InputError, match="no layer is left"):
        chosen_layers(MODEL, linear, exclude=(".",))


def test_sizes_must_fit() -> None:
    with pytest.raises(InputError, match="no tensor '9.weight'"):
        Storage.of(MODEL, {"9.weight": Stored(1, 1)})
    with pytest.raises(InputError, match="32 numbers, not 31"):
        Storage.of(MODEL, {"0.weight": Stored(31, 1)})
    assert torch.is_tensor(MODEL[0].weight)
