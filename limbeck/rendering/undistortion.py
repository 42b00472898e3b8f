"""Pictures taken through a lens, resampled to what a pinhole with the same focal lengths and centre would have taken."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.rays import distort, pixel_grid


class Undistorted(NamedTuple):
    """``images`` (N, H, W, C), ``cameras`` without distortion, and ``valid`` (N, H, W): whether the pixel was in the photograph."""

    images: Tensor
    cameras: Cameras
    valid: Tensor


def undistorted(images: Tensor, cameras: Cameras, chunk: int = 16) -> Undistorted:
    """Resample pictures bilinearly; where a pixel looks beyond the photograph, its edge is repeated.

    Args:
        images: (N, H, W, C) of N cameras. cameras: with or without distortion. chunk: pictures at a time.

    Raises:
        InputError: pictures of another number or size.
    """
    expected = (len(cameras), cameras.height, cameras.width)
    if images.ndim != 4 or tuple(images.shape[:3]) != expected:
        raise InputError(f"pictures for these cameras are {(*expected, 'C')}, not {tuple(images.shape)}")
    if cameras.distortion is None:
        return Undistorted(images, cameras, torch.ones(expected, dtype=torch.bool, device=images.device))
    focal = torch.stack([cameras.fx, cameras.fy], -1)[:, None]
    centre = torch.stack([cameras.cx, cameras.cy], -1)[:, None]
    ideal = (pixel_grid(cameras.width, cameras.height, focal.device) + 0.5 - centre) / focal
    place = distort(ideal, cameras.distortion[:, None].expand(*ideal.shape[:2], 5)) * focal + centre
    size = place.new_tensor([cameras.width, cameras.height])
    grid = (2 * place / size - 1).view(*expected, 2).to(images)
    pictures = [
        F.grid_sample(some.movedim(3, 1), at, mode="bilinear", padding_mode="border", align_corners=False).movedim(1, 3)
        for some, at in zip(images.split(chunk), grid.split(chunk), strict=True)
    ]
    valid = ((place >= 0) & (place <= size)).all(-1).view(expected)
    return Undistorted(torch.cat(pictures), replace(cameras, distortion=None), valid)
