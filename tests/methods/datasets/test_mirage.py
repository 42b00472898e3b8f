"""Mirage: items against brute force, budgets, variants, training and judging, the artifact, resuming."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

import limbeck
from limbeck import networks
from limbeck.adapters.distilled_graphs import read, save_distilled_graphs
from limbeck.blocks.computation_trees import canonical_code
from limbeck.blocks.quantised_nodes import fit_centroids, quantise
from limbeck.core.distilled_graphs import DistilledGraphs
from limbeck.core.errors import InputError, RunError
from limbeck.core.graphs import Graph, GraphData
from limbeck.methods.datasets.mirage import Mirage
from limbeck.report.tree_sheets import layout
from limbeck.tasks.graphs import molecules
from limbeck.tasks.judging_graphs import graph_metrics, train_and_test, train_on_graphs
from tests.helpers import resumed_equals_uninterrupted

DATA = molecules(60, seed=2, noise=0.0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def code_sets(data: GraphData, hops: int) -> list[set[str]]:
    """For each graph the canonical strings of its nodes' trees."""
    found = []
    for g in range(len(data)):
        graph = data.graph(g)
        labels, edges = graph.node_labels.numpy(), graph.edge_index.numpy()
        kinds = None if graph.edge_labels is None else graph.edge_labels.numpy()
        found.append({canonical_code(labels, edges, v, hops, kinds) for v in range(len(labels))})
    return found


def item_codes(graph: Graph, hops: int) -> tuple[str, ...]:
    kinds = None if graph.edge_labels is None else graph.edge_labels.numpy()
    roots = graph.root_mask.nonzero().flatten().tolist()
    labels, edges = graph.node_labels.numpy(), graph.edge_index.numpy()
    return tuple(sorted(canonical_code(labels, edges, r, hops, kinds) for r in roots))


def expected_items(
    data: GraphData, hops: int, support: dict[int, int], max_len: int
) -> dict[tuple[str, ...], list[int]]:
    """By counting: sets of strings, and their supports in the two classes."""
    codes, y = code_sets(data, hops), data.y.tolist()
    found = {}
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(sorted(set().union(*codes)), n) for n in range(1, max_len + 1)
    ):
        counts = [sum(set(chosen) <= c for c, label in zip(codes, y, strict=True) if label == k) for k in (0, 1)]
        if any(counts[k] >= support[k] for k in (0, 1)):
            found[chosen] = counts
    return found


@pytest.mark.parametrize("discriminative", [False, True])
def test_items_are_the_frequent_sets_of_canonical_trees(discriminative):
    data = DATA.subset(torch.arange(30))
    sizes = torch.bincount(data.y).tolist()
    support = {0: int(0.6 * sizes[0]), 1: int(0.7 * sizes[1])}
    method = Mirage(
        data, hops=1, max_len=2, support=(float(support[0]), float(support[1])), discriminative=discriminative
    )
    made = method.mine()
    expected = set()
    for codes, counts in expected_items(data, 1, support, 2).items():
        frequent = [counts[k] >= support[k] for k in (0, 1)]
        for k in (0, 1):
            if frequent[k] and not (discriminative and frequent[1 - k]):
                expected.add((codes, k, counts[k]))
    found = [
        (item_codes(made.graphs.graph(i), 1), int(made.labels[i]), int(made.frequency[i])) for i in range(len(made))
    ]
    assert set(found) == expected and len(found) == len(expected) > 5
    assert method.supports == support


def test_a_relabelled_data_set_gives_the_same_items():
    def shuffled(seed: int) -> GraphData:
        generator = torch.Generator().manual_seed(seed)
        graphs = []
        for i in torch.randperm(len(DATA), generator=generator).tolist():
            graph = DATA.graph(i)
            order = torch.randperm(len(graph.node_labels), generator=generator)
            labels = torch.empty_like(graph.node_labels)
            labels[order] = graph.node_labels
            graphs.append(Graph(labels, order[graph.edge_index], graph.y))
        return GraphData.of(graphs, label_counts=(4,))

    first, second = (Mirage(shuffled(s), ipc=6).mine() for s in (1, 2))
    assert first.graphs.fingerprint() == second.graphs.fingerprint()
    assert torch.equal(first.frequency, second.frequency)


@pytest.mark.parametrize("sampling", ["frequency", "uniform", "class-frequency"])
@pytest.mark.parametrize("multiplicity", [False, True])
def test_a_budget_in_bytes_is_kept_and_the_next_lower_support_breaks_it(multiplicity, sampling):
    options = {"target_bytes": 3000, "multiplicity": multiplicity, "sampling": sampling}
    method = Mirage(DATA, fill=False, **options)
    made = method.mine()
    assert method.cost(method.mined) == (len(made), made.nbytes) and made.nbytes <= 3000
    steps = method.search.supports
    lower = steps[steps.index(method.search.found) - 1]
    assert not method.fits(lower) and method.fits(method.search.found)
    filled = Mirage(DATA, **options)
    more = filled.mine()
    assert made.nbytes < more.nbytes <= 3000 and filled.supports == method.supports
    below = filled.miner.mine_all(filled.thresholds(lower))[0]
    for label, sets in filled.mined.items():
        assert set(method.mined[label]) <= set(sets) <= set(below[label])
    left = [s for label in below for s in below[label] if s not in filled.mined[label]]
    assert left and all(filled._bytes_of([s])[0] > 3000 - more.nbytes for s in left)


def test_budgets_in_items_and_per_class():
    assert len(Mirage(DATA, ipc=4).mine()) == 8
    assert len(Mirage(DATA, target_items=15).mine()) == 15
    assert torch.bincount(Mirage(DATA, ipc=1).mine().labels).tolist() == [1, 1]
    whole = len(Mirage(DATA, support=(1.0,)).mine())
    with pytest.raises(InputError, match=f"support 1 make {whole} items in .* fill is off"):
        Mirage(DATA, ipc=1, fill=False).mine()
    method = Mirage(DATA, support=(0.5,))
    method.mine()
    assert method.supports == {0: 15, 1: 15}
    ratio = Mirage(DATA, support_ratio=(0.5, 1.0), ipc=40)
    ratio.mine()
    assert ratio.supports == ratio.thresholds(ratio.search.found)
    assert ratio.supports[0] == pytest.approx(ratio.supports[1] / 2, abs=1)


def test_frequencies_drive_sampling():
    made = Mirage(DATA, ipc=6).mine()
    p = made.probabilities()
    torch.testing.assert_close(p, made.frequency.double() / made.frequency.sum())
    by_class = Mirage(DATA.subset(torch.arange(45)), ipc=6, sampling="class-frequency").mine()
    p = by_class.probabilities()
    share = torch.bincount(DATA.y[:45]).double() / 45
    torch.testing.assert_close(torch.stack([p[by_class.labels == c].sum() for c in (0, 1)]), share)
    own = p[by_class.labels == 1]
    torch.testing.assert_close(own / own.sum(), (f := by_class.frequency[by_class.labels == 1].double()) / f.sum())
    uniform = Mirage(DATA, ipc=6, sampling="uniform").mine()
    assert uniform.probabilities() is None and uniform.frequency is None
    assert made.nbytes - uniform.nbytes == 4 * len(made)


def test_training_with_frequencies_is_descent_on_the_weighted_loss():
    """With draws as large as they are, the mean drawn loss is the weighted one: one step against a step by hand."""
    made = Mirage(DATA, ipc=3).mine()
    torch.manual_seed(0)
    net = networks.build("gin-w4-l2", in_shape=(4,), num_classes=2)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    draws = []
    original = torch.multinomial

    def recording(p, n, **options):
        draws.append(original(p, n, **options))
        return draws[-1]

    torch.multinomial = recording
    try:
        train_on_graphs(net, made, steps=1, batch_size=500, lr=0.1)
    finally:
        torch.multinomial = original
    shares = torch.bincount(draws[0], minlength=len(made)).double() / 500
    assert (shares - made.probabilities()).abs().max() < 0.1
    other = networks.build("gin-w4-l2", in_shape=(4,), num_classes=2)
    other.load_state_dict(start)
    batch = made.graphs.fetch(draws[0], None)  # every draw through the network by itself
    optimizer = torch.optim.Adam(other.parameters(), 0.1)
    torch.nn.functional.cross_entropy(other(batch.inputs), batch.labels).backward()
    optimizer.step()
    for key, value in other.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, atol=2e-3, rtol=1e-3)


def test_root_weights_are_mean_counts_in_the_graphs_that_hold_the_item():
    data = DATA.subset(torch.arange(20))
    made = Mirage(data, hops=1, ipc=4, multiplicity=True).mine()
    for i in range(len(made)):
        graph, label = made.graphs.graph(i), int(made.labels[i])
        roots = graph.root_mask.nonzero().flatten().tolist()
        labels, edges = graph.node_labels.numpy(), graph.edge_index.numpy()
        wanted = [canonical_code(labels, edges, r, 1) for r in roots]
        tables = []
        for g in (data.y == label).nonzero().flatten().tolist():
            one = data.graph(g)
            codes = [
                canonical_code(one.node_labels.numpy(), one.edge_index.numpy(), v, 1)
                for v in range(len(one.node_labels))
            ]
            counts = [codes.count(w) for w in wanted]
            if all(counts):
                tables.append(counts)
        assert tables
        assert graph.node_weights[graph.root_mask].tolist() == pytest.approx(np.mean(tables, 0).tolist())


def with_edge_labels(data: GraphData) -> GraphData:
    labels = (data.edge_index.sum(0) % 3).long()
    return GraphData(
        data.y, data.node_labels, data.node_ptr, data.edge_index, data.edge_ptr, labels, label_counts=data.label_counts
    )


@pytest.mark.parametrize("change", ["plain", "edges", "degrees", "tuples", "quantised", "weights"])
def test_the_artifact_comes_back_as_it_was(change, tmp_path):
    data, options = DATA, {}
    if change == "edges":
        data = with_edge_labels(DATA)
    elif change == "tuples":
        columns = torch.cat([DATA.node_labels, DATA.node_labels % 2], 1)
        data = DATA.with_columns(columns, (4, 2))
    elif change == "quantised":
        features = DATA.node_labels.float() + 0.1
        continuous = DATA.with_columns(torch.zeros_like(DATA.node_labels), (1,), features=features)
        data = quantise(continuous, fit_centroids(continuous, 4))
    elif change == "degrees":
        options = {"degrees": True}
    elif change == "weights":
        options = {"multiplicity": True, "sampling": "class-frequency"}
    method = Mirage(data, ipc=5, class_names=["a", "b"], **options)
    made = method.mine()
    method.save_artifact(tmp_path / "out", {"method": "mirage"})
    again = limbeck.load(tmp_path / "out")
    assert again.kind == "graph-dataset" and again.description["supports"] == {
        str(c): s for c, s in method.supports.items()
    }
    found = again.content
    assert isinstance(found, DistilledGraphs) and found.graphs.fingerprint() == made.graphs.fingerprint()
    assert (found.nbytes, found.sampling, found.hops, found.class_names) == (made.nbytes, made.sampling, 2, ["a", "b"])
    assert torch.equal(found.frequency, made.frequency) and list(found.class_counts) == list(made.class_counts)
    assert found.graphs.label_counts == made.graphs.label_counts
    if change == "quantised":
        torch.testing.assert_close(found.graphs.centroids, data.centroids)
    if change == "degrees":
        assert found.graphs.degrees is not None and found.graphs.node_labels.shape[1] == 1
    table = datasets.load_dataset(str(tmp_path / "out"), split="train")
    first = table[0]
    assert first["num_nodes"] == len(first["node_feat"]) and len(first["edge_index"]) == 2
    assert first["y"] == [int(made.labels[0])] and first["frequency"] == int(made.frequency[0])
    assert ("edge_attr" in first) == (change == "edges")
    assert (tmp_path / "out" / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_artifacts_are_named(tmp_path):
    made = Mirage(DATA, ipc=3).mine()
    save_distilled_graphs(made, tmp_path, {})
    about = limbeck.load(tmp_path).description
    with pytest.raises(RunError, match="describes no distilled"):
        read(tmp_path, {})
    with pytest.raises(RunError, match="lacks 'hops'"):
        read(tmp_path, {"dataset": {k: v for k, v in about["dataset"].items() if k != "hops"}})
    with pytest.raises(RunError, match="label_counts"):
        read(tmp_path, {"dataset": {**about["dataset"], "label_counts": [1]}})
    path = Path(tmp_path) / "data" / "train-00000-of-00001.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(RunError, match="damaged"):
        limbeck.load(tmp_path)
    path.unlink()
    with pytest.raises(RunError, match="is missing"):
        limbeck.load(tmp_path)


def test_it_learns_what_tells_classes_apart():
    train, test = molecules(200, seed=5, noise=0.0), molecules(200, seed=6, noise=0.0)
    method = Mirage(train, judge_steps=80, judge_seeds=1, ipc=12, discriminative=True)
    made = method.mine()
    assert made.share_of(train) < 0.1
    factories = method.judge_factories()
    assert list(factories) == ["gin-w32-l2", "gat-w32-l2", "sage-w32-l2"]
    for factory in factories.values():
        assert train_and_test(made, factory, test, method.config, seed=0)["auroc"] > 0.9


def test_random_graphs_take_at_least_the_same_bytes():
    method = Mirage(DATA, ipc=6)
    made = method.mine()
    for seed in range(3):
        chosen = method.random_selection(made.nbytes, seed)
        without_last = chosen.graphs.bytes_each()[:-1].sum()
        assert chosen.nbytes >= made.nbytes > without_last
        assert len(set(chosen.labels.tolist())) == 2 and chosen.graphs.root_mask is None
    assert len(method.random_selection(1)) >= 2
    assert len(method.random_selection(10**9)) == len(DATA)
    assert method.whole_set().share_of(DATA) == 1.0


def test_fit_judges_three_networks_on_ordinary_graphs_and_draws_trees(tmp_path):
    small = {"judge_steps": 5, "judge_seeds": 2, "ipc": 4}
    run = limbeck.fit(
        Mirage, DATA, test=molecules(30, seed=9), out=tmp_path / "run", engine={"progress": False}, **small
    )
    assert [r["who"] for r in run.result["rows"]] == ["distilled", "random, same bytes", "whole set"]
    row = run.result["rows"][0]
    assert {"accuracy", "accuracy_std", "auroc", "auroc on gat-w32-l2", "accuracy on sage-w32-l2"} <= set(row)
    assert row["bytes"] == run.method.distilled().nbytes and row["samples"] <= 8
    assert run.result["rows"][2]["bytes"] == int(DATA.bytes_each().sum())
    assert 0 < run.result["tree_coverage"] <= 1 and run.result["distinct_trees"] == len(run.method.trees)
    (picture,) = run.result["pictures"]
    assert base64.b64decode(picture["png"]).startswith(b"\x89PNG")
    found = limbeck.load(tmp_path / "run").content
    assert found.graphs.fingerprint() == run.method.distilled().graphs.fingerprint()
    stages = {r["stage"] for r in run.rows}
    assert stages == {"support", "mining"}
    own = limbeck.fit(Mirage, [DATA.graph(i) for i in range(60)], engine={"progress": False}, **small)
    assert own.method.distilled().graphs.fingerprint() == found.graphs.fingerprint()


def test_a_task_by_name_and_a_network_of_ones_own():
    run = limbeck.fit(
        Mirage, task="molecules", train_size=60, ipc=3, network="gcn-w8-l2", judge_steps=2, judge_seeds=1,
        judge_whole=False, engine={"progress": False},
    )  # fmt: skip
    assert next(iter(run.method.judge_factories())) == "gcn-w8-l2"
    assert run.method.class_names == ["amide-like", "nitro-like"]


def test_a_users_own_torch_geometric_graphs():
    items = [
        SimpleNamespace(
            x=torch.nn.functional.one_hot(g.node_labels[:, 0], 4).float(),
            edge_index=g.edge_index,
            y=torch.tensor([g.y]),
            num_nodes=len(g.node_labels),
        )
        for g in map(DATA.graph, range(len(DATA)))
    ]
    assert Mirage(items, ipc=5).mine().graphs.fingerprint() == Mirage(DATA, ipc=5).mine().graphs.fingerprint()


@pytest.mark.parametrize("options", [{"ipc": 5}, {"ipc": 5, "discriminative": True}, {"support": (0.4,)}])
def test_resume_is_exact_and_the_engine_gives_what_mine_gives(options, tmp_path):
    def make() -> Mirage:
        return Mirage(DATA, **options)

    steps = len(make().stages())
    method = resumed_equals_uninterrupted(make, DATA, tmp_path, stops=(1, 2) if steps == 1 else (1, 3), every=1)
    alone = make()
    alone.mine()
    assert method.mined == alone.mined and method.supports == alone.supports and method.finished
    assert torch.equal(method.get_extra_state(), alone.get_extra_state())


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Mirage((torch.rand(4, 3), torch.zeros(4))), "a data set of graphs is"),
        (
            lambda: Mirage(DATA.with_columns(DATA.node_labels, (4,), features=torch.rand(len(DATA.node_labels), 2))),
            "continuous node features.*quantise",
        ),
        (lambda: Mirage(DATA, support=(0.1, 0.2, 0.3)), "3 supports for 2 classes"),
        (lambda: Mirage(DATA, support=(0.1, 31.0)), "a support of 31 graphs is more than the 30 of class 1"),
        (lambda: Mirage(DATA, support=(0.0,)), "supports must be above 0"),
        (lambda: Mirage(DATA, support_ratio=(0.5,)), "support_ratio must be 2 factors"),
        (lambda: Mirage(DATA, hops=0), "hops must be int >= 1"),
        (lambda: Mirage(DATA).distilled(), "mined nothing yet"),
        (lambda: Mirage(DATA, target_bytes=100).mine(), "the budget is too small.* not one of each class fits"),
        (lambda: Mirage(DATA, support=(0.05,), most_itemsets=50).mine(), "more than 50 itemsets"),
        (
            lambda: Mirage([Graph([0], [], 0), Graph([0, 1], [[0, 1], [1, 0]], 1)], ipc=1).mine(),
            "class 0 has no frequent itemset at all",
        ),
        (lambda: Mirage([Graph([0], [], 0)] * 2), "one class only"),
    ],
)
def test_wrong_uses_are_refused(make, line):
    with pytest.raises(InputError, match=line):
        make()


def test_the_paper_preset_is_valid():
    method = Mirage(DATA, None, Mirage.Config.make("paper"))
    assert method.config.discriminative and method.config.max_len is None
    assert list(method.judge_factories())[1] == "gcn-w64-l2-sum"


def test_metrics_of_graph_classifiers():
    logits = torch.tensor([[2.0, 0], [0, 1], [0, 3], [1, 0]])
    found = graph_metrics(logits, torch.tensor([0, 0, 1, 1]))
    # scores 1 - 0: -2, 1, 3, -1; pairs of a positive over a negative: 3>-2, 3>1, -1>-2, not -1>1
    assert found == {"accuracy": 0.5, "auroc": 0.75}
    assert graph_metrics(logits, torch.zeros(4, dtype=torch.long)) == {"accuracy": 0.5}
    three = graph_metrics(torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 1]))
    assert three["accuracy"] == 0.75 and three["auroc"] == pytest.approx((1 + 0.75 + 5 / 6) / 3)


def test_trees_are_laid_out_without_collisions():
    parent = np.array([-1, -1, 0, 0, 1, 2, 2, 3])
    places = layout(parent)
    assert len({tuple(p) for p in places.tolist()}) == 8
    assert places[:, 1].tolist() == [0, 0, -1, -1, -1, -2, -2, -2]
    assert places[2, 0] == places[[5, 6], 0].mean() and places[0, 0] == places[[2, 3], 0].mean()
