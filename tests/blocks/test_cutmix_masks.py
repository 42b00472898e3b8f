"""CutMix of several boxes, and pairs of unlabelled batches."""

from __future__ import annotations

import pytest
import torch

from limbeck.blocks.cutmix_masks import MixedPair, box_masks, mix
from limbeck.core.errors import InputError


def test_one_box_is_a_rectangle_of_the_area_asked_for() -> None:
    torch.manual_seed(0)
    masks = box_masks(400, 64, 48, boxes=1)
    covered = ~masks[:, 0]
    rows, columns = covered.any(2), covered.any(1)
    assert torch.equal(covered, rows[:, :, None] & columns[:, None, :])  # a rectangle
    share = covered.double().mean((1, 2))
    assert share.min() > 0.23 and share.max() < 0.52  # rounded to pixels
    assert abs(share.mean() - 0.375) < 0.015  # uniform in (0.25, 0.5)
    tall = rows.sum(1).double() / columns.sum(1)
    assert tall.min() < 0.6 and tall.max() > 2  # and of any aspect


def test_boxes_share_the_area_and_flip_where_they_overlap() -> None:
    torch.manual_seed(1)
    share = 1 - box_masks(2000, 32, 32).double().mean((1, 2, 3))
    # three boxes of p/3 each: together at most p, and twice the overlap of each pair less
    assert share.max() < 0.55 and 0.2 < share.mean() < 0.375
    torch.manual_seed(2)
    one = box_masks(5, 16, 16, boxes=1, area=(1.0, 1.0))
    assert not bool(one.any())  # one box over everything
    torch.manual_seed(3)
    state = torch.get_rng_state()
    two = box_masks(50, 40, 40, boxes=2, area=(0.9, 0.9))
    torch.set_rng_state(state)
    u = torch.rand(50, 2), torch.rand(50, 2), torch.rand(50, 2, 2)
    share = 0.9
    tall = share ** u[1]  # u[0] draws the share, which is fixed here
    sides = (torch.stack([tall, share / tall], -1) * 0.5**0.5 * 40).round()
    start = ((40 - sides) * u[2]).round().int()
    expected = torch.ones(50, 40, 40, dtype=torch.bool)
    for i in range(50):
        for j in range(2):
            (top, left), (high, wide) = start[i, j].tolist(), sides[i, j].int().tolist()
            expected[i, top : top + high, left : left + wide] ^= True
    assert torch.equal(two[:, 0], expected)
    assert bool((expected.float().mean((1, 2)) > 0.19).all())


def test_mixing_takes_the_second_where_the_mask_is_true() -> None:
    first, second = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    mask = torch.rand(2, 1, 4, 4) < 0.5
    mixed = mix(first, second, mask)
    torch.testing.assert_close(mixed, first * (1 - mask.float()) + second * mask.float())


def pair(ignored: torch.Tensor | None = None) -> MixedPair:
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    return MixedPair(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2), mask, ignored)


def test_logits_are_mixed_before_the_largest_is_taken() -> None:
    logits = torch.zeros(2, 3, 2, 2)
    logits[0, 1], logits[1, 2] = 1.0, 1.0  # class 1 everywhere in the first, class 2 in the second
    assert pair().pseudo_labels(logits).tolist() == [[[2, 1], [1, 1]]]
    padded = torch.tensor([[[False, False], [True, False]]])
    assert pair(padded).pseudo_labels(logits).tolist() == [[[2, 1], [-100, 1]]]
    assert torch.equal(pair().both, torch.cat([pair().first, pair().second]))
    assert pair().images[0, 0].tolist() == [[1, 0], [0, 0]]


def test_padding_moves_with_the_images() -> None:
    torch.manual_seed(0)
    valid = torch.ones(4, 16, 16, dtype=torch.bool)
    valid[:, :, 12:] = False
    drawn = MixedPair.draw((torch.zeros(4, 3, 16, 16), {"inputs": torch.ones(4, 3, 16, 16), "valid": valid}))
    assert torch.equal(drawn.ignored, drawn.mask[:, 0] & ~valid)
    assert bool(drawn.ignored.any())
    labels = drawn.pseudo_labels(torch.zeros(8, 2, 16, 16))
    assert torch.equal(labels == -100, drawn.ignored)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: MixedPair.draw(None), "mixes two unlabelled batches and got 0"),
        (lambda: MixedPair.draw(()), "mixes two unlabelled batches and got 0"),
        (lambda: MixedPair.draw((torch.zeros(1, 3, 4, 4),)), "got 1: give {'inputs': x"),
        (lambda: MixedPair.draw((torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))), "must be equal to be mixed"),
        (lambda: MixedPair.draw((torch.zeros(0, 3, 4, 4),) * 2), "unlabelled batches are empty"),
        (lambda: MixedPair.draw((torch.zeros(3, 4),) * 2), r"shape \(B, channels, height, width\), not \(3, 4\)"),
        (lambda: MixedPair.draw(({"images": torch.zeros(1, 3, 4, 4)},) * 2), "got the keys images"),
        (
            lambda: MixedPair.draw(({"inputs": torch.zeros(1, 3, 4, 4), "valid": torch.ones(1, 4)},) * 2),
            "map of valid pixels has shape",
        ),
        (lambda: pair().pseudo_labels(torch.zeros(2, 3, 1, 1)), "for 2 images of 2x2 pixels: resize the logits"),
        (lambda: box_masks(2, 8, 8, area=(0.0, 0.5)), r"range within \(0, 1\]"),
        (lambda: box_masks(2, 8, 8, boxes=0), "at least one of each"),
    ],
)
def test_mistakes(call, line) -> None:
    with pytest.raises(InputError, match=line) as error:
        call()
    assert "\n" not in str(error.value)
