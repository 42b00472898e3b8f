"""Mixing whole images, or boxes of them, together with their labels."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.blocks.mixing import CutMix
from limbeck.core.errors import InputError


def soft_labels(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """(B,) class indices or (B, C) soft labels as (B, C) smoothed distributions: (1 - s) · label + s / C."""
    whole = labels.float() if labels.ndim == 2 else torch.nn.functional.one_hot(labels, classes).float()
    return whole if smoothing == 0 else whole * (1 - smoothing) + smoothing / classes


def mix(
    images: Tensor, labels: Tensor, classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A batch by mixup or CutMix (each every second time where both are on), with the labels mixed in the same proportion.

    Args:
        images: (B, C, H, W).
        labels: (B,) class indices or (B, C) soft labels.
        classes: C.
        mixup, cutmix: alpha of the Beta distribution of the share; 0 turns the one off.
        smoothing: label smoothing, in [0, 1).

    Returns:
        images of the same shape, soft labels (B, C). All draws come from torch's global random state on the CPU.

    Source: "mixup: Beyond Empirical Risk Minimization" (2017), "CutMix" (2019).

    Raises:
        InputError: a negative alpha.
    """
    if mixup < 0 or cutmix < 0:
        raise InputError(f"alpha of mixup and CutMix must be 0 or above (got {mixup}, {cutmix})")
    target = soft_labels(labels, classes, smoothing)
    if not mixup and not cutmix:
        return images, target
    if cutmix and (not mixup or bool(torch.rand(()) < 0.5)):
        boxes = CutMix.draw(len(images), cutmix)
        share = 1 - boxes.mask(*images.shape[2:]).float().mean((1, 2)).to(images.device)
        return boxes(images), share[:, None] * target + (1 - share[:, None]) * target[boxes.partner.to(target.device)]
    share = torch.distributions.Beta(mixup, mixup).sample((len(images),)).to(images.device)
    partner = torch.randperm(len(images)).to(images.device)
    wide = share[:, None, None, None]
    mixed = wide * images + (1 - wide) * images[partner]
    return mixed, share[:, None] * target + (1 - share[:, None]) * target[partner]
