"""DATM: the range, the start from what experts get right, soft labels, and steps that change nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.methods.datasets.datm import DATM
from tests.helpers import resumed_equals_uninterrupted
from tests.methods.datasets.trajectory_cases import SMALL, Stepper, experts, network, real

torch.set_num_threads(1)


def make(walk=None, **settings):
    return DATM(real(), network, experts=walk or experts(3), **{**SMALL, "threshold": 1e9, **settings})


def logits_of(method, k, images):
    return method.student(method.experts.snapshot(k, -1), images)


def test_initial_labels_average_the_experts_that_are_right():
    method = make()
    images, labels = method.real_samples(torch.arange(20))
    found = method.expert_labels(images, labels)
    for n in range(20):
        z = [logits_of(method, k, images[n : n + 1])[0] for k in range(3)]
        right = [v for v in z if int(v.argmax()) == int(labels[n])]
        torch.testing.assert_close(found[n], torch.stack(right or z).mean(0), rtol=1e-4, atol=1e-5)
    everyone = [
        sum(int(logits_of(method, k, images[n : n + 1]).argmax()) == labels[n] for k in range(3)) for n in range(20)
    ]
    assert 0 in everyone and any(0 < e < 3 for e in everyone)  # the test saw the guarded case and mixed ones


def test_images_are_those_that_the_first_expert_gets_right_then_the_next():
    method = make(ipc=9)
    ids = method.correct_images(9)
    labels = method.classes.labels
    assert ids.shape == (3, 9) and len(set(ids.flatten().tolist())) == 27
    assert torch.equal(labels[ids], torch.arange(3)[:, None].expand(3, 9))
    generator = torch.Generator().manual_seed(limbeck_seed(method))
    torch.randperm(45, generator=generator)
    order = torch.randperm(3, generator=generator).tolist()
    images = method.real_samples(torch.arange(45))[0]
    right = torch.stack([logits_of(method, k, images).argmax(1) == labels for k in order])  # (K, N)
    first = torch.where(right.any(0), right.float().argmax(0), 3)
    for c in range(3):
        ranks = first[ids[c]].tolist()
        assert ranks == sorted(ranks)
        left = set((labels == c).nonzero().flatten().tolist()) - set(ids[c].tolist())
        assert min((int(first[n]) for n in left), default=3) >= max(ranks)  # nobody better was left out


def limbeck_seed(method):
    from limbeck.core.data import mix_seed

    return mix_seed(method.seed, 79)


def test_the_start_sets_images_and_labels():
    method = make()
    before = method.images.detach().clone()
    method.start()
    ids = method.correct_images(2).flatten()
    images, labels = method.real_samples(ids)
    assert torch.equal(method.images.detach(), images) and not torch.equal(before, images)
    torch.testing.assert_close(method.label_logits.detach(), method.expert_labels(images, labels))
    grids = make(factor=2)
    grids.start()
    assert grids.images.shape == before.shape and grids.label_logits.shape == (6, 3)


def test_labels_enter_as_softmax_once_and_learn():
    method = make(diffaug="none", batch_synthetic=6, inner_steps=1)
    method.start()
    segment = method.segment_at(0)
    theta = segment.start.clone().requires_grad_()
    logits = method.label_logits.detach().clone().requires_grad_()
    log_p = F.log_softmax(method.student(theta, method.images.detach()), -1)
    ce = -(F.softmax(logits, -1) * log_p).sum(1).mean()
    (g,) = torch.autograd.grad(ce, theta, create_graph=True)
    end = segment.start - 0.05 * g
    loss = (end - segment.target).square().sum() / (segment.start - segment.target).square().sum()
    found = method.losses_at(0).total
    torch.testing.assert_close(found.detach(), loss.detach())
    (expected,) = torch.autograd.grad(loss, logits)
    (gradient,) = torch.autograd.grad(found, method.label_logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
    made = method.distilled()
    torch.testing.assert_close(made.labels, method.label_logits.detach().softmax(-1), rtol=1e-3, atol=1e-3)


def test_a_skipped_step_leaves_everything_as_it_is_momentum_too():
    method = make(threshold=1e9)
    method.start()
    stepper = Stepper(method.optimisers(20))
    for step in range(3):
        stepper.step = step
        method.update(None, stepper)
    everything = lambda: [  # noqa: E731
        t.detach().clone()
        for t in (method.images, method.label_logits, method.step_size, *(
            s["momentum_buffer"] for o in stepper.optimised.values() for s in o.optimizer.state.values()
        ))
    ]  # fmt: skip
    before = everything()
    assert len(before) == 6 and int(method.skipped) == 0
    method.config = method.config.replace(threshold=1e-6)
    values = method.update(None, stepper)
    assert int(method.skipped) == 1 and float(values["skipped"]) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    method.config = method.config.replace(threshold=1e9)
    method.update(None, stepper)
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def test_a_segment_that_diverges_is_skipped_and_logged_with_a_number():
    method = make(threshold=1.0, step_size=1e30)
    stepper = Stepper(method.optimisers(20))
    values = method.update(None, stepper)
    assert float(values["skipped"]) == 1 and torch.isfinite(values["loss"])


def test_fixed_and_hard_labels():
    fixed = make(soft_labels="fixed")
    fixed.start()
    assert not fixed.label_logits.requires_grad and set(fixed.optimisers(5)) == {"images", "step_size"}
    assert fixed.distilled().soft
    hard = make(soft_labels="none")
    hard.start()
    assert not hard.distilled().soft and "labels" not in hard.optimisers(5)
    assert torch.isfinite(hard.losses_at(0).total)


def test_the_range_follows_from_the_size_of_the_set():
    tiny = DATM(TensorData(*real(3000)), network, **{**SMALL, "ipc": 1, "max_start": None, "expert_epochs": 40})
    large = DATM(real(), network, **{**SMALL, "ipc": 10, "max_start": None, "expert_epochs": 40})
    assert (tiny.schedule.min_start, tiny.schedule.max_start) == (0, 6)  # a tenth of a percent
    assert (large.schedule.min_start, large.schedule.max_start) == (16, 26)
    manual = make(min_start=1, max_start=6, cur_max=3, expand_end=10)
    assert [manual.schedule.upper(i) for i in (0, 5, 10)] == [3, 4, 6]
    with pytest.raises(InputError, match="need 9 epochs"):
        make(max_start=8)


def test_a_run_resumes_exactly(tmp_path):
    resumed_equals_uninterrupted(make, None, tmp_path)


def test_it_is_judged_beside_real_images_with_the_experts_labels():
    method = make(steps=3)
    Engine(None, EngineConfig(progress=False), seed=0).run(method, method.stages())
    found = method.evaluate(TensorData(*real(12, 4)))
    assert [row["who"] for row in found["rows"]] == [
        "distilled, soft labels", "distilled, hard labels", "random, same bytes", "whole set", "random, experts' labels",
    ]  # fmt: skip
    assert found["skipped_steps"] == 0
    assert len(method.random_with_expert_labels()) == 6


def test_presets_are_valid():
    assert DATM.Config.make("paper").cur_max == 10 and DATM.Config.make("large").min_start == 40
