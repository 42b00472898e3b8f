"""The field of TensoRF: a sum of products of planes and lines (vector-matrix decomposition)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.fields.base import GEO, UNIT_BOX, Box, Density, VolumeField, positive_int
from limbeck.rendering.fields.mlp import ColourHead

PLANES = ((0, 1), (0, 2), (1, 2))
LINES = (2, 1, 0)


class VMField(VolumeField):
    r"""Planes times lines.

    .. math:: h_\sigma(x) = \sum_{k=1}^{3}\sum_{r=1}^{R_\sigma} M_k^r(x_{a_k}, x_{b_k})\, V_k^r(x_{c_k}), \qquad
              \mathrm{geo}(x) = B\,\mathrm{concat}_{k,r}\big(M_k^r V_k^r\big)

    with (a, b; c) = (x, y; z), (x, z; y), (y, z; x), bilinear planes and linear lines whose outer samples lie on the box's faces.
    ``encode`` gives [h_sigma, the 3 R_c products]; B and the colour head decode. At full scale: ranks 16 and 48, resolution 300.

    Args:
        resolution: N, samples an axis, at least 2. rank, colour_rank: R_sigma and R_c, products of each orientation.
        hidden: width of the colour head. sh_degree: of directions. init: standard deviation of planes and lines at the start.
        aabb, density: see :class:`VolumeField`.

    Source: "TensoRF: Tensorial Radiance Fields".
    """

    family = "vm"

    def __init__(
        self,
        resolution: int = 48,
        rank: int = 8,
        colour_rank: int = 12,
        hidden: int = 64,
        sh_degree: int = 3,
        init: float = 0.1,
        aabb: Box = UNIT_BOX,
        density: Density | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(aabb, density)
        n = positive_int("resolution", resolution, 2)
        self.rank, self.colour_rank = positive_int("rank", rank), positive_int("colour_rank", colour_rank)
        self.hidden, self.sh_degree, self.init = positive_int("hidden", hidden), sh_degree, float(init)
        self.planes = nn.Parameter(init * torch.randn(3, rank + colour_rank, n, n))  # last index: the pair's first axis
        self.lines = nn.Parameter(init * torch.randn(3, rank + colour_rank, n))
        self.basis = nn.Linear(3 * colour_rank, GEO, bias=False)
        self.colour_head = ColourHead(GEO, hidden, 3, sh_degree)

    @property
    def resolution(self) -> int:
        """Samples an axis, N."""
        return self.lines.shape[-1]

    def encode(self, x: Tensor) -> Tensor:
        planes, lines = self._sampled(2 * self.unit(x) - 1)
        products = planes * lines  # (3, R, N)
        return torch.cat([products[:, : self.rank].sum((0, 1))[None], products[:, self.rank :].flatten(0, 1)]).T

    def geometry(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        return h[:, 0], self.basis(h[:, 1:])

    def colour(self, h: Tensor, geo: Tensor | None, d: Tensor) -> Tensor:
        found: Tensor = self.colour_head(geo, d)
        return found

    def encoding_parameters(self) -> list[nn.Parameter]:
        return [self.planes, self.lines]

    def config(self) -> dict[str, Any]:
        names = ("resolution", "rank", "colour_rank", "hidden", "sh_degree", "init")
        return {**super().config(), **{name: getattr(self, name) for name in names}}

    def sparsity(self) -> Tensor:
        """Mean absolute value of the density's planes plus that of its lines, a scalar: the L1 penalty."""
        return self.planes[:, : self.rank].abs().mean() + self.lines[:, : self.rank].abs().mean()

    def total_variation(self) -> Tensor:
        """Mean squared difference of neighbours in the planes, summed over both directions, a scalar."""
        return self.planes.diff(dim=-1).square().mean() + self.planes.diff(dim=-2).square().mean()

    @torch.no_grad()
    def upsample(self, resolution: int) -> None:
        """Resample planes and lines (bi)linearly to another resolution; the optimiser must be built anew.

        From N to 2 N - 1 samples (or any lattice that contains the old one) the field stays the same everywhere.
        """
        n = positive_int("resolution", resolution, 2)
        self.planes = nn.Parameter(F.interpolate(self.planes, (n, n), mode="bilinear", align_corners=True))
        self.lines = nn.Parameter(F.interpolate(self.lines, n, mode="linear", align_corners=True))

    @torch.no_grad()
    def shrink(self, aabb: Box) -> None:
        """Give the box new corners within the old one and resample onto it at the same resolution; the optimiser must be built anew.

        Raises:
            InputError: the new box is not inside the old one, or is empty.
        """
        box = torch.as_tensor(aabb, dtype=self.aabb.dtype, device=self.aabb.device)
        if box.shape != (2, 3) or not bool((box[1] > box[0]).all()) or not bool(self.inside(box).all()):
            raise InputError(f"the new box must lie in the old one {self.aabb.tolist()} (got {box.tolist()})")
        n = self.resolution
        steps = torch.linspace(0, 1, n, dtype=box.dtype, device=box.device)[:, None]
        axes = 2 * self.unit(box[0] + (box[1] - box[0]) * steps) - 1  # (n, 3), in the old box
        grids = [torch.stack(torch.meshgrid(axes[:, b], axes[:, a], indexing="ij"), -1).flip(-1) for a, b in PLANES]
        planes = F.grid_sample(self.planes, torch.stack(grids).to(self.planes.dtype), align_corners=True)
        self.lines = nn.Parameter(self._line_samples(axes.to(self.lines.dtype)))
        self.planes = nn.Parameter(planes)
        self.aabb.copy_(box)

    def _sampled(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Planes and lines (3, R, N) at places (N, 3) in [-1, 1]."""
        pairs = torch.stack([place[:, pair] for pair in PLANES])[:, :, None]  # (3, N, 1, 2)
        planes = F.grid_sample(self.planes, pairs, padding_mode="border", align_corners=True)[..., 0]
        return planes, self._line_samples(place)

    def _line_samples(self, place: Tensor) -> Tensor:
        along = place[:, LINES].T[:, :, None]  # (3, N, 1)
        grid = torch.stack([torch.zeros_like(along), along], -1)  # a line is an image one pixel wide
        return F.grid_sample(self.lines[..., None], grid, padding_mode="border", align_corners=True)[..., 0]
