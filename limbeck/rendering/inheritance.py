"""What one field takes over from another: its box and limits, weights that have a namesake of the same shape, and where it is empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.data import mix_seed
from limbeck.core.errors import InputError
from limbeck.rendering.contraction import FOLDED, ContractedField
from limbeck.rendering.fields import VolumeField, build_field
from limbeck.rendering.fields.occupied import OccupiedField
from limbeck.rendering.occupancy import OccupancyGrid

Inherit = Literal["all", "heads", "none"]
HEADS = ("geometry_head", "colour_head")
"""What families name alike: ``geometry_head`` (feature volume to log density and geometry), ``colour_head`` (geometry and direction to colour)."""


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, which: Inherit = "all") -> list[str]:
    """Copy every parameter of ``teacher`` whose name and shape a parameter of ``student`` has, in place.

    Between families these are the colour head (``mlp``, ``hash``, ``vm``, ``triplane``) and, where the feature volumes are equally wide, the
    geometry head; two fields of one family and size have all in common. Buffers are not taken over: boxes, lattices and active levels
    say how a field is built.

    Args:
        student: receives. teacher: gives; it may have another precision or device.
        which: ``all``, the ``heads`` alone (for two fields of one family, whose encodings would be copied too), or ``none``.

    Returns:
        the names that were copied, in the student's order.

    Raises:
        InputError: another ``which``; a teacher with weights that are not finite.
    """
    if which not in ("all", "heads", "none"):
        raise InputError(f"what is inherited is all, heads or none, not '{which}'")
    if which == "none":
        return []
    given = dict(teacher.named_parameters())
    copied = []
    for name, parameter in student.named_parameters():
        source = given.get(name)
        if source is None or source.shape != parameter.shape or (which == "heads" and not is_head(name)):
            continue
        if not bool(torch.isfinite(source).all()):
            raise InputError(f"the teacher's weights '{name}' hold NaN or infinity: load an earlier checkpoint")
        parameter.copy_(source)
        copied.append(name)
    return copied


def is_head(name: str) -> bool:
    """Whether a parameter's name is one of a head."""
    return name.split(".")[0] in HEADS


def core(field: nn.Module) -> Any:
    """The field itself, without a contraction or an occupancy around it."""
    while isinstance(field, ContractedField | OccupiedField):
        field = field.field
    return field


def seen_box(field: Any) -> Tensor:
    """The box (2, 3) that cameras look at: the field's own, of a contracted one that around its ball without contraction."""
    if isinstance(field, ContractedField):
        return torch.stack([field.centre - field.radius, field.centre + field.radius])
    box: Tensor = field.aabb
    return box


def heir(teacher: Any, family: str, config: Mapping[str, Any] | None = None, low: float | None = None) -> VolumeField:
    """A new field of another family in the teacher's box, with the limits of its log density; contracted where the teacher is.

    Args:
        teacher: has ``aabb`` and, perhaps, a ``density_law``. family, config: of the new field; a box in it is not overridden.
        low: lower limit of the log density where the teacher's own is higher.

    Raises:
        UnknownNameError, InputError: see :func:`~limbeck.rendering.fields.build_field`.
    """
    law = getattr(teacher, "density_law", None)
    if law is not None and law.low is not None and low is not None and low < law.low:
        law = replace(law, low=low)
    folded = isinstance(teacher, ContractedField)
    made = build_field(family, {"aabb": FOLDED if folded else teacher.aabb, "density": law, **dict(config or {})})
    if not folded:
        return made
    return ContractedField(made, teacher.centre, teacher.radius, teacher.reach)


def occupancy_of(teacher: Any, resolution: int, threshold: float, seed: int = 0, points: int = 4) -> OccupancyGrid:
    """Where a finished field holds anything, from ``points`` places in every cell and its neighbours.

    Raises:
        InputError: it is empty.
    """
    grid = OccupancyGrid(teacher.aabb, resolution, threshold).to(teacher.aabb.device)
    grid.refresh(teacher, points, torch.Generator().manual_seed(mix_seed(seed, 467)))
    if not bool(grid.occupied.any()):
        raise InputError(f"the teacher has no density above 0 anywhere in its box {teacher.aabb.tolist()}")
    return grid
