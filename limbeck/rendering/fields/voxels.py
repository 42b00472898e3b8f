"""The field of Plenoxels: density and spherical harmonics at the vertices of a sparse lattice, no network at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.fields.base import UNIT_BOX, Box, Density, VolumeField, positive_int
from limbeck.rendering.fields.encodings import spherical_harmonics

NOTHING = -50.0  # raw density of an empty vertex, below what any density bias can lift to something visible
CHUNK = 65536


class VoxelField(VolumeField):
    r"""Trilinear interpolation of 1 + 3 K channels between the vertices that exist.

    .. math:: h(x) = \sum_{v} w_v(x) h_v, \qquad \sigma = e^{h_0}, \qquad rgb_c = \mathrm{sigmoid}\Big(\sum_{j<K} h_{c,j}\, Y_j(d)\Big)

    Channels are the raw density, then K = (degree + 1)^2 coefficients for red, for green and for blue. All vertices exist at the start;
    :meth:`prune` drops those around which nothing is, and an absent vertex counts as raw density -50 with no colour. The family has no
    volume-aligned feature (``feature`` is None). At full scale: 128 vertices an axis, degree 2.

    Args:
        resolution: R, vertices an axis, at least 2; the outer ones lie on the box's faces.
        sh_degree: largest degree of the harmonics, 0 to 3.
        init: raw density at the start; it must lie between the density's limits, or it would get no gradient.
        aabb, density: see :class:`VolumeField`.

    Attributes:
        links: (R, R, R) row of each vertex (x, y, z) in ``data``, -1 where there is none.
        data: (M, 1 + 3 K) channels of the M vertices that exist.

    Source: "Plenoxels: Radiance Fields without Neural Networks".
    """

    family = "voxels"
    feature_width = None
    links: Tensor

    def __init__(
        self,
        resolution: int = 32,
        sh_degree: int = 1,
        init: float = 0.0,
        aabb: Box = UNIT_BOX,
        density: Density | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(aabb, density)
        n, self.sh_degree = positive_int("resolution", resolution, 2), positive_int("sh_degree", sh_degree, 0)
        law, self.init = self.density_law, float(init)
        bounds = (-math.inf if law.low is None else law.low, math.inf if law.high is None else law.high)
        if law.bias == "none" and law.activation == "trunc_exp" and not bounds[0] < init + law.shift < bounds[1]:
            raise InputError(f"init={init} lies outside the log density's limits {bounds}: it would never learn")
        self.register_buffer("links", torch.arange(n**3).view(n, n, n))
        data = torch.zeros(n**3, 1 + 3 * (sh_degree + 1) ** 2)
        data[:, 0] = init
        self.data = nn.Parameter(data)

    @property
    def resolution(self) -> int:
        """Vertices an axis, R."""
        return len(self.links)

    @property
    def filled(self) -> float:
        """Share of the lattice's vertices that exist."""
        return len(self.data) / self.links.numel()

    def encode(self, x: Tensor) -> Tensor:
        return self._interpolated(self.unit(x))[0]

    def geometry(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        return h[:, 0], None

    def colour(self, h: Tensor, geo: Tensor | None, d: Tensor) -> Tensor:
        harmonics = spherical_harmonics(d, self.sh_degree)
        return (h[:, 1:].unflatten(1, (3, -1)) * harmonics[:, None]).sum(-1).sigmoid()

    def encoding_parameters(self) -> list[nn.Parameter]:
        return [self.data]

    def config(self) -> dict[str, Any]:
        own = {"resolution": self.resolution, "sh_degree": self.sh_degree, "init": self.init}
        return {**super().config(), **own}

    def vertices(self) -> Tensor:
        """Positions (R, R, R, 3) of the lattice, world units."""
        steps = torch.linspace(0, 1, self.resolution, dtype=self.aabb.dtype, device=self.aabb.device)
        unit = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), -1)
        return self.aabb[0] + (self.aabb[1] - self.aabb[0]) * unit

    def total_variation(self) -> Tensor:
        """Mean squared difference of neighbouring vertices that both exist, summed over the three axes, a scalar."""
        total = self.data.new_zeros(())
        for axis in range(3):
            n = self.resolution - 1
            a, b = self.links.narrow(axis, 0, n).flatten(), self.links.narrow(axis, 1, n).flatten()
            both = (a >= 0) & (b >= 0)
            if bool(both.any()):
                gap = self.data.index_select(0, a[both]) - self.data.index_select(0, b[both])
                total = total + gap.square().mean()
        return total

    @torch.no_grad()
    def prune(self, threshold: float = 0.01) -> float:
        """Drop the vertices where neither they nor any of their 26 neighbours has a density above ``threshold``.

        The density changes only where it was below the threshold. The optimiser must be built anew.

        Returns:
            The share of the lattice that is left.

        Raises:
            InputError: nothing is above the threshold, or the density's lower limit alone is.
        """
        low = self.density_law.low
        if low is not None and math.exp(low) > threshold:
            raise InputError(
                f"no density is below exp({low}) = {math.exp(low):.3g}, so a threshold of {threshold} prunes nothing: "
                "build the field with a lower density.low"
            )
        live = self.links >= 0
        positions, rows = self.vertices()[live], self.links[live]
        sigma = torch.zeros(self.links.shape, dtype=self.data.dtype, device=self.data.device)
        sigma[live] = self.density_law(self.data[rows, 0], positions.to(self.data.dtype))[0]
        keep = live & (F.max_pool3d(sigma[None], 3, 1, 1)[0] > threshold)
        if not bool(keep.any()):
            raise InputError(
                f"no density is above {threshold} (the highest is {float(sigma.max()):.3g}): nothing would be left"
            )
        self.data = nn.Parameter(self.data[self.links[keep]].clone())
        self._relink(keep)
        return self.filled

    @torch.no_grad()
    def upsample(self, resolution: int) -> None:
        """Interpolate onto another lattice; a new vertex exists where its old cell had one. The optimiser must be built anew.

        From R to 2 R - 1 vertices the field stays the same wherever all vertices exist.
        """
        n = positive_int("resolution", resolution, 2)
        steps = torch.linspace(0, 1, n, dtype=self.data.dtype, device=self.data.device)
        unit = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), -1).view(-1, 3)
        parts = [self._interpolated(piece) for piece in unit.split(CHUNK)]
        share = torch.cat([part[1] for part in parts])
        keep = share > 0
        self.data = nn.Parameter(torch.cat([part[0] for part in parts])[keep])
        self._relink(keep.view(n, n, n))

    def _relink(self, keep: Tensor) -> None:
        links = torch.full(keep.shape, -1, dtype=torch.long, device=keep.device)
        links[keep] = torch.arange(int(keep.sum()), device=keep.device)
        self.links = links

    def _interpolated(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Channels (N, C) at fractions of the box (N, 3), and the weight (N,) of vertices that exist."""
        n = self.resolution
        place = unit * (n - 1)
        corner = place.detach().floor().long().clamp(0, n - 2)  # the upper face belongs to the last cell
        fraction = place - corner
        ends = torch.stack([1 - fraction, fraction], -1)  # (N, 3, 2)
        weights = (ends[:, 0, :, None, None] * ends[:, 1, None, :, None] * ends[:, 2, None, None, :]).flatten(1)
        steps = torch.arange(2, device=unit.device)
        x, y, z = (corner[:, axis, None] + steps for axis in range(3))
        flat = ((x * n)[:, :, None, None] + y[:, None, :, None]) * n + z[:, None, None, :]
        rows = self.links.flatten().index_select(0, flat.flatten()).view(len(unit), 8)
        if len(self.data) < self.links.numel():
            weights = weights * (rows >= 0)
        found = self.data.index_select(0, rows.clamp_min(0).flatten()).unflatten(0, (len(unit), 8))
        channels = (weights[:, None] @ found)[:, 0]
        share = weights.sum(1)
        if len(self.data) < self.links.numel():
            raw = channels[:, :1] + NOTHING * (1 - share)[:, None]
            channels = torch.cat([raw, channels[:, 1:]], 1)
        return channels, share

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        # a pruned field has fewer vertices than the lattice it is built with
        stored = state_dict.get(f"{prefix}data")
        if isinstance(stored, Tensor) and stored.ndim == 2 and stored.shape[1:] == self.data.shape[1:]:
            self.data = nn.Parameter(self.data.new_zeros(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
