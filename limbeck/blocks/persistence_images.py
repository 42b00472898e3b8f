r"""Barcodes and persistence images of one parameter: what multiparameter representations are compared with.

A bar (b, d) becomes a Gaussian of the bandwidth s at (b, d - b), weighted by a power of its length; the image is their sum on a
grid over the range of the training set's bars. The images equal those of ``gudhi.representations``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from limbeck.blocks.fibered_summands import Floats, barcodes
from limbeck.blocks.multifiltrations import Multifiltration
from limbeck.core.errors import InputError, UnknownNameError

Slice = int | Literal["diagonal"]
Bars = list[list[Floats]]
"""The bars (·, 2) of a sample by slice and degree."""


class Barcodes(TransformerMixin, BaseEstimator):
    """Filtrations -> barcodes of one-parameter filtrations that are cut out of them.

    Args:
        degrees: of homology.
        slices: which: k is parameter k alone (all others unlimited), ``diagonal`` appears where the last of all parameters allows it
            (with scale and a distance to the measure nearly the DTM filtration).

    Attributes:
        tops_: (slices,) where bars that never die are cut: the training set's largest value.
    """

    def __init__(self, degrees: Sequence[int] = (0, 1), *, slices: Sequence[Slice] = (0,)) -> None:
        self.degrees = degrees
        self.slices = slices

    def fit(self, X: Sequence[Multifiltration], y: Any = None) -> Self:
        """Learn where to cut endless bars."""
        if not len(X) or not len(self.slices) or not len(self.degrees):
            raise InputError("give at least one sample, slice and degree (there are 0)")
        self.tops_ = np.array([max(float(np.concatenate(cut(f, s)).max()) for f in X) for s in self.slices])
        return self

    def transform(self, X: Sequence[Multifiltration]) -> list[Bars]:
        """By sample, slice and degree the bars (·, 2)."""
        check_is_fitted(self)
        found = []
        for filtration in X:
            by_slice = []
            for s, top in zip(self.slices, self.tops_, strict=True):
                bars = barcodes(filtration, cut(filtration, s), tuple(self.degrees))
                by_slice.append([np.minimum(b, top)[b[:, 0] < np.minimum(b[:, 1], top)] for b in bars])
            found.append(by_slice)
        return found


class PersistenceImages(TransformerMixin, BaseEstimator):
    """Barcodes (:class:`Barcodes`) -> one persistence image for every slice and degree, side by side.

    Args:
        bandwidth: s, as a share of the bars' range.
        power: of the length in a bar's weight.
        resolution: pixels along each side.

    Attributes:
        ranges_: (slices, degrees, 4) of the training set's bars: least and largest birth, 0 and the largest length.
        n_features_out_: columns of the result.
    """

    def __init__(self, *, bandwidth: float = 0.05, power: float = 1.0, resolution: int = 20) -> None:
        self.bandwidth = bandwidth
        self.power = power
        self.resolution = resolution

    def fit(self, X: Sequence[Bars], y: Any = None) -> Self:
        """Learn the range of the bars."""
        if not len(X):
            raise InputError("there are 0 samples: give at least one")
        if not self.bandwidth > 0 or self.power < 0 or self.resolution < 2:
            raise InputError("bandwidth must be above 0, power at least 0 and resolution at least 2")
        self.ranges_ = np.array([[_range([b[s][d] for b in X]) for d in range(len(X[0][s]))] for s in range(len(X[0]))])
        self.n_features_out_ = self.ranges_.shape[0] * self.ranges_.shape[1] * self.resolution**2
        return self

    def transform(self, X: Sequence[Bars]) -> NDArray[np.float64]:
        """(samples, slices * degrees * resolution^2)."""
        check_is_fitted(self)
        places = np.ndindex(*self.ranges_.shape[:2])
        return np.concatenate([self._images([b[s][d] for b in X], self.ranges_[s, d]) for s, d in places], axis=1)

    def _images(self, bars: list[Floats], limits: Floats) -> NDArray[np.float64]:
        # in coordinates in which the range is a unit square, so that one bandwidth suits births and lengths
        low, scale = limits[[0, 2]], limits[[1, 3]] - limits[[0, 2]]
        pixels = np.linspace(0.0, 1.0, self.resolution)
        found = np.zeros((len(bars), self.resolution**2))
        for number, table in enumerate(bars):
            places = (np.column_stack([table[:, 0], table[:, 1] - table[:, 0]]) - low) / scale
            across, up = np.exp(-((places.T[:, :, None] - pixels) ** 2) / (2 * self.bandwidth**2))
            weighted = (places[:, 1].clip(0) ** self.power)[:, None] * up
            found[number] = (weighted.T @ across).ravel() / (2 * np.pi * self.bandwidth**2)
        return found


def cut(filtration: Multifiltration, which: Slice) -> list[Floats]:
    """Heights by dimension of one one-parameter filtration out of several parameters.

    Raises:
        UnknownNameError, InputError: no such slice or parameter.
    """
    if which == "diagonal":
        return [values.max(1) for values in filtration.values]
    if isinstance(which, str):
        raise UnknownNameError("slice", which, ("diagonal", *map(str, range(filtration.parameters))))
    if not 0 <= which < filtration.parameters:
        raise InputError(f"there is no parameter {which}: the filtration has {filtration.parameters}, from 0")
    return [values[:, which] for values in filtration.values]


def _range(bars: list[Floats]) -> list[float]:
    every = np.concatenate(bars)
    if not len(every):
        return [0.0, 1.0, 0.0, 1.0]
    births, lengths = every[:, 0], every[:, 1] - every[:, 0]
    low, high = float(births.min()), float(births.max())
    return [low, high if high > low else low + 1.0, 0.0, float(lengths.max()) or 1.0]
