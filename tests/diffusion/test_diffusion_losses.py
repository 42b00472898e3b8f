from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.losses import denoising_loss, edm_weight, flow_matching_loss, squared_errors
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.predictions import error_weight
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPDiscrete
from limbeck.diffusion.time_samplers import LogNormal, Uniform
from limbeck.networks.diffusion_mlp import DiffusionMLP

torch.set_num_threads(1)


class Fixed(nn.Module):
    """Predicts the same, and notes what it was asked."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.asked = x
        return self.value.to(x.dtype).expand_as(x)


X0, EPS = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
VALUE = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
T = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)


SPACES = [
    pytest.param(schedule, space, id=f"{schedule.name}-{space}")
    for schedule in (Flow(), Trig(), EDM(), VPDiscrete())
    for space in ("x0", "eps", "v", "flow", "score")
    if space != "v" or schedule.variance_preserving
]


@pytest.mark.parametrize(("schedule", "space"), SPACES)
def test_losses_by_numpy(schedule: Schedule, space: str):
    """A network that predicts in the space of the loss: mean of (value - target)^2."""
    made = Denoiser(Fixed(VALUE), schedule, space)
    a, s, da, ds = (f(T).numpy()[:, None] for f in (schedule.alpha, schedule.sigma, schedule.dalpha, schedule.dsigma))
    x, e = X0.numpy(), EPS.numpy()
    target = {"x0": x, "eps": e, "v": a * e - s * x, "flow": da * x + ds * e, "score": -e / s}[space]
    errors = ((VALUE.numpy() - target) ** 2).mean(1)
    found = denoising_loss(made, X0, T, noise=EPS, space=space)
    assert float(found.detach()) == pytest.approx(errors.mean(), rel=1e-9)
    torch.testing.assert_close(made.module.asked, schedule.add_noise(X0, EPS, T))
    weights = torch.tensor([1.0, 2.0, 0.0, 4.0], dtype=torch.float64)
    weighted = denoising_loss(made, X0, T, noise=EPS, space=space, weight=weights)
    assert float(weighted.detach()) == pytest.approx((errors * weights.numpy()).mean(), rel=1e-9)
    by_time = denoising_loss(made, X0, T, noise=EPS, space=space, weight=lambda t: t**2)
    assert float(by_time.detach()) == pytest.approx((errors * T.numpy() ** 2).mean(), rel=1e-9)


@pytest.mark.parametrize("schedule", [Flow(), EDM(), VPDiscrete()], ids=lambda s: s.name)
@pytest.mark.parametrize("space", ["eps", "flow", "score"])
def test_losses_of_different_spaces_are_equivalent(schedule: Schedule, space: str):
    made = Denoiser(Fixed(VALUE), schedule, "x0")
    one = denoising_loss(made, X0, T, noise=EPS, space=space)
    two = denoising_loss(made, X0, T, noise=EPS, space="x0", weight=error_weight(space, T, schedule))
    torch.testing.assert_close(one, two, rtol=1e-7, atol=0)


def test_edm_weight():
    weight = edm_weight(0.5)(torch.tensor([0.5, 0.002, 80.0], dtype=torch.float64))
    expected = [(s**2 + 0.25) / (s * 0.5) ** 2 for s in (0.5, 0.002, 80.0)]
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-12)


def test_flow_matching_on_pairs():
    made = Denoiser(Fixed(VALUE), Flow(), "flow")
    z = EPS
    errors = ((VALUE.numpy() - (z - X0).numpy()) ** 2).mean(1)
    assert float(flow_matching_loss(made, X0, z, T).detach()) == pytest.approx(errors.mean())
    np.testing.assert_allclose(flow_matching_loss(made, X0, z, T, per_sample=True).detach().numpy(), errors)
    torch.testing.assert_close(made.module.asked, (1 - T)[:, None] * X0 + T[:, None] * z)
    other = Denoiser(Fixed(VALUE), Trig(), "flow")
    target = (-T.sin()[:, None] * X0 + T.cos()[:, None] * z).numpy()
    assert float(flow_matching_loss(other, X0, z, T).detach()) == pytest.approx(((VALUE.numpy() - target) ** 2).mean())


def test_errors_are_per_sample_and_not_in_sixteen_bits():
    a, b = torch.full((2, 1000), 1.0).bfloat16(), torch.zeros(2, 1000).bfloat16()
    found = squared_errors(a, b)
    assert found.shape == (2,) and found.dtype == torch.float32 and found.tolist() == [1.0, 1.0]
    assert squared_errors(X0, EPS).dtype == torch.float64
    made = Denoiser(Fixed(VALUE), EDM(), precond="edm").bfloat16()
    loss = denoising_loss(
        made, X0.bfloat16(), torch.tensor([0.002, 0.1, 1.0, 80.0]), space="x0", weight=edm_weight(0.5)
    )
    assert loss.dtype == torch.float32 and bool(torch.isfinite(loss))


def test_the_exact_denoiser_has_the_least_loss():
    """Moving the prediction by delta raises the loss by delta^2, as the minimum says."""
    law = gaussian_mixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.3, schedule=Flow())
    x0 = law.sample(20000, torch.Generator().manual_seed(0))[0]
    noise, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)), torch.full((20000,), 0.5)
    best = float(denoising_loss(law, x0, t, noise=noise, space="x0"))

    class Moved(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            return law.predict(x, 0.5) + 0.2

    moved = float(denoising_loss(Denoiser(Moved(), Flow(), "x0"), x0, t, noise=noise, space="x0"))
    assert moved - best == pytest.approx(0.04, abs=0.005)


@pytest.mark.parametrize(
    ("schedule", "prediction", "space"),
    [(Flow(), "flow", "flow"), (VPDiscrete(), "eps", "eps"), (EDM(0.02, 20.0), "x0", "x0")],
    ids=lambda v: getattr(v, "name", v),
)
def test_denoising_recovers_the_exact_denoiser(schedule: Schedule, prediction: str, space: str):
    """A small network trained on samples of the law comes to its denoiser, and closer with more steps."""
    law = gaussian_mixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.3, schedule=schedule, labels=torch.tensor([0, 1]))
    edm = schedule.name == "edm"
    torch.manual_seed(0)
    network = DiffusionMLP((2,), width=48, blocks=2, num_classes=2, time_scale=1.0 if edm else 1e-3)
    made = Denoiser(network, schedule, prediction, precond="edm" if edm else None, sigma_data=0.8)
    times = LogNormal(-0.4, 1.2, 0.02, 20.0) if edm else Uniform(schedule.t_min, schedule.t_max)
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    x_test, c_test = law.sample(2000, torch.Generator().manual_seed(9))
    t = schedule.t_from_nsr(torch.tensor(0.6)).expand(2000)
    x_t = schedule.add_noise(x_test, torch.randn(x_test.shape, generator=torch.Generator().manual_seed(8)), t)
    exact = law.predict(x_t, t, c_test)
    errors = []
    g = torch.Generator().manual_seed(1)
    for step in range(251):
        if step in (25, 250):
            with torch.no_grad():
                errors.append(float((made.predict(x_t, t, c_test) - exact).square().mean()))
        x0, cond = law.sample(128, g)
        loss = denoising_loss(made, x0, times(128, g), cond, space=space, weight=edm_weight(0.8) if edm else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 260)
    spread = float(exact.var(0).mean())
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.05 * spread, (errors, spread)
