"""Candidate decompositions into vectors, as a scikit-learn transformer that learns box and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.blocks.summand_images import Local, represent
from limbeck.core.errors import InputError

Floats = NDArray[np.float64]


class DecompositionTransformer(TransformerMixin, BaseEstimator):
    """Candidate decompositions -> images on a grid (:func:`~limbeck.blocks.summand_images.represent`), one for each degree.

    Args:
        degrees: of homology; each has an image of its own.
        local: phi: ``linear``, ``volume``, ``rectangle``, or a kernel of the distance.
        power: p of the weights w^p; infinity takes the largest summand. Without length in the box a summand weighs nothing for p > 0.
        bandwidth: delta, in units of the normalised box.
        resolution: pixels along each parameter.
        mean: divide by the sum of the weights.
        op: in the place of the sum: (summands, pixels) -> (pixels,).
        normalise: for each degree, put the box of the training set's corners to [0, 1]^n; without it bandwidth and grid are in the
            decompositions' own units.
        quantile: the share of training samples that may stick out of the box on each side.
        box: (2, n) fixed corners in the place of what ``fit`` would learn, the same for all degrees.
        flatten: rows of (degrees * resolution^n) numbers in the place of images.

    Attributes:
        boxes_: (degrees, 2, n), learnt from the training set alone.
        n_features_out_: columns of the flat result.
    """

    def __init__(
        self,
        degrees: Sequence[int] = (0, 1),
        *,
        local: Local = "linear",
        power: float = 1.0,
        bandwidth: float = 0.05,
        resolution: int = 20,
        mean: bool = False,
        op: Callable[[Tensor], Tensor] | None = None,
        normalise: bool = True,
        quantile: float = 0.0,
        box: Any = None,
        flatten: bool = True,
    ) -> None:
        self.degrees = degrees
        self.local = local
        self.power = power
        self.bandwidth = bandwidth
        self.resolution = resolution
        self.mean = mean
        self.op = op
        self.normalise = normalise
        self.quantile = quantile
        self.box = box
        self.flatten = flatten

    def fit(self, X: Sequence[IntervalSummands], y: Any = None) -> Self:
        """Learn where the corners lie."""
        if not len(X):
            raise InputError("there are 0 samples: give at least one")
        wrong = next((x for x in X if not isinstance(x, IntervalSummands)), None)
        if wrong is not None:
            raise InputError(f"a {type(wrong).__name__} is no decomposition: put a Decomposer before")
        if not 0 <= self.quantile < 0.5 or self.resolution < 2 or not len(self.degrees):
            raise InputError("quantile must be in [0, 0.5), resolution at least 2, and there must be a degree")
        n = X[0].parameters
        if self.box is None:
            boxes = [self._bounds([x.of_degree(d) for x in X], n) for d in self.degrees]
        else:
            boxes = [np.asarray(self.box, dtype=np.float64)] * len(self.degrees)
        self.boxes_ = np.stack(boxes)
        if self.boxes_.shape[1:] != (2, n) or not (self.boxes_[:, 1] > self.boxes_[:, 0]).all():
            raise InputError(f"the box must be two corners of {n} numbers, the lower one first")
        self.n_features_out_ = len(self.degrees) * self.resolution**n
        return self

    def _bounds(self, X: Sequence[IntervalSummands], n: int) -> Floats:
        ends = np.array([[side.numpy() for side in x.bounds()] for x in X])
        ends = ends[~np.isnan(ends).any((1, 2))]
        if not len(ends):  # nothing of this degree
            return np.array([np.zeros(n), np.ones(n)])
        low, high = np.quantile(ends[:, 0], self.quantile, axis=0), np.quantile(ends[:, 1], 1 - self.quantile, axis=0)
        return np.array([low, np.where(high > low, high, low + 1.0)])

    def transform(self, X: Sequence[IntervalSummands]) -> Floats:
        """(samples, degrees * resolution^n), or (samples, degrees, resolution, …) where not flat; float64."""
        check_is_fitted(self)
        images = np.stack(
            [
                np.stack([self._image(x.of_degree(d), b) for d, b in zip(self.degrees, self.boxes_, strict=True)])
                for x in X
            ]
        )
        return images.reshape(len(images), -1) if self.flatten else images

    def _image(self, summands: IntervalSummands, box: Floats) -> Floats:
        if summands.parameters != box.shape[1]:
            raise InputError(
                f"a decomposition has {summands.parameters} parameters, the training set had {box.shape[1]}"
            )
        if self.normalise:
            summands, box = (
                summands.rescaled((box[0], box[1])),
                np.array([np.zeros(box.shape[1]), np.ones(box.shape[1])]),
            )
        axes = [np.linspace(low, high, self.resolution) for low, high in box.T]
        found: Floats = represent(
            summands,
            axes,
            bandwidth=self.bandwidth,
            local=self.local,
            power=self.power,
            normalise=self.mean,
            op=self.op,
            box=(box[0], box[1]),
        ).numpy()
        return found
