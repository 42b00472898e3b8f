import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel, ViTModel

from limbeck import networks
from limbeck.adapters.patch_tokens import load_encoder, patch_decoder, patch_encoder
from limbeck.blocks.masking import TokenMask, masked_mse, patchify, standardise_patches
from limbeck.blocks.patch_tokens import same_patches
from limbeck.core.errors import InputError
from limbeck.networks.mae import build_decoder

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 8, "patch_size": 2, "num_channels": 1}
DECODER = {
    "decoder_hidden_size": 12,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}


def autoencoder() -> ViTMAEForPreTraining:
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **IMAGES, **DECODER, mask_ratio=0.75, norm_pix_loss=True))
    nn.init.normal_(model.decoder.decoder_pos_embed)  # the library leaves it at 0 where no checkpoint fills it
    return model.eval()


def test_a_masked_autoencoder_gives_what_its_own_library_says() -> None:
    model, images, noise = autoencoder(), torch.randn(5, 1, 8, 8), torch.rand(5, 16)
    expected = model(images, noise=noise)
    mask = TokenMask.of(noise, 0.75)
    decoder = patch_decoder(model)
    pixels = decoder.pixels(decoder.hidden(patch_encoder(model)(images, mask).latent, mask))
    assert torch.equal(mask.removed.float(), expected.mask)
    torch.testing.assert_close(pixels, expected.logits)
    loss = masked_mse(pixels, standardise_patches(patchify(images, 2)), mask.removed)
    torch.testing.assert_close(loss, expected.loss)


@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
def test_plain_transformers_too(kind: type) -> None:
    model = kind(ViTConfig(**SIZES, **IMAGES, num_labels=4)).eval()
    images = torch.randn(2, 1, 8, 8)
    encoder = patch_encoder(model)
    expected = getattr(model, "vit", model)(images).last_hidden_state
    torch.testing.assert_close(encoder(images).latent, expected)
    assert encoder.grid == (4, 4) and encoder.in_shape == (1, 8, 8) and encoder.width == 16


def test_taps_are_the_residual_stream_and_a_stop_runs_nothing_further() -> None:
    model, images = autoencoder(), torch.randn(2, 1, 8, 8)
    calls = []
    for number, layer in enumerate(model.vit.layers):
        layer.register_forward_hook(lambda *_, n=number: calls.append(n))
    encoded = patch_encoder(model)(images, taps=(0, 1), stop=1)
    assert calls == [0, 1] and set(encoded.hidden) == {0, 1}
    assert torch.equal(encoded.tokens, encoded.hidden[1]) and encoded.tokens.shape == (2, 17, 16)


def test_hidden_patches_do_not_reach_the_encoder() -> None:
    model, images = autoencoder(), torch.randn(3, 1, 8, 8)
    mask = TokenMask.draw(3, 16, 0.75)
    other = torch.where(_pixels(mask), torch.randn(3, 1, 8, 8), images)
    encoder = patch_encoder(model)
    torch.testing.assert_close(encoder(images, mask).tokens, encoder(other, mask).tokens)
    assert not torch.allclose(encoder(images).tokens, encoder(other).tokens)


def _pixels(mask: TokenMask) -> torch.Tensor:
    """(B, 1, 8, 8) bool: pixels of hidden patches."""
    return mask.removed.reshape(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, 16, 2, 2)
        self.grid_size, self.patch_size = (4, 4), (2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class LikeTimm(nn.Module):
    """The attributes by which timm's VisionTransformer is read, with its order of operations."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 16))
        self.pos_drop, self.norm_pre = nn.Identity(), nn.Identity()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(2)])
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        x = self.pos_drop(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed)
        return self.norm(self.blocks(self.norm_pre(x)))


def test_a_model_with_timms_attributes() -> None:
    model, images = LikeTimm(), torch.randn(2, 1, 8, 8)
    encoder = patch_encoder(model)
    torch.testing.assert_close(encoder(images).latent, model(images))
    assert encoder.patch == 2 and encoder.channels == 1
    model.reg_token = nn.Parameter(torch.zeros(1, 4, 16))
    with pytest.raises(InputError, match="more than a class token"):
        patch_encoder(model)


def test_pretrained_weights_fill_a_classifier() -> None:
    source = autoencoder()
    target = networks.build("maevit-d16-l3-h2-p2", in_shape=(1, 8, 8), num_classes=3)
    with pytest.raises(InputError, match="does not fit"):  # another width of the MLP
        load_encoder(target, source)
    fitting = ViTMAEModel(ViTMAEConfig(**SIZES, **IMAGES))
    load_encoder(fitting, source)
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(patch_encoder(fitting)(images).latent, patch_encoder(source)(images).latent)


def test_mistakes() -> None:
    with pytest.raises(InputError, match="no vision transformer"):
        patch_encoder(nn.Linear(2, 2))
    small, big = (networks.build(f"maevit-d8-l1-h2-p{p}", in_shape=(1, 8, 8), num_classes=2) for p in (2, 4))
    with pytest.raises(InputError, match=r"token grids do not match: the student has a 4x4 grid.*teacher a 2x2 grid"):
        same_patches(patch_encoder(small), patch_encoder(big))
    with pytest.raises(InputError, match=r"images of shape \(1, 8, 8\)"):
        patch_encoder(small).check(torch.zeros(1, 1, 6, 8))
    with pytest.raises(InputError, match="no block 3"):
        patch_encoder(small).block(3)
    with pytest.raises(InputError, match="square grid"):
        networks.build("maevit-d8-l1-h2-p2", in_shape=(1, 8, 4), num_classes=2)
    with pytest.raises(InputError, match="width that 4"):
        build_decoder(patch_encoder(small), width=6, depth=1, heads=2)
    assert patch_decoder(nn.Linear(1, 1)) is None
