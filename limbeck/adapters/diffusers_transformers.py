"""Transformers of diffusers, called as a denoiser calls its network; and :func:`wrap`, which finds the wrapper of any network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.adapters.diffusers_networks import DiffusersNetwork, UNet2D, UNet2DConditional, check_divisible
from limbeck.core.errors import InputError

FLUX_GUIDANCE = 3.5
"""Guidance that a network with embedded guidance is told unless said otherwise: the default of diffusers' pipeline."""


class Transformer(DiffusersNetwork):
    """What the transformers share."""

    component = "transformer"
    last = "proj_out"

    def check_size(self, height: int, width: int) -> None:
        check_divisible(self.name, height, width, int(self.config.patch_size))


class DiT(Transformer):
    """``DiTTransformer2DModel``: class ids (B,); id ``num_embeds_ada_norm`` (1000 for ImageNet) is the null class.

    Labels are not dropped at random inside the network in training mode, as the plain model does: a distiller drops them itself.
    """

    parts = ("class_labels",)
    main = "class_labels"
    last = "proj_out_2"

    def __init__(self, network: nn.Module, sign: int = 1) -> None:
        super().__init__(network, sign)
        tables = [m for m in network.modules() if type(m).__name__ == "LabelEmbedding"]
        for table in tables:
            table.dropout_prob = 0.0  # type: ignore[assignment]
        self.null_class = int(self.config.num_embeds_ada_norm)
        self.num_classes = self.null_class + 1

    def check_size(self, height: int, width: int) -> None:
        super().check_size(height, width)
        if height != width:
            raise InputError(f"{self.name} takes square samples, not {height} x {width}")

    def prepared(self, parts: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
        return {"class_labels": self.class_ids(parts, self.null_class + 1)}

    def ask(self, x: Tensor, model_time: Tensor, arguments: dict[str, Any]) -> Tensor:
        found: Tensor = self.network(x, timestep=model_time, **arguments, return_dict=False)[0]
        return found


class PixArt(Transformer):
    """``PixArtTransformer2DModel`` (alpha and Sigma).

    Parts: ``encoder_hidden_states`` (B, T, D), ``encoder_attention_mask`` (B, T) with 1 for tokens that count, and for networks of 1024 pixels
    ``resolution`` (B, 2) and ``aspect_ratio`` (B, 1).
    """

    parts = ("encoder_hidden_states", "encoder_attention_mask", "resolution", "aspect_ratio")
    main = "encoder_hidden_states"

    @property
    def width(self) -> int:
        return int(self.config.caption_channels or self.config.cross_attention_dim)

    @property
    def sized(self) -> bool:
        """Whether it is told the picture's size."""
        return bool(getattr(self.network, "use_additional_conditions", False))

    def prepared(self, parts: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
        text = self.required(parts, "encoder_hidden_states", self.width, 3)
        made: dict[str, Any] = {"encoder_hidden_states": text}
        if "encoder_attention_mask" in parts:
            made["encoder_attention_mask"] = self.required(parts, "encoder_attention_mask", text.shape[1], 2)
        sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.sized:
            sizes = {
                "resolution": self.required(parts, "resolution", 2, 2),
                "aspect_ratio": self.required(parts, "aspect_ratio", 1, 2),
            }
        made["added_cond_kwargs"] = sizes
        return made

    def ask(self, x: Tensor, model_time: Tensor, arguments: dict[str, Any]) -> Tensor:
        found: Tensor = self.network(x, timestep=model_time, **arguments, return_dict=False)[0]
        return found


class SD3(Transformer):
    """``SD3Transformer2DModel``: ``encoder_hidden_states`` (B, T, D) and ``pooled_projections`` (B, P)."""

    parts = ("encoder_hidden_states", "pooled_projections")
    main = "encoder_hidden_states"

    def check_size(self, height: int, width: int) -> None:
        super().check_size(height, width)
        most = int(self.config.pos_embed_max_size) * int(self.config.patch_size)
        if max(height, width) > most:
            raise InputError(f"{self.name} has positions for samples of up to {most} x {most}, not {height} x {width}")

    def prepared(self, parts: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
        return {
            "encoder_hidden_states": self.required(
                parts, "encoder_hidden_states", int(self.config.joint_attention_dim), 3
            ),
            "pooled_projections": self.required(parts, "pooled_projections", int(self.config.pooled_projection_dim), 2),
        }

    def ask(self, x: Tensor, model_time: Tensor, arguments: dict[str, Any]) -> Tensor:
        found: Tensor = self.network(x, timestep=model_time, **arguments, return_dict=False)[0]
        return found


class Flux(Transformer):
    """``FluxTransformer2DModel``. Samples are latents (B, C, H, W) with H and W even; 2 x 2 patches are packed on the way in and unpacked
    on the way out.

    Parts: ``encoder_hidden_states`` (B, T, D), ``pooled_projections`` (B, P), and for networks with embedded guidance (FLUX.1-dev)
    optionally ``guidance`` (B,).

    Args:
        embedded_guidance: what those are told where the condition has no ``guidance``.
    """

    parts = ("encoder_hidden_states", "pooled_projections", "guidance")
    main = "encoder_hidden_states"

    def __init__(self, network: nn.Module, sign: int = 1, embedded_guidance: float = FLUX_GUIDANCE) -> None:
        super().__init__(network, sign)
        self.embedded_guidance = float(embedded_guidance)

    def sample_channels(self) -> int:
        return int(self.config.in_channels) // 4

    def output_channels(self) -> int:
        return int(self.config.out_channels or self.config.in_channels) // 4

    def check_size(self, height: int, width: int) -> None:
        check_divisible(self.name, height, width, 2)

    def prepared(self, parts: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
        made = {
            "encoder_hidden_states": self.required(
                parts, "encoder_hidden_states", int(self.config.joint_attention_dim), 3
            ),
            "pooled_projections": self.required(parts, "pooled_projections", int(self.config.pooled_projection_dim), 2),
        }
        if bool(self.config.guidance_embeds):
            usual = torch.full((len(x),), self.embedded_guidance, device=x.device)
            made["guidance"] = self.required({"guidance": usual, **parts}, "guidance", ndim=1)
        elif "guidance" in parts:
            raise InputError(f"{self.name} has no embedded guidance (guidance_embeds is False): it takes no 'guidance'")
        return made

    def ask(self, x: Tensor, model_time: Tensor, arguments: dict[str, Any]) -> Tensor:
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        packed = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(len(x), height * width, -1)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(x.device, x.dtype)
        text = torch.zeros(arguments["encoder_hidden_states"].shape[1], 3, device=x.device, dtype=x.dtype)
        found: Tensor = self.network(
            packed,
            timestep=model_time / 1000,  # the network multiplies by 1000 itself
            img_ids=places,
            txt_ids=text,
            **arguments,
            return_dict=False,
        )[0]
        return found.reshape(len(x), height, width, self.channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


WRAPPERS: dict[str, type[DiffusersNetwork]] = {
    "UNet2DModel": UNet2D,
    "UNet2DConditionModel": UNet2DConditional,
    "DiTTransformer2DModel": DiT,
    "PixArtTransformer2DModel": PixArt,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
}


def wrap(network: nn.Module, sign: int = 1, **options: Any) -> DiffusersNetwork:
    """A network of diffusers as the network of a denoiser.

    Args:
        network: one of :data:`WRAPPERS`.
        sign: -1 negates its output.
        options: of its wrapper (``embedded_guidance`` for Flux).

    Raises:
        InputError: another class, or options that it does not take.
    """
    for kind in type(network).__mro__:
        if kind.__name__ in WRAPPERS:
            try:
                return WRAPPERS[kind.__name__](network, sign, **options)
            except TypeError as error:
                raise InputError(f"{kind.__name__} does not take {', '.join(options)}: {error}") from None
    raise InputError(
        f"the network {type(network).__name__} is not known here; known are {', '.join(WRAPPERS)}: wrap it yourself as "
        "module(x, model_time, cond) and give it to a Denoiser"
    )
