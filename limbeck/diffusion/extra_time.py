r"""A further number beside the time: where a jump is to end, or how strong guidance is meant to be.

A network that knows one time is wrapped so that it is also told another number; an embedding of it is added to that of the time. The
last layer of the new embedding starts at zero, so the wrapped network is at first what it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.blocks.taps import list_taps, unwrap
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.schedules import Schedule, make_schedule

TIME_LAYERS = ("time_embedding", "time_embed", "time_mlp", "t_embedder", "embed_time", "time")
"""What the layer that embeds the time is called, in diffusers and elsewhere."""


class ExtraNumber(nn.Module):
    r"""A network that is told one more number: :math:`e(t) \to e(t) + g(u)`, e being the network's embedding of the time.

    g has sinusoidal features, a hidden layer and a last layer that starts at 0. The number of a forward pass is given by::

        with network.told(u):
            denoiser.predict(x_t, t, cond)

    and otherwise follows from :meth:`default`.

    Args:
        network: called as ``network(x, model_time, cond)``.
        layer: path of the layer whose output (B, width) is the embedding of the time; None: looked for by its usual names.
        features: sinusoidal features.
        scale: numbers are multiplied by it before the sines; about 1000 for numbers in [0, 1].

    Raises:
        UnknownNameError, InputError: no such layer, or it gives no vectors.

    Sources: of the target time "Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion" (2023), of the
    embedded guidance "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference" (2023).
    """

    def __init__(
        self, network: nn.Module, width: int, layer: str | None = None, features: int = 32, scale: float = 1000.0
    ) -> None:
        super().__init__()
        if features < 2 or features % 2:
            raise InputError(f"the number of sinusoidal features must be even and at least 2 (got {features})")
        self.network, self.width, self.features = network, width, features
        self.layer = time_layer(network) if layer is None else layer
        known = dict(unwrap(network).named_modules())
        if self.layer not in known:
            raise UnknownNameError("layer", self.layer, filter(None, known))
        self.scale = float(scale)
        rates = torch.exp(-math.log(10_000.0) * torch.arange(features // 2) / (features // 2))
        self.register_buffer("rates", rates)
        first, last = nn.Linear(features, width), nn.Linear(width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.embed = nn.Sequential(first, nn.SiLU(), last)
        self._told: Tensor | None = None

    rates: Tensor

    @property
    def spec(self) -> dict[str, Any] | None:
        """From what the network can be built again, where the one inside can; see :mod:`limbeck.adapters.denoising`."""
        inner = getattr(self.network, "spec", None)
        if inner is None:
            return None
        return {"inner": {"class": type(self.network).__name__, **inner}, "width": self.width, "layer": self.layer}

    def default(self, model_time: Tensor) -> Tensor:
        """The number (B,) where none was told."""
        raise InputError(f"{type(self).__name__} was not told its number: use it inside `with network.told(…)`")

    @contextmanager
    def told(self, number: Tensor) -> Iterator[None]:
        """Inside, forward passes are told ``number`` (B,), () for all alike; twice as many rows (guidance) repeat it."""
        before, self._told = self._told, number
        try:
            yield
        finally:
            self._told = before

    def forward(self, x: Tensor, model_time: Tensor, cond: Any = None) -> Tensor:
        number = self.default(model_time) if self._told is None else self._told
        number = number.to(x.device).float().reshape(-1)
        if len(x) % len(number):
            raise InputError(f"{len(x)} samples but {len(number)} numbers: they must be as many")
        angles = self.scale * number.repeat(len(x) // len(number))[:, None] * self.rates
        added = self.embed(torch.cat([angles.cos(), angles.sin()], 1).to(next(self.embed.parameters()).dtype))

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor) or output.shape != added.shape:
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise InputError(
                    f"layer '{self.layer}' gives {shape}, not an embedding of the time {tuple(added.shape)}: name another"
                )
            return output + added.to(output.dtype)

        handle = unwrap(self.network).get_submodule(self.layer).register_forward_hook(add)
        try:
            found: Tensor = self.network(x, model_time, cond)
        finally:
            handle.remove()
        return found


class TargetTime(ExtraNumber):
    r"""A network that is told where its jump ends, as the share :math:`\arctan(\sigma_s/\alpha_s)/(\pi/2)` of the way to noise, in [0, 1].

    Outside of ``told`` it takes the next time of a grid below the one it is asked at, as a sampler on that grid needs; without a grid
    it aims at clean samples.

    Args:
        schedule: whose times are meant.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, width: int, layer: str | None = None) -> None:
        super().__init__(network, width, layer)
        self.schedule = schedule
        self.grid: tuple[float, ...] = ()

    @property
    def spec(self) -> dict[str, Any] | None:
        known = super().spec
        return known and {**known, "schedule": self.schedule.describe(), "grid": list(self.grid)}

    def share(self, s: Tensor) -> Tensor:
        """Times (B,) as the network is told them."""
        return torch.atan2(self.schedule.sigma(s), self.schedule.alpha(s)) * (2 / math.pi)

    def on_grid(self, times: Sequence[float] | Tensor) -> TargetTime:
        """The same network (not a copy) that aims at the next of these falling times."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._told = None
        made.grid = tuple(float(t) for t in times)
        return made

    def default(self, model_time: Tensor) -> Tensor:
        if not self.grid:
            return torch.zeros_like(model_time, dtype=torch.float32)
        grid = torch.tensor(self.grid[::-1], dtype=torch.float32, device=model_time.device)  # rising
        known = self.schedule.to_model_time(grid)
        # The time asked at is one of the grid's up to rounding: it lies above the middle between itself and the next one.
        middles = (known[1:] + known[:-1]) / 2
        below = torch.bucketize(model_time.float(), middles) - 1
        return self.share(grid)[below.clamp_min(0)]


class GuidanceScale(ExtraNumber):
    """A network that is told the guidance w it is to imitate; outside of ``told`` the ``usual`` one."""

    def __init__(self, network: nn.Module, width: int, layer: str | None = None, usual: float = 1.0) -> None:
        super().__init__(network, width, layer, scale=100.0)
        self.usual = float(usual)

    @property
    def spec(self) -> dict[str, Any] | None:
        known = super().spec
        return known and {**known, "usual": self.usual}

    def default(self, model_time: Tensor) -> Tensor:
        return torch.full_like(model_time, self.usual, dtype=torch.float32)

    def at(self, guidance: float) -> GuidanceScale:
        """The same network (not a copy) with another usual guidance."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._told = None
        made.usual = float(guidance)
        return made


def rebuilt(spec: dict[str, Any], inner: nn.Module) -> ExtraNumber | None:
    """The wrapper that ``spec`` (with ``class``) describes around a network; None for other classes."""
    if spec["class"] == "TargetTime":
        schedule = dict(spec["schedule"])
        made = TargetTime(inner, make_schedule(schedule.pop("name"), **schedule), spec["width"], spec["layer"])
        return made.on_grid(spec["grid"])
    if spec["class"] == "GuidanceScale":
        return GuidanceScale(inner, spec["width"], spec["layer"], spec["usual"])
    return None


def time_layer(network: nn.Module) -> str:
    """The path of the layer that embeds the time, by its usual names.

    Raises:
        InputError: there is none.
    """
    paths = [path for path, _ in unwrap(network).named_modules()]
    for name in TIME_LAYERS:
        found = [p for p in paths if p.rpartition(".")[2] == name]
        if found:
            return min(found, key=len)
    raise InputError(
        f"{type(unwrap(network)).__name__} has no layer called {', '.join(TIME_LAYERS)}: name the one that embeds the time"
    )


def embedding_width(network: nn.Module, sample: tuple[Any, ...], layer: str | None = None) -> int:
    """The width of the embedding of the time.

    Args:
        sample: what one forward takes.

    Raises:
        InputError: the layer gives no vectors (B, width).
    """
    path = time_layer(network) if layer is None else layer
    shape = next((info.shape for info in list_taps(network, sample) if info.path == path), None)
    if shape is None or len(shape) != 2:
        raise InputError(f"layer '{path}' gives no embedding (B, width) of the time: name another")
    return shape[1]
