r"""Analytic scenes: signed distances and colours in closed form, to be rendered as density or as surfaces, from any number of views."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.rendering.cameras import Cameras, orbit
from limbeck.rendering.rays import Rays, intersect_box
from limbeck.rendering.volume import render_image

Distance = Callable[[Tensor], Tensor]
Colour = Callable[[Tensor], Tensor]


def ball(x: Tensor, centre: tuple[float, float, float] = (0.0, 0.0, 0.0), radius: float = 0.6) -> Tensor:
    """Signed distance (N,) to a ball."""
    return (x - x.new_tensor(centre)).norm(dim=-1) - radius


def box(x: Tensor, centre: tuple[float, float, float], half: tuple[float, float, float]) -> Tensor:
    """Signed distance (N,) to an axis-aligned box."""
    q = (x - x.new_tensor(centre)).abs() - x.new_tensor(half)
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)


def torus(x: Tensor, major: float, minor: float) -> Tensor:
    """Signed distance (N,) to a torus around z."""
    return torch.hypot(x[..., :2].norm(dim=-1) - major, x[..., 2]) - minor


def disc(x: Tensor, z: float, radius: float, half: float = 0.02) -> Tensor:
    """Signed distance (N,) to a flat cylinder of height 2 ``half`` around height z."""
    q = torch.stack([x[..., :2].norm(dim=-1) - radius, (x[..., 2] - z).abs() - half], -1)
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)


def _pick(test: Tensor, yes: tuple[float, float, float], no: tuple[float, float, float]) -> Tensor:
    return torch.where(
        test[..., None], test.new_tensor(yes, dtype=torch.float32), test.new_tensor(no, dtype=torch.float32)
    )


def _nearest(distances: Tensor, colours: Tensor) -> Tensor:
    return colours.gather(0, distances.argmin(0)[None, ..., None].expand(1, *colours.shape[1:]))[0]


class AnalyticScene(nn.Module):
    r"""A scene as a volume field and as a surface.

    Density is :math:`\sigma(x) = A\,\mathrm{sigmoid}(-k\,\mathrm{sdf}(x))`; colour is the texture c(x), times
    0.35 + 0.65 max(0, -n.d) where the scene is shaded (a light at the camera).

    Args:
        distance: signed distance, (N, 3) to (N,). texture: (N, 3) to (N, 3) in [0, 1]. peak: A, per unit length. sharpness: k.
        shaded: Lambert at the camera. half: half side of the box.
    """

    aabb: Tensor

    def __init__(
        self,
        distance: Distance,
        texture: Colour,
        shaded: bool = False,
        peak: float = 55.0,
        sharpness: float = 55.0,
        half: float = 1.0,
    ) -> None:
        super().__init__()
        if peak <= 0 or sharpness <= 0 or half <= 0:
            raise InputError("a scene's peak density, sharpness and half side are above 0")
        self.distance, self.texture, self.shaded = distance, texture, shaded
        self.peak, self.sharpness = peak, sharpness
        self.register_buffer("aabb", torch.tensor([[-half] * 3, [half] * 3]))

    def density(self, x: Tensor) -> dict[str, Tensor | None]:
        """sigma and log_sigma (N,); no features."""
        log = math.log(self.peak) + F.logsigmoid(-self.sharpness * self.distance(x))
        return {"sigma": log.exp(), "log_sigma": log, "feature": None}

    def normals(self, x: Tensor) -> Tensor:
        """Unit gradients (N, 3) of the signed distance."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.distance(x).sum(), x)
        return F.normalize(slope, dim=-1)

    def colour(self, x: Tensor, d: Tensor) -> Tensor:
        """What is seen at x (N, 3) along unit directions d (N, 3)."""
        colour = self.texture(x).to(x.dtype)
        if self.shaded:
            colour = colour * (0.35 + 0.65 * (-(self.normals(x) * d).sum(-1, keepdim=True)).clamp(min=0))
        return colour

    def forward(self, x: Tensor, d: Tensor) -> dict[str, Tensor | None]:
        return {**self.density(x), "rgb": self.colour(x, d)}

    @torch.no_grad()
    def trace(self, rays: Rays, near: float = 0.05, steps: int = 24, factor: float = 0.9) -> tuple[Tensor, Tensor]:
        """Sphere tracing: distances t (R,) along rays and whether a surface is there (within 1e-2)."""
        t, leave, inside = intersect_box(rays, self.aabb, near)
        for _ in range(steps):
            t = t + factor * self.distance(rays.origins + t[:, None] * rays.directions)
        near_surface = self.distance(rays.origins + t[:, None] * rays.directions).abs() < 1e-2
        return t, inside & near_surface & (t <= leave)

    def surface_image(self, cameras: Cameras, background: float = 1.0, steps: int = 24) -> dict[str, Tensor]:
        """Pictures of the surface: rgb, normal (B, H, W, 3), opacity and depth (B, H, W), depth along rays and 0 where nothing is."""
        each = [cameras.rays(i) for i in range(len(cameras))]
        rays = Rays(torch.cat([r.origins for r in each]), torch.cat([r.directions for r in each]))
        t, hit = self.trace(rays, cameras.near, steps)
        x = rays.origins + t[:, None] * rays.directions
        rgb = torch.where(hit[:, None], self.colour(x, rays.directions), torch.full_like(x, background))
        normal = torch.where(hit[:, None], self.normals(x), torch.zeros_like(x))
        shape = (len(cameras), cameras.height, cameras.width)
        found = {"rgb": rgb, "normal": normal, "opacity": hit.to(x.dtype), "depth": t * hit}
        return {name: value.view(*shape, *value.shape[1:]) for name, value in found.items()}


def _spheres_box(seed: int) -> AnalyticScene:
    def parts(x: Tensor) -> Tensor:
        return torch.stack([
            ball(x, (-0.35, 0.0, 0.0), 0.38), box(x, (0.4, 0.1, -0.05), (0.22, 0.3, 0.3)), disc(x, -0.5, 0.85)
        ])  # fmt: skip

    def texture(x: Tensor) -> Tensor:
        checks = torch.sin(12 * x).sign().prod(-1) > 0
        floor = (torch.sin(8 * x[..., 0]) * torch.sin(8 * x[..., 1])) > 0
        colours = torch.stack([
            _pick(torch.sin(18 * x[..., 2]) > 0, (0.9, 0.2, 0.2), (0.95, 0.8, 0.3)),
            _pick(checks, (0.15, 0.35, 0.85), (0.8, 0.9, 0.95)),
            _pick(floor, (0.3, 0.6, 0.3), (0.75, 0.75, 0.7)),
        ])  # fmt: skip
        return _nearest(parts(x), colours)

    return AnalyticScene(lambda x: parts(x).amin(0), texture)


def _faced_sphere(seed: int) -> AnalyticScene:
    def texture(x: Tensor) -> Tensor:
        a, z = torch.atan2(x[..., 1], x[..., 0]), x[..., 2]
        colour = _pick(torch.ones_like(z, dtype=torch.bool), (0.95, 0.8, 0.65), (0.0, 0.0, 0.0))
        eyes = torch.hypot(a.abs() - 0.4, z - 0.15) < 0.13
        mouth = (a.abs() < 0.45) & ((z + 0.2).abs() < 0.06)
        marks = (
            (eyes, (0.1, 0.1, 0.3)),
            (mouth, (0.8, 0.1, 0.1)),
            (((a - math.pi / 2).abs() < 0.2) & (z.abs() < 0.2), (0.2, 0.7, 0.3)),
            (((a + math.pi / 2).abs() < 0.2) & (z.abs() < 0.2), (0.2, 0.3, 0.9)),
            ((a.abs() > math.pi - 0.6) & (z > -0.3), (0.35, 0.2, 0.1)),
        )
        for where, value in marks:
            colour = torch.where(where[..., None], colour.new_tensor(value), colour)
        return colour

    return AnalyticScene(ball, texture)


def _three_blobs(seed: int) -> AnalyticScene:
    balls = (((0.0, 0.0, -0.25), 0.38), ((0.35, 0.1, 0.2), 0.24), ((-0.3, -0.25, 0.15), 0.2))

    def parts(x: Tensor) -> Tensor:
        return torch.stack([ball(x, c, r) for c, r in balls])

    def texture(x: Tensor) -> Tensor:
        pairs = (
            ((0.85, 0.25, 0.2), (0.95, 0.7, 0.5)),
            ((0.2, 0.6, 0.3), (0.8, 0.9, 0.4)),
            ((0.2, 0.3, 0.85), (0.6, 0.8, 0.95)),
        )
        colours = torch.stack([_pick(torch.sin(20 * x[..., k]) > 0, *pair) for k, pair in enumerate(pairs)])
        return _nearest(parts(x), colours)

    return AnalyticScene(lambda x: parts(x).amin(0), texture)


def _split_sphere(seed: int) -> AnalyticScene:
    return AnalyticScene(ball, lambda x: _pick(x[..., 1] > 0, (0.85, 0.3, 0.15), (0.2, 0.4, 0.8)))


def _textured_shapes(seed: int) -> AnalyticScene:
    g = torch.Generator().manual_seed(seed)
    kind = int(torch.randint(4, (1,), generator=g))
    frequency, phase = 5 + 6 * torch.rand(3, generator=g), 6.28 * torch.rand(3, generator=g)
    palette, product = torch.rand(2, 3, generator=g), bool(torch.rand(1, generator=g) < 0.5)
    shapes: tuple[Distance, ...] = (
        ball,
        lambda x: box(x, (0.0, 0.0, 0.0), (0.45, 0.4, 0.35)),
        lambda x: torus(x, 0.45, 0.22),
        lambda x: torch.stack([ball(x, (0.0, 0, -0.25), 0.38), ball(x, (0.35, 0.1, 0.2), 0.24), ball(x, (-0.3, -0.25, 0.15), 0.2)]).amin(0),
    )  # fmt: skip

    def texture(x: Tensor) -> Tensor:
        waves = torch.sin(frequency.to(x) * x + phase.to(x))
        test = (waves.prod(-1) if product else waves.sum(-1)) > 0
        return torch.where(test[..., None], palette[0].to(x), palette[1].to(x))

    return AnalyticScene(shapes[kind], texture, shaded=True)


def _terrain(seed: int) -> AnalyticScene:
    def distance(x: Tensor) -> Tensor:  # divided by the largest slope, so that tracing never steps through
        return (x[..., 2] - 0.15 * torch.sin(3 * x[..., 0]) * torch.cos(2 * x[..., 1])) / math.sqrt(
            1 + 0.45**2 + 0.3**2
        )

    def texture(x: Tensor) -> Tensor:
        return 0.5 + 0.35 * torch.sin(x * x.new_tensor([1.7, 2.3, 6.0]) + x.new_tensor([0.0, 1.0, 2.0]))

    return AnalyticScene(distance, texture, half=2.0)


SCENES: dict[str, Callable[[int], AnalyticScene]] = {
    "spheres_box": _spheres_box, "faced_sphere": _faced_sphere, "three_blobs": _three_blobs,
    "split_sphere": _split_sphere, "textured_shapes": _textured_shapes, "terrain": _terrain,
}  # fmt: skip


def scene(name: str, seed: int = 0) -> AnalyticScene:
    """One of :data:`SCENES`; only ``textured_shapes`` differs by seed (shape, palette, frequencies)."""
    if name not in SCENES:
        raise UnknownNameError("scene", name, SCENES)
    return SCENES[name](seed)


class Shots(NamedTuple):
    """Cameras and their pictures: ``images`` (N, H, W, 3) in [0, 1], ``depth`` (accumulated) and ``opacity`` (N, H, W)."""

    cameras: Cameras
    images: Tensor
    depth: Tensor
    opacity: Tensor


@torch.no_grad()
def shots(
    field: AnalyticScene, views: int, size: int = 32, seed: int = 0, radius: float = 3.0, fovy: float = 45.0, samples: int = 128
) -> Shots:  # fmt: skip
    """Ground truth on a white background from cameras spread evenly in azimuth and at random elevations in (-10, 50) degrees.

    Args:
        views: N. size: of the square pictures. seed: of the elevations and the first azimuth. samples: per ray, 128 to 256 for a truth.
    """
    if views < 1:
        raise InputError(f"a scene is seen from 1 view or more (got {views})")
    g = torch.Generator().manual_seed(seed)
    azimuth = 360 / views * (torch.arange(views) + torch.rand(1, generator=g))
    cameras = orbit(azimuth, -10 + 60 * torch.rand(views, generator=g), radius, fovy, size, size)
    found = render_image(field, cameras, samples=samples)
    return Shots(cameras, found["rgb"].clamp(0, 1), found["depth"], found["opacity"])
