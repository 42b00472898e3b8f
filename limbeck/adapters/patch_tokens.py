"""Vision transformers of other libraries as patch encoders: 🤗 transformers' ViT and ViTMAE, timm's VisionTransformer.

Everything goes by attributes, so neither library is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.blocks.patch_tokens import PatchDecoder, PatchEncoder
from limbeck.core.errors import InputError


def patch_encoder(model: nn.Module) -> PatchEncoder:
    """A vision transformer's encoder.

    Args:
        model: a network of ours with ``patch_encoder()``; ``ViTMAEModel``, ``ViTMAEForPreTraining``, ``ViTModel``,
            ``ViTForImageClassification`` of transformers; a timm ``VisionTransformer`` with one class token.

    Raises:
        InputError: none of these, or a grid that is not known.
    """
    own = getattr(model, "patch_encoder", None)
    if callable(own):
        found: PatchEncoder = own()
        return found
    body: Any = getattr(model, "vit", model)
    if hasattr(body, "embeddings") and hasattr(body.embeddings, "patch_embeddings") and hasattr(body, "layernorm"):
        return _transformers(model, body)
    if all(hasattr(model, name) for name in ("patch_embed", "cls_token", "pos_embed", "blocks", "norm")):
        return _timm(model)
    raise InputError(
        f"{type(model).__name__} is no vision transformer that can be read here: give transformers' ViT or ViTMAE models, a timm "
        "VisionTransformer, or a module whose method patch_encoder() returns a limbeck.blocks.patch_tokens.PatchEncoder"
    )


def patch_decoder(model: nn.Module) -> PatchDecoder | None:
    """The decoder of ``ViTMAEForPreTraining``, of a ``ViTMAEDecoder``, or of a module with ``patch_decoder()``; None if there is none."""
    own = getattr(model, "patch_decoder", None)
    if callable(own):
        found: PatchDecoder = own()
        return found
    decoder: Any = model if hasattr(model, "decoder_layers") else getattr(model, "decoder", None)
    if not hasattr(decoder, "decoder_layers"):
        return None
    return PatchDecoder(
        decoder,
        decoder.decoder_embed,
        decoder.mask_token,
        decoder.decoder_pos_embed,
        decoder.decoder_layers,
        decoder.decoder_norm,
        decoder.decoder_pred,
        decoder.mask_token.shape[-1],
    )


def _transformers(model: nn.Module, body: Any) -> PatchEncoder:
    embeddings, patches = body.embeddings, body.embeddings.patch_embeddings
    blocks = getattr(body, "layers", None)
    if blocks is None:  # older versions keep them one level deeper
        blocks = body.encoder.layer
    height, width = _pair(patches.image_size)
    side = _pair(patches.patch_size)
    if side[0] != side[1]:
        raise InputError(f"patches must be square (got {side[0]}x{side[1]})")
    dropout: Callable[[Tensor], Tensor] = getattr(embeddings, "dropout", nn.Identity())
    positions = embeddings.position_embeddings
    prefix = positions.shape[1] - patches.num_patches
    if prefix != 1:
        raise InputError(f"{type(model).__name__} has {prefix} tokens before its patches; one class token is expected")

    def embed(images: Tensor) -> Tensor:
        return dropout(patches(images) + positions[:, 1:])

    def class_token(batch: int) -> Tensor:
        return dropout((embeddings.cls_token + positions[:, :1]).expand(batch, -1, -1))

    return PatchEncoder(
        model,
        embed,
        class_token,
        blocks,
        body.layernorm,
        positions.shape[-1],
        (height // side[0], width // side[0]),
        side[0],
        patches.num_channels,
        embeddings=tuple(embeddings.parameters()),
    )


def _timm(model: Any) -> PatchEncoder:
    patches = model.patch_embed
    if getattr(model, "num_prefix_tokens", 1) != 1 or getattr(model, "reg_token", None) is not None:
        raise InputError(
            f"{type(model).__name__} has more than a class token before its patches; that is not supported"
        )
    if getattr(model, "no_embed_class", False):
        raise InputError(f"{type(model).__name__} gives its class token no position; that is not supported")
    drop, before = getattr(model, "pos_drop", nn.Identity()), getattr(model, "norm_pre", nn.Identity())

    def embed(images: Tensor) -> Tensor:
        tokens: Tensor = patches(images)
        if tokens.ndim == 4:  # (B, H, W, D) where patch_embed was told not to flatten
            tokens = tokens.flatten(1, 2)
        out: Tensor = before(drop(tokens + model.pos_embed[:, 1:]))
        return out

    def class_token(batch: int) -> Tensor:
        out: Tensor = before(drop((model.cls_token + model.pos_embed[:, :1]).expand(batch, -1, -1)))
        return out

    projection = patches.proj
    rows, columns = patches.grid_size
    parameters = (*patches.parameters(), model.cls_token, model.pos_embed)
    return PatchEncoder(
        model,
        embed,
        class_token,
        model.blocks,
        model.norm,
        model.pos_embed.shape[-1],
        (int(rows), int(columns)),
        _pair(patches.patch_size)[0],
        projection.in_channels,
        embeddings=tuple(p for p in parameters if isinstance(p, nn.Parameter)),
    )


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return int(first), int(second)


@torch.no_grad()
def load_encoder(target: nn.Module, source: nn.Module) -> nn.Module:
    """Copy the encoder's weights of one vision transformer into another of the same class of encoder, in place.

    Heads and decoders are left alone: this is how a pre-trained ``ViTMAEForPreTraining`` fills a classifier.

    Raises:
        InputError: the encoders differ in shape or in the names of their parts.
    """
    there, here = (getattr(m, "vit", m) for m in (source, target))
    state = there.state_dict()
    try:
        here.load_state_dict({k: v for k, v in state.items() if k in here.state_dict()}, strict=True)
    except RuntimeError as error:
        raise InputError(
            f"the encoder of {type(source).__name__} does not fit that of {type(target).__name__}: "
            f"{' '.join(str(error).split())[:160]}"
        ) from None
    return target
