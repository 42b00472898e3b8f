from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import Oracle, gaussian_mixture
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPDiscrete
from limbeck.diffusion.scores import (
    Distance,
    Huber,
    Lp,
    PseudoHuber,
    SquaredL2,
    dmd_gradient,
    inject_gradient,
    score_difference,
    sds_gradient,
    sid_loss,
    sim_loss,
    vsd_gradient,
)
from limbeck.networks.diffusion_mlp import DiffusionMLP

torch.set_num_threads(1)

MEANS = torch.tensor([[-1.0, 0.5, 0.2], [1.0, -0.5, 0.0]])
SCHEDULES: list[Schedule] = [Flow(), VPDiscrete(), EDM(), Trig()]
every = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
N = 5


def two(schedule: Schedule) -> tuple[Oracle, Oracle]:
    """A fake law and a real one, both with classes."""
    labels = torch.tensor([0, 1])
    return (
        gaussian_mixture(MEANS + 0.4, 0.5, labels=labels, schedule=schedule),
        gaussian_mixture(MEANS, 0.3, labels=labels, schedule=schedule),
    )


def points(schedule: Schedule) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn((N, 3), generator=g, dtype=torch.float64) for _ in range(2))
    t = schedule.t_from_nsr(torch.logspace(-1, 0.7, N, dtype=torch.float64))
    return x0, eps, t, schedule.add_noise(x0, eps, t), torch.tensor([0, 1, 1, 0, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_an_injected_gradient_is_exact(dtype: torch.dtype, size: float):
    """Also one that x - g would swallow."""
    x = (torch.randn(8, 2, 3) * 100).to(dtype).requires_grad_()
    g = (torch.randn(8, 2, 3) * size).to(dtype)
    loss = inject_gradient(x, g)
    loss.backward()
    assert torch.equal(x.grad, g / 8)
    np.testing.assert_allclose(float(loss.detach()), 0.5 * float(g.double().square().sum()) / 8, rtol=1e-2, atol=1e-7)


def test_no_gradient_goes_into_an_injected_gradient():
    x, g = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    (inject_gradient(2 * x, g)).backward()
    assert g.grad is None
    torch.testing.assert_close(x.grad, 2 * g.detach() / 3)


@every
def test_differences_and_gradients_by_formula(schedule: Schedule):
    fake, real = two(schedule)
    x0, eps, t, x_t, cond = points(schedule)
    s = schedule.sigma(t)[:, None]
    of_real, of_fake = (d.predict(x_t, t, cond, "eps") for d in (real, fake))
    gap = of_real - of_fake
    torch.testing.assert_close(score_difference(fake, real, x_t, t, cond), gap)
    torch.testing.assert_close(vsd_gradient(fake, real, x_t, t, cond), s**2 * gap)
    torch.testing.assert_close(vsd_gradient(fake, real, x_t, t, cond, weight="uniform"), gap)
    torch.testing.assert_close(vsd_gradient(fake, real, x_t, t, cond, weight=lambda t: t), t[:, None] * gap)
    torch.testing.assert_close(sds_gradient(real, x_t, t, eps, cond), s**2 * (of_real - eps))
    clean, own = real.predict(x_t, t, cond), fake.predict(x_t, t, cond)
    by_numpy = (own - clean).numpy() / np.abs((x0 - clean).numpy()).mean(1, keepdims=True)
    np.testing.assert_allclose(dmd_gradient(fake, real, x0, x_t, t, cond).numpy(), by_numpy, rtol=1e-9)
    guided = real.predict(x_t, t, cond, "eps", 3.0)
    torch.testing.assert_close(score_difference(fake, real, x_t, t, cond, guidance=3.0), guided - of_fake)
    own = fake.predict(x_t, t, cond, "eps", 2.0)
    torch.testing.assert_close(vsd_gradient(fake, real, x_t, t, cond, fake_guidance=2.0), s**2 * (of_real - own))


@every
def test_gradients_point_away_from_the_real_law(schedule: Schedule):
    """Moving against them lowers log p_fake - log p_real, and a fake law that is the real one gives none."""
    fake, real = two(schedule)
    x0, _, t, x_t, cond = points(schedule)
    moved = x_t - 1e-4 * vsd_gradient(fake, real, x_t, t, cond, weight="uniform")

    def gap(x: torch.Tensor) -> torch.Tensor:
        return fake.log_prob(x, t, cond) - real.log_prob(x, t, cond)

    assert bool((gap(moved) < gap(x_t)).all())
    moved = x_t - 1e-4 * dmd_gradient(fake, real, x0, x_t, t, cond)
    assert bool((gap(moved) < gap(x_t)).all())
    assert float(vsd_gradient(real, real, x_t, t, cond).abs().max()) == 0
    assert float(dmd_gradient(real, real, x0, x_t, t, cond).abs().max()) == 0


def test_no_gradients_through_the_networks():
    x = torch.randn(4, 3, requires_grad=True)
    fake, real = two(Flow())
    t = torch.full((4,), 0.5)
    for found in (
        vsd_gradient(fake, real, x, t),
        sds_gradient(real, x, t, torch.randn(4, 3)),
        dmd_gradient(fake, real, x, x, t),
    ):
        assert not found.requires_grad


DISTANCES: list[Distance] = [
    PseudoHuber(0.3),
    PseudoHuber(1e-3),
    SquaredL2(),
    Lp(1.5),
    Lp(3.0),
    Lp(1.0),
    Huber(0.8),
    Huber(50.0),
]


@pytest.mark.parametrize("distance", DISTANCES, ids=repr)
def test_derivatives_of_distances_against_autograd(distance: Distance):
    y = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)
    value = distance.value(y)
    assert value.shape == (6,) and bool((value > 0).all())
    (expected,) = torch.autograd.grad(value.sum(), y)
    torch.testing.assert_close(distance.derivative(y), expected, rtol=1e-9, atol=1e-12)
    zero = torch.zeros(1, 2, 5, dtype=torch.float64)
    assert float(distance.value(zero)) == 0 and not bool(distance.derivative(zero).any())


def test_pseudo_huber_normalises_each_sample_by_itself():
    small, large = PseudoHuber(1e-6), torch.randn(4, 30) * torch.tensor([[1e-2], [1.0], [1e2], [1e4]])
    torch.testing.assert_close(small.derivative(large).norm(dim=1), torch.ones(4))
    alone = PseudoHuber(0.5)
    torch.testing.assert_close(alone.derivative(large)[1:2], alone.derivative(large[1:2]))
    wide = PseudoHuber(1e6)  # a c so large is plain L2
    torch.testing.assert_close(1e6 * wide.derivative(large[:2]), large[:2], rtol=1e-5, atol=1e-7)


@every
def test_score_implicit_matching_by_numpy(schedule: Schedule):
    fake, real = two(schedule)
    x0, eps, t, x_t, cond = points(schedule)
    df, dq = (d.predict(x_t, t, cond).numpy() for d in (fake, real))
    y = df - dq
    size = np.sqrt((y**2).sum(1, keepdims=True) + 0.3**2)
    expected = -(y / size * (df - x0.numpy())).sum(1)
    found = sim_loss(fake, real, x0, t, eps, cond, distance=PseudoHuber(0.3))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)
    weighted = sim_loss(fake, real, x0, t, eps, cond, distance=PseudoHuber(0.3), weight=lambda t: 2 * t)
    np.testing.assert_allclose(weighted.numpy(), 2 * t.numpy() * expected, rtol=1e-8)
    sf, sq = (d.predict(x_t, t, cond, "score").numpy() for d in (fake, real))
    s = schedule.sigma(t).numpy()[:, None]
    by_score = -(2 * (sf - sq) * (sf + eps.numpy() / s)).sum(1)
    found = sim_loss(fake, real, x0, t, eps, cond, distance=SquaredL2(), space="score")
    np.testing.assert_allclose(found.numpy(), by_score, rtol=1e-6)
    # the same loss in both spaces: a factor (alpha/sigma^2)^2 for squared L2
    plain = sim_loss(fake, real, x0, t, eps, cond, distance=SquaredL2())
    factor = (schedule.alpha(t) / schedule.sigma(t) ** 2) ** 2
    torch.testing.assert_close(found, factor * plain, rtol=1e-6, atol=1e-9)


@every
def test_score_identity_is_score_implicit_matching_with_a_of_one(schedule: Schedule):
    fake, real = two(schedule)
    x0, eps, t, x_t, cond = points(schedule)
    found = sid_loss(fake, real, x0, t, eps, cond, alpha=1.0)
    scale = (x0 - real.predict(x_t, t, cond)).abs().mean(1)
    half = 0.5 * sim_loss(fake, real, x0, t, eps, cond, distance=SquaredL2())
    torch.testing.assert_close(found * scale, half, rtol=1e-8, atol=1e-10)
    df, dq = fake.predict(x_t, t, cond), real.predict(x_t, t, cond)
    other = ((dq - df) * ((dq - x0) - 1.2 * (dq - df))).sum(1) / scale
    torch.testing.assert_close(sid_loss(fake, real, x0, t, eps, cond), other)


@pytest.mark.parametrize("which", ["sim", "sid"])
def test_gradient_goes_through_inputs_and_never_to_parameters(which: str):
    torch.manual_seed(0)
    networks = []
    for _ in range(2):
        network = DiffusionMLP((3,), width=16, blocks=1, time_scale=1.0)
        torch.nn.init.normal_(network.last.weight, std=0.3)
        networks.append(Denoiser(network, EDM(), precond="edm").double())
    fake, real = networks
    x0, eps, t, _, _ = points(EDM())

    def loss(x: torch.Tensor) -> torch.Tensor:
        if which == "sim":
            return sim_loss(fake, real, x, t, eps, distance=PseudoHuber(0.3)).sum()
        x_t = real.schedule.add_noise(x, eps, t)
        scale = (x0 - real.predict(real.schedule.add_noise(x0, eps, t), t)).abs().mean(1).detach()
        gap = real.predict(x_t, t) - fake.predict(x_t, t)
        return ((gap * (real.predict(x_t, t) - x - 1.2 * gap)).sum(1) / scale).sum()

    x = x0.clone().requires_grad_()
    (loss(x) if which == "sim" else sid_loss(fake, real, x, t, eps).sum()).backward()
    assert all(p.grad is None and p.requires_grad for p in [*fake.parameters(), *real.parameters()])
    h = 1e-5  # finite differences see every path from x0 to the loss
    for i, j in ((0, 0), (2, 1), (4, 2)):
        step = torch.zeros_like(x0)
        step[i, j] = h
        with torch.no_grad():
            slope = float(loss(x0 + step) - loss(x0 - step)) / (2 * h)
        assert float(x.grad[i, j]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_sixteen_bits_stay_finite():
    fake, real = two(EDM())
    x0, eps = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16()
    t = torch.tensor([0.002, 0.5, 10.0, 80.0])
    for found in (
        sim_loss(fake, real, x0, t, eps, distance=PseudoHuber(0.1)),
        sid_loss(fake, real, x0, t, eps),
        vsd_gradient(fake, real, real.schedule.add_noise(x0, eps, t), t),
    ):
        assert bool(torch.isfinite(found).all())


def test_bad_input_is_named():
    for make in (lambda: PseudoHuber(0.0), lambda: Lp(0.5), lambda: Huber(-1.0)):
        with pytest.raises(InputError):
            make()
    fake, real = two(Flow())
    with pytest.raises(UnknownNameError, match="weight of a score difference"):
        vsd_gradient(fake, real, torch.randn(2, 3), torch.full((2,), 0.5), weight="odd")
