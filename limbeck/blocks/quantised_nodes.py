"""Continuous node features as discrete labels: each node gets the number of its nearest k-means centroid.

An extension for methods that need discrete labels (frequent trees, say); no part of the published ones. The centroids are
fitted on training graphs and must be kept with whatever is made from the labels: they say what a number means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.graphs import GraphData

_CHUNK = 1 << 16  # nodes whose distances are held at once


def fit_centroids(data: GraphData, clusters: int, *, seed: int = 0) -> Tensor:
    """(K, D) float32 k-means centroids of the nodes' features.

    Args:
        data: training graphs with ``features``.
        clusters: K, at least 2 and at most the number of nodes.
        seed: of the initial centroids.

    Raises:
        InputError: no features, or a wrong number of clusters.
    """
    from sklearn.cluster import KMeans

    features = _features(data)
    if not 2 <= clusters <= len(features):
        raise InputError(f"the number of clusters must be from 2 to the {len(features)} nodes (got {clusters})")
    found = KMeans(clusters, n_init=1, random_state=seed % 2**32).fit(features.numpy())
    return torch.from_numpy(found.cluster_centers_).float()


def quantise(data: GraphData, centroids: Tensor) -> GraphData:
    """The graphs with a further label column, the nearest centroid's number, instead of their features.

    A label column that is the same for all nodes of ``data`` and has one value only is dropped first.

    Raises:
        InputError: no features, or features of another width than the centroids.
    """
    features = _features(data)
    if features.shape[1] != centroids.shape[1]:
        raise InputError(f"features have {features.shape[1]} columns, the centroids {centroids.shape[1]}")
    nearest = torch.cat([torch.cdist(part, centroids).argmin(1) for part in features.split(_CHUNK)])
    kept = [c for c, count in enumerate(data.label_counts) if count > 1]
    labels = torch.cat([data.node_labels[:, kept], nearest[:, None]], 1)
    counts = (*(data.label_counts[c] for c in kept), len(centroids))
    return data.with_columns(labels, counts, features=None, centroids=centroids)


def _features(data: GraphData) -> Tensor:
    if data.features is None:
        raise InputError("these graphs have no continuous features: there is nothing to quantise")
    return data.features
