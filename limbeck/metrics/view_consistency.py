"""How the views of a generated object relate: to each other, to true views, to what a prior was made from, and to those of other particles.

Distances are Euclidean over all numbers of a picture, in the units of the pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import InputError


def pairwise_distance(images: Tensor) -> float:
    """Mean distance between two different views: small where all views look alike.

    Args:
        images: (V, ...) with V >= 2.

    Raises:
        InputError: fewer than two views, NaN or infinity.
    """
    flat = _flat(images, "views", least=2)
    count = len(flat)
    return float(_distances(flat, flat).sum() / (count * (count - 1)))


def nearest_distance(images: Tensor, support: Tensor) -> float:
    """Mean distance of a view to its nearest picture of a set: small where views look like something that the set shows.

    Args:
        images: (V, ...). support: (N, ...) of the same size.

    Raises:
        InputError: no pictures, other sizes, NaN or infinity.
    """
    return float(_distances(_flat(images, "views"), _flat(support, "pictures to compare with")).amin(1).mean())


def nearest_entropy(images: Tensor, references: Tensor, labels: Tensor, bins: int) -> float:
    r"""Entropy of which true views the views resemble, in nats: :math:`-\sum_b h_b \ln h_b`, h the histogram of the nearest ones' labels.

    0 where every view resembles the same side (an object with that side all around), ln(bins) where all sides are seen equally often.

    Args:
        images: (V, ...). references: (N, ...) true views, and labels: (N,) their classes in 0 … bins - 1, such as
            :func:`azimuth_bins`.

    Raises:
        InputError: as :func:`nearest_distance`; labels that do not fit.
    """
    flat, others = _flat(images, "views"), _flat(references, "references")
    if labels.shape != (len(others),) or labels.is_floating_point():
        raise InputError(f"{len(others)} references need as many whole labels, not {tuple(labels.shape)}")
    if bins < 1 or int(labels.min()) < 0 or int(labels.max()) >= bins:
        raise InputError(f"labels of references lie in 0 … {bins - 1} (got {int(labels.min())} to {int(labels.max())})")
    nearest = labels.to(flat.device)[_distances(flat, others).argmin(1)]
    return float(entropy(torch.bincount(nearest, minlength=bins).double() / len(flat)))


def azimuth_bins(azimuth: Tensor, bins: int = 8) -> Tensor:
    """Equal sectors of azimuths in degrees, of their shape; the first one is centred on 0."""
    if bins < 1:
        raise InputError(f"azimuths are put into 1 bin or more (got {bins})")
    width = 360 / bins
    return ((azimuth + width / 2) % 360 / width).long().clamp(max=bins - 1)


def entropy(probabilities: Tensor) -> Tensor:
    """In nats, over the last axis; 0 ln 0 is 0."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def inception_scores(probabilities: Tensor) -> dict[str, float]:
    r"""Inception quality, variety and gain of a classifier's predictions for an object's views.

    .. math:: IQ = E_c H[p(y|x_c)], \qquad IV = H[E_c\,p(y|x_c)], \qquad IG = (IV - IQ)/IQ

    Low IQ: each view is of a definite class; high IV: different views are of different classes. IV >= IQ always. Where all predictions
    are certain the gain is infinite.

    Args:
        probabilities: (V, C), rows that sum to 1.

    Returns:
        ``inception_quality`` and ``inception_variety`` in [0, ln C], ``inception_gain``.

    Raises:
        InputError: rows that are no probabilities.

    Source: "Taming Mode Collapse in Score Distillation for Text-to-3D Generation" (2024).
    """
    p = probabilities.double()
    if p.ndim != 2 or not len(p) or float(p.min()) < 0 or float((p.sum(1) - 1).abs().max()) > 1e-3:
        raise InputError("inception scores need probabilities (V, C): not negative, each row with sum 1")
    quality, variety = float(entropy(p).mean()), float(entropy(p.mean(0)))
    return {"inception_quality": quality, "inception_variety": variety, "inception_gain": gain(variety, quality)}


def gain(variety: float, quality: float) -> float:
    """(IV - IQ)/IQ; 0 where both are 0."""
    if quality > 0:
        return (variety - quality) / quality
    return float("inf") if variety > 0 else 0.0


def particle_distance(images: Tensor) -> float:
    """Mean distance between two particles seen by the same camera, over cameras and pairs: small where all particles are the same object.

    Args:
        images: (n, V, ...) with n >= 2 particles.

    Raises:
        InputError: fewer than two particles, NaN or infinity.
    """
    if images.ndim < 3 or len(images) < 2 or images.shape[1] < 1:
        raise InputError(f"renders of 2 particles or more are (n, V, ...), not {tuple(images.shape)}")
    return sum(pairwise_distance(seen) for seen in images.movedim(1, 0)) / images.shape[1]


def _flat(images: Tensor, what: str, least: int = 1) -> Tensor:
    """(N, D) in double precision."""
    if images.ndim < 2 or len(images) < least:
        raise InputError(f"{least} {what} or more are needed, (N, ...), not {tuple(images.shape)}")
    flat = images.detach().reshape(len(images), -1).double()
    if not bool(torch.isfinite(flat).all()):
        raise InputError(f"the {what} hold NaN or infinity")
    return flat


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M), without the cancellation of the dot-product form."""
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"pictures of {a.shape[1]} and {b.shape[1]} numbers cannot be compared: render them in one size"
        )
    return torch.cdist(a, b.to(a.device), compute_mode="donot_use_mm_for_euclid_dist")
