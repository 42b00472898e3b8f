from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pandas
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LinearRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

import limbeck
from limbeck.blocks.dags import is_dag
from limbeck.core.artifacts import load
from limbeck.core.errors import InputError
from limbeck.methods.structures.notears import NOTEARS
from limbeck.methods.structures.notears_topo import NotearsTopo, TopoSwap, TopoSwapMLP
from limbeck.metrics.dags import edge_errors, order_score
from limbeck.tasks.causal import CausalSetup, load_causal
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
SMALL = {"nodes": 5, "edges_per_node": 1.2, "samples": 120}


def data(**settings: Any) -> tuple[np.ndarray, np.ndarray]:
    task = load_causal(CausalSetup(**{"nodes": 8, "edges_per_node": 2, "samples": 800, **settings}))
    assert task.truth is not None
    return task.train.inputs.numpy(), task.truth


@parametrize_with_checks(
    [
        TopoSwap(),
        TopoSwap(l1=0.1, move="insert-after", size_small=3),
        TopoSwapMLP(hidden=2, fit_iter=3, size_small=2, size_large=3, max_iter=2),
    ]
)
def test_they_are_estimators(estimator: Any, check: Any) -> None:
    check(estimator)


# ---- the estimators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["gaussian", "exponential", "gumbel"])
@pytest.mark.parametrize("graph", ["er", "sf"])
def test_the_graph_of_a_linear_model_is_found(noise: str, graph: str) -> None:
    x, truth = data(noise=noise, graph=graph)
    found = TopoSwap(random_state=0).fit(x + 5.0)
    assert edge_errors(found.adjacency_, truth)["shd"] == 0
    assert found.score_ == pytest.approx(order_score(found.order_, x)) and found.converged_
    assert (np.diff(found.history_) < 0).all() and found.kkt_violation_ < 1e-8
    assert found.n_evaluations_ >= found.n_moves_ >= found.n_iter_ == len(found.history_) - 1 > 0


def test_another_algorithms_graph_never_gets_worse() -> None:
    x, _ = data()
    for l1 in (0.0, 0.3):
        first = NOTEARS(l1, max_iter=4).fit(x)
        start = order_score(first.order_, x)
        graph = first.to_networkx()
        for given in (first.adjacency_, first.order_, graph):
            found = TopoSwap(random_state=1).fit(x, order_init=given)
            assert found.history_[0] >= found.score_
            assert found.score_ <= start * (1 + 1e-9) or given is not first.order_
        nothing = TopoSwap(max_iter=0).fit(x, order_init=first.order_)
        assert np.array_equal(nothing.order_, first.order_) and nothing.score_ == pytest.approx(start)


def test_names_of_columns_go_into_the_graph_and_out_of_it() -> None:
    x, truth = data()
    frame = pandas.DataFrame(x, columns=[f"v{i}" for i in range(8)])
    found = TopoSwap(random_state=0).fit(frame)
    graph = found.to_networkx()
    assert networkx.is_directed_acyclic_graph(graph) and set(graph) == set(frame.columns)
    assert {(int(a[1:]), int(b[1:])) for a, b in graph.edges} == set(zip(*np.nonzero(truth), strict=True))
    again = TopoSwap(random_state=3).fit(frame, order_init=graph)
    assert again.score_ == pytest.approx(found.score_)
    with pytest.raises(InputError, match="no column"):
        TopoSwap().fit(frame, order_init=networkx.DiGraph([("v0", "w")]))


def test_predictions_and_scores_on_new_samples() -> None:
    x, _ = data()
    found = TopoSwap(random_state=0).fit(x[:400])
    short = x[400:] - found.predict(x[400:])
    assert found.score(x[400:]) == pytest.approx(-0.5 * (short**2).sum() / 400)
    assert found.score(x[:400]) == pytest.approx(-found.score_)


def test_the_logistic_model() -> None:
    x, truth = data(mechanism="logistic", nodes=5, edges_per_node=0.8, samples=3000)
    found = TopoSwap("logistic", l1=0.005, random_state=0, size_small=6).fit(x)
    wrong = edge_errors((found.adjacency_ != 0) + 0.0, truth)
    assert found.score_ < found.history_[0] and (wrong["tpr"] > 0 or wrong["shd"] <= truth.astype(bool).sum())
    chances = found.predict(x)
    assert ((chances > 0) & (chances < 1)).all()
    loss = -(x * np.log(chances) + (1 - x) * np.log(1 - chances)).sum() / len(x)
    assert found.score(x) == pytest.approx(-loss)
    assert found.score_ == pytest.approx(loss + 0.005 * abs(found.weights_).sum())


def test_losses_of_ones_own() -> None:
    x, _ = data(nodes=5, edges_per_node=1.2, samples=150)

    def loss(samples: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        short = samples - samples @ weights
        return 0.5 * float((short**2).sum()) / len(samples), -samples.T @ short / len(samples)

    own = TopoSwap(loss, LinearRegression(fit_intercept=False), random_state=0, size_small=10).fit(x)
    built_in = TopoSwap(random_state=0, size_small=10).fit(x)
    assert np.array_equal(own.order_, built_in.order_) and own.score_ == pytest.approx(built_in.score_)
    assert own.score(x) == pytest.approx(built_in.score(x))


def test_networks_lower_the_score_of_a_nonlinear_model() -> None:
    x, _ = data(mechanism="mlp", nodes=5, edges_per_node=1, samples=200)
    found = TopoSwapMLP(hidden=4, fit_iter=40, random_state=2).fit(x)
    assert found.score_ < found.history_[0] and (np.diff(found.history_) < 0).all()
    assert is_dag(found.adjacency_) and found.predict(x).shape == x.shape
    errors = ((x - found.predict(x)) ** 2).mean(0).sum()
    assert found.score(x) == pytest.approx(-0.5 * errors)
    assert clone(found).get_params() == found.get_params()


def test_wrong_settings_and_samples_are_one_clear_line() -> None:
    x, _ = data(nodes=4, edges_per_node=1, samples=30)
    for settings, words in (
        ({"loss": "poisson"}, "loss must be one of linear, logistic"),
        ({"l1": -0.1}, "l1 must be >= 0"),
        ({"move": "turn"}, "move must be one of swap, insert-after, insert-before"),
        ({"acyclicity": "tr"}, "acyclicity must be one of log-det"),
        ({"size_small": 0}, "size_small must be >= 1"),
        ({"ridge": 1.0, "l1": 1.0}, "a ridge goes with the linear loss"),
        ({"regress": LinearRegression()}, "go together"),
        ({"loss": lambda x, w: (0.0, w)}, "go together"),
        ({"loss": "logistic", "l1": 0.1}, "zeros and ones"),
    ):
        with pytest.raises(InputError, match=words):
            TopoSwap(**settings).fit(x)  # type: ignore[arg-type]
    for samples, words in (
        (x[:1], "minimum of 2"),
        (x[:3], "fewer samples than columns"),
        (np.where(x > 1, np.nan, x), "NaN"),
        (np.column_stack([x, x[:, 0]]), "linear combinations"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            TopoSwap().fit(samples)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="choose must be one of first, multi"):
        TopoSwapMLP(choose="all").fit(x)


def test_constant_columns_stay_alone() -> None:
    x, _ = data(nodes=4, edges_per_node=1, samples=60)
    for estimator in (
        TopoSwap(threshold=0, random_state=0),
        TopoSwap(l1=0.1, threshold=0, random_state=0),
        TopoSwapMLP(hidden=2, fit_iter=3, max_iter=1, threshold=0, random_state=0),
        TopoSwapMLP(hidden=2, fit_iter=3, max_iter=1, threshold=0, loss="log", random_state=0),
    ):
        found = estimator.fit(np.column_stack([x[:, :2], np.full(60, 0.7), x[:, 2:]]))
        graph = found.to_networkx()
        assert (found.predict(np.zeros((3, 5)))[:, 2] == 0.7).all()
        assert set(graph) == set(range(5)) and not list(graph.predecessors(2)) + list(graph.successors(2))


# ---- the run by name -----------------------------------------------------------------------------------------------------


def method(start: str = "random", model: str = "linear", **settings: Any) -> NotearsTopo:
    config = NotearsTopo.Config(start=start, model=model, **{"steps": 8, "size_small": 3, "hidden": 2, **settings})
    return NotearsTopo(load_causal(CausalSetup(**SMALL)), config)


@pytest.mark.parametrize(("start", "model"), [("random", "linear"), ("notears", "linear"), ("random", "mlp")])
def test_resume_is_exact(tmp_path: Path, start: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NotearsTopo, "NOTEARS_STEPS", 5)
    done = resumed_equals_uninterrupted(lambda: method(start, model), None, tmp_path, stops=(3, 4), every=2)
    assert isinstance(done, NotearsTopo) and (len(done.search.history) > 1 or start == "notears")
    assert done.counters["notears_milliseconds"] > 0


def test_a_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NotearsTopo, "NOTEARS_STEPS", 10)
    run = limbeck.fit(NotearsTopo, out=tmp_path / "run", steps=10, engine={"progress": False}, **SMALL)
    rows = {row["who"]: row for row in run.result["rows"]}
    assert next(iter(rows)) == "topo" and {"notears", "notears + topo", "its random start", "true order"} <= set(rows)
    assert rows["topo"]["score"] <= rows["its random start"]["score"] and run.result["converged"]
    assert rows["notears + topo"]["score"] <= rows["notears"]["score"] * (1 + 1e-9)
    assert rows["topo"]["kkt_violation"] < 1e-8 and "own_shd" in rows["notears"]
    titles = [picture["title"] for picture in run.result["pictures"]]
    assert titles == ["adjacency", "score after each step"]
    assert all(base64.b64decode(p["png"]).startswith(b"\x89PNG") for p in run.result["pictures"])
    graph = load(tmp_path / "run").content
    assert networkx.is_directed_acyclic_graph(graph) and set(graph) == {f"x{i}" for i in range(5)}
    json.dumps(run.result)


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_other_models_and_tables_without_a_graph_run_too(model: str, tmp_path: Path) -> None:
    x, _ = data(mechanism="logistic", nodes=4, edges_per_node=1, samples=80)
    pandas.DataFrame(x, columns=list("abcd")).to_csv(tmp_path / "own.csv", index=False)
    options: dict[str, Any] = {"baseline": False, "steps": 2, "hidden": 2, "size_small": 2, "size_large": 3}
    run = limbeck.fit(NotearsTopo, data=str(tmp_path / "own.csv"), model=model, engine={"progress": False}, **options)
    assert [row["who"] for row in run.result["rows"]] == ["topo", "its random start", "by variance", "greedy, top-down"]
    assert all("shd" not in row and np.isfinite(row["test_loss"]) for row in run.result["rows"])


def test_it_says_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="call its fit with your arrays"):
        limbeck.fit(NotearsTopo, np.zeros((10, 3)))
    with pytest.raises(InputError, match="size_small"):
        NotearsTopo.Config.make(size_small=0)
    with pytest.raises(InputError, match="zeros and ones"):
        method(model="logistic")
