from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.artifacts import load
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.methods.graphs.topological_concentration import TopologicalConcentration
from limbeck.metrics.concentration import topological_concentration
from limbeck.networks.link_networks import HadamardPredictor
from limbeck.tasks.links import LinkTask
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)


def a_task(features: bool = True, nodes: int = 60, **more: Any) -> LinkTask:
    graph = nx.relaxed_caveman_graph(nodes // 6, 6, 0.15, seed=0)
    edges = torch.tensor(list(graph.edges)).T
    x = torch.randn(nodes, 8, generator=torch.Generator().manual_seed(0)) if features else None
    return LinkTask.from_edges(edges, nodes, features=x, **more)


def make(task: LinkTask | None = None, **settings: Any) -> TopologicalConcentration:
    torch.manual_seed(3)
    small = {"hidden": 12, "embedding": 6, "batch_size": 32, "epochs": 6, "projection": 16, "draws": 1, "warm_up": 1}
    return TopologicalConcentration(task or a_task(), **{**small, "check_every": 2, "choose_at": 10, **settings})


def test_the_loss_is_the_papers() -> None:
    method = make()
    pairs = method.on.train[:, :20].T
    torch.manual_seed(5)
    losses = method.losses(method.on.parts().train.fetch(torch.arange(20), None))
    torch.manual_seed(5)
    negative = method.unlinked.sample(20)
    linked = set(map(tuple, torch.cat([method.on.train, method.on.train.flip(0)], 1).T.tolist()))
    assert not linked & set(map(tuple, negative.tolist()))
    x, dense = method.on.features, method.on.graph.adjacency("sym", self_loops=True).to_dense()
    layer: Any = method.model.encoder.layers[0]  # type: ignore[index,union-attr]
    h = dense @ (x @ layer.linear.weight.T) + layer.bias
    last: Any = method.model.predictor.net[0]  # type: ignore[index,union-attr]
    positive, other = (((h[p[:, 0]] * h[p[:, 1]]) @ last.weight.T + last.bias)[:, 0] for p in (pairs, negative))
    expected = -0.5 * (F.logsigmoid(positive).mean() + F.logsigmoid(-other).mean())
    torch.testing.assert_close(losses.total, expected)
    torch.manual_seed(5)
    assert torch.equal(method(pairs), losses.total)  # a bare tensor of pairs, as in anybody's loop


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_new_weights_follow_what_the_predictor_says_of_the_surroundings(kind: str) -> None:
    method = make(network=kind, alpha=2.0)
    before = method.messages.matrix(original=True).to_dense()
    method.reweight()
    with torch.no_grad():
        h = method.model.states(method.features, method.messages.matrix(original=True))
        around = before @ h
        scores = method.model.predictor.with_all(around, h).sigmoid()  # type: ignore[operator]
    there = before != 0
    soft = torch.softmax(scores.masked_fill(~there, -torch.inf), 1).nan_to_num()
    expected = before + 2 * soft * before.sum(1, keepdim=True)
    torch.testing.assert_close(method.messages.matrix().to_dense(), expected)
    assert bool(before.diagonal().any()) == (kind == "gcn")
    first = method.messages.weights.clone()
    method.reweight()  # the predictor now sees other states, but what is added to are the original weights
    total = method.messages.matrix().to_dense().sum(1)
    torch.testing.assert_close(total, 3 * before.sum(1))
    assert not torch.equal(first, method.messages.weights)


def test_weights_change_between_epochs_and_only_where_asked() -> None:
    def trained(**settings: Any) -> TopologicalConcentration:
        method = make(**settings)
        seen: list[Tensor] = []
        (stage,) = method.stages(method.on.parts().train, None, seed=0)
        after = stage.after_step
        assert after is not None

        def watch(step: int) -> None:
            after(step)
            seen.append(method.messages.weights.clone())

        stage.after_step = watch
        Engine(None, EngineConfig(progress=False), seed=0).run(method, [stage])
        changed = [k + 1 for k in range(1, len(seen)) if not torch.equal(seen[k], seen[k - 1])]
        method.changed = changed  # type: ignore[assignment]
        return method

    plain = trained()
    assert plain.changed == [] and torch.equal(plain.messages.weights, plain.messages.base)
    per_epoch = plain.on.train.shape[1] // 32
    assert per_epoch == 3
    assert trained(alpha=1.0, warm_up=2, interval=2).changed == [4 * per_epoch, 6 * per_epoch]


def test_training_finds_links_and_keeps_the_best_state() -> None:
    method = make(epochs=25)
    parts = method.on.parts()
    rows = Engine(None, EngineConfig(progress=False), seed=0).run(method, method.stages(parts.train, parts.val, seed=0))
    hits = [row["link_hits_at_10"] for row in rows if row["split"] == "val"]
    assert len(hits) >= 12 and method.best.score == max(hits) and max(hits) > 0.4
    now = method.study.link_hits(method.pair_scorer("val"), "val", (10,))[10]
    assert now == pytest.approx(max(hits))


def test_clipping_is_per_part_and_an_embedding_learns_with_the_encoder() -> None:
    method = make(a_task(features=False))
    (stage,) = method.stages(method.on.parts().train)
    made = stage.optimisers()
    assert set(made) == {"encoder", "predictor"} and all(o.clip == 1.0 for o in made.values())
    assert any(p is method.model.embedding for p in made["encoder"].parameters())
    everything = [p for o in made.values() for p in o.parameters()]
    assert len(everything) == len(list(method.trainable_parameters()))


@pytest.mark.parametrize("features", [True, False])
def test_a_run_resumes(tmp_path: Path, features: bool) -> None:
    task = a_task(features)
    parts = task.parts()

    def fresh() -> TopologicalConcentration:
        method = make(task, alpha=1.0, epochs=8, warm_up=1)
        whole = method.stages
        method.stages = lambda train, val, seed: whole(train, parts.val, seed=seed)  # type: ignore[method-assign,assignment]
        return method

    method = resumed_equals_uninterrupted(fresh, parts.train, tmp_path)
    assert not torch.equal(method.messages.weights, method.messages.base)


def test_it_judges_any_encoder_and_keeps_what_the_links_say(tmp_path: Path) -> None:
    """An encoder that knows the cliques finds their links; it has nothing to train."""
    task = a_task()
    clique = F.one_hot(torch.arange(60) // 6).float()
    seen: list[Tensor] = []

    def encode(x: Tensor, adjacency: Tensor) -> Tensor:
        seen.append(adjacency)
        return clique

    predictor = HadamardPredictor(10)
    nn.init.ones_(predictor.net[0].weight)  # type: ignore[arg-type]
    method = TopologicalConcentration(task, encode, predictor.requires_grad_(False), projection=16, draws=1, cut=5)
    found = method.evaluate(task.parts().test)
    assert seen[0].layout == torch.sparse_csr and seen[0].shape == (60, 60)
    rows = {row["who"]: row for row in found["rows"]}
    assert next(iter(rows)) == "TC, test" and rows["TC, test"]["pearson_recall_at_5"] > 0.3
    assert rows["TC, test"]["pearson_recall_at_5"] > rows["degree, train"]["pearson_recall_at_5"] + 0.15
    assert found["recall_at_5"] > 0.5 and len(found["pictures"]) == 2
    with pytest.raises(InputError, match="nothing to train|has anything to train"):
        method.stages(task.parts().train)
    method.save_artifact(tmp_path / "artifact", {"method": method.name})
    held = np.load(tmp_path / "artifact" / "nodes.npz")
    exact = topological_concentration(task.train, 60, task.test, hops=2).values
    np.testing.assert_allclose(held["TC_test"], exact.numpy())
    with pytest.raises(InputError, match="pass model="):
        load(tmp_path / "artifact")


def test_a_predictor_loads_without_the_method(tmp_path: Path) -> None:
    for features in (True, False):
        method = make(a_task(features), network="sage")
        method.save_artifact(tmp_path / str(features), {})
        model = load(tmp_path / str(features)).content
        pairs = method.on.test.T
        expected = method.pair_scorer()(pairs)
        torch.testing.assert_close(model(method.on.features, method.messages.matrix(), pairs), expected)
    assert json.loads((tmp_path / "True" / "artifact.json").read_text())["kind"] == "link-predictor"


def test_validation_links_carry_messages_only_when_test_links_are_judged() -> None:
    method = make(val_messages=True, alpha=1.0)
    plain = method.states("val")
    assert not torch.equal(plain, method.states("test"))
    torch.testing.assert_close(plain, method.model.states(method.features, method.messages.matrix()).detach())
    assert torch.equal(make().states("test"), make().states("val"))


def test_shift_and_concentration_are_those_of_the_task() -> None:
    method = make()
    task = method.on
    test = topological_concentration(task.train, 60, task.test, hops=1)
    assert torch.equal(method.concentration("test", hops=1).values, test.values)
    assert set(method.study.shift()) == {"train", "other", "shift", "nodes"}
    weighted = method.message_tc(original=True)
    assert weighted.defined.sum() > 40 and 0 < weighted.mean < 1
    near = method.concentration("train", exact=False)
    assert torch.equal(near.defined, method.concentration("train").defined)


def test_graphs_of_two_sides() -> None:
    sides = torch.tensor([0] * 20 + [1] * 20)
    graph = nx.bipartite.random_graph(20, 20, 0.3, seed=1)
    task = LinkTask.from_edges(torch.tensor(list(graph.edges)).T, 40, sides=sides)
    method = make(task)
    assert method.study.shift()["train"] > 0  # at two hops; there are no triangles
    found = method.evaluate(task.parts().test)
    assert 0 < found["mrr"] <= 1
    negative = method.unlinked.sample(50)
    assert bool((sides[negative[:, 0]] != sides[negative[:, 1]]).all())


def test_to_pyg() -> None:
    pytest.importorskip("torch_geometric")
    data = make().to_pyg()
    assert data.num_nodes == 60 and data.tc_test.shape == (60,) and data.edge_weight.shape == data.edge_index.shape[1:]


def test_wrong_input_is_named() -> None:
    task = a_task()
    with pytest.raises(InputError, match="needs predictor="):
        TopologicalConcentration(task, lambda x, a: x)
    complete = torch.combinations(torch.arange(8)).T
    with pytest.raises(InputError, match="no pair is left to predict"):
        TopologicalConcentration(LinkTask("k8", 8, complete, complete[:, :0], complete[:, :0]))
    method = make(task)
    for wrong in (torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), [1, 2]):
        with pytest.raises(InputError, match="batch"):
            method(wrong)
    with pytest.raises(InputError, match="judged on the test links of its own task"):
        method.evaluate(a_task().parts().test)
    with pytest.raises(InputError, match="takes links"):
        TopologicalConcentration.from_data(None, None, None, method.config)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="goes into an object"):
        TopologicalConcentration.from_data(task.parts().train, nn.Linear(1, 1), None, method.config)
    with pytest.raises(InputError, match="alpha must be"):
        make(task, alpha=-1)

    class Broken(nn.Linear):
        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * float("nan")

    broken = TopologicalConcentration(task, Broken(8, 4), HadamardPredictor(4))
    with pytest.raises(InputError, match="not finite"):
        broken.check(task.parts().train.fetch(torch.arange(4), 0))
