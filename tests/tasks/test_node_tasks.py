from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.hypergraphs import Hypergraph
from limbeck.core.node_graphs import NodeGraph
from limbeck.tasks.node_classification import NodeSetup, NodeTask, hide, load_nodes, random_split
from limbeck.tasks.node_generators import hypergraph_sbm, sbm
from limbeck.tasks.node_loaders import row_shares

torch.set_num_threads(1)


def own(**changed: object) -> NodeTask:
    graph = NodeGraph.of(torch.randn(6, 2), torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]))
    parts = {"train": [0, 1], "val": [2], "test": [3, 4, 5], "hidden": [4], **changed}
    return NodeTask.of(graph, graph.features, torch.tensor([0, 1, 0, 1, 0, 1]), **parts)


def test_splits_are_disjoint_complete_and_stratified() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20 + [-1] * 5)
    split = random_split(labels, 6, 32, seed=3)
    together = torch.cat(list(split.values())).sort().values
    assert torch.equal(together, torch.arange(100))
    assert torch.bincount(labels[split["train"]]).tolist() == [6, 6, 6]
    left = torch.tensor([44, 24, 14]) * 32 / 82
    assert bool(((torch.bincount(labels[split["val"]]) - left).abs() <= 1).all())
    again, other = random_split(labels, 6, 32, seed=3), random_split(labels, 6, 32, seed=4)
    assert torch.equal(split["train"], again["train"]) and not torch.equal(split["train"], other["train"])
    with pytest.raises(InputError, match="class 2 has 20 nodes"):
        random_split(labels, 20, 1, seed=0)
    with pytest.raises(InputError, match="82 validation nodes leave none"):
        random_split(labels, 6, 82, seed=0)


def test_some_test_nodes_are_hidden_but_never_all() -> None:
    test = torch.arange(10, 20)
    hidden = hide(test, 0.3, seed=0)
    assert len(hidden) == 3 and bool(torch.isin(hidden, test).all())
    assert len(hide(test, 0.99, seed=0)) == 9 and len(hide(test, 0.001, seed=0)) == 1


def test_what_is_watched_lacks_the_hidden_nodes_and_their_edges() -> None:
    task = own()
    watched = task.observed()
    assert watched.kept is not None and watched.kept.tolist() == [0, 1, 2, 3, 5]
    assert torch.equal(watched.features, task.features[watched.kept])
    assert watched.train.tolist() == [0, 1] and watched.test.tolist() == [3, 4] and not len(watched.hidden)
    ends = watched.kept[watched.graph.edge_index]
    assert sorted(map(tuple, ends.T.tolist())) == [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]
    assert task.observed() is watched
    assert own(hidden=None).observed().num_nodes == 6


def test_masks_are_node_numbers() -> None:
    mask = torch.zeros(6, dtype=torch.bool)
    mask[[0, 1]] = True
    assert own(train=mask).train.tolist() == [0, 1]
    with pytest.raises(InputError, match="a mask of 6 nodes"):
        own(train=mask[:3])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"val": [1]}, "two of train, val and test"),
        ({"test": [9]}, "numbers of nodes, 0 to 5"),
        ({"hidden": [0]}, "hidden nodes must be test nodes"),
        ({"train": []}, "training and validation nodes"),
        ({"num_classes": 1}, "no label of 1 classes|two or more"),
    ],
)
def test_wrong_parts_are_named(changed: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        own(**changed)
    assert "\n" not in str(caught.value)


def test_nodes_without_a_label_or_with_nan_are_named() -> None:
    graph = NodeGraph.of(torch.randn(4, 2), torch.tensor([[0], [1]]))
    with pytest.raises(InputError, match="node 1 is in a part but has no label"):
        NodeTask.of(graph, graph.features, [0, -1, 1, 0], train=[0, 1], val=[2])
    x = graph.features.clone()
    x[2] = torch.nan
    with pytest.raises(InputError, match="node 2 has NaN"):
        NodeTask.of(graph, x, [0, 1, 1, 0], train=[0, 1], val=[2])
    with pytest.raises(InputError, match="as many"):
        NodeTask.of([[0, 1], [2]], graph.features[:3], [0, 1], train=[0], val=[1])


def test_each_structure_can_be_seen_as_the_other() -> None:
    task = NodeTask.of([[0, 1, 2], [2, 3]], torch.randn(5, 2), [0, 1, 0, 1, 0], train=[0, 1], val=[2])
    assert isinstance(task.structure, Hypergraph)
    assert int(task.hypergraph.degrees.min()) == 1  # vertex 4 stands alone
    assert task.graph.num_edges == 8
    assert own().hypergraph.num_edges == 5 + 6
    assert task.describe()["hyperedges"] == 2 and own().describe()["edges"] == 10
    assert task.fingerprint != own().fingerprint


def test_parts_are_data() -> None:
    parts = own().parts()
    batch = parts.test.fetch(torch.tensor([0, 2]), None)
    assert batch.index is not None and batch.index.tolist() == [3, 5]
    assert torch.equal(parts.train.labels_tensor(), torch.tensor([0, 1])) and len(parts.val) == 1


def test_the_block_model_has_the_edges_it_should() -> None:
    graph, community = sbm(seed=1)
    assert graph.labels is not None and torch.equal(graph.labels, community // 5)
    u, v = graph.edge_index
    pairs = graph.edge_index.shape[1] / 2
    inside = float((community[u] == community[v]).sum()) / 2
    same = float((graph.labels[u] == graph.labels[v]).sum()) / 2 - inside
    expected = {"inside": 20 * 80 * 79 / 2 * 0.03, "same": 4 * 10 * 80 * 80 * 0.006, "other": 6 * 400 * 400 * 0.001}
    for found, name in ((inside, "inside"), (same, "same"), (pairs - inside - same, "other")):
        assert abs(found - expected[name]) < 5 * expected[name] ** 0.5, name
    assert torch.equal(sbm(seed=1)[0].edge_index, graph.edge_index)
    larger, _ = sbm(8000, seed=1)
    assert abs(larger.num_edges / 8000 - graph.num_edges / 1600) < 0.3  # degrees do not depend on N
    with pytest.raises(InputError, match="20 communities need 40 nodes"):
        sbm(30)


def test_the_hypergraph_model_prefers_classes() -> None:
    graph, x, labels = hypergraph_sbm(seed=2)
    assert graph.num_edges == 700 and x.shape == (1000, 50)
    assert torch.bincount(labels).tolist() == [200] * 5
    assert int(graph.sizes.min()) == 3 and int(graph.sizes.max()) == 7
    counts = torch.zeros(700, 5).index_put_((graph.edge_of, labels[graph.members]), torch.tensor(1.0), accumulate=True)
    share = float((counts.max(1).values / graph.sizes).mean())
    assert 0.85 < share < 0.92  # 0.85 + 0.15 / 5, and a little for the majority
    with pytest.raises(InputError, match="need 40 vertices"):
        hypergraph_sbm(30)


def test_generated_tasks_are_loaded_by_name() -> None:
    task = load_nodes(NodeSetup.make(task="sbm", setting="inductive"))
    assert len(task.train) == 80 and len(task.hidden) == round(0.2 * len(task.test))
    small = load_nodes(NodeSetup.make(task="hypergraph-sbm", generated_nodes=300, labels_per_class=5, val_size=20))
    assert small.num_nodes == 300 and len(small.train) == 25
    with pytest.raises(UnknownNameError, match="unknown task 'corra'; did you mean cora"):
        load_nodes(NodeSetup.make(task="corra"))
    with pytest.raises(InputError, match="published with no split"):
        load_nodes(NodeSetup.make(task="sbm", public_split=True))


def test_data_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    with pytest.raises(InputError, match="--data-root or LIMBECK_DATA"):
        load_nodes(NodeSetup.make(task="cora"))
    with pytest.raises(InputError, match="no folder planetoid/Cora"):
        load_nodes(NodeSetup.make(task="cora", data_root=str(tmp_path)))
    with pytest.raises(InputError, match="no file .*cocitation-cora"):
        load_nodes(NodeSetup.make(task="cocitation-cora", data_root=str(tmp_path)))


def test_ones_own_file_is_read(tmp_path: Path) -> None:
    labels = np.arange(30) % 2
    x = np.random.default_rng(0).random((30, 3)).astype(np.float32)
    np.savez(tmp_path / "mine.npz", x=x, labels=labels, edge_ptr=[0, 3, 5], edge_nodes=[0, 1, 2, 4, 9])
    asked = NodeSetup.make(data=str(tmp_path / "mine.npz"), labels_per_class=3, val_size=5)
    task = load_nodes(asked)
    assert task.name == "mine" and task.structure.num_edges == 2 and len(task.test) == 30 - 6 - 5
    np.savez(tmp_path / "mine.npz", x=x, labels=labels, edge_index=[[0, 1], [1, 2]])
    assert load_nodes(asked).graph.num_edges == 4
    np.savez(tmp_path / "mine.npz", x=x, labels=labels)
    with pytest.raises(InputError, match="no array 'edge_ptr'; it holds labels, x"):
        load_nodes(asked)
    np.savez(tmp_path / "mine.npz", x=np.array([{}], dtype=object), labels=labels)
    with pytest.raises(InputError, match="plain arrays"):
        load_nodes(asked)


def test_counts_become_shares_and_other_features_stay() -> None:
    x = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert row_shares(x).tolist() == [[0.25, 0.75], [0, 0]]
    assert row_shares(-x).tolist() == (-x).tolist()
