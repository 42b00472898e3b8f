"""Fields of other libraries as ours: a callable, or a radiance field in nerfacc's way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.rendering.fields.base import GEO, UNIT_BOX, Box, Density, VolumeField

Feature = Callable[[Tensor], Tensor]


class ForeignField(VolumeField):
    """Something that gives density and colour, to be rendered and to teach; it cannot be saved or inherited from.

    Args:
        source: ``source(x, d)`` with positions and unit directions (N, 3) gives (sigma, rgb), (N,) or (N, 1) and (N, 3), or a mapping with
            these names. A module with ``query_density(x)`` is taken for a radiance field of nerfacc's examples, whose ``source(x, d)`` gives
            (rgb, sigma).
        feature: ``feature(x)`` gives the volume-aligned feature (N, 16), log density first; None: there is none.
        aabb: (2, 3) the box that holds the scene, in the source's own coordinates.
        density: the limits of the log density; the source's own densities are kept as they are.

    Raises:
        InputError: a source that cannot be called.
    """

    family = "foreign"
    feature_width = None

    def __init__(
        self,
        source: Callable[..., Any],
        aabb: Box = UNIT_BOX,
        feature: Feature | None = None,
        density: Density | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(aabb, density)
        if not callable(source):
            raise InputError(f"a foreign field is a callable (x, d) -> (sigma, rgb), not {type(source).__name__}")
        self.source = source  # a module becomes a sub-module, and moves along
        self.tap = feature
        self.feature_width = None if feature is None else 1 + GEO
        self.colour_first = hasattr(source, "query_density")

    def forward(self, x: Tensor, d: Tensor) -> dict[str, Tensor | None]:
        self._check_points(x, d)
        sigma, rgb = self._asked(x, d)
        if tuple(rgb.shape) != tuple(x.shape):
            raise InputError(f"a foreign field gives colours {tuple(x.shape)} (got {tuple(rgb.shape)})")
        self._check_finite(rgb)
        return {**self._described(sigma, x), "rgb": rgb}

    def density(self, x: Tensor) -> dict[str, Tensor | None]:
        self._check_points(x)
        if self.colour_first:
            query: Any = self.source.query_density  # type: ignore[attr-defined]
            return self._described(query(x), x)
        up = torch.zeros_like(x)
        up[:, 2] = 1
        return self._described(self._asked(x, up)[0], x)

    def encode(self, x: Tensor) -> Tensor:
        raise InputError("a foreign field has no encoding: call it with positions and directions")

    def save(self, folder: str | Path) -> None:
        raise InputError("a foreign field is saved by its own library; distil it into one of the families here first")

    def config(self) -> dict[str, Any]:
        raise InputError("a foreign field cannot be built from a description")

    def _asked(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        found = self.source(x, d)
        if isinstance(found, Mapping) and {"sigma", "rgb"} <= set(found):
            return found["sigma"], found["rgb"]
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise InputError(f"a foreign field gives (sigma, rgb), not {type(found).__name__}")
        first, second = found
        return (second, first) if self.colour_first else (first, second)

    def _described(self, sigma: Tensor, x: Tensor) -> dict[str, Tensor | None]:
        if sigma.numel() != len(x):
            raise InputError(f"a foreign field gives one density a point: {len(x)} (got shape {tuple(sigma.shape)})")
        sigma = sigma.reshape(-1)
        self._check_finite(sigma)
        inside = self.inside(x)
        sigma = torch.where(inside, sigma, 0.0)
        log_sigma = sigma.clamp_min(torch.finfo(sigma.dtype).tiny).log()
        feature = None if self.tap is None else self.tap(x)
        if feature is not None and tuple(feature.shape) != (len(x), 1 + GEO):
            raise InputError(f"a feature is ({len(x)}, {1 + GEO}), log density first (got {tuple(feature.shape)})")
        return {"sigma": sigma, "log_sigma": self.density_law._limited(log_sigma), "feature": feature}


def as_field(source: Any, aabb: Box = UNIT_BOX) -> nn.Module:
    """A field of ours as it is (anything with ``density`` and ``aabb``), another callable as a :class:`ForeignField`.

    Raises:
        InputError: neither.
    """
    if (
        isinstance(source, nn.Module)
        and hasattr(source, "density")
        and isinstance(getattr(source, "aabb", None), Tensor)
    ):
        return source
    return ForeignField(source, aabb)
