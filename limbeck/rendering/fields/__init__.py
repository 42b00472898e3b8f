"""Volume fields behind one interface: ``mlp`` (NeRF), ``hash`` (Instant-NGP), ``vm`` (TensoRF), ``voxels`` (Plenoxels),
``triplane``.

``field(x, d)`` gives density and colour, ``field.save(folder)`` writes an open format, :func:`load_field` reads it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.core.artifacts import DESCRIPTION, WEIGHTS, load_weights, register_kind
from limbeck.core.errors import InputError, RunError, UnknownNameError
from limbeck.core.files import read_json
from limbeck.rendering.fields.base import Density, VolumeField, trunc_exp
from limbeck.rendering.fields.hash_grid import HashEncoding, HashField
from limbeck.rendering.fields.mlp import MLPField
from limbeck.rendering.fields.occupied import OccupiedField
from limbeck.rendering.fields.textured import TexturedField
from limbeck.rendering.fields.triplane import TriplaneField
from limbeck.rendering.fields.vm import VMField
from limbeck.rendering.fields.voxels import VoxelField

FAMILIES: dict[str, type[VolumeField]] = {
    cls.family: cls for cls in (MLPField, HashField, VMField, VoxelField, TriplaneField)
}


def build_field(family: str, config: Mapping[str, Any] | None = None) -> VolumeField:
    """A new field of a family.

    Args:
        family: ``mlp``, ``hash``, ``vm``, ``voxels`` or ``triplane``; or ``contracted``, a field of any of them over all of space.
        config: the constructor's arguments; ``field.config()`` gives those of a field.

    Raises:
        UnknownNameError: another family. InputError: arguments that the family does not know or cannot use.
    """
    from limbeck.rendering.contraction import ContractedField  # it builds its inner field with this function

    around = (ContractedField, TexturedField, OccupiedField)
    known: dict[str, type[VolumeField]] = {**FAMILIES, **{cls.family: cls for cls in around}}
    if family not in known:
        raise UnknownNameError("family of fields", family, FAMILIES)
    try:
        return known[family](**dict(config or {}))
    except TypeError as error:
        raise InputError(f"a {family} field cannot be built so: {' '.join(str(error).split())}") from None


def load_field(folder: str | Path) -> VolumeField:
    """A field that ``field.save(folder)`` wrote, in evaluation mode.

    Raises:
        RunError: nothing there, damaged, or not a field. InputError: weights that are not finite.
    """
    path = Path(folder)
    return read_field(path, read_json(path / DESCRIPTION))


def read_field(folder: Path, description: Mapping[str, Any]) -> VolumeField:
    """The field in an artifact's folder, as its description says; see :func:`load_field`."""
    if description.get("kind") != "field" or "family" not in description:
        raise RunError(f"{folder / DESCRIPTION} describes no field (kind '{description.get('kind')}')")
    field = build_field(description["family"], description.get("config"))
    load_weights(field, folder / WEIGHTS)
    field.check()
    return field.eval()


register_kind("field", read_field)

__all__ = [
    "FAMILIES",
    "Density",
    "HashEncoding",
    "HashField",
    "MLPField",
    "TexturedField",
    "TriplaneField",
    "VMField",
    "VolumeField",
    "VoxelField",
    "build_field",
    "load_field",
    "read_field",
    "trunc_exp",
]
