import pytest
import torch

from limbeck.blocks.masking import TokenMask, masked_mse, patchify, standardise_patches, unpatchify
from limbeck.core.errors import InputError


def test_a_mask_keeps_the_patches_of_least_noise_in_their_order() -> None:
    mask = TokenMask.of(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), 0.5)
    assert mask.keep.tolist() == [[1, 3]] and mask.removed.tolist() == [[True, False, True, False]]
    tokens = torch.arange(4.0).reshape(1, 4, 1)
    assert mask.select(tokens).flatten().tolist() == [1, 3]
    assert mask.fill(mask.select(tokens), torch.full((1, 1, 1), -1.0)).flatten().tolist() == [-1, 1, -1, 3]


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"), [(16, 0.75, 4), (49, 0.75, 12), (16, 0.0, 16), (16, 0.98, 1), (10, 0.9, 1)]
)
def test_how_many_stay_visible(patches: int, ratio: float, visible: int) -> None:
    mask = TokenMask.draw(3, patches, ratio)
    assert mask.visible == visible and (~mask.removed).sum(1).tolist() == [visible] * 3


def test_filling_in_is_the_inverse_of_selecting() -> None:
    torch.manual_seed(0)
    tokens, mask = torch.randn(5, 12, 3), TokenMask.draw(5, 12, 0.6)
    back = mask.fill(mask.select(tokens), torch.zeros(1, 1, 3))
    assert torch.equal(back, tokens * ~mask.removed[:, :, None])


def test_every_patch_is_hidden_equally_often() -> None:
    torch.manual_seed(0)
    share = TokenMask.draw(4000, 8, 0.75).removed.float().mean(0)
    assert (share - 0.75).abs().max() < 0.03


def test_patches_are_rows_with_channels_last() -> None:
    image = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    rows = patchify(image, 2)
    assert rows.shape == (1, 4, 8)
    assert rows[0, 1].tolist() == [
        2,
        18,
        3,
        19,
        6,
        22,
        7,
        23,
    ]  # upper right patch, pixel by pixel, both channels of each
    assert torch.equal(unpatchify(rows, 2, (2, 2)), image)


def test_rectangular_images_come_back() -> None:
    image = torch.randn(2, 3, 4, 8)
    assert torch.equal(unpatchify(patchify(image, 2), 2, (2, 4)), image)


def test_standardised_patches_and_flat_ones() -> None:
    rows = standardise_patches(torch.stack([torch.arange(4.0), torch.full((4,), 0.3)]), eps=1e-6)
    assert rows[0].mean().abs() < 1e-6 and rows[0].var().item() == pytest.approx(1, abs=1e-5)
    assert rows[1].abs().max() < 1e-3


def test_only_hidden_patches_count() -> None:
    predicted, target = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 3.0], [100.0, 100.0], [2.0, 0.0]]])
    removed = torch.tensor([[True, False, True]])
    assert masked_mse(predicted, target, removed).item() == pytest.approx((5 + 2) / 2)
    assert masked_mse(predicted, target, torch.zeros(1, 3, dtype=torch.bool)).item() == 0


def test_mistakes() -> None:
    with pytest.raises(InputError, match="mask ratio"):
        TokenMask.draw(1, 4, 1.0)
    with pytest.raises(InputError, match="no patches"):
        TokenMask.draw(1, 0, 0.5)
    with pytest.raises(InputError, match="same grid of patches"):
        TokenMask.draw(2, 4, 0.5).select(torch.zeros(2, 5, 1))
    with pytest.raises(InputError, match="do not tile"):
        patchify(torch.zeros(1, 1, 5, 4), 2)
