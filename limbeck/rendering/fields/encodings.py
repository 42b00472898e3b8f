"""Encodings of positions and directions without parameters: sines and cosines, real spherical harmonics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.core.errors import InputError

MAX_SH_DEGREE = 3


def frequency_width(channels: int, levels: int, include_input: bool = True) -> int:
    """How many channels :func:`frequency_encoding` gives."""
    return channels * (2 * levels + int(include_input))


def frequency_encoding(x: Tensor, levels: int, include_input: bool = True, with_pi: bool = False) -> Tensor:
    r"""Sines and cosines of octaves of the coordinates.

    .. math:: \gamma(x) = \big[x, \sin(2^k s x), \cos(2^k s x)\big]_{k=0}^{L-1}, \qquad s = 1 \text{ or } \pi

    Order of the channels: the input, then for each octave the sines of all coordinates and the cosines of all coordinates.

    Args:
        x: (..., C) coordinates, about [-1, 1].
        levels: L >= 0, the number of octaves.
        include_input: put x itself in front.
        with_pi: s = pi. Checkpoints made with one value do not work with the other.

    Returns:
        (..., C (2 L + 1)), or (..., 2 C L) without the input.

    Raises:
        InputError: L < 0, or nothing would be left.

    Source: "NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis" (s = pi); the distillation papers leave pi out.
    """
    if levels < 0 or (levels == 0 and not include_input):
        raise InputError(f"a frequency encoding needs at least one octave or the input itself (got levels={levels})")
    scales = 2.0 ** torch.arange(levels, dtype=x.dtype, device=x.device) * (math.pi if with_pi else 1.0)
    angles = x[..., None, :] * scales[:, None]  # (..., L, C)
    waves = torch.stack([angles.sin(), angles.cos()], -2).flatten(-3)
    return torch.cat([x, waves], -1) if include_input else waves


def spherical_harmonics(d: Tensor, degree: int) -> Tensor:
    r"""Real spherical harmonics up to ``degree``, (..., (degree + 1)^2).

    Orthonormal on the sphere, in the order l = 0, 1, ..., m = -l..l, with the signs that Gaussian-splatting files use (terms of odd m are
    negated against the textbook's real harmonics).

    Args:
        d: (..., 3) unit directions.
        degree: the largest l, 0 to 3: 1, 4, 9 or 16 functions.

    Raises:
        InputError: another degree, d not of 3 coordinates.

    Source: "3D Gaussian Splatting for Real-Time Radiance Field Rendering" (order and signs).
    """
    if not 0 <= degree <= MAX_SH_DEGREE:
        raise InputError(f"spherical harmonics go from degree 0 to {MAX_SH_DEGREE} (got {degree})")
    if d.shape[-1] != 3:
        raise InputError(f"directions have 3 coordinates (got shape {tuple(d.shape)})")
    x, y, z = d.unbind(-1)
    found = [torch.full_like(x, 0.28209479177387814)]
    if degree >= 1:
        c1 = 0.4886025119029199
        found += [-c1 * y, c1 * z, -c1 * x]
    if degree >= 2:
        xx, yy, zz = x * x, y * y, z * z
        c2 = 1.0925484305920792
        found += [c2 * x * y, -c2 * y * z, 0.31539156525252005 * (2 * zz - xx - yy)]
        found += [-c2 * x * z, 0.5462742152960396 * (xx - yy)]
    if degree >= 3:
        found += [
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
            -0.4570457994644658 * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
        ]
    return torch.stack(found, -1)
