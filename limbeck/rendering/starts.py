"""What generation starts from: fields with a blob in the middle, or a shell around the cameras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from limbeck.rendering.fields import Density, VolumeField, build_field
from limbeck.rendering.particles import SceneParticles

STARTS: Mapping[str, Density] = {
    "object": Density("softplus", "blob_magic3d", 10.0, 0.5, low=None, high=None),
    "bump": Density.dreamfusion(),
    "scene": Density.scene(),
}
"""Densities that generation starts from, by the name of what is to be generated."""


def fresh_scenes(
    family: str, count: int = 1, subject: str = "object", resolution: int = 24, samples: int = 24
) -> SceneParticles:
    """Fields to begin generation with.

    Args:
        family: of the fields. count: how many; each starts a little differently.
        subject: of :data:`STARTS`. resolution: of voxels, planes and lines. samples: on each ray.
    """
    law = STARTS[subject]
    half = 3.0 if subject == "scene" else 1.0
    common: dict[str, Any] = {"density": law, "aabb": [[-half] * 3, [half] * 3]}
    if family in ("voxels", "vm", "triplane"):
        common["resolution"] = resolution
    if family == "voxels":
        common["sh_degree"] = 0
    fields = [build_field(family, common) for _ in range(count)]
    for number, field in enumerate(fields):
        jittered(field, number)
    return SceneParticles(fields, samples)


@torch.no_grad()
def jittered(field: VolumeField, number: int, size: float = 0.05) -> None:
    """Give a grid a start of its own: equal grids would stay equal under equal pulls. Networks start at random anyway."""
    if field.family == "voxels" and number:
        for parameter in field.encoding_parameters():
            parameter.add_(size * torch.randn_like(parameter))
