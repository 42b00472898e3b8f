r"""A distance of images in the features of a network: what counts is what the network's layers see, not pixels.

It has the form of LPIPS, but neither its networks nor its learned weights: the numbers are those of whatever network the features come from,
and can be compared within that network only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.losses.features import channel_axis, full_precision, unit_vectors

Layers = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def feature_distance(a: Layers, b: Layers, weights: Sequence[float] | None = None) -> Tensor:
    r"""Distance of each pair of images in the features of several layers, (B,).

    .. math:: d = \sum_l w_l\,\mathrm{mean}_{positions}\, \Big\lVert \frac{a_l}{\lVert a_l\rVert} - \frac{b_l}{\lVert b_l\rVert} \Big\rVert_2^2

    with norms along the channels (:func:`limbeck.losses.features.channel_axis`). Each layer adds between 0 and 4. A position whose features
    are all 0 is left at 0.

    Args:
        a, b: features of the first and of the second images, by layer: (B, C), (B, N, D) or (B, C, H, W) each. Gradients flow into both.
        weights: of the layers, in their order; None: 1.

    Raises:
        InputError: different layers or shapes, another number of weights.

    Source of the form: "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018).
    """
    first, second = _listed(a), _listed(b)
    if isinstance(a, Mapping) and isinstance(b, Mapping) and list(a) != list(b):
        raise InputError(f"both images need features of the same layers (got {', '.join(a)} and {', '.join(b)})")
    if not first or [x.shape for x in first] != [x.shape for x in second]:
        raise InputError(
            "both images need features of the same shapes, of one layer at least "
            f"(got {[tuple(x.shape) for x in first]} and {[tuple(x.shape) for x in second]})"
        )
    scales = [1.0] * len(first) if weights is None else list(weights)
    if len(scales) != len(first):
        raise InputError(f"{len(first)} layers but {len(scales)} weights: they must be as many")
    parts = []
    for x, y, scale in zip(first, second, scales, strict=True):
        axis = channel_axis(x)
        gap = unit_vectors(full_precision(x), axis) - unit_vectors(full_precision(y), axis)
        parts.append(
            scale * gap.square().sum(axis).flatten(1).mean(1) if x.ndim > 2 else scale * gap.square().sum(axis)
        )
    return torch.stack(parts).sum(0)


class FeatureDistance(nn.Module):
    """:func:`feature_distance` of images, in a frozen network's features; mean over the batch.

    The network's parameters get no gradient, nor do the second images (the wanted ones); the first ones do if they ask for it. The network
    is put into evaluation mode and stays there.

    Args:
        network: whose features are compared; its parameters are frozen.
        features: image batch (B, ...) -> features by layer. None: the network itself gives them (a tensor, a list or a mapping). With
            :class:`limbeck.blocks.taps.Taps` any layers of any classifier can be read.
        name: which features these are, e.g. ``"digits classifier, conv2 and conv4"``; no default, because the number means nothing without.
        weights: of the layers.
    """

    def __init__(
        self,
        network: nn.Module,
        features: Callable[[Tensor], Layers] | None = None,
        *,
        name: str,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self._read = features
        self._weights = None if weights is None else tuple(weights)

    def forward(self, images: Tensor, wanted: Tensor) -> Tensor:
        """Mean distance of images (B, ...) to the wanted ones, a scalar."""
        read = self.network if self._read is None else self._read
        with torch.no_grad():
            target = read(wanted)
        return feature_distance(read(images), target, self._weights).mean()

    def train(self, mode: bool = True) -> FeatureDistance:
        """Stays in evaluation mode."""
        return super().train(False)

    def extra_repr(self) -> str:
        return self.name


def _listed(features: Layers) -> list[Tensor]:
    if isinstance(features, Tensor):
        return [features]
    return list(features.values()) if isinstance(features, Mapping) else list(features)
