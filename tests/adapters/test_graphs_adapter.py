"""torch_geometric's graphs: every way in which they keep labels, and what is refused. Stand-ins have the same attributes."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from limbeck.adapters.graphs import as_graphs, from_pyg, mixed_radix, to_pyg
from limbeck.core.errors import InputError, MissingDependencyError
from limbeck.core.graphs import Graph, GraphData

EDGES = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])


def pyg(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"edge_index": EDGES, "y": torch.tensor([1]), "num_nodes": 3, **fields})


def test_integer_columns_are_labels():
    data = from_pyg([pyg(x=torch.tensor([[5, 0], [1, 1], [0, 2]])), pyg(x=torch.zeros(3, 2, dtype=torch.long), y=0)])
    assert data.node_labels.tolist()[:3] == [[5, 0], [1, 1], [0, 2]] and data.label_counts == (6, 3)
    assert data.y.tolist() == [1, 0] and data.edge_labels is None and data.features is None


def test_rows_with_a_single_one_are_labels_and_other_floats_features():
    eye = torch.eye(4)
    data = from_pyg([pyg(x=eye[[0, 3, 3]], edge_attr=torch.eye(2)[[0, 0, 1, 1]])])
    assert data.node_labels[:, 0].tolist() == [0, 3, 3] and data.edge_labels.tolist() == [0, 0, 1, 1]
    data = from_pyg([pyg(x=torch.rand(3, 2))])
    assert data.features.shape == (3, 2) and data.label_counts == (1,)


def test_without_x_the_label_is_the_degree():
    assert from_pyg([pyg()]).node_labels[:, 0].tolist() == [1, 2, 1]


def test_edge_tuples_become_one_number_and_stay_apart():
    columns = torch.tensor([[0, 1, 0], [2, 0, 1], [0, 1, 0], [4, 0, 0]])
    data = from_pyg([pyg(edge_attr=columns)], edge_columns=(5, 6, 2))
    assert data.edge_labels.tolist() == [2, 2 * 12 + 1, 2, 4 * 12]
    every = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(2))
    assert sorted(mixed_radix(every).tolist()) == list(range(24))
    with pytest.raises(InputError, match="do not fit edge_columns"):
        mixed_radix(every, (3, 2, 2))


@pytest.mark.parametrize(
    ("graphs", "line"),
    [
        ([], "empty"),
        ([pyg(y=None)], "graph 0 has y = None"),
        ([pyg(y=torch.tensor([0.5]))], "a class is one integer"),
        ([pyg(y=torch.tensor([0, 1]))], "a class is one integer"),
        ([pyg(edge_attr=torch.rand(4, 2))], "edge labels must be discrete"),
        ([pyg(x=torch.eye(3)), pyg()], "graph 1 has no x"),
        ([SimpleNamespace(edge_index=EDGES, y=0, num_nodes=None)], "number of its nodes is unknown"),
    ],
)
def test_what_cannot_be_read_is_refused(graphs, line):
    with pytest.raises(InputError, match=line):
        from_pyg(graphs)


def test_what_counts_as_a_data_set_of_graphs():
    data = GraphData.of([Graph([0, 1], [[0], [1]], 0)])
    assert as_graphs(data) is data
    assert len(as_graphs([Graph([0, 1], [[0], [1]], 0)] * 3)) == 3
    assert len(as_graphs([pyg(), pyg()])) == 2
    for wrong in ((torch.rand(3, 2), torch.zeros(3)), "graphs", 3):
        with pytest.raises(InputError, match="a data set of graphs is"):
            as_graphs(wrong)


def test_there_and_back():
    data = GraphData.of([Graph([[0, 2], [1, 0]], [[0, 1], [1, 0]], 1, [1, 1], root_mask=[True, False])])
    if importlib.util.find_spec("torch_geometric") is None:
        with pytest.raises(MissingDependencyError, match="torch_geometric"):
            to_pyg(data)
        return
    again = from_pyg(to_pyg(data))
    assert again.fingerprint() == data.fingerprint()
