from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import InputError
from limbeck.core.method import fingerprint
from limbeck.core.optim import Optimised
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.schedules import EDM, Flow, VPCosine, VPDiscrete
from limbeck.diffusion.time_samplers import spread_times
from limbeck.methods.samplers.score_base import VariationalDistiller
from limbeck.networks.diffusion_mlp import DiffusionMLP

torch.set_num_threads(1)
CLASSES = 3


def network(seed: int = 0) -> DiffusionMLP:
    torch.manual_seed(seed)
    made = DiffusionMLP((4,), width=16, blocks=1, num_classes=CLASSES, time_features=8)
    nn.init.normal_(made.last.weight, std=0.3)  # it starts at zero, which would hide errors
    return made


def teacher(prediction: str = "v", schedule: Any = None) -> Denoiser:
    return Denoiser(network(), schedule or VPCosine(), prediction, null_cond=torch.tensor(CLASSES))


def labels(n: int = 30) -> Tensor:
    return torch.arange(n) % CLASSES


def make(**settings: Any) -> VariationalDistiller:
    torch.manual_seed(3)
    return VariationalDistiller(teacher(), labels(), **{"rank": 2, "batch_size": 6, "steps": 25, **settings})


class Plain:
    """A stepper that differentiates and steps as the engine does, in the open."""

    step = 0

    def __init__(self, optimised: Any) -> None:
        self.optimised: dict[str, Optimised] = dict(optimised)
        self.calls: list[str] = []

    def minimise(self, losses: Any, *names: str) -> None:
        self.calls += names
        for name in names:
            self.optimised[name].optimizer.zero_grad()
        losses.total.backward()
        for name in names:
            self.optimised[name].optimizer.step()


def gaussians() -> tuple[Any, Any]:
    """Two exact denoisers of N(1, 0.5^2) and N(-1, 0.5^2) in two dimensions."""
    means = torch.ones(1, 2)
    return gaussian_mixture(means, 0.5, schedule=VPCosine()), gaussian_mixture(-means, 0.5, schedule=VPCosine())


@pytest.mark.parametrize("weight", ["sigma2", "uniform", "dmd"])
def test_the_gradient_of_two_gaussians_is_the_closed_form(weight: str) -> None:
    real, fake = gaussians()
    student = Denoiser(DiffusionMLP((2,), 8, 1), VPCosine(), "v")
    method = VariationalDistiller(real, None, student, fake_denoiser=fake, shape=(2,), guidance=1.0, weight=weight)
    x = torch.randn(50, 2)
    torch.manual_seed(11)
    found = method.score_gradient(x, None)
    torch.manual_seed(11)
    t = method.generator_times(50)[:, None]
    noise = torch.randn_like(x)
    alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    x_t, variance = alpha * x + sigma * noise, alpha**2 * 0.25 + sigma**2
    if weight == "dmd":
        clean_real, clean_fake = (m + alpha * 0.25 / variance * (x_t - alpha * m) for m in (1.0, -1.0))
        expected = (clean_fake - clean_real) / (x - clean_real).abs().mean(1, keepdim=True)
    else:
        # eps = sigma (x_t - alpha m) / variance, so the difference of both is -2 sigma alpha / variance
        expected = -2 * sigma * alpha / variance * (sigma**2 if weight == "sigma2" else 1) * torch.ones(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found < 0).all()  # x moves against it, towards the teacher's mean


@pytest.mark.parametrize("weight", ["sigma2", "dmd"])
def test_without_a_fake_network_the_drawn_noise_takes_its_place(weight: str) -> None:
    method = make(fake="none", weight=weight)
    x, cond = torch.randn(6, 4), labels(6)
    torch.manual_seed(5)
    found = method.score_gradient(x, cond)
    torch.manual_seed(5)
    t, noise = method.generator_times(6), torch.randn_like(x)
    x_t = method.teacher.schedule.add_noise(x, noise, t)
    with torch.no_grad():
        if weight == "dmd":
            clean = method.teacher.predict(x_t, t, cond, "x0", 1.5)
            expected = (x - clean) / (x - clean).abs().mean(1, keepdim=True)
        else:
            eps = method.teacher.predict(x_t, t, cond, "eps", 1.5)
            expected = torch.sin(math.pi / 2 * t)[:, None] ** 2 * (eps - noise)
    torch.testing.assert_close(found, expected)
    assert method.fake is None and list(method.score_optimisers(3)) == ["student"]
    with pytest.raises(InputError, match="without a fake network"):
        method.fake_losses(x, cond)


def test_guidance_of_both_sides_and_of_one() -> None:
    x, cond = torch.randn(6, 4), labels(6)

    def gradient(guide: bool) -> tuple[Tensor, Tensor]:
        method = make(fake="copy", guide_fake=guide, guidance=2.5, weight="uniform")
        with torch.no_grad():
            assert method.fake is not None
            method.fake.module.last.weight.mul_(0.5)
        torch.manual_seed(1)
        found = method.score_gradient(x, cond)
        torch.manual_seed(1)
        t, noise = method.generator_times(6), torch.randn_like(x)
        x_t = method.teacher.schedule.add_noise(x, noise, t)
        with torch.no_grad():
            return found, method.teacher.predict(x_t, t, cond, "eps", 2.5) - method.fake.predict(
                x_t, t, cond, "eps", 2.5 if guide else 1.0
            )

    for guide in (True, False):
        torch.testing.assert_close(*gradient(guide))
    assert not torch.allclose(gradient(True)[0], gradient(False)[0])


def test_adapters_that_never_move_give_no_gradient() -> None:
    method = make(weight="uniform")
    x = method.generate(labels(6))
    losses = method.generator_losses(x, labels(6))
    losses.total.backward()
    assert float(losses.total.detach()) == 0
    assert all(float(p.grad.abs().max()) == 0 for p in method.student.parameters() if p.grad is not None)


def test_the_injected_gradient_is_a_mean_over_all_elements() -> None:
    method = make(fake="none")
    x = method.generate(labels(6)).detach().requires_grad_()
    torch.manual_seed(2)
    loss, gradient = method.pull(x, labels(6))
    loss.backward()
    torch.testing.assert_close(x.grad, gradient / x.numel())


@pytest.mark.parametrize("fake", ["lora", "copy"])
def test_gradients_go_where_they_should(fake: str) -> None:
    method, cond = make(fake=fake), labels(6)
    assert method.fake is not None
    with torch.no_grad():
        for p in method.fake.parameters():
            p.add_(0.05 * torch.randn_like(p))
    mark = fingerprint(method.teacher)
    x = method.generate(cond)
    method.generator_losses(x, cond).total.backward()
    assert any(float(p.grad.abs().max()) > 0 for p in method.student.parameters() if p.grad is not None)
    assert all(p.grad is None for p in [*method.fake.parameters(), *method.teacher.parameters()])
    method.student.zero_grad()
    method.fake_losses(x, cond).total.backward()
    assert all(p.grad is None for p in [*method.student.parameters(), *method.teacher.parameters()])
    assert any(float(p.grad.abs().max()) > 0 for p in method.fake.parameters() if p.grad is not None)
    assert fingerprint(method.teacher) == mark


def test_the_teacher_is_the_teacher_although_it_carries_adapters() -> None:
    plain, method = teacher(), make()
    x, t, cond = torch.randn(5, 4), torch.full((5,), 0.4), labels(5)
    stepper = Plain(method.score_optimisers(3))
    for _ in range(3):
        method.update(Batch({"cond": labels(6)}), stepper)
    assert method.lora is not None and method.fake is not None
    with torch.no_grad():
        assert torch.equal(method.teacher.predict(x, t, cond), plain.predict(x, t, cond))
        adapted = method.fake.predict(x, t, cond)
        assert not torch.allclose(adapted, plain.predict(x, t, cond))
        with method.adapted():
            assert torch.equal(method.teacher.predict(x, t, cond), adapted)
        assert torch.equal(method.teacher.predict(x, t, cond), plain.predict(x, t, cond))
    trained = sum(p.numel() for p in method.fake.parameters())
    assert trained == method.lora.describe()["parameters"]
    keys = method.training_state()["tensors"]
    assert not [k for k in keys if k.startswith("teacher.")] and any("lora_A" in k for k in keys)


class Counting(nn.Module):
    """Counts the rows that go through a network, with gradient and without."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.rows, self.calls = module, [0, 0], 0

    def forward(self, x: Tensor, *rest: Any) -> Any:
        self.calls += 1
        self.rows[int(torch.is_grad_enabled())] += len(x)
        return self.module(x, *rest)


@pytest.mark.parametrize(("fake", "guide"), [("lora", True), ("copy", True), ("copy", False)])
def test_a_step_costs_the_passes_that_its_equations_have(fake: str, guide: bool) -> None:
    method = make(fake=fake, guide_fake=guide)
    assert method.fake is not None
    method.student.module = student = Counting(method.student.module)
    method.teacher.module = real = Counting(method.teacher.module)
    method.fake.module = online = Counting(method.fake.module)
    method.update(Batch({"cond": labels(6)}), Plain(method.score_optimisers(1)))
    assert (student.rows, student.calls) == ([0, 6], 1)
    assert (real.rows, real.calls) == ([12, 0], 1)  # both halves of guidance in one pass, no graph
    assert (online.rows, online.calls) == ([12 if guide else 6, 6], 2)


def test_order_and_number_of_updates() -> None:
    method = make(fake_steps=3)
    stepper = Plain(method.score_optimisers(1))
    logged = method.update(Batch({"cond": labels(6)}), stepper)
    assert stepper.calls == ["student", "fake", "fake", "fake"]
    assert set(logged) == {"loss", "scores", "pull", "fake"}

    class First(VariationalDistiller):
        fake_first, fresh_samples = True, True

    first = First(teacher(), labels(), rank=2, batch_size=6)
    stepper = Plain(first.score_optimisers(1))
    first.update(Batch({"cond": labels(6)}), stepper)
    assert stepper.calls == ["fake", "student"]


def test_the_fake_network_learns_as_the_teacher_did() -> None:
    sigma = EDM(0.02, 20.0)
    edm = Denoiser(DiffusionMLP((4,), 8, 1, time_scale=1.0), sigma, precond="edm", sigma_data=0.7)
    space, weight = VariationalDistiller(edm, rank=1).fake_objective()
    assert space == "x0" and weight is not None
    torch.testing.assert_close(weight(torch.tensor([2.0])), torch.tensor([(4 + 0.49) / 1.4**2]))
    flow = Denoiser(DiffusionMLP((4,), 8, 1), Flow(), "flow")
    assert VariationalDistiller(flow, rank=1).fake_objective() == ("flow", None)


def test_conditions_are_dropped_for_the_fake_network_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    method = make(fake="copy", cond_dropout=1.0)
    assert method.fake is not None
    inner = method.fake.module.forward
    monkeypatch.setattr(method.fake.module, "forward", lambda x, t, c: (seen.append(c), inner(x, t, c))[1])
    method.fake_losses(torch.randn(6, 4), labels(6))
    assert seen[0].tolist() == [CLASSES] * 6
    method.config = method.config.replace(cond_dropout=0.0)
    method.fake_losses(torch.randn(6, 4), labels(6))
    assert seen[1].tolist() == labels(6).tolist()


def test_times_cover_their_part_of_each_schedule() -> None:
    discrete = spread_times(VPDiscrete(), 0.02, 0.98)(20_000)
    assert discrete.min() == pytest.approx(21 / 1000) and discrete.max() == pytest.approx(980 / 1000)
    edm = spread_times(EDM(0.02, 20.0), 0.1, 0.9)(20_000)
    wanted = [(0.02 ** (1 / 7) + s * (20 ** (1 / 7) - 0.02 ** (1 / 7))) ** 7 for s in (0.1, 0.5, 0.9)]
    assert [float(edm.min()), float(edm.median()), float(edm.max())] == pytest.approx(wanted, rel=0.05)
    flow = spread_times(Flow(), 0.25, 0.75)(1000)
    assert flow.min() == pytest.approx(0.25, abs=0.01) and flow.max() == pytest.approx(0.75, abs=0.01)


class Affine(nn.Module):
    """A generator x = a + b z, or the exact denoiser of N(mean, std^2), with what it needs as parameters."""

    def __init__(self, mean: float, std: float, denoises: bool) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor([mean])), nn.Parameter(torch.tensor([math.log(std)]))
        self.denoises = denoises

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        if not self.denoises:
            return self.mean + self.log_std.exp() * x
        angle = (math.pi / 2 * t / 1000)[:, None]
        alpha, variance = angle.cos(), angle.cos() ** 2 * (2 * self.log_std).exp() + angle.sin() ** 2
        return self.mean + alpha * (2 * self.log_std).exp() / variance * (x - alpha * self.mean)


@pytest.mark.parametrize("fake", ["copy", "none"])
def test_the_score_difference_finds_mean_and_spread_and_sds_loses_the_spread(fake: str) -> None:
    """The law of a Gaussian is recovered; without the fake score samples collapse onto its mode."""
    schedule = VPCosine()
    real = gaussian_mixture(torch.tensor([[1.0]]), 0.5, schedule=schedule)
    student = Denoiser(Affine(-0.5, 1.0, False), schedule, "x0")
    online = Denoiser(Affine(-0.5, 1.0, True), schedule, "x0")
    torch.manual_seed(0)
    method = VariationalDistiller(
        real,
        None,
        student,
        fake_denoiser=online if fake == "copy" else None,
        shape=(1,),
        fake=fake,
        guidance=1.0,
        lr=0.02,
        lr_fake=0.05,
        ema=0.95,
    )
    stepper, batch = Plain(method.score_optimisers(250)), Batch({"number": torch.arange(128)})
    for step in range(250):
        method.update(batch, stepper)
        method.follow(step)
    averaged = method.averaged.module
    assert float(averaged.mean) == pytest.approx(1.0, abs=0.15)
    spread = float(averaged.log_std.exp())
    assert spread == pytest.approx(0.5, abs=0.1) if fake == "copy" else spread < 0.25


def test_unconditional_and_the_result() -> None:
    plain = Denoiser(DiffusionMLP((4,), 8, 1), Flow(), "flow")
    method = VariationalDistiller(plain, None, rank=1, batch_size=5)
    method.update(Batch({"number": torch.arange(5)}), Plain(method.score_optimisers(1)))
    made = method.sampler()
    z = torch.randn(3, 4)
    assert (made.kind, made.nfe) == ("one-step", 1)
    torch.testing.assert_close(made.sample(z).x, z - method.averaged.predict(z, 1.0, None, "flow").detach())
    assert method(Batch({"number": torch.arange(5)})).ndim == 0


def test_what_does_not_fit_is_named() -> None:
    oracle, other = gaussians()
    with pytest.raises(InputError, match="no weights to start the fake network from: give fake_denoiser"):
        VariationalDistiller(oracle, None, shape=(2,))
    with pytest.raises(InputError, match="both are asked at the same noisy samples"):
        VariationalDistiller(oracle, None, shape=(2,), fake_denoiser=other.in_schedule(Flow()))
    with pytest.raises(InputError, match="t_low must be below t_high"):
        make(t_low=0.6, t_high=0.5)
    with pytest.raises(InputError, match="no linear or 2-D convolutional layer matches the target 'to_q'"):
        make(lora_targets=("to_q",))
    with pytest.raises(InputError, match="no signal left"):
        VariationalDistiller(teacher("eps"), labels())


def test_a_copy_of_the_method_is_independent() -> None:
    method = make()
    twin = deepcopy(method)
    twin.update(Batch({"cond": labels(6)}), Plain(twin.score_optimisers(1)))
    assert method.lora is not None and twin.lora is not None
    assert all(float(v.abs().max()) == 0 for k, v in method.lora.state_dict().items() if "lora_B" in k)
    assert any(float(v.abs().max()) > 0 for k, v in twin.lora.state_dict().items() if "lora_B" in k)
