r"""Scenes of 3-D Gaussians: what is stored, what it means, and colours that depend on the direction of view."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import InputError

SH_C0 = 0.28209479177387814
"""Y_00 = 1/(2 sqrt(pi)): a base colour c is stored as (c - 0.5)/Y_00."""

MAX_DEGREE = 3

GSPLAT = {
    "means": "means",
    "scales": "log_scales",
    "quats": "quats",
    "opacities": "opacity_logits",
    "sh0": "sh0",
    "shN": "sh_rest",
}
"""gsplat's names of the parameters, and ours; both hold scales as logarithms and opacities as logits."""


def sh_basis(directions: Tensor, degree: int) -> Tensor:
    r"""Real spherical harmonics up to a degree, in the order and with the signs of 3-D Gaussian splatting.

    Orthonormal on the unit sphere; (l, m) is at l^2 + l + m, with the Condon-Shortley sign: Y_{1,-1} = -0.4886 y, Y_{10} = 0.4886 z,
    Y_{11} = -0.4886 x.

    Args:
        directions: unit vectors (..., 3). degree: 0 to 3.

    Returns:
        (..., (degree+1)^2).
    """
    check_degree(degree)
    x, y, z = directions.unbind(-1)
    terms = [torch.full_like(x, SH_C0)]
    if degree > 0:
        c = math.sqrt(3 / (4 * math.pi))
        terms += [-c * y, c * z, -c * x]
    if degree > 1:
        c = math.sqrt(15 / (4 * math.pi))
        xx, yy, zz = x * x, y * y, z * z
        terms += [
            c * x * y,
            -c * y * z,
            math.sqrt(5 / (16 * math.pi)) * (2 * zz - xx - yy),
            -c * x * z,
            c / 2 * (xx - yy),
        ]
    if degree > 2:
        a, b, c = math.sqrt(35 / (32 * math.pi)), math.sqrt(105 / (4 * math.pi)), math.sqrt(21 / (32 * math.pi))
        terms += [
            -a * y * (3 * xx - yy),
            b * x * y * z,
            -c * y * (4 * zz - xx - yy),
            math.sqrt(7 / (16 * math.pi)) * z * (2 * zz - 3 * xx - 3 * yy),
            -c * x * (4 * zz - xx - yy),
            b / 2 * z * (xx - yy),
            -a * x * (xx - 3 * yy),
        ]
    return torch.stack(terms, -1)


def check_degree(degree: int) -> None:
    if degree not in range(MAX_DEGREE + 1):
        raise InputError(f"spherical harmonics have a degree of 0 to {MAX_DEGREE} here (got {degree})")


def rotations(quats: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4), order (w, x, y, z), normalised here."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    entries = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


class Gaussians(nn.Module):
    r"""N Gaussians as they are optimised: unconstrained numbers whose activations are the physical ones.

    .. math:: \Sigma = R(q)\,\mathrm{diag}(e^{s})^2\,R(q)^T,\quad o = \mathrm{sigmoid}(\ell),\quad
              c(d) = \max\Big(0, \tfrac12 + \sum_{lm} Y_{lm}(d)\,h_{lm}\Big)

    The parameters carry what a ``.ply`` of 3-D Gaussian splatting carries: ``means`` (N, 3) in world units, ``log_scales`` (N, 3),
    ``quats`` (N, 4) as (w, x, y, z) of any length above 0, ``opacity_logits`` (N,), ``sh0`` (N, 1, 3) and ``sh_rest``
    (N, (degree+1)^2 - 1, 3).

    Args:
        means, log_scales, quats, opacity_logits, sh: the parameters, ``sh`` (N, K, 3) with K = 1, 4, 9 or 16.

    Raises:
        InputError: shapes that do not fit each other.

    Source: "3D Gaussian Splatting for Real-Time Radiance Field Rendering".
    """

    def __init__(self, means: Tensor, log_scales: Tensor, quats: Tensor, opacity_logits: Tensor, sh: Tensor) -> None:
        super().__init__()
        count = len(means)
        expected = {"means": (count, 3), "log_scales": (count, 3), "quats": (count, 4), "opacity_logits": (count,)}
        given = {"means": means, "log_scales": log_scales, "quats": quats, "opacity_logits": opacity_logits}
        for name, shape in expected.items():
            if given[name].shape != shape:
                raise InputError(f"{name} of {count} Gaussians must be {shape}, not {tuple(given[name].shape)}")
        if sh.ndim != 3 or sh.shape[0] != count or sh.shape[2] != 3 or sh.shape[1] not in (1, 4, 9, 16):
            raise InputError(
                f"spherical harmonics of {count} Gaussians must be ({count}, 1, 4, 9 or 16, 3), not {tuple(sh.shape)}"
            )
        self.means = nn.Parameter(means.detach().clone())
        self.log_scales = nn.Parameter(log_scales.detach().clone())
        self.quats = nn.Parameter(quats.detach().clone())
        self.opacity_logits = nn.Parameter(opacity_logits.detach().clone())
        self.sh0 = nn.Parameter(sh[:, :1].detach().clone())
        self.sh_rest = nn.Parameter(sh[:, 1:].detach().clone())

    @classmethod
    def from_points(
        cls, points: Tensor, colours: Tensor | None = None, sh_degree: int = 3, opacity: float = 0.1
    ) -> Gaussians:
        """Isotropic Gaussians on a cloud of points, as wide as the root mean squared distance to the three nearest others.

        Args:
            points: (N, 3). colours: (N, 3) in [0, 1], grey if None. sh_degree: of the harmonics, those above 0 start at 0.
            opacity: in (0, 1), of every Gaussian.

        Raises:
            InputError: no points, points that are not finite, colours of another shape.
        """
        check_degree(sh_degree)
        if points.ndim != 2 or points.shape[1] != 3 or not len(points):
            raise InputError(f"points must be (N, 3) with N of 1 or more, not {tuple(points.shape)}")
        if not bool(torch.isfinite(points).all()):
            raise InputError("points contain NaN or infinity: remove those rows first")
        if colours is not None and colours.shape != points.shape:
            raise InputError(f"colours must be {tuple(points.shape)} like the points, not {tuple(colours.shape)}")
        if not 0 < opacity < 1:
            raise InputError(f"an initial opacity lies between 0 and 1 (got {opacity})")
        points = points.detach()
        count = len(points)
        sh = points.new_zeros(count, (sh_degree + 1) ** 2, 3)
        if colours is not None:
            sh[:, 0] = (colours.detach().to(points) - 0.5) / SH_C0
        log_scales = neighbour_distance(points).log()[:, None].expand(count, 3)
        quats = points.new_tensor([1.0, 0, 0, 0]).expand(count, 4)
        return cls(points, log_scales, quats, points.new_full((count,), math.log(opacity / (1 - opacity))), sh)

    @classmethod
    def from_gsplat(cls, params: Mapping[str, Any]) -> Gaussians:
        """Gaussians from the parameters that gsplat's trainers keep: ``means`` (N, 3), ``scales`` (N, 3) as logarithms, ``quats`` (N, 4) as
        (w, x, y, z), ``opacities`` (N,) as logits, ``sh0`` (N, 1, 3) and ``shN`` (N, K, 3), which may be missing.

        Args:
            params: a dictionary, a ``ParameterDict``, or a checkpoint that has one under ``splats``. Values are copied.

        Raises:
            InputError: a parameter is missing, or of another shape.
        """
        splats = params.get("splats", params)
        missing = [name for name in GSPLAT if name != "shN" and name not in splats]
        if missing:
            hint = " (colours that a network decodes are not read)" if "sh0" in missing and "colors" in splats else ""
            raise InputError(f"gsplat's parameters lack {', '.join(missing)}: there are {', '.join(splats)}{hint}")
        sh0 = splats["sh0"]
        rest = splats["shN"] if "shN" in splats else sh0[:, :0]
        if sh0.ndim != 3 or rest.ndim != 3 or sh0.shape[1] != 1:
            raise InputError(f"sh0 is (N, 1, 3) and shN (N, K, 3), not {tuple(sh0.shape)} and {tuple(rest.shape)}")
        logits = splats["opacities"]
        logits = logits[:, 0] if logits.ndim == 2 and logits.shape[1] == 1 else logits
        return cls(splats["means"], splats["scales"], splats["quats"], logits, torch.cat([sh0, rest], 1))

    def to_gsplat(self) -> dict[str, nn.Parameter]:
        """The parameters under gsplat's names: the same tensors, not copies, so that what trains them there trains them here."""
        return {theirs: getattr(self, ours) for theirs, ours in GSPLAT.items()}

    def __len__(self) -> int:
        return len(self.means)

    @property
    def sh_degree(self) -> int:
        """The highest degree stored."""
        return math.isqrt(self.sh_rest.shape[1] + 1) - 1

    @property
    def sh(self) -> Tensor:
        """All coefficients (N, K, 3)."""
        return torch.cat([self.sh0, self.sh_rest], 1)

    @property
    def scales(self) -> Tensor:
        """Standard deviations along the own axes (N, 3), world units."""
        return self.log_scales.exp()

    @property
    def opacities(self) -> Tensor:
        """(N,), in (0, 1)."""
        return torch.sigmoid(self.opacity_logits)

    def covariances(self) -> Tensor:
        """(N, 3, 3), world units squared."""
        factor = rotations(self.quats) * self.scales[:, None]
        return factor @ factor.mT

    def colours(self, centre: Tensor, degree: int | None = None) -> Tensor:
        """Colours (N, 3), 0 or more, seen from a camera centre (3,). ``degree`` leaves higher harmonics out."""
        degree = self.sh_degree if degree is None else min(degree, self.sh_degree)
        basis = sh_basis(F.normalize(self.means - centre, dim=-1), degree)
        found = torch.einsum("nk,nkc->nc", basis, self.sh[:, : basis.shape[1]]) + 0.5
        return found.clamp_min(0)

    def param_groups(self, extent: float = 1.0) -> Iterator[dict[str, object]]:
        """One optimiser group per parameter with the published learning rates; ``extent`` is the scene's radius.

        That of the means is meant to fall to a hundredth over the training, exponentially.
        """
        rates = {
            "means": 1.6e-4 * extent,
            "log_scales": 5e-3,
            "quats": 1e-3,
            "opacity_logits": 5e-2,
            "sh0": 2.5e-3,
            "sh_rest": 1.25e-4,
        }
        for name, rate in rates.items():
            yield {"params": [getattr(self, name)], "lr": rate, "name": name}


def neighbour_distance(points: Tensor, neighbours: int = 3) -> Tensor:
    """Root mean squared distance (N,) of each point (N, 3) to its nearest others, at least 1e-4 of the cloud's size."""
    from scipy.spatial import cKDTree

    array = points.detach().double().cpu().numpy()
    size = float((array.max(0) - array.min(0)).max()) or 1.0
    if len(array) == 1:
        return torch.full_like(points[:, 0], 0.01 * size)
    found, _ = cKDTree(array).query(array, k=min(neighbours + 1, len(array)))
    nearest = torch.as_tensor(found[:, 1:]).square().mean(1).sqrt().clamp_min(1e-4 * size)
    return nearest.to(points)
