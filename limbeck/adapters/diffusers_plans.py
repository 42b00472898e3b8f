r"""What a sampler is in the terms of diffusers: a scheduler and the arguments of a pipeline's call, and, always, a table of numbers.

Every sampler of kind ``one-step``, ``renoise`` and ``tcd``, and ``ode`` with the solvers ``ddim`` and ``euler``, asks its network once a step, and
everything around the network is linear. So a step is seven numbers (:class:`Step`):

.. math:: F = f(scale \cdot x,\, time), \quad \hat x_0 = skip \cdot x + out \cdot F, \quad x \leftarrow keep \cdot x + clean \cdot \hat x_0 + noise \cdot \epsilon

A stock pipeline expresses some of them; the table expresses all, in a few lines of plain PyTorch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.adapters.diffusers_networks import DiffusersNetwork, UNet2D, UNet2DConditional
from limbeck.adapters.diffusers_transformers import SD3, DiT, Flux, PixArt
from limbeck.core.errors import InputError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.samplers import Sampler, tcd_step
from limbeck.diffusion.schedules import EDM, Flow, Schedule, VPDiscrete
from limbeck.diffusion.solvers import ddim_step
from limbeck.diffusion.transforms import InSchedule

_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_NO_SKIP = 1e6
"""Scaling of time in LCMScheduler at which its boundary condition leaves x0 as the network gave it, in single precision."""
_LEAST_SIGNAL = 1e-8
"""alpha^2 below which schedulers that divide by alpha give numbers without meaning."""
DIT_NULL = 1000
"""The null class that DiTPipeline has built in."""


@dataclass(frozen=True)
class Step:
    """One step of a sampler, see the module's text. ``noise`` multiplies fresh noise, or the initial noise again."""

    time: float
    scale: float
    skip: float
    out: float
    keep: float
    clean: float
    noise: float


@dataclass(frozen=True)
class Plan:
    """How a sampler is exported.

    Attributes:
        scheduler: what the folder gets.
        call: arguments with which the stock pipeline reproduces the sampler; None: no stock pipeline does.
        exact: whether that call gives the sampler's own samples up to rounding.
        why: why there is no call, or what is inexact about it.
        prelude: lines of code before the call, on ``pipe``.
        pipeline: class of the pipeline to write where it is not the teacher's.
        start: factor of unit noise.
        steps: the table.
    """

    scheduler: Any
    call: dict[str, Any] | None
    exact: bool
    why: str
    start: float
    steps: tuple[Step, ...]
    prelude: tuple[str, ...] = ()
    pipeline: str | None = None


class _Probe(nn.Module):
    """Stands for a network: notes what it is asked, and answers with the second unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.time = self.scale = 0.0

    def forward(self, x: Tensor, model_time: Tensor, cond: Any = None) -> Tensor:
        self.time, self.scale = float(model_time[0]), float(x[0, 0])
        return torch.tensor([[0.0, 1.0]], dtype=x.dtype)


def steps_of(sampler: Sampler) -> tuple[float, tuple[Step, ...]]:
    """The factor of unit noise at the start, and the table of a sampler.

    The numbers are what the library's own functions do to unit vectors, so they cannot drift from it.

    Raises:
        InputError: a solver that asks its network more than once a step or remembers earlier steps.
    """
    if sampler.kind == "ode" and sampler.solver not in ("ddim", "euler"):
        raise InputError(
            f"a sampler with the solver '{sampler.solver}' cannot be exported: use sampler.replace(solver='ddim'), or export the network and "
            "sample with one of diffusers' own schedulers"
        )
    probe = _Probe()
    denoiser = sampler.denoiser.with_module(probe)
    x, x0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    times = [float(t) for t in sampler.describe()["times"]]
    steps = []
    for t, s in itertools.pairwise(times):
        clean = denoiser.predict(x, torch.tensor(t, dtype=torch.float64), None, "x0")
        keep, given, noise = _move(sampler, denoiser, x, x0, t, s)
        steps.append(Step(probe.time, probe.scale, float(clean[0, 0]), float(clean[0, 1]), keep, given, noise))
    return float(sampler.start(torch.ones(1, 1))), tuple(steps)


def _move(
    sampler: Sampler, denoiser: Denoiser, x: Tensor, x0: Tensor, t: float, s: float
) -> tuple[float, float, float]:
    """What the next state has of x, of x0 and of noise."""
    ends = torch.tensor([t, s], dtype=torch.float64)
    if sampler.kind == "one-step" or (sampler.kind != "ode" and s == 0):
        return 0.0, 1.0, 0.0
    if sampler.kind == "renoise":
        schedule = denoiser.schedule
        return 0.0, float(schedule.alpha(ends[1])), float(schedule.sigma(ends[1]))
    if sampler.kind == "ode" and sampler.solver == "euler":
        slope = denoiser.converted_from_x0(x0, "flow", x, ends[0])
        return 1 + (s - t) * float(slope[0, 0]), (s - t) * float(slope[0, 1]), 0.0
    if sampler.kind == "ode" or sampler.gamma == 0:
        moved = ddim_step(x, x0, ends[0], ends[1], denoiser.schedule)
        return float(moved[0, 0]), float(moved[0, 1]), 0.0
    three = [torch.eye(3, dtype=torch.float64)[i : i + 1] for i in range(3)]
    moved = tcd_step(three[0], three[1], t, s, denoiser, sampler.gamma, three[2])
    return float(moved[0, 0]), float(moved[0, 1]), float(moved[0, 2])


def plan_of(sampler: Sampler, network: DiffusersNetwork, fallback: Any) -> Plan:
    """Scheduler, call and table of a sampler.

    Args:
        sampler: whose denoiser is a plain one or one seen through another schedule.
        network: the student's wrapped network.
        fallback: the teacher's scheduler, kept where diffusers has none for the student's schedule.

    Raises:
        InputError: see :func:`steps_of`; a denoiser with rules of its own.
    """
    denoiser = sampler.denoiser
    if type(denoiser) not in (Denoiser, InSchedule):
        raise InputError(
            f"{type(denoiser).__name__} has rules of its own that no table of numbers expresses: it cannot be exported"
        )
    start, steps = steps_of(sampler)
    steps = tuple(replace(step, time=step.time * network.time_scale) for step in steps)
    if isinstance(denoiser, InSchedule):
        scheduler = _usual(denoiser.inner, fallback)
        why = f"the network is sampled in the schedule '{denoiser.schedule.name}', not in its own"
        return Plan(scheduler, None, False, why, start, steps)
    rule = _rule(sampler)
    if network.time_scale != 1:
        why = f"the network is told its time {network.time_scale:g}-fold"
        return Plan(_usual(denoiser, fallback), None, False, why, start, steps)
    if isinstance(denoiser.schedule, VPDiscrete) and denoiser.prediction in _PREDICTIONS:
        scheduler, call, exact, why, extra = _discrete(sampler, network, rule)
    elif isinstance(denoiser.schedule, Flow) and denoiser.prediction == "flow":
        scheduler, call, exact, why, extra = _flow(sampler, network, rule)
    else:
        name = denoiser.schedule.name
        scheduler, call, exact, extra = _usual(denoiser, fallback), None, False, {}
        why = f"pipelines start and scale noise otherwise than the schedule '{name}' of this sampler"
    if scheduler is None:
        scheduler = _usual(denoiser, fallback)
    if call is not None:
        reason = _guidance(sampler, network, call)
        if reason:
            call, exact, why = None, False, reason
    return Plan(scheduler, call, exact and call is not None, why, start, steps, **(extra if call is not None else {}))


def _rule(sampler: Sampler) -> str:
    """``ddim``, ``renoise`` (fresh noise), ``tcd`` (in between), ``euler`` or ``initial`` (noise again); one step is always ``ddim``."""
    if sampler.kind == "ode":
        return sampler.solver
    if sampler.kind == "one-step" or sampler.steps == 1:
        return "ddim"
    if sampler.kind == "renoise":
        return "renoise" if sampler.noise == "fresh" else "initial"
    return {0.0: "ddim", 1.0: "renoise"}.get(float(sampler.gamma), "tcd")


def _guidance(sampler: Sampler, network: DiffusersNetwork, call: dict[str, Any]) -> str:
    """Put guidance into a call; a reason why it cannot be."""
    weight = float(sampler.guidance)
    if isinstance(network, UNet2D):
        return ""
    if isinstance(network, Flux):
        if weight != 1:
            return "FluxPipeline has no guidance by the empty prompt as this sampler has"
        if bool(network.config.guidance_embeds):
            call["guidance_scale"] = network.embedded_guidance
        return ""
    if weight != 1 and isinstance(network, DiT) and network.null_class != DIT_NULL:
        return f"DiTPipeline has the null class {DIT_NULL} built in, the network's is {network.null_class}"
    if weight < 1:
        return "stock pipelines have no guidance below 1"
    call["guidance_scale"] = weight
    return ""


Chosen = tuple[Any, dict[str, Any] | None, bool, str, dict[str, Any]]


def _discrete(sampler: Sampler, network: DiffusersNetwork, rule: str) -> Chosen:
    """For networks of a discrete schedule. A grid that starts below the last index goes into a table cut there."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler

    schedule = sampler.denoiser.schedule
    assert isinstance(schedule, VPDiscrete)
    scheduler: Any
    times = [float(t) for t in sampler.describe()["times"]]
    places = [t * schedule.steps - 1 for t in times[:-1]]
    index = [round(p) for p in places]
    if times[-1] != 0 or any(abs(p - k) > 1e-3 or k < 0 for p, k in zip(places, index, strict=True)):
        return None, None, False, "its times lie between the indices of the schedule, or do not end in 0", {}
    if isinstance(network, UNet2D) and network.embeds is not None:
        return None, None, False, "no stock pipeline gives a UNet2DModel its class", {}
    count, size = len(index), index[0] + 1
    signal = schedule.alphas_cumprod[index[0]]
    if signal < _LEAST_SIGNAL and sampler.denoiser.prediction == "eps":
        return None, None, False, "its first time has no signal, where schedulers divide by zero", {}
    settings = {
        **_table(schedule, size),
        "prediction_type": _PREDICTIONS[sampler.denoiser.prediction],
        "steps_offset": 1,
    }
    free = isinstance(network, UNet2DConditional | PixArt)  # their pipelines take timesteps
    even = size % count == 0 and index == [size - 1 - i * (size // count) for i in range(count)]
    stepped = index == [size - 1 - i * size // count for i in range(count)]
    if rule == "ddim" and even:
        scheduler = DDIMScheduler(**settings, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
        extra = {"pipeline": "DDIMPipeline"} if isinstance(network, UNet2D) else {}
        return scheduler, {"num_inference_steps": count}, True, "", extra
    if rule == "ddim" and free and signal > _LEAST_SIGNAL:
        # Its state is x / alpha; spaced "leading" it starts from noise times sqrt(1 + sigma^2) = 1 / alpha, as this sampler does.
        return EulerDiscreteScheduler(**settings, timestep_spacing="leading"), {"timesteps": index}, True, "", {}
    if rule == "renoise" and index[-1] > 0 and (stepped or free):
        scheduler = LCMScheduler(**settings, original_inference_steps=size, timestep_scaling=_NO_SKIP)
        call = {"num_inference_steps": count} if stepped else {"timesteps": index}
        return scheduler, call, True, "", {"pipeline": "DDPMPipeline"} if isinstance(network, UNet2D) else {}
    if rule == "tcd" and isinstance(network, UNet2DConditional):
        why = (
            "TCDScheduler rounds the intermediate time down to an index and ends at index 0 instead of clean data, so its samples differ "
            "slightly from this sampler's"
        )
        scheduler = TCDScheduler(**settings, original_inference_steps=size)
        return scheduler, {"timesteps": index, "eta": float(sampler.gamma)}, False, why, {}
    return None, None, False, f"no stock pipeline and scheduler take these steps ({rule}, indices {_short(index)})", {}


def _flow(sampler: Sampler, network: DiffusersNetwork, rule: str) -> Chosen:
    """For networks that predict the velocity of a flow: FlowMatchEulerDiscreteScheduler with explicit sigmas."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = sampler.denoiser.schedule
    assert isinstance(schedule, Flow)
    times = [float(t) for t in sampler.describe()["times"]]
    if rule == "euler":
        rule = "ddim"  # the same step in a flow
    if rule not in ("ddim", "renoise") or times[-1] != 0 or schedule.time_scale != int(schedule.time_scale):
        return None, None, False, "FlowMatchEulerDiscreteScheduler has no such steps", {}
    settings = {"num_train_timesteps": int(schedule.time_scale), "shift": 1.0, "stochastic_sampling": rule == "renoise"}
    whole = len(times) == 2 and times[0] == 1.0
    call: dict[str, Any] = {"num_inference_steps": 1} if whole else {"sigmas": times[:-1]}
    if isinstance(network, SD3 | Flux):
        return FlowMatchEulerDiscreteScheduler(**settings), call, True, "", {}
    if isinstance(network, UNet2D) and network.embeds is None and whole:
        return FlowMatchEulerDiscreteScheduler(**settings), call, True, "", {"pipeline": "DDPMPipeline"}
    if isinstance(network, UNet2DConditional):
        # Their pipelines ask every scheduler for these; a flow starts from unit noise and scales nothing. The first stands in the
        # configuration too, where pipelines of diffusers 0.x find it without the line.
        lines = ["pipe.scheduler.init_noise_sigma = 1.0"]
        if network.config.addition_embed_type == "text_time":
            lines.append("pipe.scheduler.scale_model_input = lambda x, t: x")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config({**settings, "init_noise_sigma": 1.0})
        return scheduler, call, True, "", {"prelude": tuple(lines)}
    return None, None, False, "no stock pipeline of this network takes a flow's steps", {}


def _table(schedule: VPDiscrete, size: int) -> dict[str, Any]:
    """Settings of a scheduler with the first ``size`` noise levels."""
    said = schedule.describe()
    if size == schedule.steps and "beta" in said:
        zero = said.pop("zero_terminal_snr")
        del said["name"]
        bar = VPDiscrete(**said).alphas_cumprod
        named: dict[str, Any] = {
            "beta_schedule": schedule.beta,
            "beta_start": round(1 - bar[0], 12),
            "beta_end": round(1 - bar[-1] / bar[-2], 12),
        }
        return {"num_train_timesteps": size, **named, **({"rescale_betas_zero_snr": True} if zero else {})}
    levels = torch.tensor((1.0, *schedule.alphas_cumprod[:size]), dtype=torch.float64)
    return {"num_train_timesteps": size, "trained_betas": (1 - levels[1:] / levels[:-1]).tolist()}


def _usual(denoiser: Denoiser, fallback: Any) -> Any:
    """A scheduler that says what the network's conventions are, whatever the sampler's steps."""
    from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

    schedule: Schedule = denoiser.schedule
    if isinstance(schedule, VPDiscrete) and denoiser.prediction in _PREDICTIONS:
        kind = _PREDICTIONS[denoiser.prediction]
        settings = {**_table(schedule, schedule.steps), "prediction_type": kind, "steps_offset": 1}
        return DDIMScheduler(**settings, clip_sample=False, timestep_spacing="trailing")
    if isinstance(schedule, Flow) and denoiser.prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=int(schedule.time_scale), shift=schedule.shift)
    if isinstance(schedule, EDM) and denoiser.precond == "edm":
        ends = {"sigma_min": schedule.t_min, "sigma_max": schedule.t_max, "rho": schedule.rho}
        return EDMEulerScheduler(**ends, sigma_data=denoiser.sigma_data)
    return fallback


def _short(index: list[int]) -> str:
    return ", ".join(map(str, index[:4])) + (" …" if len(index) > 4 else "")
