"""Vision transformers for masked pre-training, with the modules of 🤗 transformers' ViTMAE, and their decoders."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.blocks.patch_tokens import Encoded, PatchEncoder
from limbeck.core.errors import InputError
from limbeck.networks.base import Network, patch_grid

if TYPE_CHECKING:
    from transformers import ViTMAEModel


class _MaskedTransformer(Network):
    """What the two classifiers share: the encoder, under the names that ``ViTMAEForPreTraining`` gives its weights."""

    vit: ViTMAEModel
    prefix_tokens = 1

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 64,
        depth: int = 6,
        heads: int = 4,
        patch: int = 2,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__(in_shape, num_classes)
        from transformers import ViTMAEModel

        self.grid = patch_grid(self.in_shape, patch)
        self.config = _config(self.in_shape, patch, width, depth, heads, mlp_ratio, self.grid)
        self.vit = ViTMAEModel(self.config)
        initialise(self.vit)
        self.feature_dim = width
        self.stage_paths = [f"vit.layers.{n}" for n in range(depth)] if hasattr(self.vit, "layers") else []

    def patch_encoder(self) -> PatchEncoder:
        """The encoder as a view (:class:`limbeck.blocks.patch_tokens.PatchEncoder`)."""
        body: Any = self.vit
        embeddings = body.embeddings
        positions = embeddings.position_embeddings
        assert self.grid is not None
        return PatchEncoder(
            self,
            lambda images: embeddings.patch_embeddings(images) + positions[:, 1:],
            lambda batch: (embeddings.cls_token + positions[:, :1]).expand(batch, -1, -1),
            body.layers if hasattr(body, "layers") else body.encoder.layer,
            body.layernorm,
            self.feature_dim,
            self.grid,
            self.in_shape[1] // self.grid[0],
            self.in_shape[0],
            embeddings=tuple(embeddings.parameters()),
        )


class MAEViT(_MaskedTransformer):
    """A classifier on the mean of the patch tokens, as masked autoencoders are fine-tuned.

    (B, C, H, W) -> patch tokens with fixed sine-cosine positions and a class token -> blocks -> mean of the patch tokens ->
    layer norm -> linear head. ``vit`` is a ``ViTMAEModel`` (its final norm is used in pre-training only), so weights of
    ``ViTMAEForPreTraining`` fit, see :func:`limbeck.adapters.patch_tokens.load_encoder`.

    Args:
        in_shape: ``(C, H, W)``, square, as the patches must be.
        num_classes: number of logits.
        width, depth, heads, patch, mlp_ratio: D (a multiple of 4), blocks, attention heads, side of a patch, hidden width over D.

    Raises:
        InputError: sizes that do not fit each other.

    Source: "Masked Autoencoders Are Scalable Vision Learners" (2021).
    """

    def __init__(self, in_shape: tuple[int, ...], num_classes: int, **sizes: Any) -> None:
        super().__init__(in_shape, num_classes, **sizes)
        self.fc_norm = nn.LayerNorm(self.feature_dim)
        self.head = nn.Linear(self.feature_dim, self.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        features: Tensor = self.fc_norm(self.patch_encoder()(x).mean())
        return features


class DistilledViT(_MaskedTransformer):
    """A classifier with a distillation token: one head reads the class token, another the distillation token.

    The distillation token stands at the end of the sequence and has no position. ``forward`` gives the mean of both heads'
    logits, :meth:`both` each of them.

    Args, errors: see :class:`MAEViT`.

    Source: "Training data-efficient image transformers & distillation through attention" (2021), in the form of
    "Generic-to-Specific Distillation of Masked Autoencoders" (2023).
    """

    def __init__(self, in_shape: tuple[int, ...], num_classes: int, **sizes: Any) -> None:
        super().__init__(in_shape, num_classes, **sizes)
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, self.feature_dim))
        self.head = nn.Linear(self.feature_dim, self.num_classes)
        self.head_distillation = nn.Linear(self.feature_dim, self.num_classes)
        nn.init.trunc_normal_(self.distillation_token, std=0.02)
        for head in (self.head, self.head_distillation):
            nn.init.trunc_normal_(head.weight, std=2e-5)
            nn.init.zeros_(head.bias)

    def encode(self, x: Tensor) -> Encoded:
        """All tokens: class, patches, distillation."""
        return self.patch_encoder()(x, behind=self.distillation_token)

    def embed(self, x: Tensor) -> Tensor:
        """The class token after the final norm, (B, C, H, W) -> (B, D)."""
        return self.encode(x).latent[:, 0]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class token's head and of the distillation token's head, (B, num_classes) each."""
        latent = self.encode(x).latent
        return self.head(latent[:, 0]), self.head_distillation(latent[:, -1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), the mean of both heads."""
        own, distilled = self.both(x)
        return (own + distilled) / 2


def build_decoder(encoder: PatchEncoder, *, width: int, depth: int, heads: int = 4, mlp_ratio: int = 4) -> nn.Module:
    """A fresh masked-autoencoder decoder (transformers' ``ViTMAEDecoder``) behind an encoder.

    Raises:
        InputError: the encoder has more than a class token in front, or sizes do not fit.
    """
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

    if encoder.prefix_tokens != 1:
        raise InputError(f"a decoder stands behind one class token, and the encoder has {encoder.prefix_tokens}")
    config = _config(encoder.in_shape, encoder.patch, encoder.width, 1, 1, mlp_ratio, encoder.grid)
    _check_width("the decoder", width, heads)
    config.decoder_hidden_size = width
    config.decoder_num_hidden_layers = depth
    config.decoder_num_attention_heads = heads
    config.decoder_intermediate_size = mlp_ratio * width
    decoder: nn.Module = ViTMAEDecoder(config, num_patches=encoder.patches)
    return initialise(decoder)


def fitting_sizes(in_shape: tuple[int, ...]) -> tuple[str, str]:
    """Sizes of a small and a large transformer for images, such as ``d24-l4-h4-p2``: the smallest patch with at most 8 a side.

    Raises:
        InputError: no square images, or no patch of at least two pixels divides their side into at most 8.
    """
    if len(in_shape) != 3 or in_shape[1] != in_shape[2]:
        raise InputError(
            f"masked autoencoders need square images (channels, side, side), not inputs of shape {in_shape}"
        )
    side = in_shape[1]
    patch = next((p for p in range(2, side // 2 + 1) if side % p == 0 and side <= 8 * p), None)
    if patch is None:
        raise InputError(f"images of {side}x{side} pixels cannot be cut into at most 8x8 patches: give --image-size 32")
    return f"d24-l4-h4-p{patch}", f"d64-l6-h4-p{patch}"


def initialise(module: nn.Module) -> nn.Module:
    """Linear layers (and the patch embedding, as one) Xavier uniform with zero biases; class and mask tokens N(0, 0.02²)."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        for token in ("cls_token", "mask_token"):
            found = getattr(part, token, None)
            if isinstance(found, nn.Parameter) and name.count(".") <= 1:
                nn.init.normal_(found, std=0.02)
    return module


def _config(
    in_shape: tuple[int, ...], patch: int, width: int, depth: int, heads: int, mlp_ratio: int, grid: tuple[int, int]
) -> Any:
    from transformers import ViTMAEConfig

    _check_width("a masked vision transformer", width, heads)
    if math.isqrt(grid[0] * grid[1]) ** 2 != grid[0] * grid[1] or grid[0] != grid[1]:
        raise InputError(
            f"masked vision transformers need a square grid of patches, not {grid[0]}x{grid[1]}: resize the images to a square"
        )
    # Eager attention is as fast at these sizes, and unlike the fused kernels it has second derivatives.
    general: dict[str, Any] = {"attn_implementation": "eager"}
    return ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp_ratio * width,
        image_size=in_shape[1],
        patch_size=patch,
        num_channels=in_shape[0],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **general,
    )


def _check_width(who: str, width: int, heads: int) -> None:
    if width % 4 or width % heads:
        raise InputError(f"{who} needs a width that 4 and the {heads} attention heads divide (got {width})")
