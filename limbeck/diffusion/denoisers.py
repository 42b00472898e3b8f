r"""A network with its conventions: what it predicts, in which schedule, and how guidance is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.blocks.taps import Tap, Taps
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.conditions import Condition, concat, null_like, rows
from limbeck.diffusion.predictions import check_prediction, convert
from limbeck.diffusion.schedules import Schedule, expand, precise

Network = Callable[..., Tensor]


class Denoiser(nn.Module):
    r"""A network that can be asked for any prediction.

    The network is called as ``module(x, model_time, cond)`` with x (B, ...), model_time (B,) and the condition as it was given, and
    returns a tensor of the shape of x. Networks of other libraries are wrapped by adapters to be called so.

    Classifier-free guidance is :math:`p_w = p_\varnothing + w\,(p_c - p_\varnothing)`: w = 1 is none, and costs one evaluation instead of
    two. Both halves go through the network in one forward pass.

    Args:
        module: the network.
        schedule: of the noise it was trained with.
        prediction: what it returns: ``x0``, ``eps``, ``v``, ``flow`` or ``score``; not used with ``precond="edm"``.
        precond: ``edm``: :math:`D(x;\sigma) = c_{skip} x + c_{out} F(c_{in} x; \ln(\sigma)/4)`; the network is F.
        sigma_data: standard deviation of the data, for ``edm``.
        null_cond: the null condition, one row without a batch axis; None: the network cannot be guided.
        split_guidance: evaluate both halves of guidance one after the other, for less memory.

    Attributes:
        evaluations: network evaluations so far, per sample (guided ones count two).

    Raises:
        InputError: a prediction that contradicts the schedule.

    Source of guidance: "Classifier-Free Diffusion Guidance" (2022); of the preconditioning: "Elucidating the Design Space of
    Diffusion-Based Generative Models" (2022).
    """

    def __init__(
        self,
        module: nn.Module,
        schedule: Schedule,
        prediction: str = "eps",
        *,
        precond: Literal["edm"] | None = None,
        sigma_data: float = 0.5,
        null_cond: Condition = None,
        split_guidance: bool = False,
    ) -> None:
        super().__init__()
        if precond not in (None, "edm"):
            raise UnknownNameError("preconditioning", str(precond), ("edm",))
        if precond == "edm" and schedule.name != "edm":
            raise InputError(f"the preconditioning 'edm' needs the schedule 'edm', not '{schedule.name}'")
        self.module, self.schedule = module, schedule
        self.prediction = "x0" if precond == "edm" else prediction
        check_prediction(self.prediction, schedule)
        self.precond, self.sigma_data = precond, float(sigma_data)
        self.null_cond, self.split_guidance = null_cond, split_guidance
        self.evaluations = 0

    # ---- asking --------------------------------------------------------------------------------------------------------

    def predict(
        self,
        x_t: Tensor,
        t: Tensor | float,
        cond: Condition = None,
        target: str = "x0",
        guidance: float | Tensor = 1.0,
        negative: Condition = None,
    ) -> Tensor:
        """A prediction (B, ...) at x_t (B, ...) and t, a number, () or (B,).

        Gradients flow to ``x_t`` and to the network's parameters.

        Args:
            cond: (B, ...), or None.
            target: the form of the prediction.
            guidance: w, a number or (B,).
            negative: condition that takes the place of the null condition.

        Raises:
            InputError: guidance without a null condition, a condition of another size, an unknown target.
        """
        times = self.times_like(t, x_t)
        size = rows(cond)
        if size is not None and size != len(x_t):
            raise InputError(f"{len(x_t)} samples but {size} conditions: they must be as many")
        if negative is not None and rows(negative) != len(x_t):
            raise InputError(f"{len(x_t)} samples but {rows(negative)} negative conditions: they must be as many")
        return self.converted(self.guided(x_t, times, cond, guidance, negative), target, x_t, times)

    def guided(self, x_t: Tensor, t: Tensor, cond: Condition, guidance: float | Tensor, negative: Condition) -> Tensor:
        """The network's own prediction with guidance; :meth:`predict` converts it."""
        if cond is None or _is_one(guidance):
            return self.raw(x_t, t, cond)
        blank = null_like(self.null_cond, cond, len(x_t)) if negative is None else negative
        if self.split_guidance:
            with_cond, without = self.raw(x_t, t, cond), self.raw(x_t, t, blank)
        else:
            both = self.raw(torch.cat([x_t, x_t]), torch.cat([t, t]), concat(cond, blank), samples=len(x_t))
            with_cond, without = both.chunk(2)
        weight = torch.as_tensor(guidance, device=x_t.device, dtype=precise(with_cond).dtype)
        return (without + expand(weight, x_t) * (with_cond - without)).to(with_cond.dtype)

    def raw(self, x_t: Tensor, t: Tensor, cond: Condition = None, *, samples: int | None = None) -> Tensor:
        """What the network itself predicts (the denoised sample with ``edm``), without guidance.

        Args:
            samples: how many samples the rows belong to, for the count of evaluations.
        """
        self.evaluations += 1 if samples is None else len(x_t) // samples
        if self.precond is None:
            found: Tensor = self.module(x_t, self.schedule.to_model_time(t), cond)
        else:
            sigma, data = expand(precise(t), x_t), self.sigma_data
            total = sigma**2 + data**2
            inner = self.module((x_t / total.sqrt()).to(x_t.dtype), self.schedule.to_model_time(t), cond)
            found = (data**2 / total * x_t + sigma * data / total.sqrt() * inner).to(x_t.dtype)
        if found.shape != x_t.shape:
            raise InputError(
                f"{type(self.module).__name__} gives shape {tuple(found.shape)} for samples of shape {tuple(x_t.shape)}: "
                "they must be equal"
            )
        return found

    def converted(self, value: Tensor, target: str, x_t: Tensor, t: Tensor) -> Tensor:
        return convert(value, self.prediction, target, x_t, t, self.schedule)

    def converted_from_x0(self, x0: Tensor, target: str, x_t: Tensor, t: Tensor | float) -> Tensor:
        """A denoised sample at (x_t, t) as another prediction."""
        return convert(x0, "x0", target, x_t, self.times_like(t, x_t), self.schedule)

    def features(
        self, x_t: Tensor, t: Tensor | float, cond: Condition = None, layers: Sequence[str | Tap] = ()
    ) -> list[Any]:
        """What the network's layers give on one forward pass, for discriminators and feature losses.

        Args:
            layers: module paths within the network.
        """
        taps = [Tap(f"module.{layer}") if isinstance(layer, str) else layer for layer in layers]
        with Taps(self, taps) as found:
            self.raw(x_t, self.times_like(t, x_t), cond)
        return [found[tap] for tap in taps]

    forward = predict

    # ---- making others -------------------------------------------------------------------------------------------------

    def with_module(self, module: nn.Module, **changes: Any) -> Denoiser:
        """The same conventions around another network; ``changes`` to the constructor's other arguments."""
        settings: dict[str, Any] = {
            "schedule": self.schedule,
            "prediction": self.prediction,
            "precond": self.precond,
            "sigma_data": self.sigma_data,
            "null_cond": self.null_cond,
            "split_guidance": self.split_guidance,
        }
        return Denoiser(module, **{**settings, **changes})

    def describe(self) -> dict[str, Any]:
        """The conventions as plain values; the null condition only where it is a class id."""
        null = self.null_cond
        return {
            "schedule": self.schedule.describe(),
            "prediction": self.prediction,
            "precond": self.precond,
            "sigma_data": self.sigma_data,
            "null_class": int(null) if isinstance(null, Tensor) and null.ndim == 0 else None,
        }

    @property
    def conditional(self) -> bool:
        return self.null_cond is not None

    @staticmethod
    def times_like(t: Tensor | float, x: Tensor) -> Tensor:
        """Times (B,) on the samples' device; double precision stays."""
        made = torch.as_tensor(t, device=x.device, dtype=None if isinstance(t, Tensor) else torch.float64)
        made = made if made.dtype == torch.float64 and x.dtype == torch.float64 else made.float()
        if made.ndim == 0:
            return made.expand(len(x))
        if made.shape != (len(x),):
            raise InputError(
                f"times must be one number or one for each of the {len(x)} samples, not {tuple(made.shape)}"
            )
        return made


def _is_one(guidance: float | Tensor) -> bool:
    return bool((guidance == 1).all()) if isinstance(guidance, Tensor) else guidance == 1


@contextmanager
def params_frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside, no gradient reaches the modules' parameters; it still flows through them to their inputs."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
