"""A picture of 5,000 Gaussians and its gradients, tile by tile, against a loop over the Gaussians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.rendering.gaussians import Gaussians
from limbeck.rendering.splatting import MAX_ALPHA, MIN_ALPHA, View, project, splat

ALLOWED = 0.1
COUNT, SIZE = 5000, 128


def scene(count: int = COUNT, size: int = SIZE) -> tuple[Gaussians, View]:
    """A ball of Gaussians of many shapes and directions that covers nearly all of the image."""
    generator = torch.Generator().manual_seed(0)
    points = 0.4 * torch.randn(count, 3, generator=generator)
    gaussians = Gaussians.from_points(points, torch.rand(count, 3, generator=generator))
    gaussians.quats.data = torch.randn(count, 4, generator=generator)
    gaussians.log_scales.data += 0.3 * torch.randn(count, 3, generator=generator)
    viewmat = torch.eye(4)
    viewmat[2, 3] = 3
    return gaussians, View(viewmat, 1.17 * size, 1.17 * size, size / 2, size / 2, size, size)


def looped(gaussians: Gaussians, view: View) -> Tensor:
    """The picture (H, W, 3) over black, one Gaussian after the other blended over the whole image."""
    opacities, colours = gaussians.opacities, gaussians.colours(view.centre)
    found = project(gaussians.means, gaussians.quats, gaussians.scales, opacities, view)
    x, y = torch.arange(view.width) + 0.5, torch.arange(view.height)[:, None] + 0.5
    rgb, left = torch.zeros(view.height, view.width, 3), torch.ones(view.height, view.width)
    order = found.depths.detach().argsort().tolist()
    visible = found.visible.tolist()
    for k in order:
        if not visible[k]:
            continue
        dx, dy = x - found.means2d[k, 0], y - found.means2d[k, 1]
        xx, xy, yy = found.conics[k]
        alpha = opacities[k] * torch.exp(-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy)
        alpha = torch.where(alpha >= MIN_ALPHA, alpha.clamp_max(MAX_ALPHA), 0)
        rgb = rgb + (left * alpha)[..., None] * colours[k]
        left = left * (1 - alpha)
    return rgb


def measure(rounds: int = 3, count: int = COUNT, size: int = SIZE, gradients: bool = False) -> dict[str, float]:
    """The median over rounds of tiles / loop, both in every round, in turn first.

    Without gradients by default: those of the loop keep ten images per Gaussian, several gigabytes.
    """
    gaussians, view = scene(count, size)

    def run(draw: Callable[[], Tensor]) -> float:
        began = time.perf_counter()
        with torch.set_grad_enabled(gradients):
            image = draw()
        if gradients:
            gaussians.zero_grad()
            image.square().mean().backward()
        return time.perf_counter() - began

    ways = {"tiles": lambda: splat(gaussians, view, backend="torch").rgb, "loop": lambda: looped(gaussians, view)}
    ratios = []
    for number in range(rounds + 1):
        spent = {name: run(ways[name]) for name in (("tiles", "loop") if number % 2 else ("loop", "tiles"))}
        if number:  # the first round warms up
            ratios.append(spent["tiles"] / spent["loop"])
    return {"ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios), "allowed": ALLOWED}
