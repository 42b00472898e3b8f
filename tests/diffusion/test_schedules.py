from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.schedules import (
    EDM,
    SCHEDULES,
    Flow,
    Schedule,
    Trig,
    VPCosine,
    VPDiscrete,
    expand,
    make_schedule,
)

torch.set_num_threads(1)

ALL: list[Schedule] = [
    Flow(),
    Flow(shift=3.0),
    VPDiscrete(),
    VPDiscrete("scaled_linear"),
    VPDiscrete("scaled_linear", zero_terminal_snr=True),
    VPCosine(),
    VPCosine(offset=0.008),
    EDM(),
    Trig(),
]
every = pytest.mark.parametrize("schedule", ALL, ids=repr)


def inner_times(schedule: Schedule, count: int = 41) -> torch.Tensor:
    """Times strictly inside, in double precision, off the borders of discrete cells."""
    part = torch.linspace(0.013, 0.987, count, dtype=torch.float64)
    return schedule.t_min + part * (schedule.t_max - schedule.t_min)


@every
def test_zero_is_clean_and_noise_grows(schedule: Schedule):
    t = torch.linspace(0, schedule.t_max, 400, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert float(alpha[0]) == 1 and float(sigma[0]) == 0
    assert bool((sigma[1:] > sigma[:-1]).all()) and bool((alpha >= 0).all())
    nsr = schedule.nsr(t)
    assert bool((nsr[1:] > nsr[:-1]).all())
    assert bool((schedule.alpha(t.float()) >= 0).all())  # pi/2 in single precision must not make it negative
    if schedule.variance_preserving:
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-12)


@every
def test_derivatives_against_finite_differences(schedule: Schedule):
    t = inner_times(schedule)
    h = 1e-6 * schedule.t_max
    for name in ("alpha", "sigma"):
        function = getattr(schedule, name)
        slope = (function(t + h) - function(t - h)) / (2 * h)
        torch.testing.assert_close(getattr(schedule, f"d{name}")(t), slope, rtol=1e-6, atol=1e-6)


@every
def test_time_from_noise_to_signal_is_the_inverse(schedule: Schedule):
    t = inner_times(schedule)
    torch.testing.assert_close(schedule.t_from_nsr(schedule.nsr(t)), t, rtol=1e-8, atol=1e-10)
    assert float(schedule.t_from_nsr(torch.zeros(1, dtype=torch.float64))) == pytest.approx(0, abs=1e-10)
    single = inner_times(schedule).float()
    torch.testing.assert_close(schedule.t_from_nsr(schedule.nsr(single)), single, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(schedule.log_snr(t), -torch.log(schedule.nsr(t)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [Flow(), VPCosine(), Trig(), VPCosine(0.008)], ids=repr)
def test_pure_noise_has_a_time(schedule: Schedule):
    infinite = torch.tensor([math.inf], dtype=torch.float64)
    assert float(schedule.t_from_nsr(infinite)) == pytest.approx(schedule.t_max, abs=1e-9)


@every
def test_precision_is_kept_and_sixteen_bits_are_not_used(schedule: Schedule):
    t = torch.tensor([[0.25, 0.5], [0.75, 1.0]]) * schedule.t_max
    for name in ("alpha", "sigma", "dalpha", "dsigma", "nsr", "to_model_time"):
        function = getattr(schedule, name)
        assert function(t.double()).dtype == torch.float64 and function(t.double()).shape == (2, 2)
        assert function(t).dtype == torch.float32 and function(t.bfloat16()).dtype == torch.float32, name
        torch.testing.assert_close(
            function(t[:, :1]), function(t.double()[:, :1]).float(), rtol=2e-5, atol=1e-6, msg=name
        )


@every
def test_noise_is_added_by_the_formula(schedule: Schedule):
    x0, eps, t = torch.randn(3, 2, 4), torch.randn(3, 2, 4), inner_times(schedule, 3).float()
    a, s = schedule.alpha(t).numpy(), schedule.sigma(t).numpy()
    by_hand = a[:, None, None] * x0.numpy() + s[:, None, None] * eps.numpy()
    np.testing.assert_allclose(schedule.add_noise(x0, eps, t).numpy(), by_hand, rtol=1e-6)
    half = schedule.add_noise(x0.bfloat16(), eps.bfloat16(), t)
    assert half.dtype == torch.bfloat16
    assert schedule.add_noise(x0.double(), eps.double(), t.double()).dtype == torch.float64


@every
@pytest.mark.parametrize("spacing", ["uniform", "karras", "nsr"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_grids_fall_from_the_start_to_zero(schedule: Schedule, spacing: str, steps: int):
    grid = schedule.times(steps, spacing)  # type: ignore[arg-type]
    assert grid.dtype == torch.float64 and grid.shape == (steps + 1,)
    assert float(grid[0]) == pytest.approx(schedule.t_max) and float(grid[-1]) == 0
    assert bool((grid[1:] < grid[:-1]).all())
    start = 0.4 * schedule.t_max
    later = schedule.times(steps, spacing, t_start=start)  # type: ignore[arg-type]
    assert float(later[0]) == pytest.approx(start) and bool((later[1:] < later[:-1]).all())


def test_grids_by_hand():
    np.testing.assert_allclose(Flow().times(4).numpy(), [1, 0.75, 0.5, 0.25, 0])
    s = 3.0
    even = np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(Flow(shift=3.0).times(4).numpy(), s * even / (1 + (s - 1) * even))
    i = np.arange(6)
    karras = (80 ** (1 / 7) + i / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(EDM().times(6).numpy(), [*karras, 0], rtol=1e-12)
    even = EDM().times(5, "nsr")[:-1].log()
    torch.testing.assert_close(even.diff(), even.diff().mean().expand(4), rtol=1e-9, atol=1e-9)


def test_discrete_levels_are_the_published_ones():
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    schedule = VPDiscrete()
    t = schedule.time_of(torch.arange(1000))
    np.testing.assert_allclose(schedule.alpha(t).numpy() ** 2, bar, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(schedule.to_model_time(t).numpy(), np.arange(1000), atol=1e-9)
    np.testing.assert_allclose(schedule.to_model_time(t.float()).numpy(), np.arange(1000), atol=1e-3)
    scaled = VPDiscrete("scaled_linear")
    assert scaled.alphas_cumprod[-1] == pytest.approx(0.0047, abs=1e-4)  # Stable Diffusion never reaches pure noise
    assert float(VPDiscrete("scaled_linear", zero_terminal_snr=True).alpha(torch.tensor(1.0))) == pytest.approx(
        0, abs=1e-7
    )
    cosine = VPCosine(0.008)
    f = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2)  # noqa: E731
    t = np.linspace(0, 1, 21)
    np.testing.assert_allclose(cosine.alpha(torch.tensor(t)).numpy(), f(t) / f(0), rtol=1e-9, atol=1e-12)


def test_discrete_levels_of_ones_own_may_end_in_pure_noise():
    schedule = VPDiscrete(alphas_cumprod=[0.9, 0.5, 0.1, 0.0])
    t = torch.tensor([1 / 4, 1 / 2, 3 / 4, 1.0])
    np.testing.assert_allclose(schedule.alpha(t).numpy() ** 2, [0.9, 0.5, 0.1, 0], atol=1e-6)
    assert float(schedule.sigma(t)[-1]) == pytest.approx(1) and float(schedule.alpha(t)[-1]) >= 0
    assert schedule.steps == 4 and schedule.t_min == 0.25
    assert bool(torch.isfinite(schedule.times(3, "karras")).all())


def test_single_precision_at_the_ends():
    """Small angles and large noise keep their relative precision."""
    cosine = VPCosine(0.008)
    small = torch.tensor([1e-4, 1e-3])
    torch.testing.assert_close(cosine.sigma(small).double(), cosine.sigma(small.double()), rtol=1e-5, atol=0)
    torch.testing.assert_close(cosine.dsigma(small).double(), cosine.dsigma(small.double()), rtol=1e-5, atol=0)
    edm = EDM()
    ends = torch.tensor([0.002, 80.0])
    torch.testing.assert_close(edm.to_model_time(ends), torch.tensor([math.log(0.002) / 4, math.log(80) / 4]))
    x0, eps = torch.randn(2, 8), torch.randn(2, 8)
    x = edm.add_noise(x0, eps, ends)
    torch.testing.assert_close((x[0] - x0[0]) / 0.002, eps[0], rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(x[1], x0[1] + 80 * eps[1])


@every
def test_described_made_again_copied_and_hashed(schedule: Schedule):
    known = schedule.describe()
    again = make_schedule(known.pop("name"), **known)
    assert again == schedule and hash(again) == hash(schedule) and copy.deepcopy(schedule) == schedule
    t = torch.rand(5, dtype=torch.float64) * schedule.t_max
    assert torch.equal(again.alpha(t), schedule.alpha(t))


def test_different_schedules_differ():
    assert len({hash(s) for s in ALL}) == len(ALL) and Flow() != Trig() and Flow() != Flow(shift=2)
    assert VPDiscrete(alphas_cumprod=[0.9, 0.5]) != VPDiscrete(alphas_cumprod=[0.9, 0.4])


def test_the_prior_follows_the_generator():
    edm = EDM()
    first = edm.prior_sample((4000,), torch.Generator().manual_seed(0))
    assert torch.equal(first, edm.prior_sample((4000,), torch.Generator().manual_seed(0)))
    assert float(first.std()) == pytest.approx(80, rel=0.05)
    assert float(Flow().prior_sample((4000,)).std()) == pytest.approx(1, rel=0.06)


def test_expand():
    x = torch.zeros(2, 3, 4)
    assert expand(torch.ones(2), x).shape == (2, 1, 1) and expand(torch.tensor(1.0), x).shape == (1, 1, 1)


def test_bad_input_is_named():
    with pytest.raises(UnknownNameError, match="schedule 'nope'"):
        make_schedule("nope")
    with pytest.raises(InputError, match="does not take"):
        make_schedule("flow", nope=1)
    with pytest.raises(InputError, match="shift"):
        Flow(shift=0)
    with pytest.raises(InputError, match="offset"):
        VPCosine(-0.1)
    with pytest.raises(InputError, match="sigma_min"):
        EDM(3.0, 2.0)
    with pytest.raises(UnknownNameError, match="beta schedule"):
        VPDiscrete("quadratic")
    with pytest.raises(InputError, match="at least two"):
        VPDiscrete(steps=1)
    for wrong in ([0.5, 0.6], [1.0, 0.5], [0.9, -0.1], [0.9], [0.9, math.nan]):
        with pytest.raises(InputError, match="alphas_cumprod"):
            VPDiscrete(alphas_cumprod=wrong)
    for schedule in (Flow(), EDM(), Trig()):
        with pytest.raises(InputError, match="at least one step"):
            schedule.times(0)
        for start in (-1.0, 0.0, 1000.0):
            with pytest.raises(InputError, match="starts in"):
                schedule.times(3, t_start=start)
    with pytest.raises(UnknownNameError, match="spacing"):
        Flow().times(3, "odd")  # type: ignore[arg-type]
    assert set(SCHEDULES) == {"flow", "vp-discrete", "vp-cosine", "edm", "trig"}
