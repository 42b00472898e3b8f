from __future__ import annotations

import pytest
import torch

from limbeck.blocks.mixing import CutMix
from limbeck.core.errors import InputError


def test_pastes_the_box_of_the_partner() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    mixing = CutMix(torch.tensor([1, 0]), torch.tensor([[0.25, 0.75, 0.5, 1.0], [0.0, 0.5, 0.0, 0.25]]))
    expected = images.clone()
    expected[0, :, 1:3, 2:4] = images[1, :, 1:3, 2:4]
    expected[1, :, 0:2, 0:1] = images[0, :, 0:2, 0:1]
    before = images.clone()
    assert torch.equal(mixing(images), expected)
    assert torch.equal(images, before)


def test_an_empty_and_a_full_box() -> None:
    images = torch.randn(2, 1, 5, 7)
    mixing = CutMix(torch.tensor([1, 0]), torch.tensor([[0.4, 0.4, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]))
    mixed = mixing(images)
    assert torch.equal(mixed[0], images[0])
    assert torch.equal(mixed[1], images[0])


def test_one_draw_serves_two_resolutions() -> None:
    """The teacher's enlarged images are mixed at the same places as the student's."""
    torch.manual_seed(1)
    mixing = CutMix.draw(16)
    coarse = CutMix(mixing.partner, (mixing.box * 8).round() / 8)
    assert torch.equal(coarse.mask(8, 8).repeat_interleave(2, 1).repeat_interleave(2, 2), coarse.mask(16, 16))


def test_boxes_cover_what_beta_1_1_says() -> None:
    """Mean share of the box: E[1 - share] = 1/2 before clipping; with a uniform centre, E of the clipped area by numpy."""
    torch.manual_seed(0)
    box = CutMix.draw(200_000).box.double()
    assert ((box >= 0) & (box <= 1)).all()
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    # A side r with a uniform centre keeps r - r²/4 on average, both axes independently; r² is uniform in [0, 1].
    r = (torch.arange(100_000, dtype=torch.float64) + 0.5).div(100_000).sqrt()
    assert area.mean().item() == pytest.approx((r - r**2 / 4).square().mean().item(), abs=2e-3)


def test_a_large_alpha_gives_boxes_of_half_the_area() -> None:
    torch.manual_seed(0)
    box = CutMix.draw(2000, alpha=1e4).box
    inner = (box[:, 0] > 0) & (box[:, 1] < 1)
    assert torch.allclose((box[inner, 1] - box[inner, 0]), torch.tensor(0.5**0.5), atol=0.02)


def test_the_global_random_state_replays_it() -> None:
    torch.manual_seed(3)
    first, second = CutMix.draw(8), CutMix.draw(8)
    torch.manual_seed(3)
    again = CutMix.draw(8)
    assert torch.equal(first.box, again.box) and torch.equal(first.partner, again.partner)
    assert not torch.equal(first.box, second.box)
    assert sorted(first.partner.tolist()) == list(range(8))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="channels, height, width"):
        CutMix.draw(4)(torch.zeros(4, 10))
    with pytest.raises(InputError, match=r"\(4, channels"):
        CutMix.draw(4)(torch.zeros(3, 1, 8, 8))
    with pytest.raises(InputError, match="alpha"):
        CutMix.draw(4, alpha=0)
    with pytest.raises(InputError, match="at least one image"):
        CutMix.draw(0)
