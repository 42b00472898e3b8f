"""Many small pictures of analytic scenes, from the cameras that score distillation draws: what the embedded priors are made of."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras, RandomOrbit, orbit
from limbeck.rendering.scenes import AnalyticScene
from limbeck.tasks.scenes import PosedImages

SIZE = 16
RADIUS = 3.0
FOVY = 45.0
FRONT = 45.0
"""Degrees on either side of azimuth 0 that count as the front where a prior prefers it."""
OVERSAMPLING = 2
REFERENCE_ELEVATIONS = (0.0, 15.0, 30.0)
REFERENCE_AZIMUTHS = 96


def render_orbit(size: int = SIZE, elevation: tuple[float, float] = (-10.0, 45.0)) -> RandomOrbit:
    """Cameras at distance 3 with a field of view of 45 degrees, without jitters.

    Args:
        size: side of the pictures. elevation: range in degrees.
    """
    return RandomOrbit(
        size, size, elevation=elevation, radius=(RADIUS, RADIUS), fovy=(FOVY, FOVY), jitter_position=0.0,
        jitter_centre=0.0, jitter_up=0.0, evaluation=(0.0, 15.0, FOVY, RADIUS),
    )  # fmt: skip


@torch.no_grad()
def render_views(scene: AnalyticScene, cameras: Cameras, at_once: int = 128) -> Tensor:
    """Pictures (N, H, W, 3) in [0, 1] of a scene's surface on white, by sphere tracing, each pixel the mean of 2 x 2 rays.

    Without volume rendering thousands of them take seconds; averaging stands for the pixels' area, which a texture may be finer than.

    Args:
        at_once: cameras per pass, for the memory.
    """
    fine = cameras.resized(cameras.width * OVERSAMPLING, cameras.height * OVERSAMPLING)
    parts = []
    for start in range(0, len(fine), at_once):
        seen = scene.surface_image(fine[start : start + at_once])["rgb"].movedim(-1, 1)
        parts.append(torch.nn.functional.avg_pool2d(seen, OVERSAMPLING).movedim(1, -1))
    return torch.cat(parts).clamp(0, 1)


def drawn_cameras(around: RandomOrbit, count: int, generator: torch.Generator, front_share: float = 0.0) -> Cameras:
    """Cameras as ``around`` draws them, or with a preference for the front.

    Args:
        front_share: so many of them, in [0, 1], stand within 45 degrees of azimuth 0 and the rest elsewhere; 0 prefers nothing.

    Raises:
        InputError: no cameras, a share outside [0, 1].
    """
    if count < 1:
        raise InputError(f"a prior is made of 1 view or more (got {count})")
    if not 0 <= front_share <= 1:
        raise InputError(f"the share of views from the front is in [0, 1] (got {front_share})")
    if front_share == 0:
        return around.sample(count, generator)
    ahead = round(front_share * count)
    ranges = ((-FRONT, FRONT), (FRONT, 360 - FRONT))
    parts = [
        replace(around, azimuth=span).sample(n, generator)
        for span, n in zip(ranges, (ahead, count - ahead), strict=True)
        if n
    ]
    angles = [torch.cat([getattr(part, name) for part in parts]) for name in ("azimuth", "elevation", "radius")]
    return orbit(angles[0], angles[1], angles[2], around.fovy[0], around.width, around.height, around.near, around.far)


def reference_views(scene: AnalyticScene, size: int = SIZE) -> PosedImages:
    """True views from evenly spaced azimuths, rising from 0, each at three elevations: what renders are compared with."""
    azimuth = torch.arange(REFERENCE_AZIMUTHS).repeat_interleave(len(REFERENCE_ELEVATIONS)) * (360 / REFERENCE_AZIMUTHS)
    elevation = torch.tensor(REFERENCE_ELEVATIONS).repeat(REFERENCE_AZIMUTHS)
    cameras = orbit(azimuth, elevation, RADIUS, FOVY, size, size)
    return PosedImages(cameras, render_views(scene, cameras))
