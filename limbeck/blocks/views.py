"""Views of images that can be differentiated and replayed: resized crop, horizontal flip, cyclic shift; and crop curricula.

A view is linear in the image and separable: with one matrix for the rows and one for the columns it is
``R @ image @ C.T``. Cropping, resizing, mirroring and rolling are all in the two matrices, so that a batch of views is two
batched matrix products, forwards and backwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.errors import InputError

TOP, LEFT, HEIGHT, WIDTH, FLIP, DOWN, RIGHT = range(7)
"""Columns of a view's parameters: the box in fractions of the image, 1 for mirrored, the shift in pixels."""
_ATTEMPTS = 10

Curriculum = Literal["step", "linear", "cosine", "reversed", "none", "whole"]


class RandomView:
    """RandomResizedCrop, then a horizontal flip, then a cyclic shift. Implements the protocol of augmentations.

    The crop is drawn as it is everywhere: an area share uniform in ``scale``, the logarithm of the aspect uniform in
    ``ratio``, up to ten attempts until the box fits, then a uniform position; if none fits, the whole image. The aspect is
    that of the box in fractions of the image, which for square images is the aspect in pixels. Boxes are not rounded to
    pixels (our decision: of an 8x8 image there would be a handful).

    Resizing is bilinear with the corners not aligned, and reads no pixel centre outside the box; on a box of whole pixels it
    is what cropping and ``torch.nn.functional.interpolate`` give.

    Args:
        scale: smallest and largest share of the area, in (0, 1].
        ratio: smallest and largest aspect (width over height), > 0.
        flip: probability of mirroring.
        jitter: largest cyclic shift, pixels; each axis is uniform in 0 … jitter.
        antialias: widen the filter where a crop is larger than the view. With views as large as the image no crop ever is,
            and both settings give the same.
        size: (height, width) of the views in pixels; None: that of the images.

    Raises:
        InputError: a number out of range.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.08, 1.0),
        *,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: int = 0,
        antialias: bool = True,
        size: tuple[int, int] | None = None,
    ) -> None:
        _check_scale(scale)
        if not 0 < ratio[0] <= ratio[1]:
            raise InputError(f"the aspect of crops must be a range above 0, not {ratio}")
        if not 0 <= flip <= 1:
            raise InputError(f"the probability of a flip must be in [0, 1] (got {flip})")
        if jitter < 0:
            raise InputError(f"jitter must be 0 or more pixels (got {jitter})")
        if size is not None and min(size) < 1:
            raise InputError(f"views need at least one pixel each way (got size {size})")
        self.scale, self.ratio, self.flip, self.jitter = scale, ratio, flip, jitter
        self.antialias, self.size = antialias, size

    def draw(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        shared: bool = False,
        scale: tuple[float, float] | None = None,
    ) -> Tensor:
        """(n, 7) float parameters of ``n`` views, on the CPU: box, flip, shift; see the constants of this module.

        Args:
            n: how many.
            generator: None: torch's global state.
            shared: one draw for all of them (what recovering does with a batch).
            scale: in place of the object's own.
        """
        low, high = self.scale if scale is None else _check_scale(scale)
        count = 1 if shared else n
        uniform = torch.rand(count, _ATTEMPTS, 2, generator=generator)
        place = torch.rand(count, 2, generator=generator)
        mirrored = torch.rand(count, generator=generator) < self.flip
        shift = torch.randint(0, self.jitter + 1, (count, 2), generator=generator)
        area = low + (high - low) * uniform[..., 0]
        from_log, to_log = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = torch.exp(from_log + (to_log - from_log) * uniform[..., 1])
        sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], -1)
        fits = (sides <= 1).all(-1)
        first = fits.float().argmax(1)
        side = torch.where(fits.any(1)[:, None], sides[torch.arange(count), first], torch.ones(()))
        rows = torch.cat([place * (1 - side), side, mirrored.float()[:, None], shift.float()], 1)
        return rows.expand(n, -1).contiguous() if shared else rows

    def apply(self, inputs: Tensor, parameters: Tensor) -> Tensor:
        """Images (B, C, H, W) in, views (B, C, height, width) out, differentiable in the images.

        Args:
            inputs: any floating-point values; nothing is padded, so their meaning does not matter.
            parameters: (B, 7), or (1, 7) for one view of the whole batch.

        Raises:
            InputError: not images, or parameters that do not fit them.
        """
        if inputs.ndim != 4:
            raise InputError(f"views need images of shape (B, channels, height, width), not {tuple(inputs.shape)}")
        if parameters.ndim != 2 or parameters.shape[1] != 7 or len(parameters) not in (1, len(inputs)):
            raise InputError(
                f"views of {len(inputs)} images need parameters of shape ({len(inputs)}, 7), not {tuple(parameters.shape)}"
            )
        height, width = inputs.shape[2:]
        tall, wide = self.size or (height, width)
        exact = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        given = parameters.to(inputs.device, exact)
        rows = _resampling(given[:, TOP], given[:, HEIGHT], height, tall, self.antialias)
        columns = _resampling(given[:, LEFT], given[:, WIDTH], width, wide, self.antialias)
        columns = torch.where(given[:, FLIP, None, None] > 0.5, columns.flip(1), columns)
        rows = _rolled(rows, given[:, DOWN]).to(inputs.dtype)
        columns = _rolled(columns, given[:, RIGHT]).to(inputs.dtype)
        return rows[:, None] @ inputs @ columns[:, None].transpose(2, 3)


@dataclass(frozen=True)
class CropCurriculum:
    r"""The smallest crop allowed at each iteration of an image optimisation: from the whole image to parts of it.

    With ``m = milestone * total`` and ``a`` the lowest bound, before m:

    - ``step``: 1, that is, whole images;
    - ``linear``: :math:`a + (1-a)(1 - it/m)`;
    - ``cosine``: :math:`a + (1-a)(1 + \cos(\pi\,it/m))/2`;

    and ``a`` from m on. ``none`` is ``a`` throughout (SRe2L), ``whole`` is 1 throughout, ``reversed`` is the cosine course
    backwards in time, from parts to the whole. The largest crop is always the whole image.

    Args:
        shape: one of these.
        lowest: a, in (0, 1].
        milestone: share of the iterations that the course takes, in (0, 1].

    Raises:
        InputError: a number out of range.

    Source: "Dataset Distillation via Curriculum Data Synthesis in Large Data Era" (2024).
    """

    shape: Curriculum = "cosine"
    lowest: float = 0.08
    milestone: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= 1:
            raise InputError(f"the lowest crop bound must be in (0, 1] (got {self.lowest})")
        if not 0 < self.milestone <= 1:
            raise InputError(f"the milestone must be in (0, 1] (got {self.milestone})")
        if self.shape not in ("step", "linear", "cosine", "reversed", "none", "whole"):
            raise InputError(f"unknown curriculum '{self.shape}'; choose step, linear, cosine, reversed, none or whole")

    def bound(self, iteration: int, total: int) -> float:
        """The lower bound of the crop's area share at ``iteration`` of ``total`` (from 0), in [lowest, 1].

        Raises:
            InputError: iterations that are not 0 … total.
        """
        if total < 1 or not 0 <= iteration <= total:
            raise InputError(f"iteration {iteration} is not one of 0 … {total}")
        if self.shape == "whole":
            return 1.0
        if self.shape == "reversed":
            iteration = total - iteration
        length = self.milestone * total
        if self.shape == "none" or iteration >= length:
            return self.lowest
        done = iteration / length
        course = {"step": 1.0, "linear": 1 - done}.get(self.shape, (1 + math.cos(math.pi * done)) / 2)
        return self.lowest + (1 - self.lowest) * course

    def scale(self, iteration: int, total: int) -> tuple[float, float]:
        """The range of area shares for :meth:`RandomView.draw`."""
        return self.bound(iteration, total), 1.0


def _check_scale(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise InputError(f"the area of crops must be a range within (0, 1], not {scale}")
    return scale


def _resampling(start: Tensor, extent: Tensor, length: int, out: int, antialias: bool) -> Tensor:
    """(B, out, length): how much each input pixel weighs in each output pixel, along one axis.

    Args:
        start, extent: (B,) the box along this axis, in fractions of ``length``.
    """
    low, size = (start * length)[:, None], (extent * length)[:, None]
    step = size / out
    centre = low - 0.5 + step * (torch.arange(out, device=start.device, dtype=start.dtype) + 0.5)
    pixels = torch.arange(length, device=start.device, dtype=start.dtype)
    support = step.clamp_min(1) if antialias else torch.ones_like(step)
    # Outside the outermost pixel centres of the box the nearest of them is repeated.
    centre = torch.minimum(torch.maximum(centre, low), torch.maximum(low, low + size - 1))
    weight = (1 - (centre[:, :, None] - pixels).abs() / support[:, :, None]).clamp_min(0)
    # A widened filter must not reach pixels that the crop has cut off; the tolerance is for rounded fractions.
    inside = (pixels > low - 1 + 1e-3) & (pixels < low + size - 1e-3)
    weight = weight * inside[:, None, :]
    return weight / weight.sum(2, keepdim=True)


def _rolled(matrix: Tensor, shift: Tensor) -> Tensor:
    """The rows (B, out, length) of a resampling moved on by ``shift`` (B,) places, around the end."""
    out = matrix.shape[1]
    places = (torch.arange(out, device=matrix.device) - shift.long()[:, None]) % out
    return matrix.gather(1, places[:, :, None].expand_as(matrix))
