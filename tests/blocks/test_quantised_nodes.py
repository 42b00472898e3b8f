"""Continuous node features as centroid numbers."""

from __future__ import annotations

import pytest
import torch

from limbeck.blocks.quantised_nodes import fit_centroids, quantise
from limbeck.core.errors import InputError
from limbeck.core.graphs import Graph, GraphData


def data(labels: bool = False) -> GraphData:
    generator = torch.Generator().manual_seed(0)
    made = []
    for y in range(4):
        group = torch.arange(6) % 3
        features = 10.0 * group[:, None] + torch.randn(6, 2, generator=generator) * 0.1
        made.append(Graph(torch.arange(6) % 2 if labels else None, [[0], [1]], y % 2, features=features))
    return GraphData.of(made)


def test_nodes_get_the_number_of_the_nearest_centroid():
    found = quantise(data(), fit_centroids(data(), 3))
    assert found.features is None and found.label_counts == (3,) and found.centroids.shape == (3, 2)
    numbers = found.node_labels[:, 0].view(4, 6)
    assert len(set(numbers[0, :3].tolist())) == 3
    assert torch.equal(numbers, numbers[:1, :3].repeat(4, 2))
    nearest = found.centroids[numbers.flatten()] - data().features
    assert nearest.abs().max() < 1
    assert torch.equal(found.subset(torch.tensor([1])).centroids, found.centroids)


def test_labels_that_say_something_are_kept_in_front():
    found = quantise(data(labels=True), torch.tensor([[0.0, 0], [10, 10], [20, 20], [99, 99]]))
    assert found.label_counts == (2, 4)
    assert found.node_labels[:6].tolist() == [[0, 0], [1, 1], [0, 2], [1, 0], [0, 1], [1, 2]]


def test_wrong_uses_are_refused():
    with pytest.raises(InputError, match="no continuous features"):
        fit_centroids(GraphData.of([Graph([0], [], 0)]), 2)
    with pytest.raises(InputError, match="from 2 to the 24 nodes"):
        fit_centroids(data(), 25)
    with pytest.raises(InputError, match="2 columns, the centroids 3"):
        quantise(data(), torch.zeros(2, 3))
