from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import limbeck
from limbeck.core.errors import InputError
from limbeck.core.hypergraphs import Hypergraph
from limbeck.methods.graphs.lighthgnn import LightHGNN, entropies
from limbeck.networks.node_mlp import NodeMLP
from limbeck.networks.node_networks import HGNN
from limbeck.tasks.node_classification import NodeSetup, NodeTask, load_nodes
from limbeck.tasks.node_generators import hypergraph_sbm
from tests.helpers import resumed_equals_uninterrupted
from tests.largest_array import LargestArray

torch.set_num_threads(1)
EDGES = [[0, 1, 2], [2, 3], [1, 3, 4, 5]]  # vertex 6 is isolated


def tiny(**more: Any) -> NodeTask:
    torch.manual_seed(1)
    parts = {"train": [0, 1, 2], "val": [3, 4], "test": [5, 6], **more}
    return NodeTask.of(EDGES, torch.randn(7, 4), [0, 1, 2, 0, 1, 2, 0], **parts)


def frozen(task: NodeTask) -> HGNN:
    torch.manual_seed(2)
    return HGNN(task.features.shape[1], task.num_classes, hidden=5)


def make(task: NodeTask | None = None, **settings: Any) -> LightHGNN:
    task = task or tiny()
    torch.manual_seed(3)
    student = nn.Sequential(nn.Linear(task.features.shape[1], 6), nn.ReLU(), nn.Linear(6, task.num_classes))
    return LightHGNN(task, frozen(task), student, **settings)


def members(graph: Hypergraph) -> list[list[int]]:
    return [graph.members[a:b].tolist() for a, b in zip(graph.pointer[:-1], graph.pointer[1:], strict=True)]


def entropy(p: Tensor) -> float:
    return -sum(float(q) * math.log(float(q)) for q in p if q > 0)


def by_hand(method: LightHGNN, kept: list[int]) -> tuple[float, float, float]:
    """Labels', soft and hyperedge terms in loops, as the paper writes them."""
    task, tau = method.task, method.config.temperature
    with torch.no_grad():
        zt = method.teacher(task.features, task.hypergraph)
        zs = method.student(task.features)
    pt, ps = zt.softmax(1), zs.softmax(1)
    labels = -sum(float(ps[v, task.labels[v]].log()) for v in task.train) / len(task.train)
    soft = sum(float((pt[v] * (pt[v] / ps[v]).log()).sum()) for v in range(7)) / 7
    terms = []
    for e in kept:
        held = members(task.hypergraph)[e]
        q_t, q_s = (torch.stack([(z[v] / tau).softmax(0) for v in held]).mean(0) for z in (zt, zs))
        terms.append(float((q_t * (q_t / q_s).log()).sum()))
    return labels, soft, sum(terms) / len(terms)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_terms_are_the_papers(temperature: float) -> None:
    method = make(sampling=False, label_weight=0.3, temperature=temperature)
    found = method.student_losses()
    assert members(method.hypergraph) == [*EDGES, [6]]
    labels, soft, hyperedges = by_hand(method, [0, 1, 2, 3])
    for name, value in (("labels", labels), ("soft", soft), ("hyperedges", hyperedges)):
        assert found[name].item() == pytest.approx(value, rel=1e-4), name
    total = 0.3 * labels + 0.7 * (soft + hyperedges)
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-4)


def test_reliability_is_the_papers() -> None:
    method = make(noise=0.7)
    epsilon = torch.randn(7, 4)
    with torch.no_grad():
        noised = method.task.features * (1 + 0.7 * epsilon)
        calm, shaken = (method.teacher(x, method.hypergraph).softmax(1) for x in (method.task.features, noised))
    change = []
    for held in members(method.hypergraph):
        before, after = (sum(entropy(p[v]) for v in held) / len(held) for p in (calm, shaken))
        change.append(abs(after - before))
    expected = [1 - c / max(change) for c in change]
    rho = method.reliability(epsilon)
    assert rho.tolist() == pytest.approx(expected, abs=1e-4)
    assert float(rho.min()) == 0 and float(rho.max()) < 1 + 1e-6


def test_all_are_reliable_where_nothing_changes() -> None:
    assert make(noise=0.0).reliability().tolist() == [1, 1, 1, 1]
    assert entropies(torch.tensor([[0.0, -1000.0], [0.0, 0.0]])).tolist() == pytest.approx([0, math.log(2)])


def test_reliability_is_drawn_once_from_the_seed() -> None:
    method, other = make(seed=4), make(seed=5)
    first = method.knowledge()
    torch.rand(10)
    assert method.knowledge() is first
    assert torch.equal(make(seed=4).knowledge().reliability, first.reliability)
    assert not torch.equal(other.knowledge().reliability, first.reliability)


def test_hyperedges_are_drawn_anew_by_their_reliability() -> None:
    method = make()
    rho = torch.tensor([0.0, 1.0, 0.3, 0.8])
    torch.manual_seed(0)
    count = torch.zeros(4)
    for _ in range(2000):
        count[method.draw_hyperedges(rho)] += 1
    assert count[0] == 0 and count[1] == 2000
    assert abs(float(count[2]) / 2000 - 0.3) < 0.04 and abs(float(count[3]) / 2000 - 0.8) < 0.04


def test_the_term_is_over_those_that_were_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make()
    monkeypatch.setattr(method, "draw_hyperedges", lambda rho: torch.tensor([2, 0]))
    assert float(method.student_losses()["hyperedges"].detach()) == pytest.approx(by_hand(method, [0, 2])[2], rel=1e-4)


def test_no_hyperedge_drawn_is_no_term_and_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make()
    monkeypatch.setattr(method, "draw_hyperedges", lambda rho: torch.zeros(0, dtype=torch.long))
    found = method.student_losses()
    assert float(found["hyperedges"]) == 0
    found.total.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in method.student.parameters() if p.grad is not None)


def test_probabilities_of_zero_stay_finite() -> None:
    task = tiny()
    certain = torch.full((7, 3), -200.0).scatter_(1, task.labels[:, None], 200.0)

    class Sure(nn.Module):
        def __init__(self, said: Tensor) -> None:
            super().__init__()
            self.said = nn.Parameter(said)

        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return self.said[: len(x)]

    method = LightHGNN(task, Sure(certain), Sure(certain.flip(1)), sampling=False)
    found = method.student_losses()
    assert bool(torch.isfinite(found["hyperedges"])) and float(found["hyperedges"]) > 1


def test_gradients_reach_the_student_only() -> None:
    method = make(label_weight=0.5)
    method.student_losses().total.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in method.student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert not method.knowledge().targets.requires_grad and not method.ask_teacher().requires_grad
    assert not method.train().teacher.training


def test_soft_labels_alone_ask_for_no_hyperedges(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make(plus=False)
    monkeypatch.setattr(method, "reliability", lambda: pytest.fail("reliability was asked for"))
    assert set(method.student_losses().terms) == {"labels", "soft"}


def test_labels_of_validation_and_test_are_never_seen() -> None:
    task = tiny()
    wrong = task.labels.clone()
    wrong[[3, 4, 5, 6]] = (wrong[[3, 4, 5, 6]] + 1) % 3
    other = NodeTask.of(EDGES, task.features, wrong, train=[0, 1, 2], val=[3, 4], test=[5, 6])
    for settings in ({"label_weight": 1.0}, {"label_weight": 0.4}):
        values = [float(make(t, sampling=False, **settings).student_losses().total) for t in (task, other)]
        assert values[0] == values[1]
    teachers = [LightHGNN(t, "hgnn", seed=1) for t in (task, other)]
    losses = []
    for method in teachers:
        torch.manual_seed(0)
        losses.append(float(method.teacher_losses().total))
    assert losses[0] == losses[1]


def test_hidden_vertices_are_not_there_in_training() -> None:
    method = make(tiny(hidden=[5]), sampling=False)
    assert method.watched.num_nodes == 6 and method.ask_teacher().shape == (6, 3)
    assert members(method.hypergraph) == [[0, 1, 2], [2, 3], [1, 3, 4], [5]]  # 6 is called 5 now
    asked: list[Tensor] = []
    method.student.register_forward_hook(lambda _, inputs, out: asked.append(inputs[0]))
    method.student_losses()
    assert asked and not any(bool((x == method.task.features[5]).all(1).any()) for x in asked)


def test_small_updates_agree_with_the_whole_on_average() -> None:
    graph, x, y = hypergraph_sbm(60, classes=3, sizes=(2, 4), seed=1)
    task = NodeTask.of(graph, x, y, train=list(range(9)), val=list(range(9, 20)))
    whole = make(task, sampling=False).student_losses()
    method = make(task, sampling=False, node_batch=15)
    torch.manual_seed(0)
    drawn = [method.student_losses() for _ in range(400)]
    assert len(method.draw_nodes()) == 15
    assert len(method.draw_hyperedges(method.knowledge().reliability)) == math.ceil(method.hypergraph.num_edges / 4)
    for name in ("soft", "hyperedges"):
        mean = sum(float(found[name]) for found in drawn) / len(drawn)
        assert mean == pytest.approx(float(whole[name]), rel=0.05), name
    assert method.student_stage().steps == 200 * 4


def test_fifty_five_thousand_vertices_need_no_large_array() -> None:
    """Both updates: nothing is larger than the student's hidden layer (or, on a hyperedge's members, its classes)."""
    vertices = 55_000
    method = LightHGNN(load_nodes(NodeSetup.make(task="hypergraph-sbm", generated_nodes=vertices)), "hgnn")
    with LargestArray() as largest:
        method.teacher_losses().total.backward()
        method.student_losses().total.backward()
    assert vertices * 50 <= largest.entries <= vertices * 128


def test_a_function_can_teach() -> None:
    task = tiny()
    teacher = frozen(task).eval()

    def answer(features: Tensor, hypergraph: Hypergraph) -> Tensor:
        return teacher(features, hypergraph)

    method = LightHGNN(task, answer, sampling=False)
    assert not method.trains_teacher and len(method.stages()) == 1
    torch.testing.assert_close(method.ask_teacher(), answer(task.features, task.hypergraph).detach())


def test_mistakes_are_named() -> None:
    task = tiny()
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: LightHGNN(task.features), "takes a NodeTask"),
        (lambda: LightHGNN(task, lambda x, g: x, train_teacher=True), "no parameters that could be trained"),
        (lambda: LightHGNN(task, "hgnnn"), "unknown network over nodes 'hgnnn'; did you mean hgnn"),
        (lambda: LightHGNN(task, lambda x, g: x[:, :2]).check(None), "finite logits"),  # type: ignore[arg-type]
        (lambda: LightHGNN(task, student=nn.Linear(9, 3)).check(None), "student does not take"),  # type: ignore[arg-type]
        (lambda: LightHGNN(task, label_weight=2.0), "label_weight must be float >= 0 and <= 1"),
        (lambda: limbeck.fit("lighthgnn", (task.features, task.labels)), "needs a graph"),
    ]
    for call, said in wrong:
        with pytest.raises((InputError, LookupError), match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_published_settings() -> None:
    config = LightHGNN.Config.make("paper")
    assert (config.epochs, config.lr, config.weight_decay, config.label_weight, config.noise) == (200, 0.01, 5e-4, 0, 1)
    method = LightHGNN(tiny(), seed=1)
    assert isinstance(method.teacher, HGNN) and isinstance(method.student, NodeMLP)
    linear, *rest = method.student.layers.get_submodule("0").children()
    assert isinstance(linear, nn.Linear) and linear.out_features == 128
    assert [type(part) for part in rest] == [nn.ReLU, nn.BatchNorm1d, nn.Dropout] and rest[2].p == 0.5


def blocks(setting: str = "transductive") -> NodeTask:
    return load_nodes(
        NodeSetup.make(
            task="hypergraph-sbm", generated_nodes=150, labels_per_class=4, val_size=30, setting=setting, split_seed=2
        )
    )


def test_resume_is_exact(tmp_path: Path) -> None:
    task = blocks()

    def fresh() -> LightHGNN:
        return LightHGNN(task, "hgnn", epochs=22, teacher_epochs=21, seed=7)

    method: Any = resumed_equals_uninterrupted(fresh, None, tmp_path)
    start = fresh().training_state()["tensors"]
    moved = {k.partition(".")[0] for k, v in method.training_state()["tensors"].items() if not torch.equal(v, start[k])}
    assert moved == {"teacher", "student"}


def test_a_run_keeps_a_student_that_needs_no_hypergraph(tmp_path: Path) -> None:
    task = blocks("inductive")
    run = limbeck.fit(
        "lighthgnn",
        task.parts().train,
        test=task.parts().test,
        out=tmp_path / "run",
        epochs=40,
        teacher_epochs=40,
        engine={"progress": False},
    )
    student, teacher = run.result["rows"]
    assert (student["who"], teacher["who"]) == ("student", "teacher")
    hidden, seen = len(task.hidden), len(task.test) - len(task.hidden)
    for row in (student, teacher):
        mixed = (row["accuracy_hidden"] * hidden + row["accuracy_seen"] * seen) / len(task.test)
        assert row["accuracy"] == pytest.approx(mixed) and row["accuracy"] > 0.4
        assert row["topology_score"] > 0 and row["latency_single"] > 0
    assert len(run.result["pictures"]) == 2
    loaded = limbeck.load(tmp_path / "run").content
    said = loaded(task.features[task.test]).argmax(1)
    assert float((said == task.labels[task.test]).double().mean()) == pytest.approx(student["accuracy"])


def test_the_weights_that_did_best_on_validation_are_kept() -> None:
    from limbeck.core.engine import Engine, EngineConfig

    task = blocks()
    method = LightHGNN(task, "hgnn", epochs=30, teacher_epochs=30, seed=1)
    rows = Engine(None, EngineConfig(progress=False, log_every=1), seed=0).run(method, method.stages())
    best = {s: max(r["accuracy_val"] for r in rows if r["stage"] == s) for s in ("teacher", "student")}
    method.eval()
    with torch.no_grad():
        said = {"teacher": method.teacher_logits()[task.val], "student": method.student_logits(task.val)}
    for who, logits in said.items():
        assert float((logits.argmax(1) == task.labels[task.val]).float().mean()) == pytest.approx(best[who])
    assert F.cross_entropy(said["teacher"], task.labels[task.val]) < math.log(5)
