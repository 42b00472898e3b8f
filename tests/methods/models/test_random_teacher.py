"""The random teacher: its start, its loss, what learns, what is reported, and that runs resume exactly."""

from __future__ import annotations

import base64
import copy

import pytest
import torch
from torch import Tensor, nn

import limbeck
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.core.semi import SemiSupervisedData
from limbeck.methods.models import RandomTeacher
from limbeck.metrics.probing import LinearProbe, extract_features
from tests.helpers import resumed_equals_uninterrupted

SMALL = {"head_hidden": 8, "head_bottleneck": 4, "head_outputs": 16}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def encoder(seed: int = 0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, 6, 3, padding=1)]
    if norm:
        layers.append(nn.BatchNorm2d(6))
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(6, 10, 3, stride=2))


def images(n: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def data(n: int = 60) -> TensorData:
    y = torch.arange(n) % 3
    x = images(n)
    x[torch.arange(n), 0, 2 * y] += 3
    return TensorData(x, y)


def make(norm: bool = False, **settings: object) -> RandomTeacher:
    return RandomTeacher(encoder(0, norm), encoder(1, norm), sample=images(2), **{**SMALL, **settings})


# ---- the start -----------------------------------------------------------------------------------------------------------


def test_alpha_zero_gives_the_teacher_and_one_an_independent_student():
    near = make(alpha=0.0)
    pairs = zip(near.student.parameters(), near.teacher.encoder.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(near.head.prototypes, near.teacher.head.prototypes)
    student, teacher = near.both(Batch(images()))
    assert torch.equal(student, teacher)

    far, fresh = make(alpha=1.0), encoder(0)
    assert all(torch.equal(a, b) for a, b in zip(far.student.parameters(), fresh.parameters(), strict=True))
    assert not torch.allclose(far.head.prototypes, far.teacher.head.prototypes)


def test_the_student_starts_on_the_variance_preserving_curve():
    method = make(alpha=0.3)
    delta = (0.3**2 + 0.7**2) ** 0.5
    fresh, teacher = encoder(0), encoder(1)
    torch.testing.assert_close(method.student[0].weight, (0.7 * teacher[0].weight + 0.3 * fresh[0].weight) / delta)
    assert float(method.head.mlp[0].bias.detach().abs().max()) == 0


def test_normalisation_is_not_scaled():
    method = make(norm=True, alpha=0.5)
    assert torch.equal(method.student[1].weight, torch.ones(6))
    assert torch.equal(method.student[1].running_var, torch.ones(6))


def test_one_encoder_becomes_the_teacher():
    student = encoder(0)
    before = copy.deepcopy(student)
    method = RandomTeacher(student, sample=images(2), alpha=0.5, **SMALL)
    given = method.teacher.encoder.model
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), before.parameters(), strict=True))
    assert method.student is student and not torch.allclose(student[0].weight, before[0].weight)
    assert RandomTeacher(encoder(0), sample=images(2), alpha=0.0, **SMALL).student[0].weight.equal(before[0].weight)


# ---- the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_the_loss_is_the_divergence_of_the_softmaxes(chunk_rows):
    method = make(alpha=0.7, chunk_rows=chunk_rows)
    x = images()
    zs = method.head(method.student(x).mean((2, 3)))
    zt = method.teacher.head(method.teacher.encoder.model(x).mean((2, 3)))
    p, q = torch.softmax(zt, -1), torch.softmax(zs, -1)
    losses = method.losses(Batch(x))
    assert list(losses) == ["kl"]
    assert losses.total.item() == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    assert zs.abs().max() <= 1 + 1e-6
    squared = make(alpha=0.7, loss="mse").losses(Batch(x))
    assert squared["mse"].item() == pytest.approx((zs - zt).square().mean().item(), rel=1e-4)


def test_the_gradient_is_that_of_cross_entropy_and_reaches_the_student_alone():
    method = make(alpha=0.7)
    x = images()
    method(x).backward()
    own = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    assert {n.split(".")[0] for n in own} == {"student", "head"} and all(g.abs().sum() > 0 for g in own.values())
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    method.zero_grad()
    student, teacher = method.both(Batch(x))
    (-(torch.softmax(teacher, -1) * torch.log_softmax(student, -1)).sum(-1).mean()).backward()
    for name, parameter in method.named_parameters():
        if name in own:
            torch.testing.assert_close(parameter.grad, own[name], rtol=1e-3, atol=1e-6)


def test_labels_do_not_matter():
    method = make(alpha=0.5)
    x = images()
    assert method((x, torch.zeros(12).long())) == method((x, torch.ones(12).long())) == method(x)


def test_near_the_teacher_double_precision_keeps_a_gradient_and_adam_makes_steps_of_it():
    method = RandomTeacher(
        encoder(0).double(), encoder(1).double(), sample=images(2, torch.float64), loss="mse", **SMALL
    )
    x = images(dtype=torch.float64)
    method.check(Batch(x))
    loss = method(x)
    loss.backward()
    largest = max(float(p.grad.abs().max()) for p in method.trainable_parameters() if p.grad is not None)
    assert 0 < loss.item() < 1e-15 and 0 < largest < 1e-9
    (made,) = method.optimisers(1).values()
    before = method.student[0].weight.detach().clone()
    made.optimizer.step()
    assert (method.student[0].weight - before).abs().max() > 1e-6
    assert made.optimizer.defaults["eps"] == 1e-10 and made.optimizer.defaults["weight_decay"] == 0


def test_the_teacher_stays_as_it_is_and_batch_statistics_are_the_students():
    method = make(norm=True, alpha=0.0)
    frozen = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    method.train()
    student, teacher = method.both(Batch(images()))
    assert not torch.allclose(student, teacher)  # batch statistics against those of the initialisation
    optimizer = torch.optim.Adam(method.trainable_parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        method(images()).backward()
        optimizer.step()
    assert all(torch.equal(v, frozen[k]) for k, v in method.teacher.state_dict().items())
    assert not method.teacher.training and method.student[1].num_batches_tracked == 4
    assert method.counters["teacher_forwards"] == 4 * 12


def test_mixed_precision_is_off_where_it_could_not_hold_the_difference():
    for alpha, kind in ((1e-10, torch.float32), (0.5, torch.bfloat16)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            student, _ = make(alpha=alpha).both(Batch(images()))
        assert student.dtype == kind


# ---- bad input -----------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean() * self.scale


def test_bad_input():
    same = encoder()
    for call, line in (
        (lambda: RandomTeacher(same, same, sample=images(2)), "the same module"),
        (lambda: RandomTeacher(encoder(), "x", sample=images(2)), "teacher must be an nn.Module"),
        (lambda: RandomTeacher(encoder(), encoder(1)), "give sample="),
        (lambda: RandomTeacher(encoder(), encoder(1, norm=True), sample=images(2)), "same architecture"),
        (lambda: RandomTeacher(nn.Flatten(), sample=images(2)), "no parameters"),
        (lambda: RandomTeacher(Odd(), sample=images(2)), "must give features"),
        (lambda: make(alpha=1.5), "alpha must be"),
        (lambda: make(alpha=0.0, loss="mse").check(Batch(images())), "compute exactly the same in torch.float32"),
        (lambda: make(alpha=0.0, chunk_rows=4).check(Batch(images())), "no gradient there"),
        (lambda: limbeck.fit("random-teacher", images()), "needs student="),
    ):
        with pytest.raises(InputError, match=line):
            call()
    flat = RandomTeacher(encoder(), encoder(1), sample=images(2), pooling="flatten", **SMALL)
    flat.check(Batch(images()))
    with pytest.raises(InputError, match=r"features are 160 wide, but the head was made for 90"):
        flat.check(Batch(torch.randn(4, 1, 10, 10)))


# ---- running -------------------------------------------------------------------------------------------------------------


def test_resume_is_exact(tmp_path):
    def method() -> RandomTeacher:
        torch.manual_seed(3)
        return make(norm=True, steps=25, batch_size=10, evaluations=0)

    resumed_equals_uninterrupted(method, data(), tmp_path)


def test_fit_on_own_encoder_reports_all_probes(tmp_path):
    student = encoder(0)
    keys = set(student.state_dict())
    run = limbeck.fit(
        "random-teacher",
        (data().inputs, data().labels),
        student=student,
        val=data(30),
        test=data(45),
        out=tmp_path / "run",
        engine={"progress": False},
        steps=12,
        batch_size=20,
        evaluations=2,
        landscape=3,
        **SMALL,
    )
    assert [row["who"] for row in run.result["rows"]] == ["student", "teacher", "input"]
    assert all({"linear_probe", "knn_probe", "features"} <= set(row) for row in run.result["rows"])
    assert run.measures("input")["features"] == 64 and "flops" not in run.measures("input")
    assert run.measures("student")["parameters"] == run.measures("teacher")["parameters"]
    assert run.result["probes_fitted_on"] == "training data, 60 samples"
    assert base64.b64decode(run.result["pictures"][0]["png"]).startswith(b"\x89PNG")
    fitted, tested = (extract_features(student, part) for part in (data(), data(45)))
    assert run.measures("student")["linear_probe"] == LinearProbe(c=0.1).fit(*fitted).score(*tested)
    evaluated = [row for row in run.rows if row["split"] == "val"]
    assert len(evaluated) == 2 and {"kl", "linear_probe", "knn_probe"} <= set(evaluated[0])
    again = limbeck.load(tmp_path / "run", model=encoder(5)).content
    assert set(again.state_dict()) == keys
    torch.testing.assert_close(again(images()), student.eval()(images()))


def test_data_without_labels_is_enough():
    settings = {"steps": 3, "batch_size": 20, "landscape": 0, "engine": {"progress": False}, **SMALL}
    run = limbeck.fit("random-teacher", images(40), student=encoder(), teacher=encoder(1), test=data(45), **settings)
    assert run.result["probes_fitted_on"] == "half of the test data, 22 samples" and "pictures" not in run.result
    run = limbeck.fit("random-teacher", images(40), student=encoder(), val=data(30), test=data(45), **settings)
    assert run.result["probes_fitted_on"] == "validation data, 30 samples"
    method = make(steps=3)
    with pytest.raises(InputError, match="probes need labels"):
        method.probe(TensorData(images()), data())


def test_unlabelled_data_is_learnt_from():
    method = make(steps=3)
    (stage,) = method.stages(SemiSupervisedData(data(30), images(50)))
    assert len(stage.stream.data) == 80
    method.prepare_run(SemiSupervisedData(data(30), images(50)), None)
    assert len(method.probed[0]) == 30


def test_the_run_by_name_uses_an_encoder_without_normalisation(tmp_path):
    run = limbeck.fit(
        "random-teacher", train_size=100, steps=2, landscape=0, evaluations=0, engine={"progress": False}, **SMALL
    )
    assert type(run.method.student).__name__ == "VGG" and not run.method.config.views
    assert len(run.result["rows"]) == 3
    cls = RandomTeacher
    task = limbeck.tasks.base.load_task(cls.Setup.make(train_size=50))
    assert not task.train.augmented
    near, far = (cls.on_task(task, cls.Setup(), cls.Config.make(alpha=a, **SMALL), seed=4) for a in (0.0, 1.0))
    a, b = near.teacher.state_dict(), far.teacher.state_dict()
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert not torch.equal(near.student.stages[0][0].weight, far.student.stages[0][0].weight)
