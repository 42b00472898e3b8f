"""Renderers: a representation and how it is drawn, behind one call, so that fields and Gaussians are trained on and judged alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from limbeck.rendering.cameras import Cameras
from limbeck.rendering.gaussians import Gaussians
from limbeck.rendering.rays import Spacing
from limbeck.rendering.splatting import splat
from limbeck.rendering.volume import Background, OccupancyGrid, render_image


class Renderer(Protocol):
    """Draws something as cameras see it, with gradients.

    Attributes:
        module: what holds the parameters.
    """

    @property
    def module(self) -> nn.Module: ...

    def __call__(self, cameras: Cameras, ids: Sequence[int] | None = None) -> dict[str, Tensor]:
        """``rgb`` (B, H, W, 3), ``opacity`` and ``depth`` (B, H, W), of all cameras or of those with the given numbers."""


@dataclass(frozen=True)
class VolumeRenderer:
    """A volume field, drawn by marching along rays.

    Attributes:
        module: the field; see :class:`~limbeck.rendering.fields.VolumeField`.
        samples, fine: on each ray; see :func:`~limbeck.rendering.volume.render_rays`.
        occupancy: cells that are not asked.
        background: colour behind the field.
        chunk: rays at once.
        spacing: of samples; disparity for fields without bounds.
    """

    module: nn.Module
    samples: int = 64
    fine: int = 0
    occupancy: OccupancyGrid | None = None
    background: Background = 1.0
    chunk: int = 8192
    spacing: Spacing = "linear"

    def __call__(self, cameras: Cameras, ids: Sequence[int] | None = None) -> dict[str, Tensor]:
        return render_image(
            self.module,
            cameras,
            ids,
            chunk=self.chunk,
            background=self.background,
            samples=self.samples,
            fine=self.fine,
            occupancy=self.occupancy,
            spacing=self.spacing,
        )


@dataclass(frozen=True)
class SplatRenderer:
    """Gaussians, drawn by splatting, one camera after the other.

    Attributes:
        module: the Gaussians.
        background: grey value or colour (3,).
    """

    module: Gaussians
    background: Tensor | float = 1.0

    def __call__(self, cameras: Cameras, ids: Sequence[int] | None = None) -> dict[str, Tensor]:
        which = range(len(cameras)) if ids is None else ids
        seen = [splat(self.module, cameras, self.background, index=i) for i in which]
        return {
            "rgb": torch.stack([s.rgb for s in seen]),
            "opacity": torch.stack([s.alpha for s in seen]),
            "depth": torch.stack([s.depth for s in seen]),
        }
