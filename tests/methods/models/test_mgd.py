"""MGD: every term against a reference of its own, who gives what, where gradients go, resuming, mistakes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import limbeck
from limbeck.blocks.cutmix_masks import box_masks
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.semi import SemiSupervisedData
from limbeck.methods.models.mgd import MGD
from limbeck.networks import build
from limbeck.tasks.base import TaskConfig, load_task
from limbeck.tasks.shapes import draw_shapes
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
SIZE = 16
OFF: dict[str, Any] = {"weight_image": 0.0, "weight_region": 0.0}


def net(seed: int = 0, name: str = "segmenter-w4-l2-b1", classes: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return build(name, in_shape=(3, SIZE, SIZE), num_classes=classes)


def wide(seed: int = 1) -> nn.Module:
    return net(seed, "segmenter-w8-l2-b1")


def deep(seed: int = 2) -> nn.Module:
    return net(seed, "segmenter-w4-l3-b2")


def method(**settings: Any) -> MGD:
    return MGD(net(), wide(), deep(), **settings).eval()


def batch() -> Batch:
    images, labels = draw_shapes(10, SIZE, seed=0)
    x = images.float() / 255
    labels = labels[:2].clone()
    labels[0, :2] = -100
    return Batch(x[:2], labels, unlabelled=(x[2:6], x[6:]))


def data() -> SemiSupervisedData:
    images, labels = draw_shapes(20, SIZE, seed=0)
    x = images.float() / 255
    return SemiSupervisedData(TensorData(x[:6], labels[:6]), TensorData(x[6:]))


# ---- the equations ---------------------------------------------------------------------------------------------------------


def numpy_ce(logits: Tensor, labels: np.ndarray) -> float:
    z = logits.detach().double().numpy()
    z = z - z.max(1, keepdims=True)
    lp = z - np.log(np.exp(z).sum(1, keepdims=True))
    counted = labels != -100
    picked = np.take_along_axis(lp, np.where(counted, labels, 0)[:, None], 1)[:, 0]
    return float(-picked[counted].mean())


def regions(features: Tensor) -> np.ndarray:
    f = features.detach().double().numpy()
    h, w = f.shape[2:]
    edges = [(int(np.floor(i * h / 7)), int(np.ceil((i + 1) * h / 7))) for i in range(7)]
    sides = [(int(np.floor(i * w / 7)), int(np.ceil((i + 1) * w / 7))) for i in range(7)]
    q = np.stack([f[:, :, a:b, c:d].mean((2, 3)) for a, b in edges for c, d in sides], 2)
    q = q / np.linalg.norm(q, axis=1, keepdims=True)
    return np.einsum("bci,bcj->bij", q, q)


def test_every_term_equals_the_equation() -> None:
    made, b = method(), batch()
    torch.manual_seed(7)
    losses = made.losses(b)
    torch.manual_seed(7)
    m = box_masks(4, SIZE, SIZE)
    u0, u1 = b.unlabelled
    mixed = torch.where(m, u1, u0)
    with torch.no_grad():
        student, teachers = made.student, dict(made.teachers)
        labels = b.labels.numpy()
        expected = {"supervised": numpy_ce(student(b.inputs), labels)}
        own = student(mixed)
        for role, teacher in teachers.items():
            pseudo = teacher(b.inputs).argmax(1).numpy()
            pseudo[labels == -100] = -100
            expected[f"pixel_labelled_{role}"] = numpy_ce(student(b.inputs), pseudo)
            z = torch.where(m, teacher(u1), teacher(u0)).argmax(1).numpy()
            expected[f"pixel_mixed_{role}"] = numpy_ce(own, z)
        pooled = (own.double().mean((2, 3)) - teachers["deep"](mixed).double().mean((2, 3))).abs()
        expected["image"] = float(pooled.sum())
        difference = regions(student.embed(mixed)) - regions(teachers["wide"].embed(mixed))
        expected["region"] = float((difference**2).mean())
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=2e-4), name
    total = sum({"image": 0.002, "region": 100.0}.get(name, 1.0) * value for name, value in expected.items())
    assert losses.total.item() == pytest.approx(total, rel=2e-4)


def test_a_teacher_equal_to_the_student_asks_for_nothing_at_image_and_region_level() -> None:
    student = net()
    twin = net()
    twin.load_state_dict(student.state_dict())
    made = MGD(student, twin, twin, pixel_labelled=0.0, pixel_unlabelled=0.0).eval()
    losses = made.losses(batch())
    assert losses["image"].item() < 1e-4 and losses["region"].item() < 1e-10


class Constant(nn.Module):
    """Logits that are the first channels of the image, whatever they mean."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def test_pseudo_labels_are_taken_after_mixing_logits_and_never_from_the_mixed_image() -> None:
    seen: list[int] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return self.weight * x

    made = MGD(Constant(1.0), Spy(), None, pixel_teachers="wide", pixel_labelled=0.0, **OFF)
    u0, u1 = torch.zeros(4, 3, SIZE, SIZE), torch.zeros(4, 3, SIZE, SIZE)
    u0[:, 1], u1[:, 2] = 5.0, 5.0  # the first batch is of class 1 everywhere, the second of class 2
    labels = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    losses = made.losses(Batch(torch.zeros(1, 3, SIZE, SIZE), labels, unlabelled=(u0, u1)))
    assert seen == [8]  # both clean batches, and nothing else
    expected = -torch.log_softmax(torch.tensor([5.0, 0, 0]), 0)[0]  # right in every pixel of the mixed image
    assert losses["pixel_mixed_wide"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_levels_and_teachers_are_switches() -> None:
    def terms(**settings: Any) -> set[str]:
        return set(method(**settings).losses(batch()))

    mixed, labelled = {"pixel_mixed_wide", "pixel_mixed_deep"}, {"pixel_labelled_wide", "pixel_labelled_deep"}
    assert terms() == {"supervised", "image", "region"} | mixed | labelled
    assert terms(pixel_unlabelled=0.0) == {"supervised", "image", "region"} | labelled
    assert terms(pixel_labelled=0.0, weight_region=0.0) == {"supervised", "image"} | mixed
    assert terms(pixel_teachers="deep", **OFF) == {"supervised", "pixel_mixed_deep", "pixel_labelled_deep"}
    alone = MGD(net(), None, None, pixel_labelled=0.0, pixel_unlabelled=0.0, **OFF)
    assert set(alone.losses(Batch(batch().inputs, batch().labels))) == {"supervised"}
    assert alone.unlabelled_batches() == 0


def test_swapping_the_teachers_changes_image_and_region_level_only() -> None:
    found = {}
    for name, settings in {"paper": {}, "swapped": {"image_teacher": "wide", "region_teacher": "deep"}}.items():
        made = method(**settings)
        torch.manual_seed(3)
        found[name] = made.losses(batch())
    for term in found["paper"]:
        same = torch.equal(found["paper"][term], found["swapped"][term])
        assert same == (term not in ("image", "region")), term
    made = MGD(net(), deep(), wide(), image_teacher="wide", region_teacher="deep").eval()
    torch.manual_seed(3)
    other = made.losses(batch())
    torch.testing.assert_close(other["image"], found["paper"]["image"])
    torch.testing.assert_close(other["region"], found["paper"]["region"])


def test_padding_is_left_out_of_pseudo_labels() -> None:
    b = batch()
    valid = torch.zeros(4, SIZE, SIZE, dtype=torch.bool)
    padded = b.with_unlabelled(tuple({"inputs": u, "valid": valid} for u in b.unlabelled))
    losses = method().losses(padded)
    assert losses["pixel_mixed_wide"].item() == 0 and losses["pixel_mixed_deep"].item() == 0
    assert losses["image"].item() > 0


def test_teachers_in_training_mode_use_the_batch_and_keep_their_statistics() -> None:
    b = batch()
    made = method(teacher_bn_train=True, **OFF)
    before = {k: v.clone() for k, v in made.teachers.state_dict().items()}
    said = made.ask("wide", b.inputs)
    reference = wide().train()
    torch.testing.assert_close(said, reference(b.inputs).detach())
    assert not torch.allclose(said, method().ask("wide", b.inputs))
    made.train().losses(b)
    assert all(torch.equal(v, before[k]) for k, v in made.teachers.state_dict().items())
    assert not any(m.training for m in made.teachers.modules())


def test_the_published_constant_terms_are_logged_and_change_nothing() -> None:
    b = batch()
    values = []
    for wanted in (False, True):
        made = method(teacher_terms=wanted).train()
        torch.manual_seed(5)
        losses = made.losses(b)
        losses.total.backward()
        values.append((losses, [p.grad for p in made.student.parameters()], made.student.state_dict()))
    (plain, grads, state), (logged, same, after) = values
    assert set(logged.observed) == {f"{r}_{w}" for r in ("wide", "deep") for w in ("supervised", "against_student")}
    assert torch.equal(plain.total, logged.total) and all(map(torch.equal, grads, same))
    assert all(torch.equal(v, after[k]) for k, v in state.items())


def test_hard_pixels_instead_of_all() -> None:
    made = method(supervised="ohem", ohem_threshold=0.01, ohem_keep=0.1)
    b = batch()
    lp = -torch.nn.functional.cross_entropy(made.student(b.inputs), b.labels, reduction="none")[b.labels != -100]
    hardest = lp.sort().values[: round(0.1 * b.labels.numel())]
    assert made.losses(b)["supervised"].item() == pytest.approx(-hardest.mean().item(), rel=1e-5)


def test_a_sum_stays_a_sum_in_micro_batches() -> None:
    whole, half = method(), method(accumulate=2)
    b = batch()
    torch.manual_seed(1)
    assert whole.losses(b).weights["image"] == pytest.approx(0.002)
    assert half.losses(b.chunks(2)[0]).weights["image"] == pytest.approx(0.004)  # of which the engine takes a half
    assert method(accumulate=2, image_reduction="mean").losses(b).weights["image"] == pytest.approx(0.002)


# ---- gradients, loops, runs --------------------------------------------------------------------------------------------------


def test_gradients_go_into_the_student_and_nowhere_else() -> None:
    made = MGD(net(), wide(), deep()).train()
    assert not made.teachers.training
    before = {k: v.clone() for k, v in made.teachers.state_dict().items()}
    optimizer = torch.optim.SGD(made.trainable_parameters(), 0.1)
    b = batch()
    loss = made({"inputs": b.inputs, "labels": b.labels, "unlabelled": b.unlabelled})
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.student.parameters())
    assert all(p.grad is None for p in made.teachers.parameters())
    assert all(torch.equal(v, before[k]) for k, v in made.teachers.state_dict().items())
    assert {id(p) for p in made.trainable_parameters()} == {id(p) for p in made.student.parameters()}
    # wide: 2 labelled, 8 clean, 4 mixed for the regions; deep: the same for the image level
    assert made.counters["teacher_forwards"] == 28


class Plain(nn.Module):
    """Somebody's own segmenter: a tuple, and a decoder of any width."""

    def __init__(self, width: int, seed: int = 0, stride: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.decoder = nn.Sequential(nn.Conv2d(3, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.decoder(x)
        return self.head(f), f


def test_other_peoples_segmenters_of_different_width_and_stride() -> None:
    made = MGD(Plain(4), net(1), Plain(10, 2), feature_tap="decoder")
    made.check(batch())
    assert made.train()(batch()).item() > 0
    with pytest.raises(InputError, match=r"Plain names none: give feature_tap='path.of.layer'"):
        MGD(Plain(4), Plain(6, 1), Plain(10, 2))
    MGD(Plain(4), Plain(6, 1), Plain(10, 2), weight_region=0.0).check(batch())


def test_fit_on_own_modules(tmp_path) -> None:
    images, labels = draw_shapes(24, SIZE, seed=0)
    x = images.float() / 255
    student = net()
    keys = set(student.state_dict())
    run = limbeck.fit(
        "mgd",
        (x[:6], labels[:6]),
        unlabelled=x[6:],
        test=TensorData(images, labels),
        student=student,
        teacher=(wide(), deep()),
        steps=3,
        out=tmp_path / "run",
        engine={"progress": False},
    )
    rows = run.result["rows"]
    assert [r["who"] for r in rows] == ["student", "teacher wide", "teacher deep"]
    assert 0 <= rows[0]["miou"] <= 1 and rows[1]["parameters"] > rows[0]["parameters"]
    assert set(limbeck.load(tmp_path / "run").content.state_dict()) == keys
    assert run.result["pictures"] and run.result["cost"]["teacher_forwards"] > 0
    with pytest.raises(InputError, match="learns from unlabelled samples"):
        limbeck.fit("mgd", (x, labels), student=net(), teacher=(wide(), deep()), engine={"progress": False})
    with pytest.raises(InputError, match="unlabelled set is empty"):
        limbeck.fit("mgd", (x, labels), unlabelled=x[:0], student=net(), teacher=(wide(), deep()))


def test_by_name_teachers_are_trained_first_and_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    setup = {"task": "shapes", "labelled": 8, "image_size": SIZE, "train_size": 24, "teacher_steps": 4}
    task = load_task(TaskConfig(**{k: v for k, v in setup.items() if k != "teacher_steps"}))
    config = MGD.Config.make(steps=2)
    first, second = (MGD.on_task(task, MGD.Setup.make(**setup), config, progress=False) for _ in range(2))
    state = second.teachers.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.teachers.state_dict().items())
    assert type(first.teachers["wide"]).__name__ == "Segmenter" and len(first.teachers["deep"].levels[0].blocks) == 3
    with pytest.raises(InputError, match=r"takes two teachers, the wide and the deep one \(got 1\)"):
        MGD.teachers_for(task, MGD.Setup.make(teacher=("segmenter-w4-l2-b1",), **setup))
    with pytest.raises(InputError, match="'digits' knows no wide and deep teacher"):
        MGD.teachers_for(load_task(TaskConfig()), MGD.Setup.make())


def test_resume_is_exact(tmp_path) -> None:
    def make() -> MGD:
        return MGD(net(), wide(), deep(), steps=16, batch_size=2, unlabelled_batch_size=3, evaluations=0)

    resumed_equals_uninterrupted(make, data(), tmp_path, stops=(7, 12))


def test_a_teacher_that_knows_nothing_is_warned_about() -> None:
    labels = draw_shapes(6, SIZE, seed=0)[1]
    blind = Constant(1.0)
    x = torch.zeros(6, 6, SIZE, SIZE)
    x[:, 5] = 1  # always the last class
    made = MGD(Constant(0.5), blind, None, pixel_teachers="wide", **OFF)
    with pytest.warns(UserWarning, match="the wide teacher has .* no better than one class everywhere"):
        assert made.check_teachers(TensorData(x, labels))["wide"] < 0.1


# ---- mistakes ----------------------------------------------------------------------------------------------------------------


class Coarse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain(4, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def with_labels(value: Tensor) -> Batch:
    b = batch()
    return Batch(b.inputs, value, unlabelled=b.unlabelled)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: method().losses(Batch(batch().inputs, batch().labels)), "mixes two unlabelled batches and got 0"),
        (lambda: method().losses(batch().with_unlabelled(())), "mixes two unlabelled batches and got 0"),
        (lambda: method().losses(Batch(batch().inputs)), "needs labels"),
        (
            lambda: method().check(with_labels(batch().labels + 3)),
            "go from .* to 8, but the student has classes 0 to 5",
        ),
        (
            lambda: method().check(with_labels(torch.full((2, SIZE, SIZE), 255))),
            "if 255 marks pixels that do not count, write -100",
        ),
        (lambda: method().check(with_labels(torch.zeros(2))), "label maps must be integers of shape"),
        (lambda: method().check(with_labels(torch.full((2, SIZE, SIZE), -100))), "every pixel of the first batch"),
        (lambda: MGD(Coarse(), wide(), deep(), **OFF).check(batch()), "the student gives logits of 8x8 pixels"),
        (lambda: MGD(net(), Coarse(), deep(), **OFF).check(batch()), "the wide teacher gives logits of 8x8 pixels"),
        (lambda: MGD(net(), Coarse(), deep(), **OFF).losses(batch()), "the wide teacher gives logits of 8x8 pixels"),
        (lambda: MGD(net(), wide(), net(3, classes=4)).check(batch()), "student has 6 classes and the deep teacher 4"),
        (lambda: MGD(net(), None, deep()), "teacher_wide is needed by these settings and is None"),
        (lambda: MGD(net(), "wide", deep()), "teacher_wide must be an nn.Module, not str"),
        (lambda: method(box_area_low=0.6), "box_area_low 0.6 is above box_area_high 0.5"),
        (lambda: MGD.from_modules(net(), wide(), MGD.Config(), sample=batch()), r"needs teacher=\(wide, deep\)"),
        (lambda: MGD.from_modules(None, (wide(), deep()), MGD.Config(), sample=batch()), "needs student="),
    ],
)
def test_mistakes_are_one_line(call, line) -> None:
    with pytest.raises(InputError, match=line) as error:
        call()
    assert "\n" not in str(error.value)


def test_an_unknown_layer_proposes_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="unknown layer 'smoth'; did you mean smooth"):
        MGD(net(), wide(), deep(), feature_tap="smoth")


def test_the_student_may_be_no_teacher() -> None:
    student = net()
    with pytest.raises(InputError, match="teacher_deep and the student are the same module"):
        MGD(student, wide(), student)
