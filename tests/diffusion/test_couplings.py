from __future__ import annotations

import pytest
import torch

from limbeck.core.data import TensorData
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.couplings import Annealed, Independent, Inverted, Online, Stored, ode_invert
from limbeck.diffusion.oracles import Oracle, gaussian_mixture
from limbeck.diffusion.pairs import PairStore
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPCosine, VPDiscrete

torch.set_num_threads(1)

MEANS = torch.tensor([[-1.0, 0.5], [1.0, -0.5]])
LABELS = torch.tensor([0, 1])


def law(schedule: Schedule | None = None) -> Oracle:
    return gaussian_mixture(MEANS, 0.3, labels=LABELS, schedule=schedule or Flow())


def data(count: int = 40) -> TensorData:
    x, labels = law().sample(count, torch.Generator().manual_seed(0))
    return TensorData(x, labels)


IDS = torch.tensor([3, 0, 7])


def test_independent_noise():
    on = data()
    coupling = Independent(on)
    z, x0, cond = coupling.draw(IDS, torch.Generator().manual_seed(1))
    assert torch.equal(x0, on.inputs[IDS]) and torch.equal(cond, on.labels[IDS]) and len(coupling) == 40
    again = coupling.draw(IDS, torch.Generator().manual_seed(1))
    assert torch.equal(z, again[0]) and not torch.equal(z, coupling.draw(IDS, torch.Generator().manual_seed(2))[0])


def test_stored_and_online_pairs_are_those_of_the_sampler():
    sampler = Sampler.ode(law(), 5)
    pairs = PairStore(10, (2,))
    pairs.fill(sampler, Conditions(LABELS), 0, 10, seed=0)
    z, x0, cond = Stored(pairs).draw(IDS)
    torch.testing.assert_close(sampler.sample(z, cond).x, x0, rtol=1e-5, atol=1e-5)
    online = Online(sampler, Conditions(LABELS), (2,))
    z, x0, cond = online.draw(torch.tensor([0, 1, 1]), torch.Generator().manual_seed(0))
    assert cond.tolist() == [0, 1, 1] and len(online) == 2 and len(Stored(pairs)) == 10
    torch.testing.assert_close(sampler.sample(z, cond).x, x0)


def test_noise_slides_from_independent_to_coupled():
    pairs = PairStore(4000, (2,))
    g = torch.Generator().manual_seed(0)
    z0 = torch.randn((4000, 2), generator=g)
    pairs.write(0, z0, z0 * 2)
    now = [0.0]
    coupling, ids = Annealed(Stored(pairs), lambda: now[0]), torch.arange(4000)
    z, x0, _ = coupling.draw(ids, torch.Generator().manual_seed(1))
    assert torch.equal(z, z0) and torch.equal(x0, z0 * 2)
    for beta in (0.6, 1.0):
        now[0] = beta
        z = coupling.draw(ids, torch.Generator().manual_seed(1))[0]
        assert float(z.std()) == pytest.approx(1, abs=0.03)  # it stays unit noise
        assert float((z * z0).mean()) == pytest.approx((1 - beta**2) ** 0.5, abs=0.03)
    assert len(coupling) == 4000


SCHEDULES = [Flow(), VPDiscrete(), VPCosine(), EDM(0.02, 20.0), Trig()]


GRIDS = [
    pytest.param(schedule, spacing, id=f"{schedule.name}-{spacing}")
    for schedule in SCHEDULES
    for spacing in ("uniform", "karras")
    if schedule.name != "edm" or spacing != "uniform"  # an even grid in sigma is not used
]


@pytest.mark.parametrize(("schedule", "spacing"), GRIDS)
def test_there_and_back(schedule: Schedule, spacing: str):
    """Inverting and sampling again gives the sample, closer with more steps: the error falls faster than the step."""
    oracle = law(schedule)
    x0, cond = oracle.sample(64, torch.Generator().manual_seed(0))
    x0 = x0.double()
    errors = []
    for steps in (20, 60):
        times = schedule.times(steps, spacing)  # type: ignore[arg-type]
        z = ode_invert(oracle, x0, times, cond)
        back = Sampler(oracle, schedule.times(200, "karras"), solver="heun").sample(z, cond).x
        errors.append(float((back - x0).square().mean().sqrt()))
    assert errors[1] < 0.01 and errors[1] < errors[0] / 3, errors


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_inverted_noise_is_that_of_sampling(schedule: Schedule):
    oracle = law(schedule)
    z = torch.randn((64, 2), generator=torch.Generator().manual_seed(3))
    cond = torch.arange(2).repeat(32)
    made = Sampler(oracle, schedule.times(300, "karras"), solver="heun").sample(z, cond).x
    found = ode_invert(oracle, made, schedule.times(150, "karras"), cond)
    torch.testing.assert_close(found, z, rtol=0, atol=0.05)
    assert not found.requires_grad and found.dtype == torch.float32


def test_inverted_data_keeps_its_samples():
    on = data()
    coupling = Inverted(on, law(), Flow().times(50))
    z, x0, cond = coupling.draw(IDS)
    assert torch.equal(x0, on.inputs[IDS]) and torch.equal(cond, on.labels[IDS]) and len(coupling) == 40
    back = Sampler(law(), Flow().times(400), solver="heun").sample(z, cond).x
    torch.testing.assert_close(back, x0, rtol=0, atol=0.03)
    plain = gaussian_mixture(MEANS, 0.3)
    z = Inverted(on, plain, Flow().times(50)).draw(IDS)[0]
    torch.testing.assert_close(Sampler(plain, Flow().times(400), solver="heun").sample(z).x, x0, rtol=0, atol=0.03)
