from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import Oracle, gaussian_mixture, kernel_density
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPCosine, VPDiscrete

torch.set_num_threads(1)

MEANS = torch.tensor([[-1.0, 0.5, 0.0], [1.0, -0.5, 0.3], [0.2, 1.0, -1.0], [0.0, -1.0, 1.0]])
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4])
LABELS = torch.tensor([0, 0, 1, 2])


def law(schedule: Schedule, std: float = 0.3) -> Oracle:
    return gaussian_mixture(MEANS, std, WEIGHTS, LABELS, schedule)


SCHEDULES = [Flow(), VPDiscrete(), VPCosine(), EDM(), Trig()]
every = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)


def times(schedule: Schedule, count: int = 8) -> torch.Tensor:
    nsr = torch.logspace(-1.5, 1.2, count, dtype=torch.float64)
    return schedule.t_from_nsr(nsr).clamp(schedule.t_min, schedule.t_max)


@every
@pytest.mark.parametrize("cond", [None, torch.tensor([0, 1, 2, -1, 0, 1, 2, -1])])
def test_the_denoised_sample_against_the_density(schedule: Schedule, cond: torch.Tensor | None):
    """Tweedie: E[x0|x_t] = (x_t + sigma^2 grad log p_t)/alpha, the gradient by autograd of log p_t."""
    oracle, t = law(schedule), times(schedule)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    x = (torch.randn(8, 3, dtype=torch.float64) * (a**2 + s**2).sqrt()).requires_grad_()
    (score,) = torch.autograd.grad(oracle.log_prob(x, t, cond).sum(), x)
    found = oracle.predict(x, t, cond)
    torch.testing.assert_close(found, (x + s**2 * score) / a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(oracle.predict(x, t, cond, "score"), score, rtol=1e-6, atol=1e-6)


def test_the_density_by_numpy():
    schedule = Trig()
    oracle, x, t = law(schedule), torch.randn(5, 3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    a, v = np.cos(0.7), np.cos(0.7) ** 2 * 0.3**2 + np.sin(0.7) ** 2
    w, mu = WEIGHTS.double().numpy(), MEANS.double().numpy()
    densities = np.exp(-((x.numpy()[:, None] - a * mu) ** 2).sum(-1) / (2 * v)) / (2 * np.pi * v) ** 1.5
    np.testing.assert_allclose(oracle.log_prob(x, t).numpy(), np.log(densities @ w), rtol=1e-6)
    own = w * (LABELS.numpy() == 0)
    zero = torch.zeros(5, dtype=torch.long)
    np.testing.assert_allclose(oracle.log_prob(x, t, zero).numpy(), np.log(densities @ (own / own.sum())), rtol=1e-6)


@every
def test_the_classes_average_to_the_whole(schedule: Schedule):
    """p_t = sum of class shares times class densities."""
    oracle, t = law(schedule), times(schedule)
    x = torch.randn(8, 3, dtype=torch.float64)
    each = torch.stack([oracle.log_prob(x, t, torch.full((8,), c)) for c in range(3)])
    shares = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()[:, None]
    torch.testing.assert_close(torch.logsumexp(each + shares, 0), oracle.log_prob(x, t), rtol=1e-6, atol=1e-6)
    whole = torch.full((8,), -1)
    torch.testing.assert_close(oracle.predict(x, t, whole), oracle.predict(x, t))


def test_ends():
    """At clean data the sample itself, at pure noise the mean of the law; single precision stays finite over all of EDM's range."""
    oracle = law(Flow())
    x = torch.randn(4, 3)
    torch.testing.assert_close(oracle.predict(x, 0.0), x)
    torch.testing.assert_close(oracle.predict(x, 1.0), (WEIGHTS @ MEANS).expand(4, 3))
    edm = law(EDM(), std=0.05)
    for sigma in (0.002, 80.0):
        noised = edm.sample(64, torch.Generator().manual_seed(0))[0]
        noised = noised + sigma * torch.randn_like(noised)
        exact = law(EDM(), std=0.05).predict(noised.double(), torch.full((64,), sigma, dtype=torch.float64))
        torch.testing.assert_close(edm.predict(noised, sigma).double(), exact, rtol=1e-3, atol=1e-4)
    point = kernel_density(MEANS, 0.0, EDM())
    torch.testing.assert_close(point.predict(MEANS + 1e-4, 0.002), MEANS)
    assert law(Flow()).predict(x.bfloat16(), 0.5).dtype == torch.bfloat16


def test_samples_follow_the_law():
    oracle = law(Flow(), std=0.1)
    x, labels = oracle.sample(20000, torch.Generator().manual_seed(0))
    assert labels is not None
    nearest = torch.cdist(x, MEANS).argmin(1)
    share = torch.bincount(nearest, minlength=4) / len(x)
    torch.testing.assert_close(share, WEIGHTS, rtol=0, atol=0.015)
    assert float((LABELS[nearest] == labels).float().mean()) > 0.999
    assert float((x - MEANS[nearest]).std()) == pytest.approx(0.1, rel=0.03)
    assert gaussian_mixture(MEANS, 0.1).sample(3)[1] is None
    density = kernel_density(MEANS.view(4, 3, 1, 1), 0.2, EDM(), LABELS)
    assert density.sample(5)[0].shape == (5, 3, 1, 1) and density.predict(torch.zeros(5, 3, 1, 1), 1.0).shape[0] == 5


def test_the_same_law_in_another_schedule_and_network():
    oracle = law(Flow())
    trig = oracle.in_schedule(Trig())
    x, nsr = torch.randn(4, 3, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    t, u = Flow().t_from_nsr(nsr), Trig().t_from_nsr(nsr)
    torch.testing.assert_close(
        trig.predict(x * Trig().alpha(u), u), oracle.predict(x * Flow().alpha(t), t), rtol=1e-6, atol=1e-6
    )
    again = oracle.with_module(trig.module)
    assert isinstance(again, Oracle) and again.schedule.name == "trig"
    torch.testing.assert_close(again.predict(x, u), trig.predict(x, u))
    plain = oracle.with_module(torch.nn.Identity())
    assert type(plain) is Denoiser and plain.prediction == "x0"


def test_guidance_and_counting():
    oracle, x, cond = law(Flow()), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    a, b = oracle.predict(x, 0.4, cond), oracle.predict(x, 0.4)
    oracle.evaluations = 0
    torch.testing.assert_close(oracle.predict(x, 0.4, cond, guidance=3.0), b + 3 * (a - b))
    assert oracle.evaluations == 2


def test_bad_input_is_named():
    with pytest.raises(InputError, match="means of a mixture"):
        gaussian_mixture(torch.zeros(3), 0.1)
    with pytest.raises(InputError, match="standard deviation"):
        gaussian_mixture(MEANS, -0.1)
    for wrong in (torch.ones(3), torch.tensor([1.0, 0.0, 1.0, 1.0])):
        with pytest.raises(InputError, match="weights above 0"):
            gaussian_mixture(MEANS, 0.1, wrong)
