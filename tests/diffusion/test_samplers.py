from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.oracles import Oracle, gaussian_mixture
from limbeck.diffusion.samplers import Sampler, tcd_step
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPDiscrete
from limbeck.diffusion.solvers import ddim_step, ode_solve

torch.set_num_threads(1)

MEANS = torch.tensor([[-1.0, 0.5], [1.0, -0.5], [0.2, 1.0]])
GRID = torch.tensor([1.0, 0.6, 0.25, 0.0])


def law(schedule: Schedule | None = None) -> Oracle:
    return gaussian_mixture(MEANS, 0.2, labels=torch.tensor([0, 1, 1]), schedule=schedule or Flow())


def noise(count: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, 2), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", [Flow(), EDM(), Trig(), VPDiscrete()], ids=lambda s: s.name)
def test_ode_samplers_are_the_solver_from_the_prior(schedule: Schedule):
    oracle, z = law(schedule), noise()
    sampler = Sampler.ode(oracle, 5, "heun")
    found = sampler.sample(z)
    expected = ode_solve(oracle, z * schedule.prior_std, schedule.times(5), solver="heun")
    assert torch.equal(found.x, expected.x) and found.nfe == sampler.nfe == 9 and sampler.steps == 5
    partial = Sampler(oracle, schedule.times(3, t_start=0.5 * schedule.t_max))
    scale = 0.5 * schedule.t_max if schedule.name == "edm" else 1.0
    assert torch.equal(partial.start(z), z * scale)


def test_renoising_by_hand():
    oracle, z = law(), noise()
    found = Sampler(oracle, GRID, "renoise").sample(z, generator=torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    x = z
    for t, s in ((1.0, 0.6), (0.6, 0.25)):
        x = (1 - s) * oracle.predict(x, t) + s * torch.randn(z.shape, generator=g)
    torch.testing.assert_close(found.x, oracle.predict(x, 0.25), rtol=1e-5, atol=1e-5)
    assert found.nfe == 3
    kept = Sampler(oracle, GRID, "renoise", noise="initial").sample(z)
    x = z
    for t, s in ((1.0, 0.6), (0.6, 0.25)):
        x = (1 - s) * oracle.predict(x, t) + s * z
    torch.testing.assert_close(kept.x, oracle.predict(x, 0.25), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [Flow(), VPDiscrete(), Trig(), EDM()], ids=lambda s: s.name)
def test_trajectory_sampling_between_ddim_and_renoising(schedule: Schedule):
    oracle, z = law(schedule), noise()
    times = schedule.times(4, "karras")
    zero = Sampler(oracle, times, "tcd", gamma=0.0).sample(z)
    torch.testing.assert_close(zero.x, Sampler(oracle, times).sample(z).x, rtol=1e-5, atol=1e-5)
    one = Sampler(oracle, times, "tcd", gamma=1.0).sample(z, generator=torch.Generator().manual_seed(1))
    again = Sampler(oracle, times, "renoise").sample(z, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one.x, again.x, rtol=1e-4, atol=1e-4)
    assert one.nfe == 4


@pytest.mark.parametrize("gamma", [0.3, 0.7, 1.0])
def test_a_step_of_trajectory_sampling_keeps_the_marginal(gamma: float):
    """With x0 known the result is alpha_s x0 + sigma_s times unit noise, whatever gamma."""
    schedule, oracle = Trig(), law(Trig())
    x0, eps = torch.full((20000, 2), 0.7), noise(20000)
    t, s = 1.2, 0.5
    x_t = schedule.add_noise(x0, eps, torch.tensor(t))
    found = tcd_step(x_t, x0, t, s, oracle, gamma, noise(20000, 5))
    rest = (found - schedule.alpha(torch.tensor(s)) * x0) / schedule.sigma(torch.tensor(s))
    assert float(rest.mean()) == pytest.approx(0, abs=0.02) and float(rest.std()) == pytest.approx(1, abs=0.02)
    middle = (1 - gamma) * s
    down = ddim_step(x_t, x0, t, middle, schedule)
    ratio = float(schedule.alpha(torch.tensor(s)) / schedule.alpha(torch.tensor(middle)))
    torch.testing.assert_close(tcd_step(x_t, x0, t, s, oracle, gamma, torch.zeros_like(x0)), ratio * down)
    with pytest.raises(InputError, match="needs noise"):
        tcd_step(x_t, x0, t, s, oracle, gamma, None)


@pytest.mark.parametrize("schedule", [Flow(), EDM(), VPDiscrete()], ids=lambda s: s.name)
def test_one_step(schedule: Schedule):
    oracle, z, cond = law(schedule), noise(), torch.arange(2).repeat(8)
    sampler = Sampler.one_step(oracle)
    start = 2.5 if schedule.name == "edm" else 1.0
    scaled = z * 2.5 if schedule.name == "edm" else z
    found = sampler.sample(z, cond)
    assert torch.equal(found.x, oracle.predict(scaled, start, cond)) and found.nfe == sampler.nfe == 1


def test_guidance_counts_two_and_is_left_out_without_a_condition():
    oracle, z, cond = law(), noise(), torch.arange(2).repeat(8)
    for kind in ("ode", "renoise", "tcd"):
        sampler = Sampler(oracle, GRID, kind, guidance=2.0)
        assert sampler.nfe == 6 and sampler.sample(z, cond).nfe == 6 and sampler.sample(z).nfe == 3
        before = oracle.predict(z, 1.0, cond, guidance=2.0)
        assert not torch.allclose(before, oracle.predict(z, 1.0, cond))
    assert Sampler.ode(oracle, 4, "heun", 3.0).nfe == 14 and Sampler(oracle, GRID, solver="rk45").nfe == 0
    assert Sampler(oracle, GRID[:3], solver="heun").nfe == 4  # does not end in clean data: every step takes two


def test_copies_with_changes_and_descriptions():
    sampler = Sampler(law(), GRID, "renoise", guidance=2.0)
    other = sampler.replace(kind="ode", solver="heun")
    assert other.kind == "ode" and other.nfe == 10 and other.denoiser is sampler.denoiser and other.guidance == 2
    twin = law()
    changed = sampler.replace(denoiser=twin, times=GRID[[0, 3]])
    assert changed.denoiser is twin and changed.steps == 1
    about = sampler.describe()
    torch.testing.assert_close(torch.tensor(about["times"]), GRID)
    assert about["kind"] == "renoise" and about["nfe"] == 6
    assert not sampler.sample(noise()).x.requires_grad


def test_sixteen_bits():
    oracle = law().bfloat16()
    for kind in ("ode", "renoise", "tcd"):
        found = Sampler(oracle, GRID, kind, gamma=0.5).sample(noise().bfloat16()).x
        assert found.dtype == torch.bfloat16 and bool(torch.isfinite(found).all())


def test_bad_input_is_named():
    oracle = law()
    with pytest.raises(UnknownNameError, match="kind of sampler"):
        Sampler(oracle, GRID, "sde")
    with pytest.raises(UnknownNameError, match="solver"):
        Sampler(oracle, GRID, solver="rk4")
    with pytest.raises(UnknownNameError, match="noise of a sampler"):
        Sampler(oracle, GRID, "renoise", noise="none")
    with pytest.raises(InputError, match="gamma"):
        Sampler(oracle, GRID, "tcd", gamma=1.5)
    with pytest.raises(InputError, match="end in 0"):
        Sampler(oracle, GRID[:3], "renoise")
    with pytest.raises(InputError, match="two times"):
        Sampler(oracle, GRID, "one-step")
    with pytest.raises(InputError, match="fall"):
        Sampler(oracle, GRID.flip(0))
