"""The field of NeRF: a multi-layer perceptron of frequency-encoded positions; and the heads that learned families share."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.rendering.fields.base import GEO, UNIT_BOX, Box, Density, VolumeField, positive_int
from limbeck.rendering.fields.encodings import frequency_encoding, frequency_width, spherical_harmonics


def perceptron(widths: list[int], bias: bool = True) -> nn.Sequential:
    """Linear layers of the given widths with ReLU in between."""
    layers: list[nn.Module] = []
    for i, (narrow, wide) in enumerate(pairwise(widths)):
        layers += [nn.ReLU()] if i else []
        layers += [nn.Linear(narrow, wide, bias=bias)]
    return nn.Sequential(*layers)


class ColourHead(nn.Module):
    """``sigmoid(MLP([SH(d), geo]))``: colours (N, 3) in (0, 1).

    Args:
        geo: channels beside the direction. hidden, layers: width of the hidden layers and number of linear layers.
        sh_degree: largest degree of the direction's harmonics.
    """

    def __init__(self, geo: int = GEO, hidden: int = 64, layers: int = 3, sh_degree: int = 3) -> None:
        super().__init__()
        self.sh_degree = sh_degree
        self.net = perceptron([(sh_degree + 1) ** 2 + geo, *[hidden] * (layers - 1), 3], bias=False)

    def forward(self, geo: Tensor, d: Tensor) -> Tensor:
        found: Tensor = self.net(torch.cat([spherical_harmonics(d, self.sh_degree), geo], -1))
        return found.sigmoid()


class DecodedField(VolumeField):
    """A field whose encoding of F channels goes through a two-layer geometry head (to 1 + 15 channels) and a colour head.

    The heads have no biases and the same names in every family, so that one family can inherit them from another.

    Args:
        width: F. hidden: width of both heads. sh_degree: of directions. aabb, density: see :class:`VolumeField`.
    """

    def __init__(self, width: int, hidden: int, sh_degree: int, aabb: Box, density: Any) -> None:
        super().__init__(aabb, density)
        self.hidden, self.sh_degree = positive_int("hidden", hidden), positive_int("sh_degree", sh_degree, 0)
        self.geometry_head = perceptron([width, hidden, 1 + GEO], bias=False)
        self.colour_head = ColourHead(GEO, hidden, 3, sh_degree)

    def geometry(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self.geometry_head(h)
        return found[:, 0], found[:, 1:]

    def colour(self, h: Tensor, geo: Tensor | None, d: Tensor) -> Tensor:
        found: Tensor = self.colour_head(geo, d)
        return found

    def config(self) -> dict[str, Any]:
        return {**super().config(), "hidden": self.hidden, "sh_degree": self.sh_degree}


class MLPField(DecodedField):
    """A perceptron of the frequency-encoded position (in world units), with one skip connection of the encoding.

    ``encode`` is the perceptron up to a linear layer of ``features`` channels. At full scale: 10 octaves, 8 layers of 256, skip 4, 28
    features.

    Args:
        levels: octaves of the frequency encoding. with_pi: frequencies 2^k pi instead of 2^k.
        depth, width: hidden layers of the encoder. skip: the layer (counted from 0) whose input gets the encoding again; None for none.
        features: channels of the feature volume.
        hidden: width of the heads. sh_degree: of directions. aabb, density: see :class:`VolumeField`.

    Source: "NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis".
    """

    family = "mlp"

    def __init__(
        self,
        levels: int = 6,
        depth: int = 4,
        width: int = 64,
        skip: int | None = 2,
        features: int = 12,
        hidden: int = 64,
        sh_degree: int = 3,
        with_pi: bool = False,
        aabb: Box = UNIT_BOX,
        density: Density | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(positive_int("features", features), hidden, sh_degree, aabb, density)
        self.levels, self.with_pi, self.skip = positive_int("levels", levels, 0), bool(with_pi), skip
        self.depth, self.width, self.features = positive_int("depth", depth), positive_int("width", width), features
        if skip is not None and not 0 < skip < depth:
            raise InputError(f"the skip goes into a layer from 1 to {depth - 1}, or is None (got {skip})")
        size = frequency_width(3, levels)
        sizes = [size, *[width] * (depth - 1)]
        if skip is not None:
            sizes[skip] += size
        self.trunk = nn.ModuleList(nn.Linear(n, width) for n in sizes)
        self.out = nn.Linear(width, features)

    def encode(self, x: Tensor) -> Tensor:
        encoded = frequency_encoding(x, self.levels, with_pi=self.with_pi)
        h = encoded
        for i, layer in enumerate(self.trunk):
            if i == self.skip:
                h = torch.cat([h, encoded], -1)
            h = layer(h).relu()
        found: Tensor = self.out(h)
        return found

    def config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("levels", "depth", "width", "skip", "features", "with_pi")}
        return {**super().config(), **own}
