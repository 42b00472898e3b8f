from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.onestep import OneStepGenerator, scaled_noise, start_of
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPCosine, VPDiscrete
from limbeck.networks.diffusion_mlp import DiffusionMLP

torch.set_num_threads(1)


def denoiser(schedule: Schedule, prediction: str = "x0", **options) -> Denoiser:
    torch.manual_seed(0)
    network = DiffusionMLP((3,), width=8, blocks=1, num_classes=4)
    torch.nn.init.normal_(network.last.weight)
    return Denoiser(network, schedule, prediction, null_cond=torch.tensor(4), **options)


Z, COND = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])


def test_edm_starts_at_two_and_a_half():
    made = OneStepGenerator(denoiser(EDM(), precond="edm"))
    assert made.t_init == 2.5
    torch.testing.assert_close(made(Z, COND), made.denoiser.predict(2.5 * Z, 2.5, COND))
    assert OneStepGenerator(denoiser(EDM(0.02, 1.5), precond="edm")).t_init == 1.5
    far = OneStepGenerator(denoiser(EDM(), precond="edm"), 80.0)
    torch.testing.assert_close(far(Z), far.denoiser.predict(80 * Z, 80.0))


def test_eps_and_flow_forms():
    vp = denoiser(VPDiscrete("scaled_linear"), "eps")
    alpha = vp.schedule.alphas_cumprod[-1] ** 0.5
    sigma = (1 - alpha**2) ** 0.5
    eps = vp.module(Z, torch.full((6,), 999.0), COND)
    torch.testing.assert_close(OneStepGenerator(vp)(Z, COND), (Z - sigma * eps) / alpha, rtol=1e-3, atol=1e-4)
    flow = denoiser(Flow(), "flow")
    torch.testing.assert_close(OneStepGenerator(flow)(Z, COND), Z - flow.module(Z, torch.full((6,), 1000.0), COND))
    trig = denoiser(Trig(), "v")
    told = torch.full((6,), 1000.0)
    torch.testing.assert_close(OneStepGenerator(trig).sample(Z), -trig.module(Z, told, None), rtol=1e-5, atol=1e-6)


def test_gradients_and_types():
    made = OneStepGenerator(denoiser(Flow(), "flow"))
    z = Z.clone().requires_grad_()
    made(z, COND).square().sum().backward()
    assert z.grad is not None and all(p.grad is not None for p in made.parameters())
    assert made.denoiser.evaluations == 1
    half = OneStepGenerator(denoiser(EDM(), precond="edm").bfloat16())
    assert half(Z.bfloat16(), COND).dtype == torch.bfloat16


def test_where_it_starts():
    assert start_of(denoiser(Trig()), None) == Trig().t_max and start_of(denoiser(Flow()), 0.7) == 0.7
    assert torch.equal(scaled_noise(denoiser(EDM()), Z, 3.0), 3 * Z)
    assert torch.equal(scaled_noise(denoiser(Flow()), Z, 0.7), Z)
    for wrong in (0.0, -1.0, 1.5):
        with pytest.raises(InputError, match="t_init"):
            OneStepGenerator(denoiser(Flow()), wrong)


@pytest.mark.parametrize("schedule", [Flow(), VPCosine(), Trig()], ids=lambda s: s.name)
@pytest.mark.parametrize("prediction", ["eps", "score"])
def test_no_division_by_a_signal_that_is_not_there(schedule: Schedule, prediction: str):
    with pytest.raises(InputError, match="no signal left"):
        OneStepGenerator(denoiser(schedule, prediction))
    OneStepGenerator(denoiser(schedule, prediction), 0.9)
