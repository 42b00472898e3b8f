"""How generated objects are judged: their views among each other, against true views, and against what the prior was made from."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.metrics.view_consistency import (
    azimuth_bins,
    gain,
    inception_scores,
    nearest_distance,
    nearest_entropy,
    pairwise_distance,
    particle_distance,
)
from limbeck.rendering.cameras import Cameras, RandomOrbit, orbit
from limbeck.rendering.renderers import Renderer
from limbeck.rendering.view_words import angles_of
from limbeck.tasks.base import Task
from limbeck.tasks.judging_fields import drawn
from limbeck.tasks.scenes import PosedImages
from limbeck.tasks.teachers import reference_teacher
from limbeck.tasks.view_priors import ViewPrior

BINS = 8
ELEVATION = 15.0
CLASSIFIER = "convnet-w8-d2"
NOISES = (0.0, 0.1, 0.3)
"""Of the pictures that the view classifier learns from: renders of a generated object are never exactly true views."""


def judging_cameras(around: RandomOrbit, count: int = 24) -> Cameras:
    """Cameras once around, 15 degrees above the horizon, at the distance and with the lens that are in the middle of an orbit's ranges.

    Raises:
        InputError: fewer than two.
    """
    if count < 2:
        raise InputError(f"an object is judged from 2 views or more (got {count})")
    low, high = around.elevation
    azimuth = torch.arange(count) * (360 / count)
    radius, fovy = sum(around.radius) / 2, sum(around.fovy) / 2
    level = min(max(ELEVATION, low), high)
    return orbit(azimuth, level, radius, fovy, around.width, around.height, around.near, around.far)


def view_classifier(references: PosedImages, *, seed: int = 0, progress: bool = True) -> nn.Module:
    """A small network that tells from which of 8 sides a picture (B, 3, S, S) in [-1, 1] was taken, from the cache where it is there."""
    clean, sides = _samples(references.images), azimuth_bins(angles_of(references.cameras)[0], BINS)
    generator = torch.Generator().manual_seed(seed)
    noisy = [clean + std * torch.randn(clean.shape, generator=generator) for std in NOISES]
    data = TensorData(torch.cat(noisy), sides.repeat(len(NOISES)))
    held = TensorData(clean, sides)
    names = [f"{360 * k // BINS} degrees" for k in range(BINS)]
    task = Task("views", data, held, held, BINS, tuple(clean.shape[1:]), names)
    return reference_teacher(task, CLASSIFIER, seed=seed, epochs=60, progress=progress)


def judge_generation(
    particles: Sequence[Renderer], prior: ViewPrior, count: int = 24, seed: int = 0, *, progress: bool = False
) -> dict[str, float]:
    """Measure one generated object, or several.

    Args:
        particles: what was generated; measures of one object are means over them, the gain is that of the mean entropies.
        prior: what it was distilled from; measures against true views need its ``references``, fidelity its ``support``.
        count: of views, evenly spaced once around.
        seed: of the view classifier.
        progress: show a bar while the view classifier trains.

    Returns:
        ``view_distance``, with references ``view_entropy`` ``inception_quality`` ``inception_variety`` ``inception_gain``, with support
        ``nearest_distance``, with several particles ``particle_distance``. Distances are between pictures in [-1, 1].

    Raises:
        InputError: nothing to judge, renders that are not finite.
    """
    if not particles:
        raise InputError("there is no generated object to judge")
    cameras = judging_cameras(prior.orbit, count)
    views = [_samples(drawn(renderer, cameras)) for renderer in particles]
    sides = None if prior.references is None else view_classifier(prior.references, seed=seed, progress=progress)
    rows = [_judged(seen, prior, sides) for seen in views]
    found = {name: fmean(row[name] for row in rows) for name in rows[0]}
    if sides is not None:
        found["inception_gain"] = gain(found["inception_variety"], found["inception_quality"])
    if len(views) > 1:
        found["particle_distance"] = particle_distance(torch.stack(views))
    return found


@torch.no_grad()
def _judged(views: Tensor, prior: ViewPrior, classifier: nn.Module | None) -> dict[str, float]:
    """The measures of one object's views (V, 3, S, S)."""
    found = {"view_distance": pairwise_distance(views)}
    if prior.references is not None and classifier is not None:
        sides = azimuth_bins(angles_of(prior.references.cameras)[0], BINS)
        found["view_entropy"] = nearest_entropy(views, _samples(prior.references.images), sides, BINS)
        found |= inception_scores(classifier(views).softmax(1))
    if prior.support is not None:
        found["nearest_distance"] = nearest_distance(views, 2 * prior.support.cpu() - 1)
    return found


def _samples(images: Tensor) -> Tensor:
    """Pictures (N, H, W, 3) in [0, 1] as samples (N, 3, H, W) in [-1, 1]."""
    return 2 * images.movedim(-1, 1).contiguous() - 1
