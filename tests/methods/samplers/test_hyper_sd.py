"""Hyper-SD: its losses against plain arithmetic, its stages, what each part may touch, its limits, resuming."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import limbeck
from limbeck.blocks.diffusion_discriminators import LevelDiscriminator, PairDiscriminator
from limbeck.blocks.lora import LoRA
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.extra_time import TargetTime
from limbeck.diffusion.schedules import EDM, Flow, Schedule, VPCosine
from limbeck.diffusion.segments import step_target
from limbeck.diffusion.solvers import ode_solve
from limbeck.losses.feedback import Reward
from limbeck.methods.samplers import feedback_base
from limbeck.methods.samplers.hyper_sd import HyperSD
from limbeck.networks.diffusion_mlp import DiffusionMLP
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
LABELS = torch.arange(3).repeat(8)
PULL = Reward(lambda x, c: -x.square().sum(1), name="pull")


def network(schedule: Schedule | None = None, prediction: str = "v", **more: Any) -> Denoiser:
    torch.manual_seed(0)
    made = DiffusionMLP((2,), width=16, blocks=1, num_classes=3, time_scale=1.0 if more.get("precond") else 1e-3)
    nn.init.normal_(made.last.weight, std=0.3)
    return Denoiser(made, schedule or VPCosine(), prediction, null_cond=torch.tensor(3), **more).eval()


def method(teacher: Denoiser | None = None, **settings: Any) -> HyperSD:
    options = {"steps": 8, "batch_size": 8, "points": 16, "pairs": 24, "teacher_nfe": 4, **settings}
    return HyperSD(teacher or network(), LABELS, **options)


def batch(n: int = 6) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(n, 2), torch.arange(n) % 3)


def data() -> TensorData:
    torch.manual_seed(3)
    return TensorData(torch.randn(24, 2), LABELS)


def run(made: HyperSD) -> HyperSD:
    Engine(None, EngineConfig(progress=False), seed=1).run(made, made.stages(data(), None, seed=0))
    return made


def stirred(made: HyperSD) -> HyperSD:
    """With a target that is not the student."""
    with torch.no_grad():
        for p in made.target.parameters():
            p.add_(0.05)
    return made


def jump_of(x: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One step of DDIM with a v-prediction on the cosine schedule, written out."""
    a, b = torch.cos(t * math.pi / 2)[:, None], torch.sin(t * math.pi / 2)[:, None]
    c, d = torch.cos(s * math.pi / 2)[:, None], torch.sin(s * math.pi / 2)[:, None]
    return c * (a * x - b * v) + d * (b * x + a * v)


# ---- segmented consistency -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_loss_by_hand(stage: int):
    made, given = stirred(method(adversary="none", guidance=2.0)), batch(40)
    made.at_stage = stage
    torch.manual_seed(2)
    losses = made.losses(given)
    torch.manual_seed(2)
    n, e = made.segments.draw(40)
    x0, c, blank = given.inputs, given.labels, torch.full((40,), 3)
    t, before, end = n / 16, (n - 1) / 16, e / 16
    noise = torch.randn(40, 2)
    x = torch.cos(t * math.pi / 2)[:, None] * x0 + torch.sin(t * math.pi / 2)[:, None] * noise
    teacher, target, student = made.teacher.module, made.target.module, made.student.module
    without = teacher(x, 1000 * t, blank)
    ahead = jump_of(x, without + 2 * (teacher(x, 1000 * t, c) - without), t, before)
    there = jump_of(ahead, target(ahead, 1000 * before, c), before, end)
    wanted = torch.where((e == n - 1)[:, None], ahead, there)
    p = jump_of(x, student(x, 1000 * t, c), t, end)
    assert losses["mse"].item() == pytest.approx((p - wanted).square().mean().item(), rel=1e-4)
    weight = (1.0, 1.0, 0.5, 0.25)[stage]
    assert losses.total.item() == pytest.approx(weight * losses["mse"].item(), rel=1e-5)


def test_at_the_last_point_the_target_is_the_teachers_step():
    made = stirred(method(adversary="none"))
    jump = made.draw(torch.randn(64, 2), torch.arange(64) % 3)
    assert bool(jump.last.any()) and not bool(jump.last.all())
    ahead = made.followed_step(jump, 1.0)
    found = made.aim(jump)
    torch.testing.assert_close(found[jump.last], ahead[jump.last], rtol=0, atol=0)
    assert bool((found[~jump.last] != ahead[~jump.last]).any(1).all())
    zero = made.draw(torch.randn(400, 2), torch.arange(400) % 3)
    assert bool((zero.before == 0).any()) and bool(torch.isfinite(made.aim(zero)).all())


def test_gradients_reach_the_student_alone():
    made = method(adversarial_weights=(1.0,))
    made(batch()).backward()
    assert all(p.grad is not None for n, p in made.student.named_parameters() if "classes" not in n)
    assert made.discriminator is not None
    others = [made.teacher, made.target, made.ema, made.kept, made.discriminator]
    assert all(p.grad is None for part in others for p in part.parameters())
    assert all(p.requires_grad for p in made.discriminator.parameters())


def test_the_variants_are_options():
    x0, cond = torch.randn(300, 2), torch.arange(300) % 3
    ctm = method(**HyperSD.Config.preset_values("ctm"))
    assert ctm.discriminator is None and [s.name for s in ctm.stages(data())] == ["segments-1"]
    jump = ctm.draw(x0, cond)
    assert len(jump.end.unique()) == 16  # any point before n - 1
    phased = method(**HyperSD.Config.preset_values("pcm"))
    assert isinstance(phased.discriminator, LevelDiscriminator)
    assert set((phased.draw(x0, cond).end * 8).tolist()) == set(range(8))  # borders of eight segments
    latent = method(segments=(1,), ends="zero", gamma=1.0, adversary="none")
    assert bool((latent.draw(x0, cond).end == 0).all())


def test_the_previous_stages_ode_can_be_followed():
    made = method(adversary="none", solver_teacher="previous-stage")
    jump = made.draw(torch.randn(9, 2), torch.arange(9) % 3)
    own = made.followed_step(jump, 1.0)
    made.at_stage = 1
    torch.testing.assert_close(made.followed_step(jump, 1.0), own)  # the kept network is the teacher still
    with torch.no_grad():
        made.kept["8"].module.last.bias.add_(1.0)
    moved = made.followed_step(jump, 1.0)
    assert bool((moved != own).any(1).all())
    made.at_stage = 0
    torch.testing.assert_close(made.followed_step(jump, 1.0), own)


def test_noise_on_the_input_reaches_the_network_and_not_the_jump():
    made = method(adversary="none", input_noise_std=0.3)
    jump = made.draw(torch.randn(9, 2), torch.arange(9) % 3)
    torch.manual_seed(4)
    found = made.leap(jump)
    torch.manual_seed(4)
    v = made.student.module(jump.x_t + 0.3 * torch.randn(9, 2), 1000 * jump.t, jump.cond)
    seen = jump.x_t + 0 * v
    torch.manual_seed(4)
    noisy = jump.x_t + 0.3 * torch.randn(9, 2)
    a, b = torch.cos(jump.t * math.pi / 2)[:, None], torch.sin(jump.t * math.pi / 2)[:, None]
    x0 = a * noisy - b * v
    eps = (seen - a * x0) / b
    c, d = torch.cos(jump.end * math.pi / 2)[:, None], torch.sin(jump.end * math.pi / 2)[:, None]
    torch.testing.assert_close(found, c * x0 + d * eps, rtol=1e-4, atol=1e-4)


class ExactJump(TargetTime):
    """For one Gaussian (mean m, standard deviation s), the prediction that makes one step of DDIM land on the exact trajectory."""

    shape = (2,)
    m, s = torch.tensor([[0.4, -0.7]]), 0.5

    def forward(self, x: Tensor, model_time: Tensor, cond: Any = None) -> Tensor:
        end = (self.default(model_time) if self._told is None else self._told).double()  # the share is t itself here
        t = model_time.double() / 1000
        schedule = self.schedule

        def std(at: Tensor) -> Tensor:
            return torch.sqrt((schedule.alpha(at) * self.s) ** 2 + schedule.sigma(at) ** 2)[:, None]

        alpha = [schedule.alpha(at)[:, None] for at in (t, end)]
        there = alpha[1] * self.m + std(end) / std(t) * (x - alpha[0] * self.m)
        return step_target(x, there, t, end, schedule).to(x.dtype)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 16])
def test_a_student_with_exact_jumps_reaches_the_trajectorys_end_in_any_number_of_steps(steps: int):
    schedule = VPCosine()
    teacher = network()
    made = HyperSD(teacher, LABELS, s_embedding=True, adversary="none", points=16, keep_stages=False)
    exact = ExactJump(teacher.module, schedule, 16)
    made.student = Denoiser(exact, schedule, "x0")
    z = torch.randn(50, 2, dtype=torch.float64)
    found = made.few_step(steps, exact).sample(z).x
    start = torch.tensor(1.0, dtype=torch.float64)
    begun = torch.sqrt((schedule.alpha(start) * exact.s) ** 2 + schedule.sigma(start) ** 2)
    torch.testing.assert_close(found, exact.m + exact.s * z / begun, rtol=1e-4, atol=1e-4)


def test_a_student_told_the_end_aims_at_it_when_training_and_when_sampling():
    made = method(s_embedding=True, adversary="none")
    inner = made.student.module
    assert isinstance(inner, TargetTime)
    nn.init.normal_(inner.embed[2].weight)
    made.ema.update(inner, 0.0)
    jump = made.draw(torch.randn(5, 2), torch.arange(5) % 3)
    with inner.told(jump.end):  # the share of the way to noise is the time itself on this schedule
        v = inner(jump.x_t, 1000 * jump.t, jump.cond)
    torch.testing.assert_close(made.leap(jump), jump_of(jump.x_t, v, jump.t, jump.end), rtol=1e-4, atol=1e-4)
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    x = z
    for t, s in ((1.0, 0.5), (0.5, 0.0)):
        with inner.told(torch.tensor(s)):
            v = inner(x, torch.full((4,), 1000 * t), c)
        x = jump_of(x, v, torch.full((4,), t), torch.full((4,), s))
    torch.testing.assert_close(made.few_step(2).sample(z, c).x, x, rtol=1e-4, atol=1e-4)


def test_samplers_ask_at_the_borders():
    made = method(adversary="none")
    assert made.few_step(4).times.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert method(adversary="none", points=18).few_step(4).times.mul(18).round().tolist() == [18, 12, 8, 4, 0]
    start = method(adversary="none", one_step_start=0.8).few_step(1).times
    assert start[0].item() == pytest.approx(0.8, abs=1e-6)
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    plain = made.few_step(4).sample(z, c).x
    torch.testing.assert_close(plain, ode_solve(made.averaged, z, made.few_step(4).times, cond=c).x)
    noisy = made.few_step(4, gamma=1.0)
    again = noisy.replace(kind="renoise").sample(z, c, torch.Generator().manual_seed(0)).x
    torch.testing.assert_close(noisy.sample(z, c, torch.Generator().manual_seed(0)).x, again, rtol=1e-4, atol=1e-4)


def test_guidance_is_baked_in_or_preserved():
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    baked = method(adversary="none", guidance=3.0)
    assert baked.few_step(2).guidance == 1 and baked.few_step(2).sample(z, c).nfe == 2
    kept = method(adversary="none", guidance=3.0, guidance_mode="preserved", cond_dropout=0.5)
    assert kept.teacher_guidance == 1 and kept.few_step(2).sample(z, c).nfe == 4
    dropped = (kept.draw(torch.randn(600, 2), torch.zeros(600, dtype=torch.long)).cond == 3).float().mean()
    assert 0.4 < dropped < 0.6


# ---- the adversary ---------------------------------------------------------------------------------------------------------


def test_pair_adversary_by_hand():
    made = method(adversarial_weights=(1.0,), adversarial=0.3)
    assert isinstance(made.discriminator, PairDiscriminator)
    jump = made.draw(torch.randn(7, 2), torch.arange(7) % 3)
    wanted, found = made.aim(jump), made.leap(jump)
    d = made.discriminator
    fake = d(found, jump.end, jump.cond, jump.x_t, jump.t)
    real = d(wanted, jump.end, jump.cond, jump.x_t, jump.t)
    losses = made.jump_losses(jump, found, wanted)
    torch.testing.assert_close(losses["adversarial"], F.softplus(-fake).mean())
    torch.testing.assert_close(losses.total, losses["mse"] + 0.3 * losses["adversarial"])
    own = made.discriminator_losses(jump, found, wanted)
    torch.testing.assert_close(own.total, F.softplus(-real).mean() + F.softplus(fake).mean())
    own.total.backward()
    assert all(p.grad is None for p in made.student.parameters())
    # The unused upper part of the trunk and the null class get none.
    assert sum(p.grad is not None for p in d.parameters()) > len(list(d.heads.parameters()))


def test_level_adversary_sees_both_at_one_later_time_with_one_noise():
    made = method(adversary="levels", adversarial_weights=(1.0,))
    jump = made.draw(torch.randn(500, 2), torch.arange(500) % 3)
    real, fake = torch.randn(500, 2), torch.randn(500, 2)
    noisy_real, noisy_fake, later = made.noised_further(jump, real, fake)
    assert bool((later >= jump.end).all()) and bool((later <= (jump.end + 1 / 8 + 1e-6).clamp(max=1)).all())
    alpha = torch.cos(later * math.pi / 2) / torch.cos(jump.end * math.pi / 2)
    torch.testing.assert_close(noisy_real - noisy_fake, alpha[:, None] * (real - fake), rtol=1e-4, atol=1e-5)
    # The noise is what takes x at the end to the marginal of the later time.
    variance = torch.sin(later * math.pi / 2) ** 2 - (alpha * torch.sin(jump.end * math.pi / 2)) ** 2
    unit = (noisy_real - alpha[:, None] * real)[variance > 1e-4] / variance[variance > 1e-4].sqrt()[:, None]
    assert unit.std().item() == pytest.approx(1, abs=0.1)
    losses = made.discriminator_losses(jump, fake, real)
    losses.total.backward()
    assert all(p.grad is None for p in made.teacher.parameters())
    assert all(p.grad is not None for p in made.discriminator.parameters())


def test_level_adversary_takes_turns():
    made = method(adversary="levels", adversarial_weights=(1.0,), segments=(4,))
    calls: list[tuple[str, ...]] = []
    stepper = SimpleNamespace(step=0, minimise=lambda losses, *names: calls.append((*names, *losses)))
    first = made.segment_update(batch(), stepper)
    stepper.step = 1
    second = made.segment_update(batch(), stepper)
    assert calls == [("student", "mse"), ("discriminator", "discriminator"), ("student", "mse", "adversarial")]
    assert "adversarial" not in first and "adversarial" in second


def test_the_adversary_waits_for_its_stage():
    made = method()
    assert [(setattr(made, "at_stage", k), made.adversarial_weight)[1] for k in range(4)] == pytest.approx(
        [0, 0.001, 0.005, 0.01]
    )


# ---- stages ----------------------------------------------------------------------------------------------------------------


def test_stages_share_the_steps_and_keep_their_students():
    made = method(steps=11, one_step_steps=3, feedback_steps=2)
    made.rewards = [PULL]
    stages = made.stages(data())
    assert [(s.name, s.steps) for s in stages] == [
        ("segments-8", 2),
        ("segments-4", 2),
        ("segments-2", 2),
        ("segments-1", 5),
        ("few-step", 1),
        ("one-step", 3),
        ("feedback", 2),
    ]
    run(made)
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    ends = [made.stage_sampler(k, 4).sample(z, c).x for k in (8, 4, 2, 1)]
    assert all(
        not torch.allclose(a, b) for a, b in zip(ends, [*ends[1:], made.few_step(4).sample(z, c).x], strict=True)
    )
    names = list(made.contestants())
    assert names[0] == "student" and "stage 8, 8 steps" in names and "teacher, 1 step" in names
    with pytest.raises(InputError, match="no stage of 3 segments"):
        made.stage_sampler(3)


def test_a_stage_begins_with_new_averages():
    made = stirred(method(adversary="none"))
    stage = made.stages(data())[1]
    stage.prepare()
    stage.begin()
    assert made.at_stage == 1
    for a, b, c in zip(made.target.parameters(), made.ema.parameters(), made.student.parameters(), strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)


def test_segmented_training_beats_the_teacher_at_few_steps():
    teacher = network(Flow(), "flow")
    made = method(teacher, adversary="none", segments=(4,), steps=150, lr=3e-3, batch_size=24, target_ema=0.9)
    z, c = torch.randn(200, 2), torch.arange(200) % 3
    fine = ode_solve(teacher, z, made.grid.flip(0), cond=c).x
    before = (made.few_step(4).sample(z, c).x - fine).square().mean()
    after = (run(made).few_step(4).sample(z, c).x - fine).square().mean()
    assert after < 0.5 * before


# ---- one step --------------------------------------------------------------------------------------------------------------


def test_distribution_matching_by_hand():
    made = method(one_step_steps=1, guidance=2.0)
    assert made.fake is not None
    nn.init.normal_(made.fake.module.last.bias)
    z, c = torch.randn(6, 2), torch.arange(6) % 3
    torch.manual_seed(5)
    losses, x = made.matching_losses(z, c)
    grads = torch.autograd.grad(losses["dmd"], x, retain_graph=True)[0]
    torch.manual_seed(5)
    t = 0.02 + 0.96 * torch.rand(6)
    a, b = torch.cos(t * math.pi / 2)[:, None], torch.sin(t * math.pi / 2)[:, None]
    torch.testing.assert_close(x, -made.student.module(z, torch.full((6,), 1000.0), c), atol=1e-5, rtol=1e-4)
    x_t = a * x + b * torch.randn(6, 2)
    blank = torch.full((6,), 3)
    teacher, fake = made.teacher.module, made.fake.module
    without = teacher(x_t, 1000 * t, blank)
    real = a * x_t - b * (without + 2 * (teacher(x_t, 1000 * t, c) - without))
    other = a * x_t - b * fake(x_t, 1000 * t, c)
    wanted = (other - real) / (x - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(grads, wanted / (6 * 2), rtol=1e-3, atol=1e-5)  # mean over the batch and dimensions
    made.zero_grad()
    losses.total.backward()
    assert all(p.grad is None for p in made.fake.parameters())
    student = [p.grad.clone() for n, p in made.student.named_parameters() if "classes" not in n]
    made.fake_losses(x, c).total.backward()
    assert made.fake.module.last.weight.grad is not None
    assert all(
        torch.equal(a, p.grad)
        for a, (n, p) in zip(
            student, [i for i in made.student.named_parameters() if "classes" not in i[0]], strict=True
        )
    )


def test_a_batch_of_the_unified_stage_is_shared():
    made = run(method(steps=4, one_step_steps=2))
    asked: dict[str, int] = {}
    made.rewards = [Reward(lambda x, c: asked.update(ones=len(x)) or -x.square().sum(1))]
    stepper = SimpleNamespace(step=0, minimise=lambda losses, *names: asked.update({names[0]: len(losses)}))
    store = made.stages(data())[-1].state["few-step"]
    store.fill(made.own_few_step(), made.conditions, 0, 24, 0)
    logged = made.one_step_update(store)(batch(10), stepper)
    assert asked["ones"] == 5 and {"dmd", "reward", "regression", "mse", "adversarial", "fake"} <= set(logged)
    assert asked["student"] == 5 and asked["fake"] == 1 and asked["discriminator"] == 1
    alone = method(one_step_steps=2, one_step_share=1.0, regression=0.0)
    logged = alone.one_step_update(None)(batch(10), stepper)
    assert set(logged) == {"loss", "dmd", "fake"}
    assert [s.name for s in alone.stages(data())][-1] == "one-step" and "few-step" not in [
        s.name for s in alone.stages(data())
    ]


def test_regression_pairs_are_the_students_own():
    made = method(pair_steps=2, one_step_steps=1)
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    sampler = made.own_few_step()
    torch.testing.assert_close(sampler.sample(z, c).x, made.few_step(2, gamma=0.0).sample(z, c).x)
    assert sampler.denoiser.module is made.ema.module  # the weights that a checkpoint puts back


def test_score_times():
    made = method(one_step_steps=1, time_low=0.2, time_high=0.5)
    times = made.score_times(1000)
    assert 0.2 <= times.min() < 0.21 and 0.49 < times.max() <= 0.5
    edm = method(network(EDM(0.02, 20.0), "x0", precond="edm"), one_step_steps=1)
    times = edm.score_times(1000)
    assert 0.02 <= times.min() < 0.1 and 10 < times.max() < 20
    assert made.generate(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)).shape == (2, 2)
    z, c = torch.randn(3, 2), torch.arange(3)
    torch.testing.assert_close(edm.generate(z, c), edm.student.predict(20 * z, 20.0, c))


# ---- feedback --------------------------------------------------------------------------------------------------------------


def test_feedback_trains_its_adapters_alone_and_merging_is_running_both():
    made = method(feedback_steps=1, feedback_rank=2, lora_rank=2, adversary="none")
    made.rewards = [PULL]
    nn.init.normal_(made.student.module._pairs().__next__()[2].lora_B.weight)  # the first adapters do something
    made.attach_feedback()
    made.attach_feedback()  # once only
    assert made.feedback is not None
    for _, _, adapter in made.feedback._pairs():
        nn.init.normal_(adapter.lora_B.weight, std=0.1)
    made.feedback_losses(batch()).total.backward()
    trained = [p for p in made.parameters() if p.grad is not None]
    assert trained and all(any(p is q for q in made.feedback.parameters()) for p in trained)
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    with_both = made.student.predict(z, 1.0, c)
    merged = made.result()
    assert isinstance(merged, DiffusionMLP) and not any(m._forward_hooks for m in merged.modules())
    torch.testing.assert_close(made.student.with_module(merged).predict(z, 1.0, c), with_both, rtol=1e-4, atol=1e-5)
    with made.feedback.disabled():
        assert not torch.allclose(made.student.predict(z, 1.0, c), with_both)


def test_the_gradient_goes_through_the_last_step_alone():
    made = method(feedback_nfe=3, adversary="none")
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    x = made.few_step_sample(z, c)
    grads = torch.autograd.grad(x.sum(), made.student.module.last.weight)[0]
    with torch.no_grad():
        times = made.borders(3)
        before = z
        for t, s in pairwise(times[:-1]):
            t, s = t.expand(4), s.expand(4)
            before = jump_of(before, made.student.module(before, 1000 * t, c), t, s)
    last = jump_of(
        before, made.student.module(before, 1000 * times[-2].expand(4), c), times[-2].expand(4), torch.zeros(4)
    )
    torch.testing.assert_close(x, last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        grads, torch.autograd.grad(last.sum(), made.student.module.last.weight)[0], rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(x, made.few_step(3).sample(z, c).x)


def test_perceptual_loss_asks_for_the_batchs_labels():
    torch.manual_seed(0)
    judge = nn.Linear(2, 3).requires_grad_(False)
    made = HyperSD(
        network(), LABELS, task_model=judge, decoder=lambda x: 2 * x, adversary="none", points=16, perceptual=0.5
    )
    given = batch()
    torch.manual_seed(6)
    losses = made.feedback_losses(given)
    torch.manual_seed(6)
    t = torch.randint(1, 17, (6,)) / 16
    x_t = made.teacher.schedule.add_noise(given.inputs, torch.randn(6, 2), t)
    wanted = F.cross_entropy(judge(2 * made.student.predict(x_t, t, given.labels)), given.labels)
    assert losses.total.item() == pytest.approx(0.5 * wanted.item(), rel=1e-4)
    assert "reward" not in losses and not any("judge" in n or "task" in n for n, _ in made.named_parameters())


def test_feedback_raises_the_reward_up_to_the_threshold():
    z, c = torch.randn(300, 2), torch.arange(300) % 3
    means = {}
    for threshold in (None, -0.5):
        made = method(adversary="none", segments=(2,), steps=2, feedback_steps=60, lr_feedback=1e-2)
        before = PULL(made.few_step(2).sample(z, c).x).mean().item()
        made.rewards = [Reward(PULL.function, threshold)]
        means[threshold] = PULL(run(made).few_step(2).sample(z, c).x).mean().item()
    assert before < means[-0.5] < means[None] and means[None] > before + 0.5 * abs(before)


def test_the_reward_of_a_class_is_its_log_probability(monkeypatch: pytest.MonkeyPatch):
    import limbeck.tasks.teachers as teachers

    classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).requires_grad_(False)
    monkeypatch.setattr(teachers, "reference_teacher", lambda *_, **__: classifier)
    task = SimpleNamespace(images=SimpleNamespace(train=None, networks={"student": "x"}), num_classes=3)
    reward = feedback_base.class_reward(task, -0.1)
    x, c = torch.rand(5, 1, 2, 2), torch.arange(5) % 3
    wanted = torch.log_softmax(classifier((x + 1) / 2), 1)[torch.arange(5), c]
    torch.testing.assert_close(reward(x, c), wanted)
    odds = feedback_base.class_reward(task, None, odds=True)(x, c)
    torch.testing.assert_close(odds, wanted - torch.log1p(-wanted.exp()), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="images with classes"):
        feedback_base.class_reward(SimpleNamespace(images=None, num_classes=3), None)


# ---- the run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"adversarial_weights": (1.0,), "one_step_steps": 4, "feedback_steps": 4},
        {"lora_rank": 2, "s_embedding": True, "adversary": "levels", "one_step_steps": 3, "feedback_steps": 3},
    ],
)
def test_resume_is_exact(tmp_path: Path, settings: dict[str, Any]):
    def make() -> HyperSD:
        made = method(steps=12, segments=(4, 1), **settings)
        made.rewards = [PULL]
        return made

    resumed_equals_uninterrupted(make, data(), tmp_path, stops=(2, 5), every=2)


@pytest.mark.parametrize(
    "settings", [{}, {"s_embedding": True, "sampling_steps": 4}, {"lora_rank": 2, "gamma": 0.3, "sampling_steps": 2}]
)
def test_the_artifact_samples_alike(tmp_path: Path, settings: dict[str, Any]):
    made = run(method(steps=4, **settings))
    made.save_artifact(tmp_path, {})
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    again = limbeck.load(tmp_path).content
    torch.testing.assert_close(
        again.sample(z, c, torch.Generator().manual_seed(0)).x,
        made.sampler().sample(z, c, torch.Generator().manual_seed(0)).x,
    )


def test_adapters_alone_are_trained():
    made = method(lora_rank=2, adversary="none")
    assert isinstance(made.student.module, LoRA)
    base = {k: v.clone() for k, v in made.student.module.base.state_dict().items()}
    run(made)
    assert all(torch.equal(v, base[k]) for k, v in made.student.module.base.state_dict().items())
    z, c = torch.randn(4, 2), torch.arange(4) % 3
    torch.testing.assert_close(made.few_step(1).sample(z, c).x, made.averaged.predict(z, 1.0, c), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"segments": (2, 4)}, "segments must fall"),
        ({"segments": (32,)}, "32 segments need at least as many points"),
        ({"ends": "zero"}, "needs segments=\\(1,\\)"),
        ({"mse_weights": ()}, "at least one value"),
        ({"adversarial_weights": (-1.0,)}, "0 or more"),
        ({"solver_teacher": "previous-stage", "keep_stages": False}, "needs keep_stages"),
        ({"time_low": 0.9, "time_high": 0.5}, "time_low must be below"),
        ({"adversary": "gan"}, "adversary must be"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], line: str):
    with pytest.raises(InputError, match=line):
        method(**settings)


def test_what_cannot_work_is_refused():
    with pytest.raises(InputError, match="feedback needs rewards"):
        method(feedback_steps=1).check(batch())
    with pytest.raises(InputError, match="at least as many steps"):
        method(steps=3).stages(data())
    with pytest.raises(InputError, match="no signal left"):
        method(network(VPCosine(), "eps"), one_step_steps=1)
    method(network(VPCosine(), "eps"), one_step_steps=1, one_step_start=0.9)
    with pytest.raises(InputError, match="perceptual loss needs labels"):
        HyperSD(network(), None, task_model=nn.Linear(2, 3), points=16).feedback_losses(
            Batch({"x0": torch.randn(3, 2)})
        )


def test_judges_see_what_a_pipelines_decoder_makes() -> None:
    from limbeck.methods.samplers.feedback_base import FeedbackBase

    whole = FeedbackBase.__new__(FeedbackBase)
    torch.nn.Module.__init__(whole)
    whole.decoder, whole.pipeline = None, SimpleNamespace(decode=lambda x: 2 * x)
    x = torch.randn(3, 2, requires_grad=True)
    assert torch.equal(whole.pictured(x), 2 * x) and whole.pictured(x).requires_grad
    whole.decoder = lambda x: 3 * x
    assert torch.equal(whole.pictured(x), 3 * x)
