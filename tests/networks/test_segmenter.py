"""The small segmenter: sizes, tap path, names."""

from __future__ import annotations

import pytest
import torch

from limbeck.blocks.taps import Taps
from limbeck.core.errors import InputError
from limbeck.networks import build


@pytest.mark.parametrize("size", [(16, 16), (20, 28), (17, 23)])
@pytest.mark.parametrize("name", ["segmenter-w4-l3-b1", "segmenter-w6-l2-b3"])
def test_logits_have_the_size_of_the_input(name: str, size: tuple[int, int]) -> None:
    net = build(name, in_shape=(3, 16, 16), num_classes=5).eval()
    x = torch.randn(2, 3, *size)
    with Taps(net, [net.feature_path, *net.stage_paths]) as seen:
        logits = net(x)
    assert logits.shape == (2, 5, *size)
    assert seen[net.feature_path].shape == (2, 32, -(-size[0] // 2), -(-size[1] // 2))
    torch.testing.assert_close(net.embed(x), seen[net.feature_path])
    widths = [seen[path].shape[1] for path in net.stage_paths]
    assert widths == [net.levels[0].blocks[0][0].out_channels * 2**level for level in range(len(widths))]


def test_names_set_width_levels_and_blocks() -> None:
    count = {
        name: sum(p.numel() for p in build(name, in_shape=(3, 48, 48), num_classes=6).parameters())
        for name in ("segmenter-w8-l3-b1", "segmenter-w48-l3-b1", "segmenter-w24-l3-b3")
    }
    assert count["segmenter-w8-l3-b1"] * 10 < min(count["segmenter-w48-l3-b1"], count["segmenter-w24-l3-b3"])
    deep = build("segmenter-w24-l3-b3", in_shape=(3, 48, 48), num_classes=6)
    assert [len(level.blocks) for level in deep.levels] == [3, 3, 3]


def test_gradients_reach_every_parameter() -> None:
    net = build("segmenter-w4-l3-b2", in_shape=(3, 16, 16), num_classes=3)
    net(torch.randn(2, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in net.parameters())


def test_too_many_levels_are_refused() -> None:
    with pytest.raises(InputError, match="a segmenter on a 8x8 image has 3 levels at most, got 4"):
        build("segmenter-w4-l4-b1", in_shape=(3, 8, 8), num_classes=2)
