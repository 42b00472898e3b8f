from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.methods.graphs.vqgraph import VQGraph
from limbeck.networks.node_networks import GCN
from limbeck.networks.node_tokenizer import NodeTokenizer
from limbeck.tasks.node_classification import NodeSetup, NodeTask, load_nodes
from tests.helpers import resumed_equals_uninterrupted
from tests.largest_array import LargestArray

torch.set_num_threads(1)
SMALL = {"codes": 12, "code_dim": 8}


@cache
def task(nodes: int = 160) -> NodeTask:
    setup = {"generated_nodes": nodes, "labels_per_class": 5, "val_size": 20, "setting": "inductive"}
    return load_nodes(NodeSetup.make(task="sbm", **setup))


def make(on: NodeTask | None = None, **settings: Any) -> VQGraph:
    torch.manual_seed(0)
    teacher, train_teacher = settings.pop("teacher", None), settings.pop("train_teacher", None)
    return VQGraph(on or task(), teacher, train_teacher=train_teacher, **{**SMALL, **settings})


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(1).mean()


# ---- the tokenizer -------------------------------------------------------------------------------------------------------


def test_the_teachers_loss_is_the_papers() -> None:
    method = make(node_weight=0.3, edge_weight=0.7)
    method.teacher.eval()  # no dropout, so that it can be made again
    found = method.teacher_losses()
    on, net = task().observed(), method.tokenizer
    told = net.tokens(on.features, on.graph)
    a = on.graph.adjacency("none", self_loops=True).to_dense()
    g = told.edge_side @ told.edge_side.T
    scaled = (g - g.min()) / (g.max() - g.min())
    q = net.quantizer.codebook[told.quantised.codes]
    ce = F.cross_entropy(told.logits[on.train], on.labels[on.train])
    expected = (
        ce
        + 0.3 * ((told.hidden - told.node_side) ** 2).mean()
        + 0.7 * ((a - scaled) ** 2).mean().sqrt()
        + 0.25 * ((q - told.hidden) ** 2).mean()
    )
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-5)


def test_the_codes_follow_in_training_and_get_no_gradient() -> None:
    method = make()
    before = method.quantizer.codebook.clone()
    method.teacher_losses().total.backward()
    assert not torch.equal(method.quantizer.codebook, before)
    assert all(
        p.grad is not None and bool(p.grad.any()) for n, p in method.teacher.named_parameters() if "head" not in n
    )
    before = method.quantizer.codebook.clone()
    method.ask_teacher(), method.code_features()
    assert torch.equal(method.quantizer.codebook, before) and method.teacher.training


def test_reconstructions_can_be_left_out() -> None:
    assert set(make(node_weight=0.0, edge_weight=0.0).teacher_losses()) == {"ce", "commitment"}


def test_fan_outs_teach_on_surroundings() -> None:
    method = make(fanouts=(2, 2), seed_batch=6, node_weight=0.0, edge_weight=0.0)
    seen: list[int] = []
    tokens = method.tokenizer.tokens
    method.tokenizer.tokens = lambda x, part: seen.append(len(x)) or tokens(x, part)  # type: ignore[func-returns-value,method-assign]
    torch.manual_seed(5)
    found = method.teacher_losses()
    assert 6 < seen[0] <= 6 * (1 + 2 + 4) and torch.isfinite(found.total)
    torch.manual_seed(5)
    seeds = method.watched.train[torch.randperm(20)[:6]]
    part, nodes = method._sampler.around(seeds)  # type: ignore[union-attr]
    assert seen[0] == len(nodes) and torch.equal(part.labels[:6], method.labels[seeds])  # type: ignore[index]


def test_what_is_hidden_in_training_changes_nothing() -> None:
    on = task()
    features, labels = on.features.clone(), on.labels.clone()
    features[on.hidden] = 7.0
    structure = replace(on.graph, features=features)
    labels[on.test] = (labels[on.test] + 1) % 4  # labels of test nodes, hidden or not
    other = replace(on, structure=structure, features=features, labels=labels)
    totals = []
    for which in (on, other):
        method = make(which)
        torch.manual_seed(1)
        teacher = method.teacher_losses().total
        method.eval()
        totals.append((teacher, method.student_losses().total))
    assert torch.equal(totals[0][0], totals[1][0]) and torch.equal(totals[0][1], totals[1][1])


@pytest.mark.parametrize("settings", [{}, {"edge_block": 100}, {"fanouts": (3, 3)}])
def test_nothing_of_the_size_of_all_pairs_is_made(settings: dict[str, Any]) -> None:
    method = make(task(4000), edge_weight=1.0, **settings)
    with LargestArray() as largest:
        method.teacher_losses().total.backward()
        method.student_losses().total.backward()
    assert method.watched.num_nodes * 40 <= largest.entries < method.watched.num_nodes**2 / 20


def test_a_hundred_thousand_nodes_need_no_large_array() -> None:
    """Both updates: nothing is larger than the similarities of all nodes to the 128 codes."""
    nodes = 100_000
    on = load_nodes(NodeSetup.make(task="sbm", generated_nodes=nodes))
    method = VQGraph(on)
    with LargestArray() as largest:
        method.teacher_losses().total.backward()
        method.student_losses().total.backward()
    assert nodes * 64 <= largest.entries <= nodes * 128


# ---- the student ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_the_students_loss_is_the_papers(similarity: str) -> None:
    method = make(similarity=similarity, label_weight=0.3, code_weight=2.0, temperature=0.2).eval()
    on, net = task().observed(), method.tokenizer
    told = net.tokens(on.features, on.graph)
    hidden = method.student.layers[0](on.features)  # type: ignore[index,operator]
    logits = method.student(on.features)
    g, e = method.to_codes(hidden), net.quantizer.codebook

    def assigned(rows: Tensor) -> Tensor:
        if similarity == "cosine":
            return torch.softmax(F.cosine_similarity(rows[:, None], e, dim=2) / 0.2, 1)
        return torch.softmax(-(rows[:, None] - e).norm(dim=2) / 0.2, 1)

    expected = (
        0.3 * F.cross_entropy(logits[on.train], on.labels[on.train])
        + 0.7 * kl(torch.softmax(told.logits, 1), torch.softmax(logits, 1))
        + 2.0 * 0.2**2 * kl(assigned(told.hidden), assigned(g))
    )
    torch.testing.assert_close(method.student_losses().total, expected, rtol=1e-4, atol=1e-5)


def test_only_the_student_learns_from_it() -> None:
    method = make()
    before = copy.deepcopy(method.quantizer.state_dict())
    method.student_losses().total.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in [*method.student.parameters(), *method.to_codes.parameters()])
    assert all(torch.equal(v, before[k]) for k, v in method.quantizer.state_dict().items())
    method.zero_grad()
    method.student_losses()["codes"].backward()  # reaches the first hidden layer, not the answers
    assert method.student.head.weight.grad is None  # type: ignore[union-attr]
    assert bool(method.student.layers[0][0].weight.grad.any())  # type: ignore[index,union-attr]


def test_without_codes_it_is_soft_labels_alone() -> None:
    method = make(code_weight=0.0).eval()
    found = method.student_losses()
    p, q = torch.softmax(method.ask_teacher(), 1), torch.softmax(method.student_logits(), 1)
    assert "codes" not in found
    torch.testing.assert_close(found.total, kl(p, q))


class Recorder:
    """Plain gradient descent with momentum, and every total that it was given."""

    step = 0

    def __init__(self, method: VQGraph) -> None:
        parameters = [*method.student.parameters(), *method.to_codes.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        self.totals: list[float] = []

    def minimise(self, total: Tensor, *names: str) -> None:
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.totals.append(float(total.detach()))


def test_the_published_schedule_steps_for_each_term_in_turn() -> None:
    settings = {"label_weight": 0.25, "code_weight": 3.0}
    mine, theirs = (make(**settings).eval() for _ in range(2))
    recorder, other = Recorder(mine), Recorder(theirs)
    mine._alternating(recorder)  # type: ignore[arg-type]
    for name in ("codes", "labels", "soft"):
        found = theirs.student_losses()
        other.minimise(found.weights[name] * found.terms[name])
    assert recorder.totals == pytest.approx(other.totals, rel=1e-5)
    for a, b in zip(mine.student.parameters(), theirs.student.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_it_takes_batches_of_nodes_in_each_pass() -> None:
    method = make(node_batch=50, alternate=True)
    recorder = Recorder(method)
    found = method._alternating(recorder)  # type: ignore[arg-type]
    passes = -(-method.watched.num_nodes // 50)
    assert (
        len(recorder.totals) == 2 * passes + 1 and recorder.totals[passes] == 0
    )  # labels weigh 0, and have their step
    assert list(found) == ["codes", "labels", "soft"]
    stage = method.student_stage()
    assert stage.steps == 300


def test_a_batch_of_nodes_is_a_part_of_the_loss() -> None:
    method = make(node_batch=40, label_weight=0.5).eval()
    torch.manual_seed(2)
    found = method.student_losses()
    torch.manual_seed(2)
    nodes = method.draw_nodes()
    assert len(nodes) == 40
    logits = method.student_logits(nodes)
    torch.testing.assert_close(
        found["soft"], kl(torch.softmax(method.ask_teacher()[nodes], 1), torch.softmax(logits, 1))
    )


# ---- running -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_epochs": 3, "epochs": 25},
        {"teacher_epochs": 25, "epochs": 3, "code_start": "kmeans", "code_refresh": 0.5},
        {"teacher_epochs": 25, "epochs": 3, "fanouts": (2, 2), "seed_batch": 8, "edge_block": 20},
        {"teacher_epochs": 3, "epochs": 25, "alternate": True, "node_batch": 60, "schedule": "cosine"},
    ],
)
def test_resume_is_exact(settings: dict[str, Any], tmp_path: Path) -> None:
    resumed_equals_uninterrupted(lambda: make(**settings), None, tmp_path)


def test_a_run_learns_and_is_judged() -> None:
    method = make(task(300), teacher_epochs=25, epochs=25)
    Engine(None, EngineConfig(progress=False), seed=0).run(method, method.stages())
    found = method.evaluate(task(300).parts().test)
    student, teacher = found["rows"]
    assert teacher["accuracy"] > 0.4 and student["accuracy"] > 0.35  # one in four by chance
    assert 1 < teacher["codes_used"] <= 12 and 0 <= student["same_code"] <= 1
    assert 0 < teacher["cut_consistency"] < 1 and {"accuracy_seen", "accuracy_hidden"} <= student.keys()
    assert [p["title"] for p in found["pictures"]] == ["Purity of codes", "Code space"]


def test_a_trained_tokenizer_is_frozen_and_shared() -> None:
    teacher = make().tokenizer
    method = make(teacher=teacher)
    assert method.tokenizer is teacher and not method.trains_teacher and len(method.stages()) == 1
    assert not any(p.requires_grad for p in teacher.parameters()) and not method.train().teacher.training


def test_other_teachers_and_structures() -> None:
    hyper = load_nodes(NodeSetup.make(task="hypergraph-sbm", generated_nodes=100, labels_per_class=3, val_size=10))
    for on, kind in ((task(), "sage"), (task(), "gat"), (hyper, "hgnn"), (hyper, "gcn")):
        method = make(on, teacher=kind)
        assert torch.isfinite(method.teacher_losses().total) and torch.isfinite(method.student_losses().total)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="a NodeTokenizer, not GCN"):
        make(teacher=GCN(40, 4))
    with pytest.raises(InputError, match="fan-outs draw neighbours"):
        make(teacher="hgnn", fanouts=(3,))
    with pytest.raises(InputError, match="another code_tap"):
        VQGraph(task(), student=nn.Sequential(nn.Unflatten(1, (4, 10)), nn.Flatten(), nn.Linear(40, 4)), code_tap="0")
    with pytest.raises(InputError, match="temperature must be"):
        make(temperature=0.0)
    assert isinstance(make().teacher, NodeTokenizer)
