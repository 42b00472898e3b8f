"""Drawn pictures of overlapping shapes with a class for every pixel, from a seed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.data import mix_seed

CLASSES = ("background", "disc", "square", "triangle", "ring", "cross")
FEWEST, MOST = 2, 5  # objects in a picture
TYPICAL = ((0.9, 0.2, 0.2), (0.2, 0.3, 0.9), (0.9, 0.8, 0.2), (0.2, 0.8, 0.3), (0.8, 0.2, 0.8))
USUAL = 0.65  # how much of an object's colour its class decides


def draw_shapes(count: int, size: int = 48, seed: int = 0, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """Pictures and their label maps.

    Each picture has a textured background and 2 to 5 objects (discs, squares, triangles, rings, crosses) of random place, size,
    turn, colour and texture, the later ones in front. An object's colour is partly its class's and partly random, so that
    neither colour nor outline alone tells the class; backgrounds are greyish. The picture is then blurred by a random width, and noise is added. Labels are
    those of the sharp picture. The same arguments give the same pictures.

    Args:
        count: how many.
        size: side in pixels.
        seed: of everything random.
        chunk: pictures drawn at once (memory).

    Returns:
        images (count, 3, size, size) uint8, labels (count, size, size) int64 of :data:`CLASSES`.
    """
    parts = [
        _draw(min(chunk, count - start), size, torch.Generator().manual_seed(mix_seed(seed, 41, start)))
        for start in range(0, count, chunk)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _draw(n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    def texture(colour: Tensor, strength: Tensor) -> Tensor:
        """Colours (K, 3), strengths (K,) -> (K, 3, size, size): stripes of a random direction and width."""
        k = len(colour)
        turn, waves, phase = uniform(0, math.pi, k), uniform(3, 9, k), uniform(0, 2 * math.pi, k)
        along = turn.cos()[:, None, None] * x + turn.sin()[:, None, None] * y
        stripes = torch.sin(2 * math.pi * waves[:, None, None] * along + phase[:, None, None])
        tint = uniform(-1, 1, k, 3)
        return colour[:, :, None, None] + strength[:, None, None, None] * tint[:, :, None, None] * stripes[:, None]

    kinds = torch.randint(1, len(CLASSES), (n, MOST), generator=generator)
    number = torch.randint(FEWEST, MOST + 1, (n, 1), generator=generator)
    there = torch.arange(MOST) < number
    inside = _inside(
        kinds, uniform(0.15, 0.85, n, MOST, 2), uniform(0.15, 0.26, n, MOST), uniform(0, 2 * math.pi, n, MOST), x, y
    )
    inside &= there[..., None, None]
    # the last object that covers a pixel is in front: 0 for the background, else its place in the list from 1
    front = (inside * torch.arange(1, MOST + 1)[None, :, None, None]).amax(1)
    labels = torch.cat([torch.zeros(n, 1, dtype=torch.long), kinds], 1).gather(1, front.flatten(1)).view_as(front)

    own = torch.tensor(TYPICAL)[kinds.flatten() - 1]
    colours = USUAL * own + (1 - USUAL) * uniform(0.0, 1.0, n * MOST, 3)
    plain = uniform(0.2, 0.8, n, 1) + uniform(-0.12, 0.12, n, 3)
    ground = texture(plain, uniform(0.03, 0.12, n)) + texture(torch.zeros(n, 3), uniform(0.0, 0.08, n))
    objects = texture(colours, uniform(0.0, 0.12, n * MOST)).view(n, MOST, 3, size, size)
    layers = torch.cat([ground[:, None], objects], 1)
    images = layers.gather(1, front[:, None, None].expand(n, 1, 3, size, size))[:, 0]
    images = _blurred(images, uniform(0.3, 1.0, n)) + uniform(0.01, 0.06, n, 1, 1, 1) * torch.randn(
        n, 3, size, size, generator=generator
    )
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


def _inside(kinds: Tensor, centre: Tensor, radius: Tensor, turn: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Which pixels each object covers, (n, objects, size, size) bool; sizes are fractions of the image's side."""
    dx, dy = x - centre[..., 0, None, None], y - centre[..., 1, None, None]
    cos, sin = turn.cos()[..., None, None], turn.sin()[..., None, None]
    r = radius[..., None, None]
    u, v = (cos * dx + sin * dy) / r, (cos * dy - sin * dx) / r
    far, wide = torch.hypot(u, v), torch.maximum(u.abs(), v.abs())
    # an equilateral triangle of circumradius 1.2: below its three sides
    lower = torch.maximum(v, torch.maximum(0.75**0.5 * u, -(0.75**0.5) * u) - 0.5 * v)
    kind = kinds[..., None, None]
    return (
        ((kind == 1) & (far <= 1))
        | ((kind == 2) & (wide <= 0.85))
        | ((kind == 3) & (lower <= 0.6))
        | ((kind == 4) & (far <= 1) & (far >= 0.55))
        | ((kind == 5) & (wide <= 1) & (torch.minimum(u.abs(), v.abs()) <= 0.3))
    )


def _blurred(images: Tensor, width: Tensor) -> Tensor:
    """Each image under its own Gaussian of standard deviation ``width`` (n,) in pixels."""
    n, channels, h, w = images.shape
    offsets = torch.arange(-3, 4).float()
    kernel = torch.softmax(-(offsets**2) / (2 * width[:, None] ** 2), -1).repeat_interleave(channels, 0)
    flat = F.pad(images.reshape(1, n * channels, h, w), (3, 3, 3, 3), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * channels)
    return F.conv2d(flat, kernel[:, None, None, :], groups=n * channels).view(n, channels, h, w)
