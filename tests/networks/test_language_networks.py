"""Small language models by name: shapes, causality, saving, wrong sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck import networks
from limbeck.core.artifacts import load
from limbeck.core.errors import InputError
from limbeck.networks.artifacts import save_model

IDS = torch.arange(12).view(2, 6) % 7


@pytest.mark.parametrize(
    ("name", "classes", "shape"),
    [
        ("gpt-d16-l2-h2", 7, (2, 6, 7)),
        ("llama-d16-l2-h2", 7, (2, 6, 7)),
        ("berttagger-d16-l2-h2-v7", 3, (2, 6, 3)),
        ("bertclassifier-d16-l2-h2-v7", 3, (2, 3)),
    ],
)
def test_networks_by_name(name: str, classes: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    model = networks.build(name, in_shape=(6,), num_classes=classes).eval()
    with torch.no_grad():
        logits = model(IDS).logits
    assert logits.shape == shape
    save_model(model, tmp_path, {})
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path).content(IDS).logits, logits)


@pytest.mark.parametrize("name", ["gpt-d16-l2-h2", "llama-d16-l2-h2"])
def test_decoders_do_not_look_ahead(name: str) -> None:
    model = networks.build(name, in_shape=(6,), num_classes=7).eval()
    changed = IDS.clone()
    changed[:, 4:] = 0
    with torch.no_grad():
        a, b = model(IDS).logits, model(changed).logits
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(InputError, match=r"takes inputs of shape \(tokens,\), not \(1, 8, 8\)"):
        networks.build("gpt-d16-l2-h2", in_shape=(1, 8, 8), num_classes=7)
    with pytest.raises(InputError, match="5 attention heads do not divide the width 16"):
        networks.build("llama-d16-l2-h5", in_shape=(8,), num_classes=7)
    with pytest.raises(InputError, match="even width per head"):
        networks.build("llama-d6-l1-h2", in_shape=(8,), num_classes=7)
