"""Tiny pipelines of diffusers, randomly initialised on the spot: a few thousand weights each, nothing downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

WORDS = ["a", "cat", "dog", "of", "photo", "red", "blue"]
WIDTH = 16


def unet(classes: int | None = None, **options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "add_attention": False,
        "num_class_embeds": classes,
    }
    return UNet2DModel(**{**settings, **options}).eval()


def text_unet(xl: bool = False, **options: Any) -> UNet2DConditionModel:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 2 * WIDTH if xl else WIDTH,
    }
    if xl:
        settings.update(
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=WIDTH + 6 * 4,
            use_linear_projection=True,
        )
    return UNet2DConditionModel(**{**settings, **options}).eval()


def vae(channels: int = 4, **options: Any) -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=2,
        sample_size=16,
        **options,
    ).eval()


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer of whole words and single letters, from a vocabulary file."""
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    merges, pieces = [], []
    for word in WORDS:
        left = word[0] if len(word) > 1 else f"{word[0]}</w>"
        for i in range(1, len(word)):
            right = word[i] + ("</w>" if i == len(word) - 1 else "")
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                pieces.append(left + right)
            left += right
    names = [*letters, *pieces, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(dict.fromkeys(names))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=8)


def clip(tokens: CLIPTokenizer, projection: bool = False) -> Any:
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=WIDTH,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(vocabulary: int) -> T5EncoderModel:
    torch.manual_seed(4)
    return T5EncoderModel(
        T5Config(vocab_size=vocabulary, d_model=WIDTH, d_kv=4, d_ff=WIDTH, num_layers=1, num_heads=2)
    ).eval()


def scaled_linear(kind: Any = DDIMScheduler, **options: Any) -> Any:
    """A scheduler with the noise of Stable Diffusion."""
    made = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    if kind is DDIMScheduler:
        made["clip_sample"] = False
    return kind(**{**made, **options})


def ddpm(classes: int | None = None, scheduler: Any = None, **options: Any) -> DDPMPipeline:
    return DDPMPipeline(unet(classes, **options), scheduler or DDPMScheduler())


def edm() -> DDPMPipeline:
    return DDPMPipeline(unet(), EDMEulerScheduler(sigma_data=0.7, sigma_min=0.02, sigma_max=20.0))


def stable_diffusion(folder: Path, scheduler: Any = None, **options: Any) -> StableDiffusionPipeline:
    tokens = tokenizer(folder)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(tokens),
        tokenizer=tokens,
        unet=text_unet(**options),
        scheduler=scheduler or scaled_linear(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(folder: Path, scheduler: Any = None) -> StableDiffusionXLPipeline:
    tokens = tokenizer(folder)
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(tokens),
        text_encoder_2=clip(tokens, projection=True),
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=text_unet(xl=True),
        scheduler=scheduler or scaled_linear(),
        add_watermarker=False,
    )


def dit(classes: int = 1000) -> DiTPipeline:
    torch.manual_seed(5)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_num_groups=4,
    ).eval()
    return DiTPipeline(network, vae(), DDIMScheduler(clip_sample=False), id2label={0: "cat, tomcat", 1: "dog"})


def pixart(folder: Path) -> PixArtAlphaPipeline:
    torch.manual_seed(6)
    tokens = tokenizer(folder)
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=8,
        sample_size=8,
        patch_size=2,
        caption_channels=WIDTH,
        use_additional_conditions=False,
        norm_num_groups=4,
    ).eval()
    return PixArtAlphaPipeline(
        tokenizer=tokens,
        text_encoder=t5(len(tokens)),
        vae=vae(),
        transformer=network,
        scheduler=DDIMScheduler(clip_sample=False),
    )


def sd3(folder: Path, **scheduler: Any) -> StableDiffusion3Pipeline:
    torch.manual_seed(7)
    tokens = tokenizer(folder)
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=clip(tokens, projection=True),
        tokenizer=tokens,
        text_encoder_2=clip(tokens, projection=True),
        tokenizer_2=tokens,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux(folder: Path, guided: bool = False) -> FluxPipeline:
    torch.manual_seed(8)
    tokens = tokenizer(folder)
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=guided,
    ).eval()
    return FluxPipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=clip(tokens),
        tokenizer=tokens,
        text_encoder_2=t5(len(tokens)),
        tokenizer_2=tokens,
    )
