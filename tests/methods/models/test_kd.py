"""KD and what the whole family shares: equations, dry run, teacher checks, plain loops, judging."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import limbeck
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.methods.models import KD, Supervised
from limbeck.tasks.judging import judge_classifiers
from tests.helpers import resumed_equals_uninterrupted


def net(width: int = 8, classes: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes))


def batch(n: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randn(n, 4, generator=generator), torch.arange(n) % 3)


def data(n: int = 60) -> TensorData:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(n) % 3
    x[torch.arange(n), y] += 4
    return TensorData(x, y)


def test_loss_equals_the_equation():
    method = KD(net(), net(16, seed=1), temperature=3.0, alpha=0.7).eval()
    b = batch()
    zs, zt = method.student(b.inputs).detach().double().numpy(), method.teachers.models[0](b.inputs).double().numpy()

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    pt = np.exp(log_softmax(zt / 3))
    kl = (pt * (log_softmax(zt / 3) - log_softmax(zs / 3))).sum() / len(zs)
    ce = -log_softmax(zs)[np.arange(12), b.labels].mean()
    losses = method.losses(b)
    assert losses["kd"].item() == pytest.approx(kl, rel=1e-4)
    assert losses.total.item() == pytest.approx(0.3 * ce + 0.7 * 9 * kl, rel=1e-4)


def test_alpha_zero_is_the_baseline_and_alpha_one_needs_no_labels():
    student = net()
    b = batch()
    kd, alone = KD(student, net(seed=1), alpha=0.0).eval(), Supervised(student).eval()
    torch.testing.assert_close(kd(b), alone(b))
    assert KD(student, net(seed=1), alpha=1.0)(b.inputs).item() > 0
    with pytest.raises(InputError, match="needs labels"):
        alone(b.inputs)


def test_equal_student_and_teacher_have_no_divergence_and_no_gradient():
    student = net()
    method = KD(student, copy.deepcopy(student), alpha=1.0).eval()
    loss = method(batch())
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-6


def test_several_teachers_average_softened_probabilities():
    teachers = [net(seed=s) for s in (1, 2)]
    method = KD(net(), teachers, temperature=2.0).eval()
    b = batch()
    target = torch.stack([torch.softmax(t.eval()(b.inputs) / 2, -1) for t in teachers]).mean(0)
    expected = F.kl_div(F.log_softmax(method.student(b.inputs) / 2, -1), target, reduction="batchmean")
    torch.testing.assert_close(method.losses(b)["kd"], expected)


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Dressed(nn.Module):
    """Gives its logits in the container that is asked for, as users' models do."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        super().__init__()
        self.inner, self.kind = net(seed=seed), kind

    def forward(self, x: Tensor) -> object:
        z = self.inner(x)
        return {"tensor": z, "tuple": (z, x), "dict": {"logits": z, "x": x}, "dataclass": Output(z, x)}[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "dataclass"])
def test_any_output_container_works(kind):
    method = KD(Dressed(kind), Dressed(kind, seed=1))
    method.check(batch())
    torch.testing.assert_close(method.eval()(batch()), KD(Dressed("tensor"), Dressed("tensor", seed=1)).eval()(batch()))


def test_dry_run_leaves_everything_as_it_was():
    method = KD(net(), net(seed=1))
    before = {k: v.clone() for k, v in method.state_dict().items()}
    state = torch.get_rng_state()
    method.check(batch())
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in method.parameters())


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).detach()


@pytest.mark.parametrize(
    ("method", "given", "line"),
    [
        (lambda: KD(net(), net(classes=5)), batch(), "student has 3 classes and the teacher 5|3.*5"),
        (
            lambda: KD(net(), net(seed=1)),
            Batch(torch.randn(4, 4), torch.tensor([0, 1, 2, 7])),
            "labels go from 0 to 7, but the student has classes 0 to 2",
        ),
        (lambda: KD(net(), net(seed=1)), Batch(torch.randn(4, 4), torch.rand(4)), "class indices must be integers"),
        (
            lambda: KD(net(), net(seed=1)),
            Batch(torch.randn(2, 4), torch.rand(2, 5)),
            "soft labels for 5 classes, but the student has 3",
        ),
        (
            lambda: KD(net(), net(seed=1)),
            Batch(torch.full((4, 4), float("nan")), torch.zeros(4).long()),
            "loss term '.*' is nan on the first batch",
        ),
        (lambda: Supervised(Detached()), batch(), "no gradient reaches the student"),
    ],
)
def test_dry_run_names_what_is_wrong(method, given, line):
    with pytest.raises(InputError, match=line):
        method().check(given)


def test_the_same_module_as_teacher_and_student_is_refused():
    model = net()
    with pytest.raises(InputError, match="the same module"):
        KD(model, model)
    with pytest.raises(InputError, match=r"student must be an nn.Module, not str"):
        KD("x", model)


def test_a_teacher_no_better_than_chance_is_warned_about():
    with pytest.warns(UserWarning, match="no better than always guessing one class"):
        KD(net(), net(seed=5)).check_teacher(TensorData(torch.randn(90, 4), torch.arange(90) % 3))
    good = net(32)
    optimizer = torch.optim.Adam(good.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(good(data().inputs), data().labels).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert KD(net(), good).check_teacher(data())[0] > 0.9


def test_fit_on_own_modules_and_arrays(tmp_path):
    student = net()
    run = limbeck.fit(
        "kd",
        (data().inputs, data().labels),
        student=student,
        teacher=net(16, seed=1),
        test=data(),
        epochs=3,
        alpha=0.1,
        out=tmp_path / "run",
        engine={"progress": False},
        batch_size=20,
    )
    assert run.measures("student")["parameters"] == sum(p.numel() for p in student.parameters())
    assert 0 <= run.result["agreement"]["top1_agreement"] <= 1
    again = limbeck.load(tmp_path / "run", model=net()).content
    torch.testing.assert_close(again(data().inputs), student.eval()(data().inputs))
    with pytest.raises(InputError, match="kd needs teacher="):
        limbeck.fit("kd", data(), student=net())


def test_judging_leaves_modes_alone_and_compares():
    models = {"student": net().train(), "teacher": net(32, seed=1).eval()}
    found = judge_classifiers(models, data(), ["a", "b", "c"])
    assert [r["who"] for r in found["rows"]] == ["student", "teacher"]
    assert models["student"].training and not models["teacher"].training
    assert np.sum(found["confusion"]["matrix"]) == 60 and found["confusion"]["labels"] == ["a", "b", "c"]
    assert found["rows"][1]["flops"] > found["rows"][0]["flops"] > 0


def test_resume_is_exact(tmp_path):
    def make() -> KD:
        return KD(net(), net(16, seed=1), steps=25, batch_size=10, evaluations=0)

    resumed_equals_uninterrupted(make, data(), tmp_path)


def test_label_smoothing():
    method = Supervised(net(), label_smoothing=0.2).eval()
    b = batch()
    expected = F.cross_entropy(method.student(b.inputs), b.labels, label_smoothing=0.2)
    torch.testing.assert_close(method(b), expected)


def test_pictures_show_the_surest_mistakes_and_right_answers():
    import base64

    from limbeck.tasks.judging import sample_pictures

    images = TensorData((torch.rand(6, 1, 8, 8) * 255).to(torch.uint8), torch.tensor([0, 1, 0, 1, 0, 1]))
    logits = torch.tensor([[3.0, 0], [0, 3], [0, 1], [2, 0], [1, 0], [0, 1]])
    mistakes, right = sample_pictures(logits, images.labels, images, ["cat", "dog"])
    assert mistakes["title"] == "Surest mistakes" and mistakes["caption"].startswith("2 of 6")
    assert right["caption"].startswith("4 of 6")
    assert base64.b64decode(right["png"]).startswith(b"\x89PNG")
    assert sample_pictures(logits, images.labels, data()) == []
