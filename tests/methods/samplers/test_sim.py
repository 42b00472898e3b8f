from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import InputError
from limbeck.core.method import fingerprint
from limbeck.core.optim import Optimised
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.schedules import EDM, Flow, VPCosine
from limbeck.diffusion.scores import Distance, Huber, Lp, PseudoHuber, SquaredL2, sim_loss
from limbeck.methods.samplers.sim import SIM
from limbeck.networks.diffusion_mlp import DiffusionMLP
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
CLASSES = 3


# ---- the theorem, on Gaussians ---------------------------------------------------------------------------------------------


class Normal(nn.Module):
    """The exact denoiser of N(mean, factor factor^T) for the schedule edm, whose networks are told ln(sigma)/4."""

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.mean, self.factor = nn.Parameter(mean.clone()), nn.Parameter(factor.clone())

    def forward(self, x: Tensor, told: Tensor, cond: Any = None) -> Tensor:
        covariance = self.factor @ self.factor.T
        noise = torch.exp(8 * told[0]) * torch.eye(len(self.mean), dtype=x.dtype)
        return self.mean + (x - self.mean) @ torch.linalg.solve(covariance + noise, covariance)

    def score(self, x: Tensor, sigma: float) -> Tensor:
        covariance = self.factor @ self.factor.T + sigma**2 * torch.eye(len(self.mean), dtype=x.dtype)
        return -torch.linalg.solve(covariance, (x - self.mean).T).T


def laws(size: int) -> tuple[Normal, Normal]:
    """The generator's law and the teacher's."""
    mean = torch.tensor([0.6, -0.4], dtype=torch.float64)[:size]
    own = torch.tensor([[0.8, 0.0], [0.5, 0.6]], dtype=torch.float64)[:size, :size]
    other = torch.tensor([[0.5, 0.0], [-0.2, 0.9]], dtype=torch.float64)[:size, :size]
    return Normal(mean, own), Normal(mean * 0 - 0.1, other)


def detached(fake: Denoiser, real: Denoiser, x0: Tensor, t: Tensor, noise: Tensor, distance: Distance) -> Tensor:
    """The loss as somebody would write it who asks both networks without gradient: not the paper's."""
    x_t = (x0 + t[:, None] * noise).detach()
    with torch.no_grad():
        of_fake, of_real = fake.predict(x_t, t, target="score"), real.predict(x_t, t, target="score")
    kernel = (x0 - x0.detach() - t[:, None] * noise) / t[:, None] ** 2
    return -(distance.derivative(of_fake - of_real) * (of_fake - kernel)).flatten(1).sum(1)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("distance", [SquaredL2(), PseudoHuber(0.4), Huber(0.7), Lp(3.0)], ids=repr)
def test_the_gradient_is_that_of_the_divergence(size: int, distance: Distance):
    """Gradient of E d(s_p - s_q) through the score alone, samples held fixed, against the gradient of the loss with the score held fixed.

    The two differ sample by sample and agree in the mean; without gradient through the networks' inputs they do not.
    """
    own, target = laws(size)
    sigma = 0.7
    fake, real = (Denoiser(m, EDM(), "x0") for m in (Normal(own.mean.data, own.factor.data), target))
    generator = torch.Generator().manual_seed(0)
    wanted, found, wrong = [], [], []
    for _ in range(40):
        z, noise = (torch.randn((5000, size), generator=generator, dtype=torch.float64) for _ in range(2))
        t = torch.full((5000,), sigma, dtype=torch.float64)
        x0 = own.mean + z @ own.factor.T
        x_t = (x0 + sigma * noise).detach()
        divergence = distance.value(own.score(x_t, sigma) - target.score(x_t, sigma).detach()).mean()
        losses = (
            divergence,
            sim_loss(fake, real, x0, t, noise, distance=distance, space="score").mean(),
            detached(fake, real, x0, t, noise, distance).mean(),
        )
        for loss, kept in zip(losses, (wanted, found, wrong), strict=True):
            grads = torch.autograd.grad(loss, [own.mean, own.factor], retain_graph=True)
            kept.append(torch.cat([g.flatten() for g in grads]).numpy())
    truth, sim, other = (np.array(v) for v in (wanted, found, wrong))
    scale = np.abs(truth.mean(0)).max()

    def off(estimate: np.ndarray) -> tuple[float, float]:
        """Largest deviation of the mean in standard errors, and the largest deviation over the gradient's size."""
        gap = estimate - truth
        free = gap.std(0) > 0  # the factor's upper half has no gradient
        errors = gap.std(0, ddof=1)[free] / math.sqrt(len(gap))
        return float((np.abs(gap.mean(0))[free] / errors).max()), float(np.abs(gap.mean(0)).max() / scale)

    assert off(sim)[0] < 4.5 and off(sim)[1] < 0.1, (off(sim), truth.mean(0), sim.mean(0))
    assert off(other)[0] > 15 and off(other)[1] > 0.3, (off(other), truth.mean(0), other.mean(0))


def test_denoised_samples_and_scores_give_the_same_loss():
    """At one noise level: d'(Y) is that of the scores when c is scaled by sigma^2, so the losses differ by sigma^2."""
    own, target = laws(2)
    fake, real = (Denoiser(m, EDM(), "x0") for m in (own, target))
    x0, noise = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    t = torch.full((6,), 0.7, dtype=torch.float64)
    by_score = sim_loss(fake, real, x0, t, noise, distance=PseudoHuber(0.3), space="score")
    by_sample = sim_loss(fake, real, x0, t, noise, distance=PseudoHuber(0.3 * 0.49))
    torch.testing.assert_close(by_sample, 0.49 * by_score, rtol=1e-8, atol=1e-10)


# ---- the method ------------------------------------------------------------------------------------------------------------


def teacher(prediction: str = "x0") -> Denoiser:
    torch.manual_seed(0)
    network = DiffusionMLP((4,), width=16, blocks=1, num_classes=CLASSES, time_features=8, time_scale=1.0)
    nn.init.normal_(network.last.weight, std=0.3)
    return Denoiser(network, EDM(0.02, 20.0), precond="edm", sigma_data=0.7, null_cond=torch.tensor(CLASSES))


def labels(n: int = 30) -> Tensor:
    return torch.arange(n) % CLASSES


def make(**settings: Any) -> SIM:
    torch.manual_seed(3)
    made = SIM(teacher(), labels(), **{"batch_size": 6, "steps": 25, **settings})
    with torch.no_grad():
        made.online.module.last.weight.mul_(0.7)  # the two networks must differ
    return made


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


def grads(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("divergence", ["pseudo-huber", "l2", "huber", "lp", "sid"])
def test_the_students_gradient_is_that_of_the_formula(divergence: str):
    """Written out once more in the open, differentiated through everything but the two networks' parameters."""
    method, cond = make(divergence=divergence, guidance=2.0, lp_exponent=3.0), labels(6)
    torch.manual_seed(9)
    x = method.generate(cond)
    losses = method.generator_losses(x, cond)
    losses.total.backward()
    found = [g.clone() for g in grads(method.student)]
    method.student.zero_grad()
    torch.manual_seed(9)
    x = method.generate(cond)
    t = method.generator_times(6)
    x_t = x + t[:, None] * torch.randn(6, 4)
    fake, real = method.online.predict(x_t, t, cond), method.teacher.predict(x_t, t, cond, "x0", 2.0)
    y = fake - real
    size, c = y.square().sum(1, keepdim=True).sqrt(), 0.03 * 2
    if divergence == "sid":
        each = ((-y) * ((real - x) + 1.2 * y)).sum(1) / (x - real).abs().mean(1).detach()
    else:
        slope = {
            "pseudo-huber": y / (size**2 + c**2).sqrt(),
            "l2": 2 * y,
            "huber": y * (c / size).clamp(max=1),
            "lp": y.sign() * y.abs() ** 2,
        }[divergence]
        each = -(slope * (fake - x)).sum(1)
    torch.testing.assert_close(losses["scores"].detach(), each.mean().detach(), rtol=1e-5, atol=1e-6)
    each.mean().backward()
    expected = grads(method.student)
    assert len(expected) == len(found) and any(bool(g.abs().max() > 1e-4) for g in found)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fake", ["copy", "lora"])
def test_gradients_go_where_they_should(fake: str):
    torch.manual_seed(3)
    method, cond = SIM(teacher(), labels(), fake=fake, rank=2), labels(6)
    with torch.no_grad():
        for p in method.online.parameters():
            p.add_(0.05 * torch.randn_like(p))
    mark = fingerprint(method.teacher)
    x = method.generate(cond)
    method.generator_losses(x, cond).total.backward()
    assert any(bool(g.abs().max() > 0) for g in grads(method.student))
    assert not grads(method.online) and not grads(method.teacher)
    assert all(p.requires_grad for p in method.online.parameters())
    method.student.zero_grad()
    method.fake_losses(x, cond).total.backward()
    assert any(bool(g.abs().max() > 0) for g in grads(method.online))
    assert not grads(method.student) and not grads(method.teacher) and fingerprint(method.teacher) == mark


def test_an_online_network_that_is_the_teacher_gives_no_gradient():
    method, cond = SIM(teacher(), labels()), labels(6)
    losses = method.generator_losses(method.generate(cond), cond)
    losses.total.backward()
    assert float(losses.observed["pull"]) < 1e-5
    assert all(float(g.abs().max()) < 1e-5 for g in grads(method.student))


def test_a_sample_that_is_not_finite_is_left_out():
    method, cond = make(), labels(6)
    x = method.generate(cond).detach()
    x[2] = torch.nan
    x.requires_grad_()
    torch.manual_seed(1)
    losses = method.generator_losses(x, cond)
    losses.total.backward()
    assert float(losses.observed["left_out"]) == pytest.approx(1 / 6)
    keep = torch.tensor([0, 1, 3, 4, 5])
    assert not bool(x.grad[2].any()) and bool(torch.isfinite(x.grad).all()) and bool(x.grad[keep].any())
    alone = x.detach()[keep].requires_grad_()
    torch.manual_seed(1)
    t, noise = method.generator_times(6), torch.randn(6, 4)
    method.divergences(alone, t[keep], noise[keep], cond[keep]).mean().backward()
    torch.testing.assert_close(x.grad[keep], alone.grad, rtol=1e-4, atol=1e-6)


def test_each_sample_is_normalised_by_itself():
    """With pseudo-Huber the pull of a sample does not depend on the others."""
    method, cond = make(), labels(6)
    x, t, noise = torch.randn(6, 4), torch.full((6,), 0.5), torch.randn(6, 4)
    whole = method.divergences(x, t, noise, cond)
    torch.testing.assert_close(whole[:2], method.divergences(x[:2], t[:2], noise[:2], cond[:2]), rtol=1e-4, atol=1e-6)


def test_the_online_network_is_first_and_both_see_fresh_samples(monkeypatch: pytest.MonkeyPatch):
    method = make(fake_steps=2)
    stepper, seen = Plain(method.score_optimisers(1)), []
    inner = method.generate
    monkeypatch.setattr(method, "generate", lambda *a, **k: (seen.append(inner(*a, **k)), seen[-1])[1])
    logged = method.update(Batch({"cond": labels(6)}), stepper)
    assert stepper.calls == ["fake", "fake", "student"] and len(seen) == 3
    assert [x.requires_grad for x in seen] == [False, False, True] and not torch.allclose(seen[0], seen[1])
    assert set(logged) == {"loss", "scores", "fake", "pull", "left_out"}


def test_times_are_those_of_the_paper():
    """The rho = 7 grid with u even in [0, 0.8]; the online network over all of it."""
    method = make()
    a, b = 0.02 ** (1 / 7), 20 ** (1 / 7)
    sigma = method.generator_times(20_000)
    u = (sigma ** (1 / 7) - a) / (b - a)
    assert float(u.min()) < 0.001 and float(u.max()) == pytest.approx(0.8, abs=1e-3)
    assert float(u.mean()) == pytest.approx(0.4, abs=0.01)
    online = method.fake_times(20_000)
    assert float(online.log().median()) == pytest.approx(-0.4, abs=0.05) and float(online.max()) > float(sigma.max())


def test_settings_and_presets():
    assert isinstance(make().distance, PseudoHuber) and make().distance.c == pytest.approx(0.06)  # 0.03 sqrt(4)
    assert make(huber_c=0.5).distance == PseudoHuber(0.5) and make(divergence="l2").distance == SquaredL2()
    assert make(divergence="sid").distance is None and make(divergence="lp").distance == Lp(1.5)
    own = SIM(teacher(), labels(), distance=Lp(2.5), divergence="l2")
    assert own.distance == Lp(2.5)
    paper, sid = SIM.Config.make("paper"), SIM.Config.make("sid")
    assert paper.betas == (0.0, 0.999) and paper.lr == paper.lr_fake == 1e-5 and paper.t_high == 0.8
    assert paper.ema == pytest.approx(0.5 ** (256 / 500_000), abs=1e-5) and paper.t_init == 2.5
    assert sid.divergence == "sid" and sid.sid_alpha == 1.2


def test_weights_of_times():
    plain = make()
    torch.manual_seed(3)
    weighted = SIM(teacher(), labels(), weight=lambda t: t**2)
    weighted.online.load_state_dict(plain.online.state_dict())
    x, t, noise = torch.randn(6, 4), torch.linspace(0.1, 1, 6), torch.randn(6, 4)
    a, b = (m.divergences(x, t, noise, labels(6)) for m in (plain, weighted))
    torch.testing.assert_close(b, t**2 * a)


class Line(nn.Module):
    """A generator x = a + b z."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor([-0.5])), nn.Parameter(torch.tensor([0.0]))

    def forward(self, x: Tensor, told: Tensor, cond: Any = None) -> Tensor:
        return self.mean + self.log_std.exp() * x


class Bell(Line):
    """The exact denoiser of N(mean, std^2) for vp-cosine."""

    def forward(self, x: Tensor, told: Tensor, cond: Any = None) -> Tensor:
        angle = (math.pi / 2 * told / 1000)[:, None]
        alpha, variance = angle.cos(), angle.cos() ** 2 * (2 * self.log_std).exp() + angle.sin() ** 2
        return self.mean + alpha * (2 * self.log_std).exp() / variance * (x - alpha * self.mean)


@pytest.mark.parametrize("divergence", ["pseudo-huber", "l2", "sid"])
def test_mean_and_spread_of_a_gaussian_are_found(divergence: str):
    """Also in another schedule than edm."""
    schedule = VPCosine()
    real = gaussian_mixture(torch.ones(1, 8), 0.5, schedule=schedule)
    torch.manual_seed(0)
    method = SIM(
        real,
        None,
        Denoiser(Line(), schedule, "x0"),
        fake_denoiser=Denoiser(Bell(), schedule, "x0"),
        shape=(8,),
        lr=0.03,
        lr_fake=0.08,
        ema=0.95,
        divergence=divergence,
    )
    stepper, batch = Plain(method.score_optimisers(150)), Batch({"number": torch.arange(64)})
    for step in range(150):
        method.update(batch, stepper)
        method.follow(step)
    made = method.averaged.module
    assert float(made.mean) == pytest.approx(1.0, abs=0.15)
    assert float(made.log_std.exp()) == pytest.approx(0.5, abs=0.1)


def test_the_result_is_one_step_of_the_averaged_student():
    method = make()
    made = method.sampler()
    z, cond = torch.randn(5, 4), labels(5)
    assert (made.kind, made.nfe) == ("one-step", 1)
    torch.testing.assert_close(made.sample(z, cond).x, method.averaged.predict(2.5 * z, 2.5, cond).detach())
    assert next(iter(method.contestants())) == "student"


def test_flows_and_unconditional_teachers():
    method = SIM(Denoiser(DiffusionMLP((4,), 8, 1), Flow(), "flow"), None, batch_size=5)
    method.update(Batch({"number": torch.arange(5)}), Plain(method.score_optimisers(1)))
    assert float(method.generator_times(1000).max()) < 0.81


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="online network: fake must be 'copy' or 'lora'"):
        SIM(teacher(), labels(), fake="none")
    with pytest.raises(InputError, match="takes no distance"):
        SIM(teacher(), labels(), divergence="sid", distance=SquaredL2())
    with pytest.raises(InputError, match="t_low must be below t_high"):
        make(t_low=0.9)


def test_resume_is_exact(tmp_path: Path):
    resumed_equals_uninterrupted(make, Conditions(labels()), tmp_path)
