r"""Schedulers of diffusers as schedules, and what their networks predict.

A scheduler there is a noise schedule, a parameterisation and a solver in one object. Here it is taken apart: the solver and
everything that only shapes its grid (Karras, exponential and beta sigmas, spacing, terminal stretching) stay behind.

=================================================== ==================================================================
DDPM, DDIM, PNDM, DPMSolver, DEIS, SA, UniPC,       :class:`~limbeck.diffusion.schedules.VPDiscrete` from ``alphas_cumprod``; networks are
LCM, TCD                                            told the index
Euler, Heun, KDPM2, LMS                             the same: their state x / alpha and its scaling before the network are the solver's affair
EDMEuler, EDMDPMSolver                              :class:`~limbeck.diffusion.schedules.EDM`, preconditioned; networks are told ln(sigma) / 4
FlowMatchEuler, FlowMatchHeun, FlowMatchLCM, and    :class:`~limbeck.diffusion.schedules.Flow` with their shift; networks are told 1000 t
multistep solvers with ``use_flow_sigmas``
=================================================== ==================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from limbeck.core.errors import InputError
from limbeck.diffusion.schedules import EDM, Flow, Schedule, VPDiscrete

ANCESTORS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
MULTISTEP = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
EXPLODING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
KARRAS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
KNOWN = (*ANCESTORS, *MULTISTEP, *EXPLODING, *KARRAS, *FLOWS)

_NAMES = {"epsilon": "eps", "sample": "x0", "original_sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
_AGREES = 1e-4
"""Relative difference up to which a table of alphas_cumprod, kept in single precision there, is a published one."""


@dataclass(frozen=True)
class Conventions:
    """What a scheduler says about its network.

    Attributes:
        schedule: of the noise.
        prediction: ``eps``, ``x0``, ``v`` or ``flow``; ``x0`` where ``precond`` is set.
        precond: ``edm``, or None.
        sigma_data: of the preconditioning.
        sign: -1 where the network's output has to be negated to be that prediction, else 1.
    """

    schedule: Schedule
    prediction: str
    precond: Literal["edm"] | None = None
    sigma_data: float = 0.5
    sign: int = 1


def schedule_of(scheduler: Any, *, tokens: int | None = None) -> Schedule:
    """The noise schedule of a scheduler.

    Args:
        scheduler: an object of diffusers.
        tokens: number of image tokens; needed where the shift depends on it (``use_dynamic_shifting``).

    Raises:
        InputError: an unknown class; a dynamic shift without ``tokens``; settings that no schedule here has.
    """
    return conventions_of(scheduler, tokens=tokens).schedule


def prediction_of(scheduler: Any) -> str:
    """What the network of a scheduler predicts: ``eps``, ``x0``, ``v`` or ``flow``.

    Raises:
        InputError: an unknown class or prediction type, or one that contradicts the schedule.
    """
    return _prediction(scheduler, _family(scheduler))


def conventions_of(scheduler: Any, *, tokens: int | None = None) -> Conventions:
    """Schedule, prediction and preconditioning of a scheduler; arguments and errors as for :func:`schedule_of`."""
    family = _family(scheduler)
    prediction = _prediction(scheduler, family)
    if family == "flow":
        steps = int(_setting(scheduler, "num_train_timesteps", 1000))
        return Conventions(Flow(_shift(scheduler, tokens), time_scale=float(steps)), prediction)
    if family == "edm":
        ends = [float(_setting(scheduler, name, usual)) for name, usual in (("sigma_min", 0.002), ("sigma_max", 80.0))]
        schedule = EDM(ends[0], ends[1], float(_setting(scheduler, "rho", 7.0)))
        sign = -1 if _setting(scheduler, "prediction_type", "epsilon") == "v_prediction" else 1
        return Conventions(schedule, "x0", "edm", float(_setting(scheduler, "sigma_data", 0.5)), sign)
    return Conventions(_discrete(scheduler), prediction)


def _class_name(scheduler: Any) -> str:
    """The scheduler's known class, itself or above it."""
    for kind in type(scheduler).__mro__:
        if kind.__name__ in KNOWN:
            return kind.__name__
    raise InputError(
        f"the scheduler {type(scheduler).__name__} is not known here; known are {', '.join(KNOWN)}: use one of them, "
        "or give the schedule and the prediction yourself (schedule=…, prediction=…)"
    )


def _family(scheduler: Any) -> Literal["vp", "edm", "flow"]:
    name = _class_name(scheduler)
    if name in KARRAS:
        return "edm"
    if name in FLOWS or (name in MULTISTEP and bool(_setting(scheduler, "use_flow_sigmas", False))):
        return "flow"
    return "vp"


def _setting(scheduler: Any, name: str, usual: Any) -> Any:
    found = scheduler.config.get(name, usual)
    return usual if found is None else found


def _prediction(scheduler: Any, family: str) -> str:
    usual = "flow_prediction" if family == "flow" else "epsilon"
    kind = str(_setting(scheduler, "prediction_type", usual))
    where = type(scheduler).__name__
    if kind not in _NAMES:
        raise InputError(f"{where} says prediction_type '{kind}', which is none of {', '.join(_NAMES)}")
    name = _NAMES[kind]
    if family == "flow" and name != "flow":
        raise InputError(
            f"{where} is a flow, but says prediction_type '{kind}': a flow's network predicts the velocity; use a scheduler that fits "
            "the network, or remove prediction_type from the scheduler's configuration"
        )
    if family != "flow" and name == "flow":
        raise InputError(
            f"{where} says prediction_type '{kind}', which needs a flow: set use_flow_sigmas=True or use FlowMatchEulerDiscreteScheduler"
        )
    if family == "edm":
        if name == "x0":
            raise InputError(
                f"{where} says prediction_type '{kind}': preconditioned networks are 'epsilon' or 'v_prediction'"
            )
        return "x0"
    return name


def _shift(scheduler: Any, tokens: int | None) -> float:
    """The factor s of t' = s t / (1 + (s - 1) t)."""
    if bool(_setting(scheduler, "invert_sigmas", False)):
        raise InputError(
            f"{type(scheduler).__name__} has invert_sigmas=True, time from noise to data: no schedule here has that"
        )
    if not bool(_setting(scheduler, "use_dynamic_shifting", False)):
        return float(_setting(scheduler, "shift", _setting(scheduler, "flow_shift", 1.0)))
    if tokens is None:
        raise InputError(
            f"the shift of {type(scheduler).__name__} depends on the size of the images (use_dynamic_shifting): give it (image_size=…, "
            "or tokens=… here), or set use_dynamic_shifting=False and a shift"
        )
    few, many = int(_setting(scheduler, "base_image_seq_len", 256)), int(_setting(scheduler, "max_image_seq_len", 4096))
    low, high = float(_setting(scheduler, "base_shift", 0.5)), float(_setting(scheduler, "max_shift", 1.15))
    mu = low + (high - low) * (tokens - few) / (many - few)
    if _setting(scheduler, "time_shift_type", "exponential") == "exponential":
        return math.exp(mu)
    if not mu > 0:
        raise InputError(
            f"the linear shift of {type(scheduler).__name__} is {mu:g} at {tokens} tokens: it must be above 0"
        )
    return mu


def _discrete(scheduler: Any) -> VPDiscrete:
    """The schedule of the scheduler's table; by name where it is a published one."""
    name = _class_name(scheduler)
    if _setting(scheduler, "timestep_type", "discrete") == "continuous":
        raise InputError(
            f"{name} has timestep_type='continuous' (networks told ln(sigma) / 4 in a discrete schedule): no schedule here has that"
        )
    table = scheduler.alphas_cumprod.detach().double().cpu()
    kind = str(_setting(scheduler, "beta_schedule", "linear"))
    if scheduler.config.get("trained_betas") is None and kind in ("linear", "scaled_linear"):
        named = VPDiscrete(
            kind,
            len(table),
            beta_start=float(scheduler.config["beta_start"]),
            beta_end=float(scheduler.config["beta_end"]),
            zero_terminal_snr=bool(_setting(scheduler, "rescale_betas_zero_snr", False)),
        )
        if torch.allclose(torch.tensor(named.alphas_cumprod, dtype=torch.float64), table, rtol=_AGREES, atol=1e-7):
            return named
    return VPDiscrete(alphas_cumprod=table)
