"""How scenes are judged: renders against held-out views, and pictures of both side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.metrics.cost import count_bytes, count_parameters
from limbeck.metrics.image_quality import image_quality
from limbeck.rendering.cameras import Cameras, orbit
from limbeck.rendering.renderers import Renderer
from limbeck.report.sample_grids import sample_grid
from limbeck.tasks.scenes import PosedImages

SHOWN = 6


@torch.no_grad()
def drawn(renderer: Renderer, cameras: Cameras, at_once: int = 4) -> Tensor:
    """Renders (N, H, W, 3) in [0, 1] on the CPU, a few cameras at a time."""
    device = next((p.device for p in renderer.module.parameters()), torch.device("cpu"))
    there = cameras.to(device)
    parts = [
        renderer(there, list(range(start, min(start + at_once, len(cameras)))))["rgb"].float().clamp(0, 1).cpu()
        for start in range(0, len(cameras), at_once)
    ]
    return torch.cat(parts)


def judge_views(renderers: Mapping[str, Renderer], views: PosedImages) -> list[dict[str, Any]]:
    """Measure renderers on held-out views.

    Args:
        renderers: by name.
        views: pictures that nothing was trained on.

    Returns:
        a row for each: ``who`` ``psnr`` (dB, mean over views) ``ssim`` (from 11 pixels on) ``seconds_per_view`` ``parameters`` ``bytes``.
        Renders that are not finite have no quality.

    Raises:
        InputError: nothing to judge.
    """
    if not renderers:
        raise InputError("there is no renderer to judge")
    found = []
    for name, renderer in renderers.items():
        row: dict[str, Any] = {"who": name}
        images = drawn(renderer, views.cameras)
        if views.has_images:
            row |= image_quality(images, views.images.cpu())
        row["seconds_per_view"] = seconds_per_view(renderer, views.cameras)
        row["parameters"] = count_parameters(renderer.module)
        row["bytes"] = count_bytes(renderer.module)
        found.append(row)
    return found


def seconds_per_view(renderer: Renderer, cameras: Cameras, repeats: int = 3) -> float:
    """Median time of drawing the first camera after a warm-up; on this machine, with what else it does."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        drawn(renderer, cameras[0])
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


def view_pictures(
    renderers: Mapping[str, Renderer], views: PosedImages, count: int = SHOWN, title: str = "Held-out views"
) -> list[dict[str, str]]:
    """A picture for the report: every renderer's views in a column, beside the real ones.

    Returns:
        entries with ``title``, ``caption`` and ``png`` (base64).
    """
    ids = spread(len(views), count)
    some = views.subset(ids)
    columns = {name: as_bytes(drawn(renderer, some.cameras)) for name, renderer in renderers.items()}
    beside = ""
    if some.has_images:
        columns["real"] = as_bytes(some.images.cpu())
        beside = ", beside the real pictures"
    caption = (
        f"Each row is one camera that nothing was trained on{beside}." if some.has_images else "Each row is one camera."
    )
    return [{"title": title, "caption": caption, "png": sample_grid(columns)}]


def as_bytes(images: Tensor) -> Any:
    """Pictures (N, H, W, 3) in [0, 1] as uint8 (N, 3, H, W) arrays."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-1, 1).contiguous().numpy()


def spread(total: int, count: int) -> Tensor:
    """``count`` numbers below ``total``, evenly spread; all where there are fewer."""
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def turntable_cameras(views: Cameras | None, frames: int = 36, size: int | None = None) -> Cameras:
    """Cameras once around the origin, from the height and distance that most of ``views`` have; square pixels.

    Args:
        views: whose lens, distance and height are taken; None: distance 3, 20 degrees above, a field of view of 45 degrees.
        size: side of the pictures; None: that of ``views``, or 64.
    """
    if views is None:
        return orbit(torch.arange(frames) * 360 / frames, 20.0, 3.0, 45.0, size or 64, size or 64)
    place = views.positions
    radius = float(place.norm(dim=1).median())
    height = float(place[:, 2].median()) / max(radius, 1e-9)
    elevation = torch.rad2deg(torch.asin(torch.tensor(height).clamp(-0.99, 0.99)))
    wide = size or views.width
    fovy = 2 * torch.rad2deg(torch.atan(0.5 * views.height / views.fy[0]))
    tall = round(wide * views.height / views.width)
    return orbit(
        torch.arange(frames) * 360 / frames, float(elevation), radius, float(fovy), wide, tall, views.near, views.far
    )


def orbit_frames(renderer: Renderer, views: Cameras | None = None, frames: int = 36, size: int | None = None) -> Tensor:
    """Frames (N, H, W, 3) of a turntable; see :func:`turntable_cameras`."""
    return drawn(renderer, turntable_cameras(views, frames, size))


def orbit_pictures(
    renderers: Mapping[str, Renderer], views: Cameras | None, count: int = 8, size: int | None = None
) -> list[dict[str, str]]:
    """A picture for the report where there is no truth to stand beside: every renderer's turntable in a column."""
    cameras = turntable_cameras(views, count, size)
    rows: Sequence[str] = [f"{360 * i // count}°" for i in range(count)]
    columns = {name: as_bytes(drawn(renderer, cameras)) for name, renderer in renderers.items()}
    caption = "Each row is one azimuth, once around; azimuth 0 is the front."
    return [{"title": "Turntable", "caption": caption, "png": sample_grid(columns, rows)}]
