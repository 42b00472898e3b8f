"""Graph tasks: the TU text format line by line, splits, the generator and its skew."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.blocks.computation_trees import computation_trees, coverage
from limbeck.core.errors import InputError
from limbeck.core.graphs import GraphData
from limbeck.tasks.base import TaskConfig, load_task
from limbeck.tasks.graphs import molecules, read_tu

FILES = {
    "A": "1, 2\n2, 1\n4, 5\n5, 4\n2, 3\n3, 2",
    "graph_indicator": "1\n1\n1\n2\n2",
    "graph_labels": "-1\n1",
    "node_labels": "6\n8\n6\n7\n8",
    "edge_labels": "4\n4\n2\n2\n9\n9",
}


def folder(path: Path, **changes: str | None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for part, text in {**FILES, **changes}.items():
        if text is not None:
            (path / f"TOY_{part}.txt").write_text(text + "\n")
    return path


def test_the_text_format_line_by_line(tmp_path):
    data, classes = read_tu(folder(tmp_path / "raw").parent)
    assert classes == ["-1", "1"] and data.y.tolist() == [0, 1]
    assert data.node_labels[:, 0].tolist() == [0, 2, 0, 1, 2] and data.label_counts == (3,)
    assert data.node_ptr.tolist() == [0, 3, 5] and data.edge_ptr.tolist() == [0, 4, 6]
    assert data.graph(0).edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert data.graph(0).edge_labels.tolist() == [1, 1, 2, 2]  # file numbers 2, 4, 9 become 0, 1, 2
    assert data.graph(1).edge_index.tolist() == [[0, 1], [1, 0]] and data.graph(1).edge_labels.tolist() == [0, 0]


def test_graphs_may_lie_in_any_order(tmp_path):
    mixed = folder(
        tmp_path, A="1, 4\n4, 1\n2, 3\n3, 2", graph_indicator="2\n1\n1\n2", node_labels="0\n1\n2\n3", edge_labels=None
    )
    data, _ = read_tu(mixed)
    assert data.graph(0).node_labels[:, 0].tolist() == [1, 2] and data.graph(1).node_labels[:, 0].tolist() == [0, 3]
    assert data.graph(1).edge_index.tolist() == [[0, 1], [1, 0]] and data.edge_labels is None


def test_without_labels_a_node_is_labelled_by_its_degree(tmp_path):
    data, _ = read_tu(folder(tmp_path, node_labels=None))
    assert data.node_labels[:, 0].tolist() == [1, 2, 1, 1, 1]


def test_attributes_are_continuous_features(tmp_path):
    attributes = "1, 2.5\n1, 2\n0, 0\n0, 0\n3, 3"
    data, _ = read_tu(folder(tmp_path, node_labels=None, node_attributes=attributes))
    assert data.features.tolist()[0] == [1, 2.5] and data.node_labels.abs().max() == 0
    data, _ = read_tu(folder(tmp_path, node_attributes=attributes))
    assert data.features.tolist()[4] == [3, 3] and data.label_counts == (3,)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"A": "1, 2\n2, 9"}, "TOY_A.txt names node 9 in line 2, but TOY_graph_indicator.txt has 5 nodes"),
        ({"A": "1, 2\n3, 4"}, "joins nodes of two graphs in line 2"),
        ({"A": "1, x"}, "no number"),
        ({"A": "1\n2"}, "2 integers in every line"),
        ({"graph_indicator": "1\n1\n1\n2\n3"}, "goes from 1 to 3, but TOY_graph_labels.txt has 2 graphs"),
        ({"graph_indicator": "1\n1\n1\n1\n1"}, "graph 1 has no nodes"),
        ({"node_labels": "1\n2"}, "TOY_node_labels.txt has 2 lines, 5 are needed"),
        ({"graph_labels": "1.5\n2"}, "1 integer in every line"),
        ({"graph_labels": None}, "no file .*TOY_graph_labels.txt"),
    ],
)
def test_broken_files_are_named(tmp_path, changes, line):
    with pytest.raises(InputError, match=line):
        read_tu(folder(tmp_path, **changes))


def test_a_folder_of_ones_own_is_a_task(tmp_path):
    graphs = 30
    own = folder(
        tmp_path / "own",
        A="\n".join(f"{2 * g + 1}, {2 * g + 2}\n{2 * g + 2}, {2 * g + 1}" for g in range(graphs)),
        graph_indicator="\n".join(str(g // 2 + 1) for g in range(2 * graphs)),
        graph_labels="\n".join(str(g % 3) for g in range(graphs)),
        node_labels="\n".join(str(g % 4) for g in range(2 * graphs)),
        edge_labels="\n".join("1" for _ in range(2 * graphs)),
    )
    task = load_task(TaskConfig(task="graphs", data=str(own)))
    assert (len(task.train), len(task.val), len(task.test)) == (24, 3, 3)
    assert task.class_names == ["0", "1", "2"] and task.in_shape == (4,) and task.networks["student"] == "gin-w32-l2-e1"
    assert torch.bincount(task.train.labels_tensor()).tolist() == [8, 8, 8]
    for config, line in (
        (TaskConfig(task="graphs"), "needs a folder"),
        (TaskConfig(task="graphs", data=str(tmp_path / "empty")), "NAME_A.txt"),
        (TaskConfig(task="graphs", data=str(own), labelled=3), "keeps all its labels"),
        (TaskConfig(task="graphs", data=str(own), train_size=2), "do not show all 3 classes"),
    ):
        with pytest.raises(InputError, match=line):
            load_task(config)


def test_parts_are_disjoint_noisy_only_in_training_and_chosen_by_the_split_seed():
    task, other = (load_task(TaskConfig(task="molecules", split_seed=s)) for s in (0, 1))
    assert (len(task.train), len(task.val), len(task.test)) == (533, 67, 600)
    assert task.fingerprint == load_task(TaskConfig(task="molecules")).fingerprint != other.fingerprint
    noisy = load_task(TaskConfig(task="molecules", label_noise=0.25))
    assert int((noisy.train.labels_tensor() != task.train.labels_tensor()).sum()) == round(0.25 * 533)
    assert torch.equal(noisy.test.labels_tensor(), task.test.labels_tensor())


def test_missing_data_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    with pytest.raises(InputError, match="task 'mutag' needs its data"):
        load_task(TaskConfig(task="mutag"))
    with pytest.raises(InputError, match="no folder tu/NCI1"):
        load_task(TaskConfig(task="nci1", data_root=str(tmp_path)))


def motifs(data: GraphData, centre: int, leaves: list[int]) -> torch.Tensor:
    """(G,) whether a graph has a node of label ``centre`` whose neighbours of degree one have just the labels ``leaves``."""
    whole = data.whole()
    degree = torch.bincount(whole.edge_index[1], minlength=len(whole.node_labels))
    labels = whole.node_labels[:, 0]
    source, target = whole.edge_index
    counts = torch.zeros(len(labels), 4, dtype=torch.long)
    ends = degree[source] == 1
    counts.index_put_((target[ends], labels[source[ends]]), torch.tensor(1), accumulate=True)
    wanted = torch.bincount(torch.tensor(leaves, dtype=torch.long), minlength=4)
    here = (labels == centre) & (counts == wanted).all(1)
    return torch.zeros(len(data), dtype=torch.long).index_add_(0, whole.graph, here.long()) > 0


def test_molecules_carry_the_group_of_their_class_and_are_skewed():
    data = molecules(400, seed=3, noise=0.0)
    nitro, amide = motifs(data, 1, [2, 2]), motifs(data, 0, [1, 2])
    assert torch.equal(nitro, data.y == 1) and torch.equal(amide, data.y == 0)
    noisy = molecules(400, seed=3)
    assert int((noisy.y != data.y).sum()) == 40 and torch.equal(noisy.edge_index, data.edge_index)
    sizes = data.node_ptr.diff()
    assert sizes.min() >= 9 and sizes.max() <= 14 + 3 + 2 * 4
    whole = data.whole()
    both = torch.cat([whole.edge_index, whole.edge_index.flip(0)], 1)
    assert len(torch.unique(both, dim=1).T) == whole.edge_index.shape[1]  # every edge in both directions, once
    trees = computation_trees(whole.node_labels.numpy(), whole.edge_index.numpy(), 2)
    assert len(trees) < 250 and coverage(trees.of_node) > 0.6
    ring = motifs(data, 0, [])  # rings are there, and every molecule is connected
    assert bool(ring.all())
    reached = np.zeros(len(whole.node_labels), dtype=bool)
    reached[(whole.sizes.cumsum(0) - whole.sizes).numpy()] = True
    source, target = whole.edge_index.numpy()
    for _ in range(40):
        reached[target[reached[source]]] = True
    assert reached.all()


@pytest.mark.skipif("LIMBECK_DATA" not in os.environ, reason="needs the TU data sets under LIMBECK_DATA")
def test_the_tu_data_sets_have_their_published_sizes():
    root = Path(os.environ["LIMBECK_DATA"])
    for name, graphs, labels, nodes in (
        ("mutag", 188, 7, 3371),
        ("proteins", 1113, 3, 43471),
        ("nci1", 4110, 37, 122747),
    ):
        if not (root / "tu" / name.upper()).is_dir():
            continue
        data, classes = read_tu(root / "tu" / name.upper())
        assert (len(data), data.label_counts[0], len(data.node_labels), len(classes)) == (graphs, labels, nodes, 2)
        task = load_task(TaskConfig(task=name))
        assert len(task.train) + len(task.val) + len(task.test) == graphs
