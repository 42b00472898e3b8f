r"""Unbounded scenes: all of space folded into a ball of radius 2, so that a field on a box can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.rendering.fields.base import VolumeField

FOLDED = ((-2.0, -2.0, -2.0), (2.0, 2.0, 2.0))
"""The box that holds all of contracted space."""


def contract(x: Tensor) -> Tensor:
    r"""Points (..., 3) of all of space into the ball of radius 2; the unit ball stays as it is.

    .. math:: \mathrm{contract}(x) = x \;\;(\|x\| \le 1), \qquad \Big(2 - \frac{1}{\|x\|}\Big)\frac{x}{\|x\|} \;\;(\|x\| > 1)

    Source: "Mip-NeRF 360: Unbounded Anti-Aliased Neural Radiance Fields", equation 10.
    """
    size = x.norm(dim=-1, keepdim=True).clamp_min(
        1
    )  # 1 within the ball: the factor below is 1 and has no gradient there
    return x * (2 - 1 / size) / size


def expand(y: Tensor) -> Tensor:
    """The inverse of :func:`contract` on the open ball of radius 2; points on its rim go as far as rounding lets them."""
    size = y.norm(dim=-1, keepdim=True)
    far = 1 / (2 - size).clamp_min(torch.finfo(y.dtype).eps)
    return torch.where(size > 1, y / size.clamp_min(1) * far, y)


class ContractedField(VolumeField):
    r"""A field of all of space: another field asked at contracted points.

    .. math:: F(x, d) = f\big(\mathrm{contract}((x - c)/r), d\big)

    The density stays one per unit of world length. Render it with ``spacing="disparity"`` and a far plane at the horizon. An occupancy grid
    belongs to contracted space: ``occupancy=lambda x: grid(field.contracted(x))`` with a grid over ``field.field.aabb``.

    Args:
        field: f; its box holds [-2, 2]^3. A mapping with ``family`` and ``config`` builds it.
        centre: c, (3,), world units. radius: r, of the ball that is not contracted.
        reach: half the side of the box around c in which the field is asked at all, in radii.

    Raises:
        InputError: an inner box that does not hold [-2, 2]^3; radius or reach that are not above 0 and 1.
    """

    family = "contracted"
    centre: Tensor

    def __init__(
        self,
        field: VolumeField | dict[str, Any],
        centre: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
        radius: float = 1.0,
        reach: float = 1000.0,
    ) -> None:
        if isinstance(field, dict):
            from limbeck.rendering.fields import build_field

            field = build_field(field["family"], field["config"])
        middle = torch.as_tensor(centre, dtype=torch.float32).detach().cpu()
        if middle.shape != (3,) or not (radius > 0 and reach > 1):
            raise InputError(
                f"a contraction has a centre (3,), a radius above 0 and a reach above 1 (got {middle.tolist()}, {radius} and {reach})"
            )
        low, high = field.aabb.cpu()
        if bool((low > -2).any()) or bool((high < 2).any()):
            raise InputError(
                f"a contracted field's inner box must hold [-2, 2]^3 (got {field.aabb.tolist()}): build it with aabb={FOLDED}"
            )
        half = radius * reach
        super().__init__(torch.stack([middle - half, middle + half]), field.density_law)
        self.field, self.radius, self.reach, self.feature_width = (
            field,
            float(radius),
            float(reach),
            field.feature_width,
        )
        self.register_buffer("centre", middle)

    def contracted(self, x: Tensor) -> Tensor:
        """World points (..., 3) in contracted space."""
        return contract((x - self.centre.to(x)) / self.radius)

    def encode(self, x: Tensor) -> Tensor:
        return self.field.encode(self.contracted(x))

    def geometry(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.field.geometry(h)

    def colour(self, h: Tensor, geo: Tensor | None, d: Tensor) -> Tensor:
        return self.field.colour(h, geo, d)

    def encoding_parameters(self) -> list[torch.nn.Parameter]:
        return self.field.encoding_parameters()

    def param_groups(self, lr: float, decoder_lr: float | None = None) -> list[dict[str, Any]]:
        return self.field.param_groups(lr, decoder_lr)

    def config(self) -> dict[str, Any]:
        inner = {"family": self.field.family, "config": self.field.config()}
        return {"field": inner, "centre": self.centre.tolist(), "radius": self.radius, "reach": self.reach}
