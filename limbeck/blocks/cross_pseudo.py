"""Cross pseudo supervision: two networks that label unlabelled images for each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.blocks.cutmix_masks import MixedPair
from limbeck.core.batch import call_model, logits_of
from limbeck.losses.segmentation import pixel_cross_entropy


def cross_pseudo_terms(
    first: nn.Module, second: nn.Module, inputs: Tensor, labels: Tensor, pair: MixedPair
) -> tuple[Tensor, Tensor]:
    r"""The two halves of the loss for networks :math:`f_1, f_2`.

    .. math::
        L_{sup} &= \mathrm{CE}(f_1(x), y) + \mathrm{CE}(f_2(x), y) \\
        L_{cps} &= \mathrm{CE}(f_1(u), \hat y_2) + \mathrm{CE}(f_2(u), \hat y_1)

    where u are the mixed images and :math:`\hat y_k` the hard labels of network k's logits on the clean images, mixed alike and
    without gradient. All means go over pixels.

    Args:
        first, second: networks from images to logits at the images' size.
        inputs: (B, channels, H, W) labelled images x.
        labels: (B, H, W) int64 label maps y, -100 where a pixel does not count.
        pair: the unlabelled images.

    Returns:
        the supervised and the cross term, scalars.

    Source: "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision" (2021).
    """
    models = (first, second)
    with torch.no_grad():
        said = [pair.pseudo_labels(logits_of(call_model(m, pair.both))) for m in models]
    images = pair.images
    supervised = [pixel_cross_entropy(logits_of(call_model(m, inputs)), labels) for m in models]
    crossed = [
        pixel_cross_entropy(logits_of(call_model(m, images)), other)
        for m, other in zip(models, said[::-1], strict=True)
    ]
    return supervised[0] + supervised[1], crossed[0] + crossed[1]
