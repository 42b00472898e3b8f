"""Patches kept, weighed and put back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.adapters.patch_tokens import patch_decoder, patch_encoder
from limbeck.blocks.masking import TokenMask, masked_mse, patchify
from limbeck.blocks.patch_store import MaskedAutoencoder, PatchStore, keep_important, token_mask
from limbeck.core.errors import InputError, RunError
from limbeck.networks.mae import MAEViT, build_decoder

torch.set_num_threads(1)


def pictures(n: int = 5, channels: int = 3, side: int = 8) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.rand(n, channels, side, side, generator=g) * 255).to(torch.uint8)


def mask(n: int = 5, patches: int = 16, keep: int = 11, seed: int = 1) -> Tensor:
    order = torch.rand(n, patches, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order < keep


def pixels_of(kept: Tensor, patch: int, side: int) -> Tensor:
    grid = side // patch
    return kept.reshape(-1, 1, grid, grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def test_kept_pixels_come_back_exactly_and_the_rest_is_filled():
    x, kept = pictures(), mask()
    store = PatchStore.of(x, kept, 2)
    assert torch.equal(store.kept, kept) and len(store) == 5 and store.grid == (4, 4)
    where = pixels_of(kept, 2, 8)
    assert torch.equal(store.holed(), x * where)
    filled = store.reconstruct()
    assert filled.dtype == torch.uint8 and filled.shape == x.shape
    assert torch.equal(filled * where, x * where)
    for image, m, out in zip(x, where, filled, strict=True):
        colour = (image * m).float().sum((1, 2)) / m.sum()
        dropped = out[:, ~m[0]].float()
        assert bool(((dropped - colour[:, None]).abs() <= 0.5).all())


def test_bytes_are_pixels_and_bits():
    store = PatchStore.of(pictures(), mask(), 2)
    assert store.bytes == 5 * 11 * 2 * 2 * 3 + 5 * 2
    assert PatchStore.of(pictures().float(), mask(), 2).bytes == 4 * 5 * 11 * 12 + 10
    odd = PatchStore.of(pictures(2, 1, 6), mask(2, 9, 4), 2)
    assert odd.bits.shape == (2, 2) and torch.equal(odd.kept, mask(2, 9, 4))


def test_stores_are_written_and_read(tmp_path):
    for x in (pictures(), pictures().float()):
        store = PatchStore.of(x, mask(), 2)
        store.save(tmp_path / "patches.safetensors")
        back = PatchStore.load(tmp_path / "patches.safetensors")
        assert torch.equal(back.patches, store.patches) and torch.equal(back.kept, store.kept)
        assert torch.equal(back.reconstruct(), store.reconstruct()) and back.in_shape == (3, 8, 8)
    (tmp_path / "other").write_bytes(b"not a store")
    for name in ("other", "none"):
        with pytest.raises(RunError, match="no store of patches"):
            PatchStore.load(tmp_path / name)


def test_floating_point_images_too():
    x, kept = torch.randn(4, 1, 6, 6), mask(4, 4, 3)
    store = PatchStore.of(x, kept, 3)
    where = pixels_of(kept, 3, 6)
    assert torch.equal(store.reconstruct()[where], x[where])


def test_a_reconstructor_sees_normalised_kept_pixels_and_fills_the_holes():
    x, kept = pictures(), mask()
    seen = []

    def ones(images: Tensor, found: TokenMask) -> Tensor:
        seen.append((images, found))
        return torch.ones(len(images), 16, 12)

    mean, std = [0.2, 0.4, 0.6], [0.1, 0.2, 0.3]
    store = PatchStore.of(x, kept, 2)
    filled = store.reconstruct(ones, mean=mean, std=std, batch_size=2)
    where = pixels_of(kept, 2, 8)
    images = torch.cat([s[0] for s in seen])
    scale = [torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std)]
    torch.testing.assert_close(images, (x.float() / 255 - scale[0]) / scale[1] * where)
    assert [len(s[0]) for s in seen] == [2, 2, 1] and torch.equal(torch.cat([s[1].removed for s in seen]), ~kept)
    expected = ((scale[0] + scale[1]) * 255).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(filled, torch.where(where, x, expected))
    with pytest.raises(InputError, match="the reconstructor gives"):
        store.reconstruct(lambda images, found: torch.ones(len(images), 4, 12))


def test_masks_for_the_autoencoder_show_kept_patches_in_the_order_of_the_grid():
    kept = mask()
    found = token_mask(kept)
    tokens = torch.arange(16.0).reshape(1, 16, 1).expand(5, -1, -1)
    visible = found.select(tokens)[:, :, 0]
    assert visible.shape == (5, 11) and bool((visible.diff(dim=1) > 0).all())
    assert torch.equal(torch.zeros_like(kept).scatter(1, visible.long(), True), kept)
    back = found.fill(found.select(tokens), torch.full((1, 1, 1), -1.0))[:, :, 0]
    assert torch.equal(back, torch.where(kept, tokens[:, :, 0], -1.0))


def test_a_trained_masked_autoencoder_fills_better_than_the_mean():
    torch.manual_seed(0)
    # images that can be told from any part of them: a ramp of random direction
    slopes = torch.randn(64, 2)
    line = torch.linspace(-1, 1, 8)
    x = (slopes[:, :1, None] * line[:, None] + slopes[:, 1:, None] * line)[:, None]
    model = MAEViT((1, 8, 8), 2, width=16, depth=2, heads=2, patch=2)
    decoder = build_decoder(patch_encoder(model), width=16, depth=1, heads=2)
    encoder, view = patch_encoder(model), patch_decoder(decoder)
    optimiser = torch.optim.Adam([*model.parameters(), *decoder.parameters()], 3e-3)
    for _ in range(150):
        drawn = TokenMask.draw(64, 16, 0.4)
        predicted = view.pixels(view.hidden(encoder(x, drawn).latent, drawn))
        loss = masked_mse(predicted, patchify(x, 2), drawn.removed)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.train()
    fill = MaskedAutoencoder(encoder, view)
    store = PatchStore.of(x, mask(64, 16, 10), 2)
    errors = [(store.reconstruct(r, batch_size=40) - x).square().sum() for r in (fill, None)]
    assert errors[0] < errors[1] / 2
    assert model.training and isinstance(fill, nn.Module)
    with pytest.raises(InputError, match="the decoder is for 16 patches"):
        MaskedAutoencoder(patch_encoder(MAEViT((1, 8, 8), 2, width=16, depth=1, heads=2, patch=4)), view)


def test_kept_patches_are_the_important_ones():
    importance = torch.tensor([[[0.1, 0.9], [0.5, 0.2]], [[0.0, 0.0], [0.0, 1.0]]])
    kept = keep_important(importance, 0.5)
    assert kept.tolist() == [[False, True, True, False], [True, False, False, True]]
    assert keep_important(importance, 0.0).all() and keep_important(importance, 0.99).sum(1).tolist() == [1, 1]
    zeros = torch.zeros(2000, 4)
    share = keep_important(zeros, 0.5, torch.Generator().manual_seed(0)).float().mean(0)
    assert (share - 0.5).abs().max() < 0.05
    distinct = torch.rand(6, 9)
    assert torch.equal(keep_important(distinct, 0.3), keep_important(distinct, 0.3, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("bad", "line"),
    [
        (lambda: PatchStore.of(pictures(), mask(5, 9, 4), 2), "a mask of kept patches"),
        (lambda: PatchStore.of(pictures(), torch.eye(5, 16) > 1, 2), "at least one"),
        (lambda: PatchStore.of(pictures(2), torch.tensor([[True] * 16, [True] * 8 + [False] * 8]), 2), "same number"),
        (lambda: PatchStore.of(pictures(), mask(), 3), "do not tile"),
        (lambda: keep_important(torch.zeros(2, 4), 1.0), "below 1"),
    ],
)
def test_bad_input_is_named(bad, line):
    with pytest.raises(InputError, match=line):
        bad()
