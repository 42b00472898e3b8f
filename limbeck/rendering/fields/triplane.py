"""The field of three feature planes: each point is projected onto them and what it finds there is summed or multiplied."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.fields.base import UNIT_BOX, Box, Density, positive_int
from limbeck.rendering.fields.mlp import DecodedField

PLANES = ((0, 1), (0, 2), (1, 2))


class TriplaneField(DecodedField):
    r"""Three bilinear planes and small heads.

    .. math:: h(x) = \sum_{k=1}^{3} P_k(x_{a_k}, x_{b_k}) \quad\text{or}\quad h(x) = \prod_{k=1}^{3} P_k(x_{a_k}, x_{b_k})

    with (a, b) = (x, y), (x, z), (y, z) and F channels a plane, whose outer samples lie on the box's faces. A product can single out a place
    where a sum can only add up three walls, which the heads then have to cut. At full scale: resolution 64 to 512, 32 channels.

    Args:
        resolution: N, samples an axis, at least 2. features: F, channels a plane.
        combine: ``sum`` ("EG3D") or ``product`` ("K-Planes").
        init: standard deviation of the planes at the start, around 0 in a sum and around 1 in a product.
        hidden: width of the heads. sh_degree: of directions. aabb, density: see :class:`~limbeck.rendering.fields.base.VolumeField`.

    Raises:
        InputError: another way to combine, a resolution below 2.

    Source: "Efficient Geometry-aware 3D Generative Adversarial Networks"; "K-Planes: Explicit Radiance Fields in Space, Time, and
    Appearance".
    """

    family = "triplane"

    def __init__(
        self,
        resolution: int = 32,
        features: int = 16,
        combine: Literal["sum", "product"] = "product",
        init: float = 0.1,
        hidden: int = 64,
        sh_degree: int = 3,
        aabb: Box = UNIT_BOX,
        density: Density | dict[str, Any] | None = None,
    ) -> None:
        if combine not in ("sum", "product"):
            raise InputError(f"planes are combined by sum or product (got '{combine}')")
        super().__init__(positive_int("features", features), hidden, sh_degree, aabb, density)
        n = positive_int("resolution", resolution, 2)
        self.combine, self.init = combine, float(init)
        start = init * torch.randn(3, features, n, n)
        self.planes = nn.Parameter(start if combine == "sum" else 1 + start)  # last index: the pair's first axis

    @property
    def resolution(self) -> int:
        """Samples an axis, N."""
        return self.planes.shape[-1]

    def encode(self, x: Tensor) -> Tensor:
        place = 2 * self.unit(x) - 1
        pairs = torch.stack([place[:, pair] for pair in PLANES])[:, :, None]  # (3, N, 1, 2)
        found = F.grid_sample(self.planes, pairs, padding_mode="border", align_corners=True)[..., 0]  # (3, F, N)
        return (found.sum(0) if self.combine == "sum" else found.prod(0)).T

    def encoding_parameters(self) -> list[nn.Parameter]:
        return [self.planes]

    def config(self) -> dict[str, Any]:
        own = {"resolution": self.resolution, "features": self.planes.shape[1]}
        return {**super().config(), **own, "combine": self.combine, "init": self.init}

    def total_variation(self) -> Tensor:
        """Mean squared difference of neighbours in the planes, summed over both directions, a scalar."""
        return self.planes.diff(dim=-1).square().mean() + self.planes.diff(dim=-2).square().mean()

    @torch.no_grad()
    def upsample(self, resolution: int) -> None:
        """Resample the planes bilinearly to another resolution; the optimiser must be built anew.

        From N to 2 N - 1 samples (or any lattice that contains the old one) the field stays the same everywhere.
        """
        n = positive_int("resolution", resolution, 2)
        self.planes = nn.Parameter(F.interpolate(self.planes, (n, n), mode="bilinear", align_corners=True))
