"""Edits of voxel fields, to be carried into other families by distillation."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.rendering.fields.base import Box
from limbeck.rendering.fields.voxels import VoxelField

REMOVED = -100.0
"""The raw density of what was taken out, and the lower limit of the log density that lets it through."""


@torch.no_grad()
def erased(field: VoxelField, region: Box | Callable[[Tensor], Tensor]) -> VoxelField:
    """A copy of a voxel field in which a region is empty.

    Vertices in the region get the raw density -100, and the field's lower limit of the log density goes down to it (with the usual limit of -2 a
    density of 0.14 would stay). Whoever compares log densities with this field has to lower their limit as well: ``clamp_low=-100`` in PVD.

    Args:
        field: stays as it is.
        region: (2, 3) a box, lowest and highest corner; or positions (N, 3) -> bool (N,). World units.

    Raises:
        InputError: another kind of field, a region that holds no vertex.
    """
    if not isinstance(field, VoxelField):
        raise InputError(
            f"regions are taken out of voxel fields, not of {type(field).__name__}: distil it into voxels first"
        )
    made = deepcopy(field)
    places, rows = made.vertices()[made.links >= 0], made.links[made.links >= 0]
    if callable(region) and not isinstance(region, Tensor):
        hit = region(places)
    else:
        low, high = torch.as_tensor(region, dtype=places.dtype, device=places.device)
        hit = ((places >= low) & (places <= high)).all(-1)
    if not bool(hit.any()):
        raise InputError("the region holds no vertex of the field: its coordinates are world units within field.aabb")
    made.data[rows[hit], 0] = REMOVED
    low_limit = made.density_law.low
    if low_limit is not None:
        made.density_law = replace(made.density_law, low=min(low_limit, REMOVED))
    return made
