"""Cross pseudo supervision: the equation, the two branches, stages, resuming."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck.blocks.cutmix_masks import box_masks
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.core.semi import SemiSupervisedData
from limbeck.methods.models.cps import CPS
from limbeck.networks import build
from limbeck.tasks.base import TaskConfig, load_task
from limbeck.tasks.shapes import draw_shapes
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
SIZE = 16


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build("segmenter-w4-l2-b1", in_shape=(3, SIZE, SIZE), num_classes=6)


def batch() -> Batch:
    images, labels = draw_shapes(8, SIZE, seed=0)
    x = images.float() / 255
    return Batch(x[:2], labels[:2], unlabelled=(x[2:5], x[5:]))


def data() -> SemiSupervisedData:
    images, labels = draw_shapes(16, SIZE, seed=0)
    x = images.float() / 255
    return SemiSupervisedData(TensorData(x[:6], labels[:6]), TensorData(x[6:]))


@pytest.mark.parametrize("cutmix", [True, False])
def test_the_loss_equals_the_equation(cutmix: bool) -> None:
    method, b = CPS(net(), net(1), cross_weight=0.7, cutmix=cutmix).eval(), batch()
    torch.manual_seed(4)
    losses = method.losses(b)
    torch.manual_seed(4)
    m = box_masks(3, SIZE, SIZE) if cutmix else torch.zeros(3, 1, SIZE, SIZE, dtype=torch.bool)
    u0, u1 = b.unlabelled
    mixed = torch.where(m, u1, u0)
    one, two = method.student, method.peer
    said = [torch.where(m, f(u1), f(u0)).argmax(1) for f in (one, two)]
    supervised = F.cross_entropy(one(b.inputs), b.labels) + F.cross_entropy(two(b.inputs), b.labels)
    crossed = F.cross_entropy(one(mixed), said[1]) + F.cross_entropy(two(mixed), said[0])
    torch.testing.assert_close(losses["supervised"], supervised)
    torch.testing.assert_close(losses["cross"], crossed)
    torch.testing.assert_close(losses.total, supervised + 0.7 * crossed)


def test_both_networks_learn_and_start_apart() -> None:
    student = net()
    method = CPS(student)
    assert method.peer is not student
    assert not torch.equal(method.peer.classifier.weight, student.classifier.weight)
    method.train()(batch()).backward()
    assert all(p.grad is not None for p in (*student.parameters(), *method.peer.parameters()))
    with pytest.raises(InputError, match="same module"):
        CPS(student, student)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    with pytest.raises(InputError, match="cannot be drawn anew.*give the second network yourself"):
        CPS(Bare())


def test_labels_come_first_within_the_same_budget() -> None:
    stages = CPS(net(), steps=20).stages(data())
    assert [(s.name, s.steps) for s in stages] == [("labels", 5), ("cross", 15)]
    assert stages[0].stream.batch(0).unlabelled is None and len(stages[1].stream.batch(0).unlabelled) == 2
    assert [(s.name, s.steps) for s in CPS(net(), steps=20, label_fraction=0).stages(data())] == [("cross", 20)]


def test_resume_is_exact(tmp_path) -> None:
    def make() -> CPS:
        return CPS(net(), net(1), steps=16, batch_size=2, unlabelled_batch_size=3, evaluations=0)

    resumed_equals_uninterrupted(make, data(), tmp_path, stops=(3, 9))


def test_it_runs_by_name_and_keeps_the_student_only() -> None:
    task = load_task(TaskConfig(task="shapes", labelled=8, image_size=SIZE, train_size=24))
    made = CPS.on_task(task, CPS.Setup(), CPS.Config.make(steps=3))
    assert not torch.equal(made.student.classifier.weight, made.peer.classifier.weight)
    run = limbeck.fit(
        "cps", (task.train.labelled), unlabelled=task.train.unlabelled, student=net(), test=task.val, steps=3,
        engine={"progress": False},
    )  # fmt: skip
    assert [r["who"] for r in run.result["rows"]] == ["student"] and "agreement" not in run.result


def test_a_peer_of_other_classes_is_refused() -> None:
    other = build("segmenter-w4-l2-b1", in_shape=(3, SIZE, SIZE), num_classes=2)
    with pytest.raises(InputError, match="the peer has classes 0 to 1"):
        CPS(net(), other).check(batch())
