"""A field and the grid that it was trained with: empty wherever the grid says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.rendering.fields.base import VolumeField


class OccupiedField(VolumeField):
    """A field that is only asked, and only dense, in the occupied cells of its box.

    A field that learned nothing of empty cells has any density there; with its grid beside it it stays what it was trained to be.

    Args:
        field: the field; a mapping with ``family`` and ``config`` builds it.
        occupied: (R, R, R) bool, cells along x, y, z; or R for a grid to be loaded, all of it occupied.

    Raises:
        InputError: a grid of another shape, or with nothing in it.
    """

    family = "occupied"
    occupied: Tensor

    def __init__(self, field: VolumeField | Mapping[str, Any], occupied: Tensor | int) -> None:
        if isinstance(field, Mapping):
            from limbeck.rendering.fields import build_field

            field = build_field(field["family"], field["config"])
        super().__init__(field.aabb, field.density_law)
        cells = torch.ones((occupied,) * 3, dtype=torch.bool) if isinstance(occupied, int) else occupied
        if cells.ndim != 3 or len(set(cells.shape)) != 1 or cells.dtype != torch.bool or not bool(cells.any()):
            raise InputError(
                f"an occupancy is (R, R, R) bool with something in it (got {tuple(cells.shape)} {cells.dtype})"
            )
        self.field, self.feature_width = field, field.feature_width
        self.register_buffer("occupied", cells.detach().clone().to(field.aabb.device))

    def inside(self, x: Tensor) -> Tensor:
        n = len(self.occupied)
        i, j, k = (self.unit(x) * n).long().clamp_max(n - 1).unbind(-1)
        return super().inside(x) & self.occupied[i, j, k]

    def encode(self, x: Tensor) -> Tensor:
        return self.field.encode(x)

    def geometry(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.field.geometry(h)

    def colour(self, h: Tensor, geo: Tensor | None, d: Tensor) -> Tensor:
        return self.field.colour(h, geo, d)

    def encoding_parameters(self) -> list[nn.Parameter]:
        return self.field.encoding_parameters()

    def param_groups(self, lr: float, decoder_lr: float | None = None) -> list[dict[str, Any]]:
        return self.field.param_groups(lr, decoder_lr)

    def config(self) -> dict[str, Any]:
        inner = {"family": self.field.family, "config": self.field.config()}
        return {"field": inner, "occupied": len(self.occupied)}
