"""CutMix for images whose every pixel has a label: masks of several boxes, and pairs of unlabelled batches mixed by them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.losses.segmentation import IGNORED


def box_masks(
    count: int, height: int, width: int, *, boxes: int = 3, area: tuple[float, float] = (0.25, 0.5)
) -> Tensor:
    """Random masks: all ones, and flipped once for every box that a pixel lies in (exclusive or).

    Each box has the share p / ``boxes`` of the image's area with p uniform in ``area``, and a random aspect: before both sides
    shrink by sqrt(1 / ``boxes``), its height is the fraction exp(u ln p) of the image's, u uniform in [0, 1], and its width p
    divided by that. Boxes lie inside the image, at positions rounded to pixels. All draws come from torch's global random state
    on the CPU, which a run seeds and its checkpoints keep.

    Args:
        count: B, number of masks.
        height, width: pixels.
        boxes: in each mask.
        area: smallest and largest p, in (0, 1].

    Returns:
        (B, 1, height, width) bool; True outside the boxes, where they do not overlap.

    Raises:
        InputError: a number out of range.

    Source: "Semi-supervised semantic segmentation needs strong, varied perturbations" (2020), as used by cross pseudo
    supervision and multi-granularity distillation.
    """
    low, high = area
    if not 0 < low <= high <= 1:
        raise InputError(f"the boxes' area must be a range within (0, 1], not {area}")
    if boxes < 1 or min(count, height, width) < 1:
        raise InputError(
            f"masks need at least one of each: count {count}, height {height}, width {width}, boxes {boxes}"
        )
    share = low + (high - low) * torch.rand(count, boxes)
    tall = torch.exp(torch.rand(count, boxes) * share.log())
    sides = torch.stack([tall, share / tall], -1) * math.sqrt(1 / boxes)
    room = torch.tensor([height, width])
    size = (sides * room).round()
    start = ((room - size) * torch.rand(count, boxes, 2)).round()
    end = start + size

    def inside(length: int, axis: int) -> Tensor:
        places = torch.arange(length)
        return (places >= start[..., axis, None]) & (places < end[..., axis, None])

    covered = (inside(height, 0)[..., :, None] & inside(width, 1)[..., None, :]).sum(1, keepdim=True)
    return covered % 2 == 0


def mix(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """``first`` where the mask is False, ``second`` where it is True; (B, C, H, W) under a mask (B, 1, H, W)."""
    return torch.where(mask, second, first)


@dataclass(frozen=True)
class MixedPair:
    """Two unlabelled batches and the mask that joins them.

    Attributes:
        first, second: (B, channels, H, W) images.
        mask: (B, 1, H, W) bool; True takes the second.
        ignored: (B, H, W) bool, pixels of the mixed images that are padding; None where there are none.
    """

    first: Tensor
    second: Tensor
    mask: Tensor
    ignored: Tensor | None = None

    @classmethod
    def draw(
        cls, unlabelled: Any, *, boxes: int = 3, area: tuple[float, float] = (0.25, 0.5), mixed: bool = True
    ) -> Self:
        """From what comes along with a batch.

        Args:
            unlabelled: two batches of images (B, channels, H, W). One with padding is a mapping ``{"inputs": images, "valid":
                (B, H, W) bool}``, False at padded pixels.
            boxes, area: see :func:`box_masks`.
            mixed: False leaves the first batch as it is.

        Raises:
            InputError: not two batches of images of one shape, or a valid map that does not fit.
        """
        if not isinstance(unlabelled, tuple | list) or len(unlabelled) != 2:
            count = len(unlabelled) if isinstance(unlabelled, tuple | list) else 0
            raise InputError(
                f"this loss mixes two unlabelled batches and got {count}: "
                "give {'inputs': x, 'labels': y, 'unlabelled': (u0, u1)}"
            )
        (first, valid0), (second, valid1) = map(_images, unlabelled)
        if first.shape != second.shape:
            raise InputError(
                f"the two unlabelled batches have shapes {tuple(first.shape)} and {tuple(second.shape)}: "
                "they must be equal to be mixed"
            )
        b, _, h, w = first.shape
        if not b:
            raise InputError("the unlabelled batches are empty: give at least one image in each")
        mask = box_masks(b, h, w, boxes=boxes, area=area) if mixed else torch.zeros(b, 1, h, w, dtype=torch.bool)
        mask = mask.to(first.device)
        ignored = None
        if valid0 is not None or valid1 is not None:
            everywhere = torch.ones(b, h, w, dtype=torch.bool, device=first.device)
            valid = [everywhere if v is None else v.to(first.device).bool() for v in (valid0, valid1)]
            ignored = ~torch.where(mask[:, 0], valid[1], valid[0])
        return cls(first, second, mask, ignored)

    @property
    def images(self) -> Tensor:
        """(B, channels, H, W): the mixed images."""
        return mix(self.first, self.second, self.mask)

    @property
    def both(self) -> Tensor:
        """(2 B, channels, H, W): the clean images, first batch first."""
        return torch.cat([self.first, self.second])

    def pseudo_labels(self, logits: Tensor) -> Tensor:
        """Hard labels of the mixed images from a model's logits on the clean ones.

        Logits are mixed by the images' own mask, and the largest is taken afterwards.

        Args:
            logits: (2 B, C, H, W) for :attr:`both`.

        Returns:
            (B, H, W) int64 without a graph, -100 at padding.

        Raises:
            InputError: logits of another size than the images.
        """
        if logits.ndim != 4 or len(logits) != 2 * len(self.first) or logits.shape[2:] != self.first.shape[2:]:
            raise InputError(
                f"logits of shape {tuple(logits.shape)} for {2 * len(self.first)} images of "
                f"{'x'.join(map(str, self.first.shape[2:]))} pixels: resize the logits to the input's size"
            )
        first, second = logits.detach().chunk(2)
        labels = mix(first, second, self.mask).argmax(1)
        return labels if self.ignored is None else labels.masked_fill(self.ignored, IGNORED)


def _images(value: Any) -> tuple[Tensor, Tensor | None]:
    """Images and the map of their valid pixels."""
    valid = None
    if isinstance(value, Mapping):
        unknown = set(value) - {"inputs", "valid"}
        if unknown or "inputs" not in value:
            raise InputError(
                f"an unlabelled batch is images, or {{'inputs': images, 'valid': map}}; got the keys {', '.join(value)}"
            )
        value, valid = value["inputs"], value.get("valid")
    if not isinstance(value, Tensor) or value.ndim != 4:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"unlabelled images must have the shape (B, channels, height, width), not {what}")
    if valid is not None and valid.shape != (value.shape[0], *value.shape[2:]):
        raise InputError(
            f"the map of valid pixels has shape {tuple(valid.shape)}, and the images {tuple(value.shape)}: "
            "it must be (B, height, width)"
        )
    return value, valid
