"""Prompts as conditions, by the pipelines' own text encoders, under the names that the wrapped networks know.

A null condition is one row without a batch axis: the empty prompt, or zeros where the pipeline says so (SDXL).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.adapters.diffusers_networks import DiffusersNetwork, UNet2D, UNet2DConditional
from limbeck.adapters.diffusers_transformers import SD3, DiT, Flux, PixArt
from limbeck.core.errors import InputError

Encoded = dict[str, Tensor]


def encode_prompts(pipeline: Any, network: DiffusersNetwork, prompts: Sequence[str], size: tuple[int, int]) -> Encoded:
    """Embedded prompts: a mapping of tensors with one row a prompt, without gradient.

    Args:
        pipeline: of diffusers, with its text encoders.
        network: the wrapped network that they are for.
        size: height and width of the pictures in pixels, for networks that are told it.

    Raises:
        InputError: no prompts, something that is no list of texts, a network that takes none, a pipeline without text encoder.
    """
    texts = list(prompts)
    if isinstance(prompts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError("prompts must be a list of one or more texts")
    encoder = _encoder(pipeline, network)
    with torch.no_grad():
        return encoder(pipeline, network, texts, size)


def null_condition(pipeline: Any, network: DiffusersNetwork, size: tuple[int, int]) -> Encoded:
    """What the network is given for "no prompt": one row of each part, without a batch axis.

    Sizes are left out: they are those of the condition it stands beside.
    """
    found = encode_prompts(pipeline, network, [""], size)
    if isinstance(network, UNet2DConditional) and bool(pipeline.config.get("force_zeros_for_empty_prompt", False)):
        found = {name: torch.zeros_like(value) for name, value in found.items()}
    return {name: value[0] for name, value in found.items() if name not in ("time_ids", "resolution", "aspect_ratio")}


def _encoder(pipeline: Any, network: DiffusersNetwork) -> Callable[..., Encoded]:
    encoder = next((found for kind, found in _ENCODERS.items() if isinstance(network, kind)), None)
    if encoder is None:
        what = "classes" if isinstance(network, UNet2D | DiT) and network.num_classes else "nothing"
        raise InputError(f"{network.name} is conditioned on {what}: it has no prompts")
    if getattr(pipeline, "text_encoder", None) is None and getattr(pipeline, "text_encoder_2", None) is None:
        raise InputError(
            f"this {type(pipeline).__name__} has no text encoder: load it with one, or give embedded prompts"
        )
    return encoder


def _stable_diffusion(pipeline: Any, network: DiffusersNetwork, texts: list[str], size: tuple[int, int]) -> Encoded:
    where = pipeline.text_encoder.device if pipeline.text_encoder is not None else pipeline.text_encoder_2.device
    if network.config.addition_embed_type != "text_time":
        return {"encoder_hidden_states": pipeline.encode_prompt(texts, where, 1, False)[0]}
    embedded, _, pooled, _ = pipeline.encode_prompt(
        texts, device=where, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    height, width = size  # original size, corner of the crop, target size: uncropped pictures of the target's size
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=embedded.device)
    return {"encoder_hidden_states": embedded, "text_embeds": pooled, "time_ids": sizes.repeat(len(texts), 1)}


def _pixart(pipeline: Any, network: DiffusersNetwork, texts: list[str], size: tuple[int, int]) -> Encoded:
    where = pipeline.text_encoder.device
    embedded, mask, _, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, device=where)
    found = {"encoder_hidden_states": embedded, "encoder_attention_mask": mask}
    if isinstance(network, PixArt) and network.sized:
        rows = torch.tensor([[float(size[0]), float(size[1])]], device=embedded.device).repeat(len(texts), 1)
        found.update(resolution=rows, aspect_ratio=rows[:, :1] / rows[:, 1:])
    return found


def _sd3(pipeline: Any, network: DiffusersNetwork, texts: list[str], size: tuple[int, int]) -> Encoded:
    embedded, _, pooled, _ = pipeline.encode_prompt(
        texts, None, None, device=pipeline.text_encoder.device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embedded, "pooled_projections": pooled}


def _flux(pipeline: Any, network: DiffusersNetwork, texts: list[str], size: tuple[int, int]) -> Encoded:
    embedded, pooled, _ = pipeline.encode_prompt(texts, None, device=pipeline.text_encoder.device)
    return {"encoder_hidden_states": embedded, "pooled_projections": pooled}


_ENCODERS: dict[type[DiffusersNetwork], Callable[..., Encoded]] = {
    UNet2DConditional: _stable_diffusion,
    PixArt: _pixart,
    SD3: _sd3,
    Flux: _flux,
}
