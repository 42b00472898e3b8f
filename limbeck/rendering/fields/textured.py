"""A field whose shape is that of one field and whose colours are those of another: texture on a fixed geometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.rendering.fields.base import VolumeField


class TexturedField(VolumeField):
    """Density of a frozen field, colour of a trainable one.

    Args:
        geometry: gives the density; frozen here. texture: gives the colour. Fields, or what ``build_field`` takes as
            ``{"family": …, "config": …}``.

    Raises:
        InputError: boxes that differ.
    """

    family = "textured"
    feature_width = None

    def __init__(self, geometry: VolumeField | Mapping[str, Any], texture: VolumeField | Mapping[str, Any]) -> None:
        shape, colours = _built(geometry), _built(texture)
        super().__init__(shape.aabb, shape.density_law)
        if not torch.equal(shape.aabb.cpu(), colours.aabb.cpu()):
            raise InputError(
                f"geometry and texture need one box (got {shape.aabb.tolist()} and {colours.aabb.tolist()})"
            )
        self.shape_field = shape.requires_grad_(False)
        self.texture_field = colours

    def forward(self, x: Tensor, d: Tensor) -> dict[str, Tensor | None]:
        found = self.density(x)
        return {**found, "rgb": self.texture_field(x, d)["rgb"]}

    def density(self, x: Tensor) -> dict[str, Tensor | None]:
        return {**self.shape_field.density(x), "feature": None}

    def encoding_parameters(self) -> list[nn.Parameter]:
        return self.texture_field.encoding_parameters()

    def param_groups(self, lr: float, decoder_lr: float | None = None) -> list[dict[str, Any]]:
        return self.texture_field.param_groups(lr, decoder_lr)

    def config(self) -> dict[str, Any]:
        return {
            "geometry": {"family": self.shape_field.family, "config": self.shape_field.config()},
            "texture": {"family": self.texture_field.family, "config": self.texture_field.config()},
        }


def _built(part: VolumeField | Mapping[str, Any]) -> VolumeField:
    if isinstance(part, VolumeField):
        return part
    from limbeck.rendering.fields import build_field  # the registry imports this module

    return build_field(part["family"], part.get("config"))
