"""The field of Instant-NGP: tables of features at many resolutions, the fine ones addressed by a hash."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.rendering.fields.base import UNIT_BOX, Box, Density, positive_int
from limbeck.rendering.fields.mlp import DecodedField

PRIMES = (1, 2654435761, 805459861)


class HashEncoding(nn.Module):
    r"""Multi-resolution hash encoding of points in the unit cube, vectorised over points, levels and corners.

    Level l is a lattice of N_l = floor(base g^l) cells an axis, g = (finest/base)^{1/(L-1)}. A point's features are trilinear in the 8
    corners v of its cell; corner v reads row v_0 + (N+1)(v_1 + (N+1) v_2) of the level's table while (N+1)^3 rows fit into T, else row
    (v_0 XOR 2654435761 v_1 XOR 805459861 v_2) mod T. The levels' features are concatenated, coarse first.

    Args:
        levels: L. channels: features a level. log2_size: log2 T, the most rows a level may have.
        base, finest: cells an axis of the first and of the last level.
        smooth: weights 3 f^2 - 2 f^3 instead of f, for a continuous gradient (smooth normals).

    Attributes:
        active: how many levels count; the finer ones give 0 (coarse-to-fine training). A buffer: it is saved.

    Source: "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding".
    """

    sizes: Tensor
    offsets: Tensor
    primes: Tensor
    strides: Tensor
    active: Tensor

    def __init__(
        self,
        levels: int = 6,
        channels: int = 2,
        log2_size: int = 13,
        base: int = 8,
        finest: int = 64,
        smooth: bool = False,
    ) -> None:
        super().__init__()
        self.levels, self.channels = positive_int("levels", levels), positive_int("channels", channels)
        self.log2_size, self.smooth = positive_int("log2_size", log2_size), bool(smooth)
        self.base, self.finest = positive_int("base", base), positive_int("finest", finest)
        if log2_size > 24 or finest < base:
            raise InputError(
                f"a hash encoding needs log2_size up to 24 and finest >= base (got {log2_size}, {finest} and {base})"
            )
        growth = (math.log(finest) - math.log(base)) / max(levels - 1, 1)
        # rounding must not turn the finest level's 64 into 63
        cells = [math.floor(base * math.exp(growth * level) + 1e-6) for level in range(levels)]
        rows = [min((n + 1) ** 3, 2**log2_size) for n in cells]
        self.dense = sum((n + 1) ** 3 <= 2**log2_size for n in cells)  # resolutions grow: the dense levels come first
        whole = torch.tensor(cells)
        self.register_buffer("sizes", whole, persistent=False)
        self.register_buffer("offsets", torch.tensor([0, *rows[:-1]]).cumsum(0), persistent=False)
        self.register_buffer("primes", torch.tensor(PRIMES), persistent=False)
        strides = torch.stack([torch.ones_like(whole), whole + 1, (whole + 1) ** 2], 1)
        self.register_buffer("strides", strides, persistent=False)
        self.register_buffer("active", torch.tensor(levels))
        self.table = nn.Parameter(torch.empty(sum(rows), channels).uniform_(-1e-4, 1e-4))

    @property
    def width(self) -> int:
        """Channels of the encoding, L times ``channels``."""
        return self.levels * self.channels

    def set_active(self, levels: int) -> None:
        """Let only the first ``levels`` levels count, 1 to L."""
        if not 1 <= levels <= self.levels:
            raise InputError(
                f"a hash encoding of {self.levels} levels has 1 to {self.levels} active ones (got {levels})"
            )
        self.active.fill_(levels)

    def rows(self, corner: Tensor) -> Tensor:
        """Rows of the common table (N, L, 8) of the cells whose lowest corners are (N, L, 3); corners in the order 000, 001, 010, ... of
        (x, y, z)."""
        ends = torch.stack([corner, corner + 1], -1)  # (N, L, 3, 2)

        def eight(parts: Tensor, exclusive: bool) -> Tensor:
            a, b, c = (parts[:, :, 0, :, None, None], parts[:, :, 1, None, :, None], parts[:, :, 2, None, None, :])
            return (a ^ b ^ c if exclusive else a + b + c).flatten(2)

        k = self.dense
        plain = eight(ends[:, :k] * self.strides[:k, :, None], exclusive=False)
        hashed = eight(ends[:, k:] * self.primes[:, None], exclusive=True) & (2**self.log2_size - 1)
        return torch.cat([plain, hashed], 1) + self.offsets[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, L C) of points (N, 3) in [0, 1]^3."""
        place = x[:, None] * self.sizes[:, None]
        # the upper face of the cube belongs to the last cell
        corner = torch.minimum(place.detach().floor().long().clamp_min(0), self.sizes[:, None] - 1)
        fraction = place - corner
        if self.smooth:
            fraction = fraction.square() * (3 - 2 * fraction)
        ends = torch.stack([1 - fraction, fraction], -1)  # (N, L, 3, 2)
        weights = ends[:, :, 0, :, None, None] * ends[:, :, 1, None, :, None] * ends[:, :, 2, None, None, :]
        # index_select: its backward is several times faster on a CPU than that of an embedding
        found = self.table.index_select(0, self.rows(corner).flatten()).view(len(x), self.levels, 8, self.channels)
        mixed = (found * weights.flatten(2)[..., None]).sum(2)  # (N, L, C)
        live = torch.arange(self.levels, device=x.device) < self.active
        return (mixed * live[:, None]).flatten(1)


class HashField(DecodedField):
    """A multi-resolution hash encoding with small heads.

    At full scale: 14 to 16 levels of 2 channels, 2^19 rows, base 16, finest 2048 times the box's half size. Train with Adam's eps 1e-15
    (``param_groups`` says so): the tables' gradients are tiny.

    Args:
        levels, channels, log2_size, base, finest, smooth: see :class:`HashEncoding`.
        hidden: width of the heads. sh_degree: of directions. aabb, density: see :class:`VolumeField`.
    """

    family = "hash"
    eps = 1e-15

    def __init__(
        self,
        levels: int = 6,
        channels: int = 2,
        log2_size: int = 13,
        base: int = 8,
        finest: int = 64,
        smooth: bool = False,
        hidden: int = 64,
        sh_degree: int = 3,
        aabb: Box = UNIT_BOX,
        density: Density | dict[str, Any] | None = None,
    ) -> None:
        encoding = HashEncoding(levels, channels, log2_size, base, finest, smooth)
        super().__init__(encoding.width, hidden, sh_degree, aabb, density)
        self.encoding = encoding

    def encode(self, x: Tensor) -> Tensor:
        found: Tensor = self.encoding(self.unit(x))
        return found

    def encoding_parameters(self) -> list[nn.Parameter]:
        return [self.encoding.table]

    def config(self) -> dict[str, Any]:
        names = ("levels", "channels", "log2_size", "base", "finest", "smooth")
        return {**super().config(), **{name: getattr(self.encoding, name) for name in names}}
