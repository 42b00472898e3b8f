"""SRe2L and the machinery of recovering and relabelling: the loss, blocks, side effects, labels, judging, resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck.blocks.soft_label_store import SoftLabelStore, label_bytes
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.core.method import fingerprint
from limbeck.methods.datasets import recover_base
from limbeck.methods.datasets.recover_base import lowest_crop, share_of_groups
from limbeck.methods.datasets.relabel_base import squeezed
from limbeck.methods.datasets.sre2l import SRe2L
from limbeck.tasks.base import TaskConfig, load_task
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
CLASSES, SIDE = 4, 8
QUIET = EngineConfig(progress=False, log_every=1)
MEAN, STD = (0.4,), (0.3,)


def data(side: int = SIDE, augment: Any = None) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, side, side), generator=generator, dtype=torch.uint8)
    return TensorData(images, torch.arange(40) % CLASSES, mean=MEAN, std=STD, augment=augment)


def teacher(classes: int = CLASSES, side: int = SIDE) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, classes),
    )
    with torch.no_grad():
        for part in (net[1], net[5]):
            part.running_mean.uniform_(-0.3, 0.3)
            part.running_var.uniform_(0.5, 1.5)
    return net


def student() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def method(**settings: Any) -> SRe2L:
    return SRe2L(data(), student, teacher(), **{"ipc": 2, "iterations": 6, "lr": 0.1, **settings})


def run(made: SRe2L) -> SRe2L:
    Engine(None, QUIET, seed=1).run(made, made.stages())
    return made


def test_the_loss_is_the_equation():
    made = method(ipc=1, r_bn=0.3, iterations=6)
    made.begin(0)
    losses = made.losses_at(0)
    net = made.teacher
    view = made.view.apply(made.pixels, made.draw(made.blocks[0][0], 0)[None])
    first = net[0](view)
    second = net[4](net[:4](view))

    def distance(at: torch.Tensor, bn: nn.Module) -> torch.Tensor:
        mean, variance = at.mean((0, 2, 3)), at.var((0, 2, 3), correction=0)
        return (mean - bn.running_mean).norm() + (variance - bn.running_var).norm()

    ce = F.cross_entropy(net(view), torch.arange(CLASSES))
    bn = 10 * distance(first, net[1]) + distance(second, net[5])
    torch.testing.assert_close(losses["ce"], ce)
    torch.testing.assert_close(losses["bn"], bn, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses.total, ce + 0.3 * bn, atol=1e-4, rtol=1e-4)


def test_images_are_what_adam_makes_of_noise_with_a_cosine_rate_and_clamping():
    made = run(method(ipc=1, lr=0.2))
    by_hand = method(ipc=1, lr=0.2)
    group = by_hand.blocks[0][0]
    x = by_hand.noise(group).requires_grad_()
    optimizer = torch.optim.Adam([x], betas=(0.5, 0.9))
    labels = torch.arange(CLASSES)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 + torch.cos(torch.tensor(torch.pi * step / 6)).item()) / 2
        ce, distance = by_hand.inversion()(x, labels, by_hand.draw(group, step)[None])
        optimizer.zero_grad()
        (ce + 0.1 * distance).sum().backward()
        optimizer.step()
        x.data.clamp_((0 - MEAN[0]) / STD[0], (1 - MEAN[0]) / STD[0])
    torch.testing.assert_close(made.images, x.detach(), atol=1e-5, rtol=1e-4)
    assert made.images.min() >= -MEAN[0] / STD[0] - 1e-6 and made.images.max() <= (1 - MEAN[0]) / STD[0] + 1e-6


def test_how_many_are_optimised_together_changes_nothing():
    together, apart = run(method(ipc=3)), run(method(ipc=3, images_together=1))
    assert (len(together.blocks), len(apart.blocks)) == (1, 3)
    torch.testing.assert_close(together.images, apart.images, atol=1e-4, rtol=1e-3)
    split = run(method(ipc=2, class_batch=2, images_together=4))
    assert len(split.blocks) == 2 and (split.images.flatten(1).std(1) > 0).all()


def test_recovering_lowers_both_terms_and_leaves_the_teacher_alone():
    made = method(iterations=60, crops=False, jitter=0)
    made.teacher[-1].weight.mul_(5)  # an untrained teacher is sure of nothing, and gives little gradient
    before = fingerprint(made.teacher)
    made.begin(0)
    start = made.losses_at(0)
    run(made)
    end = made.losses_at(59)
    assert end["ce"] < 0.7 * start["ce"] and end["bn"] < 0.8 * start["bn"]
    assert fingerprint(made.teacher) == before
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())
    assert made.counters["teacher_forwards"] == 60 * 2 * CLASSES
    noise = torch.randn_like(made.images)
    assert made.distance_of(made.images) < made.distance_of(noise)


def test_resume_is_exact_within_and_between_blocks(tmp_path):
    resumed_equals_uninterrupted(
        lambda: method(ipc=3, iterations=8, images_together=1), data(), tmp_path, stops=(5, 11, 17), every=4
    )


def test_processes_share_the_class_batches(monkeypatch):
    made = method(ipc=3)
    made.begin(0)

    def gradient() -> torch.Tensor:
        (found,) = torch.autograd.grad(made.losses_at(0).total, made.pixels)
        return found

    whole = gradient()
    parts = []
    for rank in range(2):
        monkeypatch.setattr(recover_base, "share_of_groups", lambda n, r=rank: (slice(r * n // 2, (r + 1) * n // 2), 2))
        parts.append(gradient())
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(recover_base, "share_of_groups", lambda n: (slice(0, 0), 4))
    assert not gradient().any()
    assert share_of_groups(5) == (slice(0, 5), 1)


def test_static_labels_are_the_teachers_on_the_stored_images():
    made = run(method(temperature=2.0))
    stored = made.distilled()
    with torch.no_grad():
        expected = torch.softmax(made.teacher(stored.inputs) / 2, 1)
    torch.testing.assert_close(stored.labels, expected.half().float())
    assert stored.recipe["temperature"] == 2.0 and stored.recipe["recovered"]["lowest_crop"] == 0.35
    assert torch.equal(stored.inputs, made.made().inputs)
    codes = (stored.inputs * STD[0] + MEAN[0]) * 255
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    averaged = method(temperature=2.0, label_views=3, student_crop=0.4)
    averaged.images.copy_(made.images)
    policy = averaged.policy("none")
    with torch.no_grad():
        said = [made.teacher(policy.show(stored.inputs, policy.plan(e, 8), torch.arange(8))) for e in range(3)]
    torch.testing.assert_close(averaged.static_labels(stored.inputs), torch.softmax(sum(said) / 6, 1))


def test_bytes_count_what_must_be_kept():
    images = 2 * CLASSES * SIDE * SIDE + 8
    hard = method(labels="hard").distilled()
    assert hard.nbytes == images + 2 * CLASSES and not hard.soft
    assert method().distilled().nbytes == images + 2 * CLASSES * 2 * CLASSES
    stored = method(labels="stored", student_epochs=7)
    assert stored.distilled().extra_bytes == label_bytes(7, 2 * CLASSES, CLASSES, stored.policy())
    online = method(labels="online")
    assert online.distilled().extra_bytes == sum(
        t.numel() * t.element_size() for t in online.teacher.state_dict().values()
    )


def quick(**settings: Any) -> SRe2L:
    return method(judge_seeds=2, judge_steps=3, judge_networks=("mlp-8",), student_epochs=2, **settings)


def test_soft_labels_are_judged_beside_random_images_with_the_same_labels():
    made = run(quick())
    contestants = made.contestants()
    assert list(contestants) == [
        "distilled, soft labels",
        "distilled, hard labels",
        "random, teacher's labels",
        "random, same bytes",
        "whole set",
    ]
    real = contestants["random, teacher's labels"]
    assert real.nbytes == contestants["distilled, soft labels"].nbytes and real.index is not None
    torch.testing.assert_close(real.labels, made.static_labels(real.inputs).half().float())
    assert contestants["random, same bytes"].nbytes <= made.distilled().nbytes
    rows = made.evaluate(data())["rows"]
    assert [r["who"] for r in rows] == list(contestants) and all(0 <= r["accuracy"] <= 1 for r in rows)


@pytest.mark.parametrize("labels", ["online", "stored"])
def test_labels_of_views_are_judged_apart_and_kept_with_the_artifact(tmp_path, labels):
    made = run(quick(labels=labels))
    rows = made.evaluate(data())["rows"]
    assert [r["who"] for r in rows[:2]] == ["distilled, labels of views", "random, labels of views"]
    assert rows[0]["samples"] == rows[1]["samples"] == 2 * CLASSES
    images = made.made()
    if labels == "online":
        assert rows[0]["bytes"] == made.distilled().nbytes
    else:
        assert rows[0]["bytes"] > images.nbytes + label_bytes(2, 2 * CLASSES, CLASSES, made.policy())
    made.save_artifact(tmp_path, {"method": "sre2l"})
    back = limbeck.load(tmp_path).content
    torch.testing.assert_close(back.inputs, images.inputs)
    if labels == "stored":
        store = SoftLabelStore(tmp_path / "labels", images.inputs)
        assert len(store) == 2
        views, said = store.fetch(1, torch.arange(8))
        with torch.no_grad():
            torch.testing.assert_close(said, made.teacher(views), atol=5e-3, rtol=1e-2)
    else:
        found = limbeck.load(tmp_path / "teacher", model=teacher()).content
        assert fingerprint(found) == fingerprint(made.teacher)


def test_crops_can_be_switched_off_and_small_images_keep_most_of_themselves():
    assert method().crops(0) == method().crops(5) == (0.35, 1.0)
    assert method(lowest_crop=0.2).crops(3) == (0.2, 1.0)
    assert method(crops=False).crops(3) == (1.0, 1.0)
    assert lowest_crop(None, (3, 32, 32)) == 0.08 and lowest_crop(None, (1, 28, 28)) == 0.35
    whole = method(crops=False, jitter=0)
    assert torch.equal(whole.draw(whole.blocks[0][0], 2)[:4], torch.tensor([0.0, 0, 1, 1]))


def test_flips_are_those_of_the_data():
    class Mirrored:
        flip = True

        def draw(self, n: int, generator: torch.Generator) -> torch.Tensor:
            return torch.zeros(n, 1)

        def apply(self, inputs: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
            return inputs

    assert method().flip == 0 and SRe2L(data(augment=Mirrored()), student, teacher()).flip == 0.5


def test_a_teacher_without_batch_normalisation_is_matched_to_recorded_moments():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    made = SRe2L(data(), student, net, ipc=1, iterations=40, crops=False, jitter=0, lr=0.2)
    real = data().fetch(torch.arange(40), None).inputs
    assert made.distance_of(real) < 1e-3
    assert made.distance_of(run(made).images) < 0.5 * made.distance_of(made.noise(made.blocks[0][0]))


def test_pixels_without_a_known_normalisation_keep_the_range_of_the_real_ones():
    x = torch.rand(20, 1, SIDE, SIDE) * 3 - 1
    made = run(SRe2L((x, torch.arange(20) % CLASSES), None, teacher(), ipc=1, iterations=4, lr=5.0))
    assert made.images.min() == x.min() and made.images.max() == x.max()


def test_more_images_than_real_ones_can_be_made():
    assert len(method(ipc=12).images) == 48  # there are 10 real ones of each class


def test_the_dry_run_says_what_is_wrong():
    sample = data().fetch(torch.arange(4), None)
    made = method()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    made.check(sample)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    with pytest.raises(InputError, match=r"logits have shape \(1, 5\); expected \(1, 4\)"):
        SRe2L(data(), student, teacher(5)).check(sample)
    with pytest.raises(InputError, match="no BatchNorm layer"):
        SRe2L(data(), student, student(), statistics="running").check(sample)
    with pytest.raises(InputError, match="no LayerNorm or GroupNorm"):
        SRe2L(data(), student, student()).check(sample)
    with pytest.raises(InputError, match=r"sre2l needs teacher="):
        SRe2L(data(), student)
    with pytest.raises(InputError, match="sre2l makes images"):
        SRe2L((torch.rand(20, 5), torch.arange(20) % CLASSES), student, teacher())
    with pytest.raises(InputError, match="class_batch must be int >= 2"):
        method(class_batch=1)
    with pytest.warns(UserWarning, match="no better than always guessing one class"):
        made.prepare_run(data(), data())


def test_fit_on_own_data_and_modules(tmp_path):
    run = limbeck.fit(
        SRe2L,
        data(),
        student=student,
        teacher=teacher(),
        test=data(),
        ipc=1,
        iterations=3,
        judge_steps=2,
        judge_seeds=1,
        judge_networks=("mlp-8",),
        out=tmp_path / "run",
        engine={"progress": False},
    )
    assert run.measures("distilled, soft labels")["samples"] == CLASSES
    back = limbeck.load(tmp_path / "run").content
    made = run.method.distilled()
    torch.testing.assert_close(back.inputs, made.inputs)
    torch.testing.assert_close(back.labels, made.labels)
    assert back.recipe["recovered"]["curriculum"] == "none"


def test_the_teacher_is_trained_on_crops_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    monkeypatch.setattr("limbeck.tasks.teachers.MIN_STEPS", 5)
    task = load_task(TaskConfig.make(task="digits", train_size=64))
    first = squeezed(task, "convnet-w4-d2-batch", 0.7, epochs=1, progress=False)
    again = squeezed(task, "convnet-w4-d2-batch", 0.7, epochs=1, progress=False)
    other = squeezed(task, "convnet-w4-d2-batch", 0.5, epochs=1, progress=False)
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    made = SRe2L.on_task(
        task,
        SRe2L.Setup.make(teacher=("convnet-w4-d2-batch",), teacher_epochs=1),
        SRe2L.Config.make(ipc=1, iterations=2),
        progress=False,
    )
    assert fingerprint(made.teacher) == fingerprint(first) and made.network_name == "convnet-w32-d2"
