from __future__ import annotations

import copy
import itertools

import pytest
import torch

from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import Oracle, gaussian_mixture
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPCosine, VPDiscrete
from limbeck.diffusion.transforms import InSchedule, native, transform
from limbeck.networks.diffusion_mlp import DiffusionMLP

torch.set_num_threads(1)

ALL: list[Schedule] = [Flow(), Flow(shift=3), VPDiscrete(), VPCosine(), VPCosine(0.008), EDM(), Trig()]
MEANS = torch.tensor([[-1.0, 0.5], [1.0, -0.5], [0.2, 1.0]])
pairs = pytest.mark.parametrize(
    ("source", "target"), list(itertools.permutations(ALL, 2)), ids=lambda s: f"{s.name}{getattr(s, 'offset', '')}"
)


def inner_times(schedule: Schedule) -> torch.Tensor:
    """Noise to signal from 0.02 to 50, which every schedule has."""
    return schedule.t_from_nsr(torch.logspace(-1.7, 1.7, 9, dtype=torch.float64))


@pairs
def test_there_and_back(source: Schedule, target: Schedule):
    t, x = inner_times(source), torch.randn(9, 2, 3, dtype=torch.float64)
    there, other = transform(x, t, source, target)
    torch.testing.assert_close(target.nsr(other), source.nsr(t), rtol=1e-8, atol=1e-8)
    back, again = transform(there, other, target, source)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(again, t, rtol=1e-8, atol=1e-8)


@pairs
def test_marginals_correspond(source: Schedule, target: Schedule):
    """The transformed point is the point of the same x0 and noise."""
    t = inner_times(source)
    x0, eps = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    there, other = transform(source.add_noise(x0, eps, t), t, source, target)
    torch.testing.assert_close(there, target.add_noise(x0, eps, other), rtol=1e-8, atol=1e-8)


def test_by_hand():
    """EDM as a rectified flow: sigma = t/(1 - t), x_ve = x_t/(1 - t)."""
    x, t = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([0.75], dtype=torch.float64)
    there, sigma = transform(x, t, Flow(), EDM())
    assert float(sigma) == pytest.approx(3.0) and float(there) == pytest.approx(8.0)


@pytest.mark.parametrize("source", [Flow(), VPCosine(), Trig(), VPDiscrete(alphas_cumprod=[0.9, 0.5, 0.0])], ids=repr)
def test_pure_noise_goes_to_the_noisiest_time(source: Schedule):
    z = torch.randn(4, 3)
    t = torch.full((4,), source.t_max)
    there, other = transform(z, t, source, EDM())
    assert other.tolist() == [80.0] * 4
    torch.testing.assert_close(there, 80 * z, rtol=1e-3, atol=1e-3)
    there, other = transform(z, t, source, Flow())
    torch.testing.assert_close(other, torch.ones(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(there, z, rtol=1e-5, atol=1e-5)
    half, _ = transform(z.bfloat16(), t, source, Trig())
    assert half.dtype == torch.bfloat16


@pairs
def test_a_denoiser_seen_through_another_schedule(source: Schedule, target: Schedule):
    """The exact law of one schedule, asked in another, is the exact law of the other."""
    law = gaussian_mixture(MEANS, 0.2, schedule=source, labels=torch.tensor([0, 1, 1]))
    seen = InSchedule(law, target, "x0")
    exact = law.in_schedule(target)
    t = inner_times(target)
    x = target.add_noise(*(torch.randn(9, 2, dtype=torch.float64) for _ in range(2)), t)
    cond = torch.tensor([0, 1, -1] * 3)
    for kind in ("x0", "eps", "flow", "score"):
        for w in (1.0, 2.0):
            torch.testing.assert_close(
                seen.predict(x, t, cond, kind, w), exact.predict(x, t, cond, kind, w), rtol=1e-5, atol=1e-5
            )
    seen.evaluations = 0
    seen.predict(x, t, cond, guidance=2.0)
    assert seen.evaluations == 2


def test_what_is_seen_can_be_copied_and_moved():
    network = DiffusionMLP((2,), width=8, blocks=1)
    seen = InSchedule(Denoiser(network, EDM(), precond="edm"), Flow(), "flow")
    x, t = torch.randn(5, 2), torch.linspace(0.1, 0.9, 5)
    twin = copy.deepcopy(seen)
    assert twin.module is twin.inner.module and twin.module is not network
    with torch.no_grad():
        twin.module.last.weight.add_(1)
    assert not torch.allclose(twin.predict(x, t), seen.predict(x, t))
    other = seen.with_module(twin.module)
    torch.testing.assert_close(other.predict(x, t), twin.predict(x, t))
    assert len(list(seen.parameters())) == len(list(network.parameters()))
    oracle = InSchedule(gaussian_mixture(MEANS, 0.2, schedule=EDM()), Flow())
    again = oracle.with_module(oracle.module)
    torch.testing.assert_close(again.predict(x, t), oracle.predict(x, t))


def test_gradients_go_through():
    network = DiffusionMLP((2,), width=8, blocks=1)
    seen = InSchedule(Denoiser(network, Trig(), "v"), Flow(), "flow")
    x = torch.randn(5, 2, requires_grad=True)
    seen.predict(x, 0.4).square().sum().backward()
    assert x.grad is not None and network.last.bias.grad is not None


def test_native_samplers_give_the_same_samples():
    law = gaussian_mixture(MEANS, 0.2, schedule=EDM())
    seen = InSchedule(law, Flow(), "flow")
    z = torch.randn(50, 2, dtype=torch.float64)
    for solver in ("euler", "ddim"):
        sampler = Sampler(seen, Flow().times(12), solver=solver)
        own = native(sampler)
        assert isinstance(own.denoiser, Oracle) and own.denoiser.schedule.name == "edm" and own.nfe == sampler.nfe
        torch.testing.assert_close(own.sample(z).x, sampler.sample(z).x, rtol=1e-3, atol=0.05)
    plain = Sampler(law, EDM().times(4))
    assert native(plain) is plain
