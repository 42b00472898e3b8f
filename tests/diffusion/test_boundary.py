from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.boundary import ConsistencyDenoiser
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPCosine, VPDiscrete

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.line(x) + 0.01 * t[:, None]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("boundary", ["edm", "lcm"])
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(Flow(), "flow"), (VPCosine(), "v"), (VPDiscrete(), "eps"), (Trig(), "x0"), (EDM(), "x0")],
)
def test_at_the_smallest_time_it_is_the_sample(boundary: str, schedule: Schedule, prediction: str):
    f = ConsistencyDenoiser(Denoiser(net(), schedule, prediction), boundary)
    x = torch.randn(4, 3)
    t = torch.full((4,), schedule.t_min)
    alpha = schedule.alpha(t)[:, None] if boundary == "edm" else 1.0
    torch.testing.assert_close(f.predict(x, t), x / alpha, rtol=1e-5, atol=1e-5)
    later = f.predict(x, torch.full((4,), 0.7))
    assert bool(torch.isfinite(later).all()) and not torch.allclose(later, x)


def test_edm_form_is_that_of_the_paper():
    """f = c_skip x + c_out F with the network's own F and input scaling, by numpy."""
    data, least = 0.6, 0.002
    f = ConsistencyDenoiser(Denoiser(net(), EDM(), precond="edm", sigma_data=data))
    x, sigma = torch.randn(5, 3), torch.tensor([0.002, 0.01, 0.5, 3.0, 80.0])
    s, xs = sigma.double().numpy()[:, None], x.double().numpy()
    inner = f.module(torch.from_numpy(xs / np.sqrt(s**2 + data**2)).float(), sigma.log() / 4).detach().double().numpy()
    skip = data**2 / ((s - least) ** 2 + data**2)
    out = data * (s - least) / np.sqrt(s**2 + data**2)
    np.testing.assert_allclose(f.predict(x, sigma).detach().numpy(), skip * xs + out * inner, rtol=2e-4, atol=2e-5)


def test_other_schedules_give_the_function_of_the_same_noise_to_signal():
    """A denoiser seen through another schedule has the same f at x_t / alpha."""

    class Shared(nn.Module):
        def __init__(self, schedule: Schedule) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self, x: Tensor, model_time: Tensor, cond: Tensor | None = None) -> Tensor:
            alpha = self.schedule.alpha(model_time / 1000)[:, None]
            return torch.tanh(x / alpha)

    flow = Flow()
    f = ConsistencyDenoiser(Denoiser(Shared(flow), flow, "x0"), sigma_data=0.5)

    class Plain(nn.Module):
        def forward(self, x: Tensor, model_time: Tensor, cond: Tensor | None = None) -> Tensor:
            return torch.tanh(x)

    edm = EDM(sigma_min=1e-5 / (1 - 1e-5))
    g = ConsistencyDenoiser(Denoiser(Plain(), edm, "x0"), sigma_data=0.5)
    t = torch.tensor([0.1, 0.5, 0.9])
    x = torch.randn(3, 3)
    torch.testing.assert_close(f.predict(x, t), g.predict(x / (1 - t)[:, None], t / (1 - t)), rtol=1e-4, atol=1e-5)


def test_far_from_the_boundary_lcm_is_the_denoiser():
    inner = Denoiser(net(), VPCosine(), "v")
    x, t = torch.randn(4, 3), torch.tensor([0.2, 0.5, 0.8, 1.0])
    torch.testing.assert_close(
        ConsistencyDenoiser(inner, "lcm").predict(x, t), inner.predict(x, t), atol=1e-5, rtol=1e-5
    )
    assert bool(torch.isfinite(ConsistencyDenoiser(inner).predict(x, torch.ones(4))).all())


def test_the_form_survives_copies_other_networks_and_guidance():
    inner = Denoiser(net(), VPCosine(), "v", null_cond=torch.tensor(7))
    f = ConsistencyDenoiser(inner, "edm", sigma_data=0.7)
    x, t = torch.randn(4, 3), torch.full((4,), 0.4)
    twin = f.with_module(copy.deepcopy(f.module))
    torch.testing.assert_close(twin.predict(x, t), f.predict(x, t))
    torch.testing.assert_close(copy.deepcopy(f).predict(x, t), f.predict(x, t))
    torch.testing.assert_close(f.plain().predict(x, t), inner.predict(x, t))
    assert twin.with_module(f.module, null_cond=None).null_cond is None
    cond = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(f.predict(x, t, cond, guidance=2.0), f.predict(x, t))  # this network ignores conditions
    before = f.evaluations
    f.predict(x, t, cond, guidance=2.0)
    assert f.evaluations == before + 2
    assert f.describe()["boundary"]["form"] == "edm" and f.describe()["prediction"] == "v"


def test_other_targets_follow_from_the_function():
    f = ConsistencyDenoiser(Denoiser(net(), Flow(), "flow"))
    x, t = torch.randn(4, 3), torch.full((4,), 0.4)
    torch.testing.assert_close(f.predict(x, t, target="flow"), (x - f.predict(x, t)) / 0.4, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    inner = Denoiser(net(), Flow(), "flow")
    with pytest.raises(UnknownNameError, match="boundary condition 'emd'"):
        ConsistencyDenoiser(inner, "emd")
    with pytest.raises(InputError, match="already"):
        ConsistencyDenoiser(ConsistencyDenoiser(inner))
    with pytest.raises(InputError, match="sigma_data"):
        ConsistencyDenoiser(inner, sigma_data=0.0)
    with pytest.raises(InputError, match="timestep_scaling"):
        ConsistencyDenoiser(inner, "lcm", timestep_scaling=0.0)
