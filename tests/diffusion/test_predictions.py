from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.predictions import PREDICTIONS, convert, error_weight
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPCosine, VPDiscrete

torch.set_num_threads(1)

ALL: list[Schedule] = [Flow(), VPDiscrete(), VPDiscrete("scaled_linear"), VPCosine(), VPCosine(0.008), EDM(), Trig()]
every = pytest.mark.parametrize("schedule", ALL, ids=repr)


def kinds(schedule: Schedule) -> list[str]:
    return [p for p in PREDICTIONS if p != "v" or schedule.variance_preserving]


def truth(schedule: Schedule, dtype: torch.dtype = torch.float64, count: int = 6):
    """x_t, t and every prediction by its definition, from known x0 and eps."""
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn((count, 3, 2), generator=g, dtype=torch.float64)
    eps = torch.randn((count, 3, 2), generator=g, dtype=torch.float64)
    part = torch.linspace(0.05, 0.9, count, dtype=torch.float64)
    t = schedule.t_min + part * (schedule.t_max - schedule.t_min)
    a, s, da, ds = (f(t).view(-1, 1, 1) for f in (schedule.alpha, schedule.sigma, schedule.dalpha, schedule.dsigma))
    known = {"x0": x0, "eps": eps, "flow": da * x0 + ds * eps, "score": -eps / s}
    if schedule.variance_preserving:
        known["v"] = a * eps - s * x0
    return (a * x0 + s * eps).to(dtype), t.to(dtype), {k: v.to(dtype) for k, v in known.items()}


@every
def test_every_conversion_gives_what_the_definition_says(schedule: Schedule):
    x_t, t, known = truth(schedule)
    for source, target in itertools.product(kinds(schedule), repeat=2):
        found = convert(known[source], source, target, x_t, t, schedule)
        torch.testing.assert_close(found, known[target], rtol=1e-8, atol=1e-8, msg=f"{source} -> {target}")


@every
def test_round_trips_of_any_value(schedule: Schedule):
    """Also a prediction that is wrong comes back."""
    x_t, t, _ = truth(schedule)
    value = torch.randn_like(x_t)
    for source, through in itertools.product(kinds(schedule), repeat=2):
        there = convert(value, source, through, x_t, t, schedule)
        back = convert(there, through, source, x_t, t, schedule)
        torch.testing.assert_close(back, value, rtol=1e-8, atol=1e-8, msg=f"{source} -> {through}")


def test_conversions_by_hand():
    x_t, t = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    flow = Flow()
    assert float(convert(torch.tensor([[4.0]]).double(), "flow", "x0", x_t, t, flow)) == pytest.approx(2 - 0.25 * 4)
    assert float(convert(torch.tensor([[4.0]]).double(), "flow", "eps", x_t, t, flow)) == pytest.approx(2 + 0.75 * 4)
    sigma = torch.tensor([0.5], dtype=torch.float64)
    assert float(convert(torch.tensor([[1.0]]).double(), "x0", "flow", x_t, sigma, EDM())) == pytest.approx(2.0)
    assert float(convert(torch.tensor([[1.0]]).double(), "x0", "score", x_t, sigma, EDM())) == pytest.approx(-4.0)


@every
def test_averages_commute(schedule: Schedule):
    """Weights that sum to 1 may be taken in any space: guidance does."""
    x_t, t, _ = truth(schedule)
    a, b, w = torch.randn_like(x_t), torch.randn_like(x_t), 2.5
    for source, target in itertools.product(kinds(schedule), repeat=2):
        first = convert(b + w * (a - b), source, target, x_t, t, schedule)
        ca, cb = (convert(v, source, target, x_t, t, schedule) for v in (a, b))
        torch.testing.assert_close(first, cb + w * (ca - cb), rtol=1e-8, atol=1e-7)


@every
def test_errors_are_equivalent(schedule: Schedule):
    x_t, t, known = truth(schedule)
    wrong = known["x0"] + 0.1 * torch.randn_like(x_t)
    base = (wrong - known["x0"]).square().flatten(1).sum(1)
    for space in kinds(schedule):
        error = (convert(wrong, "x0", space, x_t, t, schedule) - known[space]).square().flatten(1).sum(1)
        torch.testing.assert_close(error, error_weight(space, t, schedule) * base, rtol=1e-7, atol=1e-12, msg=space)


def test_known_weights():
    t = torch.tensor([0.3], dtype=torch.float64)
    assert float(error_weight("flow", t, Flow())) == pytest.approx(1 / 0.09)
    assert float(error_weight("eps", t, Flow())) == pytest.approx((0.7 / 0.3) ** 2)
    snr = (np.cos(0.3) / np.sin(0.3)) ** 2
    assert float(error_weight("v", t, Trig())) == pytest.approx(1 + snr)


@every
def test_ends_stay_finite(schedule: Schedule):
    """At clean data and at pure noise denominators are kept away from 0; 16 bits keep their type."""
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.tensor([0.0, schedule.t_max])
        x_t, value = torch.randn(2, 4).to(dtype), torch.randn(2, 4).to(dtype)
        for source, target in itertools.product(kinds(schedule), repeat=2):
            found = convert(value, source, target, x_t, t, schedule)
            assert found.dtype == dtype and bool(torch.isfinite(found).all()), (source, target)


def test_edm_ends_in_single_precision():
    schedule = EDM()
    x0, eps = torch.randn(2, 5), torch.randn(2, 5)
    t = torch.tensor([0.002, 80.0])
    x_t = schedule.add_noise(x0, eps, t)
    torch.testing.assert_close(convert(x0, "x0", "eps", x_t, t, schedule), eps, rtol=1e-3, atol=3e-4)
    torch.testing.assert_close(convert(eps, "eps", "x0", x_t, t, schedule), x0, rtol=1e-3, atol=1e-4)


def test_bad_names_are_named():
    x = torch.zeros(1, 1)
    with pytest.raises(UnknownNameError, match="prediction 'noise'"):
        convert(x, "noise", "x0", x, torch.ones(1), Flow())
    with pytest.raises(InputError, match=r"alpha\^2 \+ sigma\^2 = 1"):
        convert(x, "x0", "v", x, torch.ones(1), Flow())
    with pytest.raises(UnknownNameError):
        error_weight("F", torch.ones(1), Flow())
