"""Trajectory matching: the published update written out, plug-ins, resume, experts, and that it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import limbeck
from limbeck.blocks.formation import flip_union
from limbeck.blocks.trajectories import TrajectoryBuffer
from limbeck.blocks.trajectory_matching import draw_batches
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.methods.datasets.mtt import MTT
from tests.helpers import resumed_equals_uninterrupted
from tests.methods.datasets.trajectory_cases import SMALL, Stepper, experts, network, real

torch.set_num_threads(1)


def make(cls=MTT, walk=None, **settings):
    settings = {**SMALL, **settings}
    return cls(real(), network, experts=experts() if walk is None else walk, **settings)


@pytest.mark.parametrize("union", [False, True])
@pytest.mark.parametrize("factor", [1, 2])
def test_one_step_is_the_published_one(union, factor):
    method = make(diffaug="crop", factor=factor)
    if union:
        method.formation = flip_union
    segment = method.segment_at(7)
    images, beta = method.images.detach().clone().requires_grad_(), torch.tensor(0.05, requires_grad=True)
    theta = segment.start.clone().requires_grad_()
    batches = draw_batches(6, 4, 3, method._generator(7, 71))
    for i, at in enumerate(batches):
        x, y = method.decode(images[at], method.labels[at])
        if union:
            x, y = torch.cat([x, x.flip(-1)]), torch.cat([y, y])
        x = method.augment.apply(x, method.augment.draw(len(x), method._generator(7, i, 67)))
        (g,) = torch.autograd.grad(F.cross_entropy(method.student(theta, x), y), theta, create_graph=True)
        theta = theta - beta * g
    loss = (theta - segment.target).square().sum() / (segment.start - segment.target).square().sum()
    expected = torch.autograd.grad(loss, [images, beta])
    losses = method.losses_at(7)
    found = torch.autograd.grad(losses.total, [method.images, method.step_size])
    torch.testing.assert_close(losses.total, loss)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-7)


def test_segments_are_a_function_of_seed_and_step_within_the_range():
    method = make(min_start=2, max_start=5)
    found = [method.segment_at(step) for step in range(40)]
    assert {s.epoch for s in found} == {2, 3, 4} and {s.expert for s in found} == {0, 1}
    again = method.segment_at(13)
    assert torch.equal(again.points, found[13].points) and len(again.points) == 3
    other = MTT(real(), network, experts=experts(), seed=1, **{**SMALL, "min_start": 2, "max_start": 5})
    assert [s.epoch for s in found] != [other.segment_at(step).epoch for step in range(40)]


def test_updates_move_images_and_step_size_and_keep_it_positive():
    method = make(lr_step=1e4)
    stepper = Stepper(method.optimisers(20))
    before = method.images.detach().clone()
    method.update(None, stepper)
    assert not torch.equal(before, method.images.detach())
    for step in range(1, 6):
        stepper.step = step
        method.update(None, stepper)
        assert float(method.step_size.detach()) >= 0.05e-3 * 0.999
    assert method.distilled().recipe["lr"] == pytest.approx(float(method.step_size.detach()))


def test_the_three_gradients_agree_in_value():
    losses = {mode: make(gradient=mode).losses_at(0) for mode in ("adjoint", "unroll", "tesla")}
    values = [float(v.total.detach()) for v in losses.values()]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_it_learns_to_follow_the_experts():
    method = MTT(
        real(),
        network,
        **{
            **SMALL,
            "steps": 40,
            "expert_count": 2,
            "expert_epochs": 6,
            "expert_batch_size": 15,
            "expert_lr": 0.1,
            "max_start": 4,
        },
        lr_step=1e-3,
    )
    method.show_progress = False
    method.prepare_run(method.real, None)
    before = [float(method.losses_at(s).total.detach()) for s in range(100, 120)]
    Engine(None, EngineConfig(progress=False), seed=0).run(method, method.stages())
    after = [float(method.losses_at(s).total.detach()) for s in range(100, 120)]
    assert sum(after) < 0.9 * sum(before)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def test_a_run_resumes_exactly(tmp_path):
    resumed_equals_uninterrupted(make, None, tmp_path)


def test_fit_builds_the_experts_judges_and_writes_the_step_size(tmp_path):
    x, y = real()
    run = limbeck.fit(
        MTT,
        TensorData(x, y),
        test=real(30, 1),
        student=network,
        out=tmp_path / "run",
        engine={"progress": False},
        **{**SMALL, "steps": 3, "expert_count": 2, "expert_epochs": 5, "expert_batch_size": 15, "max_start": 3},
    )
    assert [row["who"] for row in run.result["rows"]] == ["distilled", "random, same bytes", "whole set"]
    kept = limbeck.load(tmp_path / "run").content
    assert kept.recipe["lr"] == pytest.approx(float(run.method.step_size.detach()))
    assert len(list((tmp_path / "cache" / "experts").glob("*/trajectories.json"))) == 1


def test_experts_may_come_from_a_folder_and_are_checked(tmp_path):
    experts().save(tmp_path / "walk")
    method = MTT(real(), network, experts=tmp_path / "walk", **SMALL)
    assert method.experts is not None and method.experts.epochs == 8
    with pytest.raises(InputError, match="must be of one architecture"):
        make(walk=TrajectoryBuffer([torch.zeros(9, 10)]))
    with pytest.raises(InputError, match=r"need 10 epochs, but the experts have 8"):
        make(max_start=9)
    with pytest.raises(InputError, match="has no experts yet"):
        MTT(real(), network, **SMALL).losses_at(0)
    with pytest.raises(InputError, match="losses_at"):
        make()((torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long)))
    with pytest.raises(InputError, match="needs network"):
        MTT(real(), None, **SMALL)


def test_without_a_bound_segments_start_wherever_they_fit():
    assert (make(max_start=None).schedule.min_start, make(max_start=None).schedule.max_start) == (0, 7)


def test_plain_experts_do_not_depend_on_settings_that_change_nothing():
    assert make(alpha=0.9, adaptive=False).expert_config() == make().expert_config()
    assert make(alpha=0.9, rho=0.1).expert_config() != make(rho=0.1).expert_config()


def test_accumulated_errors_are_those_of_chained_segments():
    method, walk = make(diffaug="none", batch_synthetic=6), experts(2, 8, seed=5)
    found = method.accumulated_errors(walk, (1, 2))
    theta = walk.snapshot(1, 0)
    for _ in range(6):  # two segments of three steps, on all images each time
        leaf = theta.clone().requires_grad_()
        loss = F.cross_entropy(method.student(leaf, method.images.detach()), method.labels)
        theta = theta - 0.05 * torch.autograd.grad(loss, leaf)[0]
    expected = (theta - walk.snapshot(1, 4)).norm() ** 2 / (walk.snapshot(1, 0) - walk.snapshot(1, 4)).norm() ** 2
    torch.testing.assert_close(found[1, 1], expected, rtol=1e-4, atol=1e-6)
    assert found.shape == (2, 2)
    with pytest.raises(InputError, match="leave the trajectory"):
        method.accumulated_errors(walk, (5,))


def test_the_paper_preset_is_valid():
    assert MTT.Config.make("paper").inner_steps == 30


def test_it_hosts_the_flip_plug_in_and_whitening():
    from limbeck.methods.datasets.fyi import FYI

    plain, flipped = make(steps=3, zca=True), FYI(make(steps=3, zca=True))
    for method in (plain, flipped):
        method.prepare_run(None, None)
        Engine(None, EngineConfig(progress=False), seed=0).run(method, method.stages(None))
    assert plain.distilled().extra_bytes > 0 and len(flipped.distilled()) == 6
    assert not torch.equal(plain.images.detach(), flipped.host.images.detach())
