from __future__ import annotations

import math

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from limbeck.adapters import diffusers_schedules as there
from limbeck.adapters.diffusers_schedules import conventions_of, prediction_of, schedule_of
from limbeck.core.errors import InputError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.predictions import convert
from limbeck.diffusion.schedules import EDM, Flow, VPDiscrete

torch.set_num_threads(1)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SKIPPED = (
    "DPMSolverSDEScheduler",
    "KDPM2AncestralDiscreteScheduler",
)  # needs torchsde; slow to make, and a sibling is here
VP = [n for n in (*there.ANCESTORS, *there.MULTISTEP, *there.EXPLODING) if n not in SKIPPED]


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, 3, 3, generator=g), torch.randn(4, 2, 3, 3, generator=g)


@pytest.mark.parametrize("name", VP)
def test_every_discrete_scheduler_gives_its_own_table(name: str) -> None:
    scheduler = getattr(diffusers, name)(**SD)
    schedule = schedule_of(scheduler)
    assert schedule == VPDiscrete("scaled_linear", beta_start=0.00085, beta_end=0.012)
    index = torch.tensor([0, 1, 400, 999])
    bar = scheduler.alphas_cumprod[index].double()
    torch.testing.assert_close(schedule.alpha(schedule.time_of(index)) ** 2, bar, rtol=2e-5, atol=0)
    torch.testing.assert_close(schedule.to_model_time(schedule.time_of(index)), index.double(), rtol=0, atol=1e-9)
    assert prediction_of(scheduler) == "eps"


def test_adds_the_same_noise_and_has_the_same_velocity(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, eps = pair
    scheduler = diffusers.DDPMScheduler(**SD, prediction_type="v_prediction")
    schedule, index = schedule_of(scheduler), torch.tensor([0, 250, 700, 999])
    t = schedule.time_of(index)
    x_t = schedule.add_noise(x0, eps, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, eps, index), rtol=1e-5, atol=1e-5)
    velocity = convert(x0.double(), "x0", "v", x_t.double(), t, schedule)
    torch.testing.assert_close(velocity.float(), scheduler.get_velocity(x0, eps, index), rtol=1e-3, atol=1e-3)
    assert prediction_of(scheduler) == "v"


@pytest.mark.parametrize(("kind", "name"), [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")])
def test_predictions_by_name(kind: str, name: str) -> None:
    assert prediction_of(diffusers.DDIMScheduler(prediction_type=kind)) == name
    assert prediction_of(diffusers.EulerDiscreteScheduler(prediction_type=kind)) == name


def test_zero_terminal_noise_and_tables_of_ones_own() -> None:
    zero = schedule_of(diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True))
    assert zero == VPDiscrete("scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True)
    # Euler keeps a little signal at the end so that its sigma is finite; the schedule is the same.
    assert schedule_of(diffusers.EulerDiscreteScheduler(**SD, rescale_betas_zero_snr=True)) == zero
    for options in (
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    ):
        scheduler = diffusers.DDIMScheduler(**options)
        schedule = schedule_of(scheduler)
        assert isinstance(schedule, VPDiscrete)
        torch.testing.assert_close(torch.tensor(schedule.alphas_cumprod), scheduler.alphas_cumprod)


def test_flows_have_their_shift_and_their_times(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, eps = pair
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    said = conventions_of(scheduler)
    assert said.schedule == Flow(shift=3.0) and said.prediction == "flow" and said.precond is None
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    grid = said.schedule.times(4)
    torch.testing.assert_close(grid.float(), scheduler.sigmas)
    torch.testing.assert_close(said.schedule.to_model_time(grid[:-1]).float(), scheduler.timesteps)
    noisy = scheduler.scale_noise(x0, scheduler.timesteps, eps)
    torch.testing.assert_close(said.schedule.add_noise(x0, eps, grid[:-1].float()), noisy)
    u = convert(x0, "x0", "flow", noisy, grid[:-1].float(), said.schedule)
    torch.testing.assert_close(u, eps - x0, rtol=1e-4, atol=1e-4)
    assert schedule_of(diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)) == Flow(shift=2.0)
    multistep = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    assert schedule_of(multistep) == Flow(shift=5.0) and prediction_of(multistep) == "flow"


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_that_of_the_size(kind: str) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    tokens = 1024
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    schedule = schedule_of(scheduler, tokens=tokens)
    assert isinstance(schedule, Flow) and schedule.shift == pytest.approx(math.exp(mu) if kind == "exponential" else mu)
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=mu)
    torch.testing.assert_close(schedule.times(2).float(), scheduler.sigmas)
    with pytest.raises(InputError, match=r"depends on the size.*image_size"):
        schedule_of(scheduler)


@pytest.mark.parametrize("name", there.KARRAS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_preconditioning_is_that_of_the_scheduler(
    name: str, kind: str, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, inner = pair
    scheduler = getattr(diffusers, name)(sigma_min=0.01, sigma_max=40.0, sigma_data=0.8, prediction_type=kind)
    said = conventions_of(scheduler)
    assert said.schedule == EDM(0.01, 40.0) and said.precond == "edm" and prediction_of(scheduler) == "x0"
    seen = {}

    class Net(torch.nn.Module):
        def forward(self, given: torch.Tensor, time: torch.Tensor, cond: object) -> torch.Tensor:
            seen.update(given=given, time=time)
            return said.sign * inner

    denoiser = Denoiser(Net(), said.schedule, said.prediction, precond=said.precond, sigma_data=said.sigma_data)
    sigma = torch.tensor(3.0)
    torch.testing.assert_close(denoiser.predict(x, 3.0), scheduler.precondition_outputs(x, inner, sigma))
    torch.testing.assert_close(seen["given"], scheduler.precondition_inputs(x, sigma))
    torch.testing.assert_close(seen["time"][0], scheduler.precondition_noise(sigma))
    scheduler.set_timesteps(5)
    torch.testing.assert_close(said.schedule.times(5).float(), scheduler.sigmas, rtol=1e-4, atol=1e-6)


def test_refuses_in_one_line() -> None:
    with pytest.raises(InputError, match=r"ScoreSdeVeScheduler is not known here; known are DDPMScheduler"):
        schedule_of(diffusers.ScoreSdeVeScheduler())
    for kind in ("epsilon", "v_prediction"):  # as left behind by FlowMatch….from_config(another scheduler's)
        wrong = diffusers.FlowMatchEulerDiscreteScheduler.from_config({"prediction_type": kind})
        with pytest.raises(InputError, match="is a flow, but says prediction_type"):
            prediction_of(wrong)
    with pytest.raises(InputError, match="needs a flow"):
        schedule_of(diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"))
    with pytest.raises(InputError, match="is a flow, but says"):
        schedule_of(diffusers.DPMSolverMultistepScheduler(prediction_type="epsilon", use_flow_sigmas=True))
    with pytest.raises(InputError, match="none of epsilon"):
        prediction_of(diffusers.DDIMScheduler(prediction_type="noise"))
    with pytest.raises(InputError, match="preconditioned networks are"):
        prediction_of(diffusers.EDMDPMSolverMultistepScheduler(prediction_type="sample"))
    with pytest.raises(InputError, match="timestep_type='continuous'"):
        schedule_of(diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous"))
    with pytest.raises(InputError, match="invert_sigmas"):
        schedule_of(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
