from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from limbeck.core.errors import InputError
from limbeck.diffusion.schedules import EDM, Flow
from limbeck.diffusion.time_samplers import (
    Discrete,
    Fixed,
    Grid,
    Karras,
    LogitNormal,
    LogNormal,
    TimeSampler,
    Uniform,
    UShaped,
)

torch.set_num_threads(1)

COUNT = 40000


def draw(sampler: TimeSampler, seed: int = 0) -> np.ndarray:
    return sampler(COUNT, torch.Generator().manual_seed(seed)).double().numpy()


def distance(sampler: TimeSampler, cdf) -> float:
    """Kolmogorov-Smirnov distance; its 99.9 % point is 1.95 / sqrt(n)."""
    return float(stats.kstest(draw(sampler), cdf).statistic)


def karras(sigma, low=0.002, high=80.0, rho=7.0, frac=0.8):
    """u of a sigma on the grid, over the largest u."""
    a, b = low ** (1 / rho), high ** (1 / rho)
    return np.clip((np.asarray(sigma) ** (1 / rho) - a) / (b - a) / frac, 0, 1)


def u_shape(t, a=4.0):
    """The integral of exp(a t) + exp(a (1 - t)), normalised."""
    return (np.exp(a * t) - np.exp(a * (1 - t)) + np.exp(a) - 1) / (2 * (np.exp(a) - 1))


@pytest.mark.parametrize(
    ("sampler", "cdf"),
    [
        (Uniform(0.2, 0.7), stats.uniform(0.2, 0.5).cdf),
        (LogNormal(-1.2, 1.2), stats.lognorm(1.2, scale=math.exp(-1.2)).cdf),
        (LogitNormal(0.3, 0.8), lambda t: stats.norm(0.3, 0.8).cdf(np.log(t / (1 - t)))),
        (UShaped(4.0), u_shape),
        (UShaped(0.0), stats.uniform(0, 1).cdf),
        (UShaped(0.01), stats.uniform(0, 1).cdf),
        (Karras(tmax_frac=0.8), karras),
        (Karras(0.02, 20.0, 5.0, 1.0), lambda s: karras(s, 0.02, 20.0, 5.0, 1.0)),
    ],
    ids=lambda v: repr(v) if " at 0x" not in repr(v) else "law",
)
def test_distribution_functions(sampler: TimeSampler, cdf):
    assert distance(sampler, cdf) < 1.95 / math.sqrt(COUNT)


def test_discrete_times_are_those_of_indices():
    """Fractions 0.02 to 0.98 of 50 levels: indices 1 to 48, each as often."""
    found = np.round(draw(Discrete(0.02, 0.98, 50)) * 50 - 1).astype(int)
    counts = np.bincount(found, minlength=50)
    assert counts[0] == 0 and counts[49] == 0 and (counts[1:49] > 0).all()
    assert stats.chisquare(counts[1:49]).pvalue > 1e-3
    whole = draw(Discrete(0.0, 1.0, 4, t_max=2.0))
    assert sorted(set(whole.tolist())) == [0.5, 1.0, 1.5, 2.0]


def test_grids_and_fixed_times():
    found = draw(Grid([0.9, 0.5, 0.1]))
    values, counts = np.unique(found.astype(np.float32), return_counts=True)
    np.testing.assert_allclose(values, [0.1, 0.5, 0.9], rtol=1e-6)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert set(draw(Fixed(0.25)).tolist()) == {0.25}


def test_ranges_are_kept():
    clamped = draw(LogNormal(-0.4, 1.2, 0.02, 20.0))
    assert clamped.min() >= 0.0199 and clamped.max() <= 20.0001
    below = draw(Karras(tmax_frac=0.8))
    assert below.min() >= 0.00199 and below.max() <= karras_at(0.8) * 1.001
    whole = draw(UShaped(8.0))
    assert whole.min() >= 0 and whole.max() <= 1
    span = Uniform.over(EDM(0.02, 20.0), 0.1, 0.5)
    assert span.low == pytest.approx(0.02 + 0.1 * 19.98) and span.high == pytest.approx(0.02 + 0.5 * 19.98)
    assert Uniform.over(Flow()).low == Flow().t_min


def karras_at(u: float) -> float:
    return (80 ** (1 / 7) + (1 - u) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7


@pytest.mark.parametrize(
    "sampler",
    [
        Uniform(0, 1),
        Discrete(0, 1),
        LogNormal(),
        LogitNormal(),
        UShaped(),
        UShaped(0.0),
        Karras(),
        Grid([0.1, 0.2]),
        Fixed(0.5),
    ],
    ids=lambda v: repr(v) if " at 0x" not in repr(v) else "law",
)
def test_draws_replay_and_are_single_precision(sampler: TimeSampler):
    assert np.array_equal(draw(sampler, 3), draw(sampler, 3))
    torch.manual_seed(0)
    first = sampler(7)
    torch.manual_seed(0)
    assert torch.equal(first, sampler(7, device="cpu"))
    assert first.shape == (7,) and first.dtype == torch.float32


def test_bad_input_is_named():
    with pytest.raises(InputError, match="rise"):
        Uniform(1.0, 1.0)
    for low, high, steps in ((0.5, 0.5, 1000), (-0.1, 1.0, 1000), (0.0, 1.1, 1000), (0.1, 0.15, 3)):
        with pytest.raises(InputError, match="fractions"):
            Discrete(low, high, steps)
    with pytest.raises(InputError, match="empty"):
        Grid([])
    with pytest.raises(InputError, match="tmax_frac"):
        Karras(tmax_frac=0.0)
    with pytest.raises(InputError, match="sigma_min"):
        Karras(1.0, 0.5)
