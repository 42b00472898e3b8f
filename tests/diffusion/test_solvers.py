from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.oracles import Oracle, gaussian_mixture
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPCosine, VPDiscrete
from limbeck.diffusion.solvers import ddim_step, ode_solve

torch.set_num_threads(1)

MEANS = torch.tensor([[-1.0, 0.5], [1.0, -0.5], [0.2, 1.0]])
SCHEDULES: list[Schedule] = [Flow(), VPDiscrete(), VPCosine(), EDM(), Trig()]
every = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)


def law(schedule: Schedule, std: float = 0.4) -> Oracle:
    return gaussian_mixture(MEANS, std, schedule=schedule, labels=torch.tensor([0, 1, 1]))


def noise(count: int = 64) -> torch.Tensor:
    return torch.randn((count, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@every
def test_a_ddim_step_is_exact_for_a_constant_prediction(schedule: Schedule):
    x0, eps = noise(4), noise(5)[1:]
    t, s = (schedule.t_from_nsr(torch.tensor(n, dtype=torch.float64)) for n in (3.0, 0.5))
    x_t, x_s = schedule.add_noise(x0, eps, t), schedule.add_noise(x0, eps, s)
    torch.testing.assert_close(ddim_step(x_t, x0, t, s, schedule), x_s, rtol=1e-8, atol=1e-8)
    a, b = float(schedule.sigma(s) / schedule.sigma(t)), schedule
    by_formula = a * x_t + (b.alpha(s) - b.alpha(t) * a) * x0
    torch.testing.assert_close(ddim_step(x_t, x0, t, s, schedule), by_formula, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ddim_step(x_t, x0, t, 0.0, schedule), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(ddim_step(x_t, x0, t, t, schedule), x_t, rtol=1e-10, atol=1e-10)
    each = ddim_step(x_t, x0, t.expand(4), torch.stack([t, s, s * 0, s]), schedule)  # a time per sample
    torch.testing.assert_close(each, torch.stack([x_t[0], x_s[1], x0[2], x_s[3]]), rtol=1e-8, atol=1e-8)
    assert ddim_step(x_t.bfloat16(), x0.bfloat16(), t, s, schedule).dtype == torch.bfloat16


def test_the_noisy_step_is_that_of_ddpm():
    """eta = 1: variance (1 - abar_s)/(1 - abar_t) (1 - abar_t/abar_s); the marginal's variance is kept."""
    schedule = VPDiscrete()
    t, s = schedule.time_of(600), schedule.time_of(400)
    a_t, a_s = schedule.alphas_cumprod[600], schedule.alphas_cumprod[400]
    x0 = torch.zeros(1, 1, dtype=torch.float64)
    x_t = torch.full((1, 1), 0.3, dtype=torch.float64)
    one, two = (ddim_step(x_t, x0, t, s, schedule, eta=1.0, noise=torch.full_like(x0, n)) for n in (0.0, 1.0))
    variance = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    assert float(two - one) == pytest.approx(math.sqrt(variance))
    kept = float(one) / (0.3 / math.sqrt(1 - a_t))
    assert kept**2 + variance == pytest.approx(1 - a_s)
    with pytest.raises(InputError, match="needs noise"):
        ddim_step(x_t, x0, t, s, schedule, eta=1.0)


def test_euler_of_flow_is_ddim_of_flow_is_ddim_of_vp():
    """On the same grid of noise to signal; EDM as well, where Euler in sigma is DDIM."""
    z = noise()
    nsr = torch.tensor([20.0, 6.0, 2.0, 0.9, 0.3, 0.05, 0.0], dtype=torch.float64)
    ends = {}
    for schedule, solver in (
        (Flow(), "euler"),
        (Flow(), "ddim"),
        (VPDiscrete(), "ddim"),
        (VPCosine(), "ddim"),
        (Trig(), "ddim"),
        (EDM(), "ddim"),
        (EDM(), "euler"),
    ):
        times = schedule.t_from_nsr(nsr)
        start = schedule.add_noise(z * 0 + 0.1, z, times[0])  # the same point in each
        ends[schedule.name, solver] = ode_solve(law(schedule), start, times, solver=solver).x
    for name, found in ends.items():
        torch.testing.assert_close(found, ends["flow", "euler"], rtol=1e-6, atol=1e-6, msg=str(name))


ORDERS = [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm2m", 2)]


@lru_cache
def solved(schedule: Schedule, solver: str, steps: int) -> torch.Tensor:
    """Between two noise levels, where the solution is smooth."""
    first, last = (float(schedule.t_from_nsr(torch.tensor(n, dtype=torch.float64))) for n in (2.0, 0.2))
    start = schedule.add_noise(MEANS[torch.arange(64) % 3].double(), noise(), torch.tensor(first, dtype=torch.float64))
    times = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return ode_solve(law(schedule), start, times, solver=solver).x


@pytest.mark.parametrize("schedule", [Flow(), Trig(), EDM(0.02, 20.0)], ids=lambda s: s.name)
@pytest.mark.parametrize(("solver", "order"), ORDERS)
def test_orders_of_convergence(schedule: Schedule, solver: str, order: int):
    """Halving the step divides the error by 2^order."""
    exact = solved(schedule, "heun", 600)
    coarse, fine = (float((solved(schedule, solver, n) - exact).norm()) for n in (40, 80))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25), (coarse, fine)


@every
def test_samples_land_on_the_mixture(schedule: Schedule):
    """From noise to the law: shares of modes, their spread, and classes, by Heun on the schedule's own grid."""
    oracle = gaussian_mixture(MEANS, 0.1, torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0, 1, 1]), schedule)
    z = torch.randn((1500, 2), generator=torch.Generator().manual_seed(1))
    times = schedule.times(60, "karras")
    found = ode_solve(oracle, z * schedule.prior_std, times, solver="heun")
    nearest = torch.cdist(found.x, MEANS).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / 1500
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.3, 0.5]), rtol=0, atol=0.05)
    assert float((found.x - MEANS[nearest]).std()) == pytest.approx(0.1, rel=0.1)
    assert found.nfe == 119 and found.x.dtype == torch.float32
    cond = torch.arange(2).repeat(750)
    classes = ode_solve(oracle, z * schedule.prior_std, times, cond=cond).x
    assert float(((torch.cdist(classes, MEANS).argmin(1) > 0).long() == cond).float().mean()) > 0.99


@pytest.mark.parametrize(("solver", "nfe"), [("ddim", 5), ("euler", 5), ("heun", 9), ("dpm2m", 5)])
def test_evaluations_are_counted(solver: str, nfe: int):
    oracle, cond = law(Flow()), torch.zeros(8, dtype=torch.long)
    plain = ode_solve(oracle, noise(8), Flow().times(5), solver=solver, cond=cond)
    guided = ode_solve(oracle, noise(8), Flow().times(5), solver=solver, cond=cond, guidance=2.0)
    assert plain.nfe == nfe and guided.nfe == 2 * nfe
    short = ode_solve(oracle, noise(8), torch.tensor([0.9, 0.5, 0.2]), solver=solver)  # does not end in clean data
    assert short.nfe == (4 if solver == "heun" else 2)


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpm2m"])
def test_states_and_slopes_are_recorded(solver: str):
    oracle, z = law(Flow()), noise(8)
    found = ode_solve(oracle, z, Flow().times(4), solver=solver, record=True)
    assert found.states is not None and found.slopes is not None
    assert found.states.shape == (5, 8, 2) and found.slopes.shape == (4, 8, 2)
    assert torch.equal(found.states[0], z) and torch.equal(found.states[-1], found.x)
    for i, t in enumerate(found.times[:-1]):
        torch.testing.assert_close(found.slopes[i], oracle.predict(found.states[i], t, target="flow"))
    assert not found.x.requires_grad and ode_solve(oracle, z, Flow().times(4), solver=solver).states is None


@pytest.mark.parametrize("schedule", [Flow(), EDM(0.02, 20.0), Trig()], ids=lambda s: s.name)
def test_the_adaptive_solver_agrees_with_many_steps(schedule: Schedule):
    oracle, z = law(schedule), noise(32) * schedule.prior_std
    fine = ode_solve(oracle, z, schedule.times(400, "karras"), solver="heun").x
    found = ode_solve(oracle, z, torch.tensor([schedule.t_max, 0.0]), solver="rk45")
    torch.testing.assert_close(found.x, fine, rtol=0, atol=2e-3)
    assert 20 < found.nfe < 2000
    path = ode_solve(oracle, z, schedule.times(6), solver="rk45", record=True)
    assert path.states is not None and path.states.shape == (7, 32, 2)
    assert torch.equal(path.states[-1], path.x)


def test_a_multistep_step_by_hand():
    """DPM-Solver++(2M): x = (sigma_s/sigma_t) x - alpha_s (e^-h - 1) D, D extrapolated by the ratio of steps in log SNR."""
    schedule, oracle, x = Flow(), law(Flow()), noise(4)
    times = torch.tensor([0.9, 0.6, 0.35], dtype=torch.float64)
    lam = [math.log((1 - t) / t) for t in times.tolist()]
    d0 = oracle.predict(x, 0.9)
    x1 = ddim_step(x, d0, 0.9, 0.6, schedule)
    d1 = oracle.predict(x1, 0.6)
    h0, h1 = lam[1] - lam[0], lam[2] - lam[1]
    r = h0 / h1
    mixed = (1 + 1 / (2 * r)) * d1 - d0 / (2 * r)
    expected = 0.35 / 0.6 * x1 - 0.65 * (math.exp(-h1) - 1) * mixed
    torch.testing.assert_close(ode_solve(oracle, x, times, solver="dpm2m").x, expected, rtol=1e-8, atol=1e-8)


def test_bad_input_is_named():
    oracle, z = law(Flow()), noise(4)
    with pytest.raises(UnknownNameError, match="solver 'rk4'"):
        ode_solve(oracle, z, Flow().times(3), solver="rk4")
    for wrong in ([0.5], [0.2, 0.5], [0.5, 0.5, 0.0]):
        with pytest.raises(InputError, match="fall"):
            ode_solve(oracle, z, torch.tensor(wrong))
    for wrong in ([2.0, 0.0], [0.5, -0.1]):
        with pytest.raises(InputError, match="must lie in"):
            ode_solve(oracle, z, torch.tensor(wrong))
    assert np.isfinite(ode_solve(oracle, z, Flow().times(3)).x.numpy()).all()
