"""Networks of diffusers, called as a denoiser calls its network: ``module(x, model_time, cond)`` -> a tensor of x's shape.

A condition is a tensor or a mapping of tensors under diffusers' own names (``encoder_hidden_states``, ``text_embeds``, ``time_ids``,
``class_labels`` …). What the network never saw (a class id out of range, an embedding of another width, a missing part) is refused in
one line before it reaches the network.

U-Nets are here; transformers are in :mod:`limbeck.adapters.diffusers_transformers`; :func:`limbeck.adapters.diffusers_transformers.wrap`
finds the class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError, MissingDependencyError, UnknownNameError
from limbeck.diffusion.conditions import Condition


class DiffusersNetwork(nn.Module):
    """Base of the wrappers.

    Args:
        network: the model of diffusers.
        sign: -1 negates the output. Networks that return x0 - eps where a flow's velocity is eps - x0 (InstaFlow and other retrained U-Nets)
            need it.

    Attributes:
        network: the model; its layers are tapped as ``network.<path>``.
        channels: of a sample.
        component: what a pipeline calls the model, ``unet`` or ``transformer``.
        parts: names that a condition may have.
        main: the part that a condition is if it is a tensor.
        num_classes: ids 0 … num_classes - 1 are allowed; None where there are no classes.
        time_scale: the model's own time over the time that the wrapper is given.

    Raises:
        InputError: a network whose output fits no sample, or that needs what no condition here has.
    """

    component: ClassVar[str] = "unet"
    parts: ClassVar[tuple[str, ...]] = ()
    main: ClassVar[str] = ""
    last: ClassVar[str] = "conv_out"
    num_classes: int | None = None
    time_scale: float = 1.0

    def __init__(self, network: nn.Module, sign: int = 1) -> None:
        super().__init__()
        if sign not in (1, -1):
            raise InputError(f"the sign of a network's output is 1 or -1 (got {sign})")
        self.network, self.sign = network, int(sign)
        self.name = type(network).__name__
        self.channels = self.sample_channels()
        given = self.output_channels()
        if given not in (self.channels, 2 * self.channels):
            raise InputError(
                f"{self.name} takes {self.channels} channels and gives {given}: a denoiser gives as many, or twice as many with a learned "
                "variance (inpainting and upscaling networks take more and are not supported)"
            )

    # ---- what a subclass says ------------------------------------------------------------------------------------------

    def sample_channels(self) -> int:
        return int(self.config.in_channels)

    def output_channels(self) -> int:
        return int(self.config.out_channels or self.config.in_channels)

    def prepared(self, parts: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
        """Checked keyword arguments of the network for a condition's parts."""
        raise NotImplementedError

    def ask(self, x: Tensor, model_time: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The network's output (B, C or 2C, H, W)."""
        found: Tensor = self.network(x, model_time, **arguments, return_dict=False)[0]
        return found

    def check_size(self, height: int, width: int) -> None:
        """Raises an InputError where the network cannot take this size."""

    # ---- what follows --------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def last_layer(self) -> Any:
        """The layer whose output is the network's: its weight and bias carry the sign when a student is saved."""
        return self.network.get_submodule(self.last)

    def forward(self, x: Tensor, model_time: Tensor, cond: Condition = None) -> Tensor:
        """The prediction (B, C, H, W) at x (B, C, H, W) and model_time (B,).

        Raises:
            InputError: x or the condition does not fit the network.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise InputError(f"{self.name} takes samples (B, {self.channels}, H, W), not {tuple(x.shape)}")
        self.check_size(*x.shape[-2:])
        arguments = self.prepared(self.named(cond), x)
        kind = next(self.network.parameters()).dtype
        arguments = {k: _as_kind(v, kind) for k, v in arguments.items()}
        found = self.ask(x.to(kind), model_time, arguments)[:, : self.channels].to(x.dtype)
        return found if self.sign == 1 else -found

    def named(self, cond: Condition) -> dict[str, Tensor]:
        """A condition's parts by name.

        Raises:
            InputError, UnknownNameError: a tensor where parts are needed; an unknown part; a condition for a network that takes none.
        """
        if cond is None:
            return {}
        if not self.parts:
            raise InputError(f"{self.name} is unconditional: it takes no condition")
        if isinstance(cond, Tensor):
            return {self.main: cond}
        for name in cond:
            if name not in self.parts:
                raise UnknownNameError(
                    f"part of a condition of {self.name}", str(name), self.parts, f"It takes {', '.join(self.parts)}."
                )
        return dict(cond)

    def required(
        self, parts: Mapping[str, Tensor], name: str, width: int | None = None, ndim: int | None = None
    ) -> Tensor:
        """A part that must be there, of this many axes and this width."""
        if name not in parts:
            raise InputError(
                f"{self.name} needs '{name}' in its condition, which has {', '.join(parts) if parts else 'nothing'}"
            )
        value = parts[name]
        if ndim is not None and value.ndim != ndim:
            raise InputError(
                f"'{name}' for {self.name} must have {ndim} axes, the first one the batch; its shape is {tuple(value.shape)}"
            )
        if width is not None and value.shape[-1] != width:
            raise InputError(
                f"'{name}' for {self.name} must be {width} wide, not {value.shape[-1]}: it comes from another text encoder"
            )
        return value

    def class_ids(self, parts: Mapping[str, Tensor], count: int) -> Tensor:
        """Class ids (B,), in range: a lookup out of range is no error on accelerators until it is too late."""
        labels = self.required(parts, "class_labels", ndim=1)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise InputError(f"class labels for {self.name} must be integers, not {labels.dtype}")
        low, high = (int(v) for v in torch.aminmax(labels)) if len(labels) else (0, 0)
        if low < 0 or high >= count:
            raise InputError(f"class labels for {self.name} must lie in 0 … {count - 1} (got {low} to {high})")
        return labels.long()


def _as_kind(value: Any, kind: torch.dtype) -> Any:
    """Floating tensors, also in a nested mapping, in the network's precision."""
    if isinstance(value, Tensor):
        return value.to(kind) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _as_kind(v, kind) for k, v in value.items()}
    return value


def check_divisible(name: str, height: int, width: int, by: int) -> None:
    """Raises an InputError unless both are multiples of ``by``."""
    if height % by or width % by:
        raise InputError(
            f"samples for {name} must have a height and width that are multiples of {by}, not {height} x {width}"
        )


class UNet2D(DiffusersNetwork):
    """``UNet2DModel``: unconditional, or with class ids (B,), or with what its class embedding takes.

    Raises:
        InputError: besides the base's, Fourier time features, which divide the output by sigma as no schedule here does.
    """

    main = "class_labels"

    def __init__(self, network: nn.Module, sign: int = 1) -> None:
        super().__init__(network, sign)
        if self.config.time_embedding_type == "fourier":
            raise InputError(
                "UNet2DModel with time_embedding_type='fourier' (score_sde) is told sigma itself: not supported"
            )
        self.embeds = self.config.class_embed_type or ("ids" if self.config.num_class_embeds is not None else None)
        self.num_classes = int(self.config.num_class_embeds) if self.embeds == "ids" else None
        self.parts = ("class_labels",) if self.embeds is not None else ()  # type: ignore[misc]
        self.halved = 2 ** (len(self.config.block_out_channels) - 1)

    def check_size(self, height: int, width: int) -> None:
        check_divisible(self.name, height, width, self.halved)

    def prepared(self, parts: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
        if self.embeds is None:
            return {}
        if self.embeds == "ids":
            assert self.num_classes is not None
            return {"class_labels": self.class_ids(parts, self.num_classes)}
        return {"class_labels": self.required(parts, "class_labels", ndim=1 if self.embeds == "timestep" else 2)}

    def ask(self, x: Tensor, model_time: Tensor, arguments: dict[str, Any]) -> Tensor:
        model_time = model_time * self.time_scale
        if self.config.time_embedding_type == "learned":  # a table of embeddings: only whole indices have one
            model_time = model_time.round().long()
        return super().ask(x, model_time, arguments)


class SmallUNet(UNet2D):
    """A ``UNet2DModel`` made here, for images of a few pixels: one residual block a level, attention on the lowest.

    Args:
        shape: (C, H, W) of a sample.
        width: channels of the first level; every further one has twice as many as the one before.
        levels: how often the sides are halved, plus one.
        num_classes: C; ids 0 … C - 1, and C for no class. None: unconditional.
        time_scale: factor of the time that it is told, for schedules whose times are small.

    Raises:
        InputError: a shape that is no image, sides that cannot be halved so often, sizes out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 32,
        levels: int = 2,
        num_classes: int | None = None,
        time_scale: float = 1.0,
    ) -> None:
        if len(shape) != 3:
            raise InputError(f"a U-Net takes images (C, H, W), not samples of shape {tuple(shape)}: use an mlp network")
        if width < 4 or width % 4 or levels < 1:
            raise InputError(
                f"a U-Net has a width that is a multiple of 4 and one level or more (got {width} and {levels})"
            )
        channels, height, breadth = (int(n) for n in shape)
        check_divisible("a U-Net", height, breadth, 2 ** (levels - 1))
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise MissingDependencyError("diffusers", "diffusion", "a U-Net") from None
        plain = levels - 1
        network: Any = UNet2DModel(
            sample_size=(height, breadth),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(width * 2**i for i in range(levels)),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
            attention_head_dim=math.gcd(width, 32),
            norm_num_groups=math.gcd(width, 32),
            num_class_embeds=None if num_classes is None else num_classes + 1,
        )
        super().__init__(network)
        self.time_scale = float(time_scale)
        self.spec = {
            "shape": [channels, height, breadth],
            "width": width,
            "levels": levels,
            "num_classes": num_classes,
            "time_scale": self.time_scale,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> SmallUNet:
        """The network of a ``spec``, with new weights."""
        return cls(**spec)


def small_unet(
    shape: Sequence[int], width: int = 32, levels: int = 2, num_classes: int | None = None, *, time_scale: float = 1.0
) -> SmallUNet:
    """A :class:`SmallUNet`; see there."""
    return SmallUNet(shape, width, levels, num_classes, time_scale)


class UNet2DConditional(DiffusersNetwork):
    """``UNet2DConditionModel`` of Stable Diffusion 1, 2 and XL.

    Parts: ``encoder_hidden_states`` (B, T, D) (what a tensor is taken for), ``encoder_attention_mask`` (B, T), for XL ``text_embeds`` (B, P)
    and ``time_ids`` (B, 6), ``class_labels`` where it has classes.

    Raises:
        InputError: besides the base's, networks conditioned on images, and ones with guidance embedded in their time (LCM).
    """

    parts = ("encoder_hidden_states", "encoder_attention_mask", "text_embeds", "time_ids", "class_labels")
    main = "encoder_hidden_states"

    def __init__(self, network: nn.Module, sign: int = 1) -> None:
        super().__init__(network, sign)
        added, projected = self.config.addition_embed_type, self.config.encoder_hid_dim_type
        if added not in (None, "text", "text_time") or projected not in (None, "text_proj"):
            raise InputError(
                f"UNet2DConditionModel with {added or projected} conditions is not supported: only text and text with sizes (SDXL)"
            )
        if self.config.time_cond_proj_dim is not None:
            raise InputError(
                "UNet2DConditionModel with guidance embedded in its time (time_cond_proj_dim, as in LCM) is not supported"
            )
        widths = self.config.cross_attention_dim
        width = widths if isinstance(widths, int) else widths[0]
        self.width = int(self.config.encoder_hid_dim if projected else width)
        self.num_classes = None if self.config.num_class_embeds is None else int(self.config.num_class_embeds)

    def prepared(self, parts: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
        made: dict[str, Any] = {"encoder_hidden_states": self.required(parts, "encoder_hidden_states", self.width, 3)}
        if "encoder_attention_mask" in parts:
            made["encoder_attention_mask"] = self.required(
                parts, "encoder_attention_mask", made["encoder_hidden_states"].shape[1], 2
            )
        if self.config.addition_embed_type == "text_time":
            pooled, sizes = self.required(parts, "text_embeds", ndim=2), self.required(parts, "time_ids", ndim=2)
            layer: Any = self.network.get_submodule("add_embedding.linear_1")
            width = pooled.shape[1] + sizes.shape[1] * self.config.addition_time_embed_dim
            if width != layer.in_features:
                rest = layer.in_features - sizes.shape[1] * self.config.addition_time_embed_dim
                raise InputError(
                    f"'text_embeds' {tuple(pooled.shape[1:])} and 'time_ids' {tuple(sizes.shape[1:])} do not fit {self.name}: with so many "
                    f"time_ids it takes {rest} pooled features"
                )
            made["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        elif "text_embeds" in parts or "time_ids" in parts:
            raise InputError(f"{self.name} takes no text_embeds and time_ids: it is not one of SDXL")
        if self.num_classes is not None:
            made["class_labels"] = self.class_ids(parts, self.num_classes)
        elif self.config.class_embed_type is not None:
            made["class_labels"] = self.required(parts, "class_labels")
        elif "class_labels" in parts:
            raise InputError(f"{self.name} takes no class_labels: it has no class embedding")
        return made
