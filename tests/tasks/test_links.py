from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch
from scipy.io import savemat
from scipy.sparse import coo_matrix

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.metrics.concentration import concentration_shift, topological_concentration
from limbeck.tasks.link_generators import closure_communities, growing
from limbeck.tasks.links import LinkSetup, LinkTask, load_links, split_links


def test_a_split_holds_every_link_once_and_does_not_depend_on_their_order() -> None:
    edges = torch.tensor(list(nx.gnm_random_graph(30, 100, seed=0).edges)).T
    messy = torch.cat([edges, edges.flip(0), torch.tensor([[3], [3]])], 1)
    parts = split_links(messy, 30, seed=1)
    assert [p.shape[1] for p in parts] == [70, 10, 20]
    keys = torch.cat([p.amin(0) * 30 + p.amax(0) for p in parts])
    assert torch.equal(keys.sort().values, (edges.amin(0) * 30 + edges.amax(0)).sort().values)
    again = split_links(edges[:, torch.randperm(100)], 30, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0], split_links(edges, 30, seed=2)[0])


def test_a_split_by_time_trains_on_the_earliest() -> None:
    edges = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 1], [1, 2, 3, 4, 5, 2, 3, 4, 5, 0]])
    times = torch.tensor([9, 8, 7, 6, 5, 4, 3, 2, 1, 0])  # the last repeats the first, earlier
    train, val, test = split_links(edges, 6, split="time", times=times, val_share=0.2, test_share=0.2)
    assert train.T.tolist() == [[0, 1], [3, 5], [2, 4], [1, 3], [0, 2]]
    assert val.T.tolist() == [[4, 5], [3, 4]] and test.T.tolist() == [[2, 3], [1, 2]]
    listed = split_links(edges, 6, split="time", val_share=0.2, test_share=0.2)[0]
    assert listed.T.tolist() == edges[:, :5].T.tolist()


def test_the_graph_of_a_task_holds_training_links_only() -> None:
    task = load_links(LinkSetup.make(task="growing", generated_nodes=100))
    assert task.graph.num_edges == 2 * task.train.shape[1] and task.features is None
    parts = task.parts()
    batch = parts.test.fetch(torch.tensor([2, 0]), None)
    assert torch.equal(batch.inputs, task.test[:, [2, 0]].T)
    assert parts.describe()["test"] == len(parts.test) and parts.class_names is None


def test_other_libraries_splits() -> None:
    edges = torch.tensor(list(nx.gnm_random_graph(20, 60, seed=0).edges))
    data = SimpleNamespace(x=torch.ones(20, 3), edge_index=torch.cat([edges, edges.flip(1)]).T, num_nodes=20)
    task = LinkTask.from_pyg(data, name="mine")
    assert (task.num_nodes, task.train.shape[1], task.name) == (20, 42, "mine")
    parts = {"train": edges[:40], "valid": edges[38:50], "test": edges[50:]}  # two links repeat
    task = LinkTask.from_ogb({k: {"edge": v} for k, v in parts.items()}, 20)
    assert [p.shape[1] for p in (task.train, task.val, task.test)] == [40, 10, 10]
    with pytest.raises(InputError, match="no part 'valid'"):
        LinkTask.from_ogb({"train": {"edge": edges}}, 20)


def test_files_are_read(tmp_path: Path) -> None:
    edges = np.array(list(nx.gnm_random_graph(20, 60, seed=0).edges)).T
    net = coo_matrix((np.ones(60), edges), shape=(22, 22))
    (tmp_path / "links").mkdir()
    savemat(tmp_path / "links" / "USAir.mat", {"net": (net + net.T).tocsc()})
    task = load_links(LinkSetup.make(task="usair", data_root=str(tmp_path)))
    assert (task.num_nodes, task.train.shape[1]) == (22, 42)
    np.savez(tmp_path / "a.npz", edge_index=edges, x=np.ones((20, 2)), times=np.arange(60)[::-1].copy())
    task = load_links(LinkSetup.make(data=str(tmp_path / "a.npz"), split="time"))
    assert task.test[:, -1].tolist() == sorted(edges[:, 0].tolist()) and task.features is not None
    sides = (np.arange(20) > 9).astype(np.int8)
    across = edges[:, sides[edges[0]] != sides[edges[1]]]
    np.savez(tmp_path / "b.npz", edge_index=across, sides=sides)
    task = load_links(LinkSetup.make(data=str(tmp_path / "b.npz")))
    assert task.sides is not None and task.sides.tolist() == sides.tolist() and task.num_nodes == 20
    (tmp_path / "a.txt").write_text("# a comment\n" + "\n".join(f"{u} {v} 0.5" for u, v in edges.T))
    assert load_links(LinkSetup.make(data=str(tmp_path / "a.txt"))).train.shape[1] == 42


def test_wrong_files_and_names_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    with pytest.raises(UnknownNameError, match="did you mean yeast"):
        load_links(LinkSetup.make(task="yeats"))
    with pytest.raises(InputError, match="needs its data"):
        load_links(LinkSetup.make(task="yeast"))
    with pytest.raises(InputError, match="no file"):
        load_links(LinkSetup.make(task="yeast", data_root=str(tmp_path)))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "Yeast.mat").write_bytes(b"no matlab")
    with pytest.raises(InputError, match="no MATLAB file"):
        load_links(LinkSetup.make(task="yeast", data_root=str(tmp_path)))
    savemat(tmp_path / "links" / "Yeast.mat", {"other": np.ones(2)})
    with pytest.raises(InputError, match="no matrix 'net'"):
        load_links(LinkSetup.make(task="yeast", data_root=str(tmp_path)))
    (tmp_path / "b.txt").write_text("one two\n")
    with pytest.raises(InputError, match="two node numbers in each line"):
        load_links(LinkSetup.make(data=str(tmp_path / "b.txt")))
    np.savez(tmp_path / "c.npz", x=np.ones(3))
    with pytest.raises(InputError, match="no array 'edge_index'"):
        load_links(LinkSetup.make(data=str(tmp_path / "c.npz")))
    whole = np.array([[0, 1, 2], [1, 2, 3]])
    for held, message in (
        ({"edge_index": whole + 0.5}, "'edge_index' of .* must hold whole numbers"),
        ({"edge_index": np.where(whole == 3, np.nan, whole)}, "must hold whole numbers"),
        ({"edge_index": whole, "x": np.full((4, 1), "a")}, "'x' of .* must hold numbers"),
        ({"edge_index": whole, "times": np.array([1, np.nan, 2])}, "as many times, none of them NaN"),
        ({"edge_index": whole, "sides": np.array([0, 1, 1, 0])}, "joins two different ones"),
    ):
        np.savez(tmp_path / "d.npz", **held)
        with pytest.raises(InputError, match=message):
            load_links(LinkSetup.make(data=str(tmp_path / "d.npz"), val_share=0.33, test_share=0.33))


def test_wrong_links_are_named(tmp_path: Path) -> None:
    matrix = tmp_path / "a.mat"
    savemat(matrix, {"net": coo_matrix(np.ones((4, 4)))})
    a, b, none = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[2], [3]]), torch.zeros(2, 0, dtype=torch.long)
    assert LinkTask("t", 5, a, b, none).num_nodes == 5
    with pytest.raises(InputError, match="edge 0 joins 2 and 3, but nodes are numbered 0 to 2"):
        LinkTask("t", 3, a, b, none)
    with pytest.raises(InputError, match="link 1 - 2 is there twice, or in two parts"):
        LinkTask("t", 5, a, b, torch.tensor([[2], [1]]))
    with pytest.raises(InputError, match="node 4 is linked with itself"):
        LinkTask("t", 5, a, b, torch.tensor([[4], [4]]))
    with pytest.raises(InputError, match="must be training links"):
        LinkTask("t", 5, none, b, none)
    with pytest.raises(InputError, match="node 1 has NaN"):
        LinkTask("t", 5, a, b, none, features=torch.tensor([[1.0], [float("nan")], [1.0], [1.0], [1.0]]))
    with pytest.raises(InputError, match="as many rows of features"):
        LinkTask("t", 5, a, b, none, features=torch.ones(4, 1))
    with pytest.raises(InputError, match="joins two different ones"):
        LinkTask("t", 5, a, b, none, sides=torch.tensor([0, 0, 1, 0, 0]))
    with pytest.raises(InputError, match="part 'test' has no links"):
        LinkTask("t", 5, a, b, none).parts()
    with pytest.raises(InputError, match="leave no link for training"):
        split_links(a, 5, val_share=0.5, test_share=0.5)
    with pytest.raises(InputError, match="too few to be split in three"):
        split_links(a, 5)
    with pytest.raises(InputError, match="have no order"):
        load_links(LinkSetup.make(data=str(matrix), split="time"))


def test_communities_close_triangles_at_their_rates() -> None:
    links, features, community = closure_communities(400, communities=8, seed=1)
    assert links.shape == (2, 1600) and features.shape == (400, 32)
    assert len(torch.unique(links[0] * 400 + links[1])) == 1600 and bool((links[0] < links[1]).all())
    same = community[links[0]] == community[links[1]]
    assert 0.85 < float(same.double().mean()) < 0.95
    found = topological_concentration(links, 400, hops=1).values
    means = [float(found[community == c].mean()) for c in range(8)]
    assert means[-1] > means[0] + 0.1 and np.corrcoef(means, range(8))[0, 1] > 0.8
    assert torch.equal(links, closure_communities(400, communities=8, seed=1)[0])
    with pytest.raises(InputError, match="of 4 of the 20 nodes or more each"):
        closure_communities(20, communities=8)
    with pytest.raises(InputError, match="ask for fewer"):
        closure_communities(40, communities=2, links_per_node=30, inside=1.0)


def test_late_links_shift_and_a_random_split_of_the_same_graph_does_not() -> None:
    links, _ = growing(seed=0)
    mixed = links[:, torch.randperm(3100, generator=torch.Generator().manual_seed(0))]
    shifts = []
    for order in (links, mixed):
        train, test = order[:, :2400], order[:, 2400:]
        parts = [topological_concentration(train, 600, pairs, hops=1) for pairs in (None, test)]
        shifts.append(concentration_shift(*parts)["shift"])
    assert shifts[0] > 0.2 and abs(shifts[1]) < 0.05
