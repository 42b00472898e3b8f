"""What the codes of a codebook stand for: how pure they are, and how features lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from limbeck.report.histograms import histogram_png
from limbeck.report.scatters import scatter_png


def purities(codes: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) for each item with a label of 0 or more, the share of its code's items that are of the code's most frequent label."""
    known = labels >= 0
    table = np.zeros((int(codes.max()) + 1, int(labels.max()) + 1))
    np.add.at(table, (codes[known], labels[known]), 1)
    found: NDArray[np.float64] = (table.max(1) / table.sum(1).clip(1))[codes[known]]
    return found


def code_pictures(
    codes: NDArray[np.int64],
    labels: NDArray[np.int64],
    features: Mapping[str, NDArray[np.float64]],
    names: Sequence[str],
) -> list[dict[str, str]]:
    """A histogram of purities, and the directions of features in the plane.

    Args:
        codes: (N,) the code of each item. labels: (N,) true classes, -1 where unknown.
        features: (N, D) by model, what is compared with the codes.
        names: of the classes.
    """
    known = np.flatnonzero(labels >= 0)
    largest = np.bincount(labels[known]).max() / len(known)
    shown = np.random.default_rng(0).permutation(known)
    panels = {
        who: z[shown] / np.linalg.norm(z[shown], axis=1, keepdims=True).clip(1e-12) for who, z in features.items()
    }
    return [
        {
            "title": "Purity of codes",
            "caption": f"For each item, the share of its code's items that are of the code's most frequent true class, which the method does not see; one code for all would give {largest:.2f}.",
            "png": histogram_png({"items": purities(codes, labels).tolist()}, "purity of the item's code"),
        },
        {
            "title": "Code space",
            "caption": "Directions of what is compared with the codes, in the principal plane of each model; by true classes.",
            "png": scatter_png(panels, labels[shown], names),
        },
    ]
