"""Quantised weights of any module, as a parametrisation: the layer computes with ``w_q``, the optimiser sees ``w``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from limbeck.blocks.quantizers import Gradient, QuantisedTensor, encode, quantile_levels, quantise, uniform_levels
from limbeck.core.errors import InputError

Mode = Literal["off", "uniform", "learned"]


class WeightQuantizer(nn.Module):
    """What stands between a weight and its layer.

    Rounding at random happens in training mode only. The number of levels is that of the parameter ``levels``; loading a state with another number
    changes it.

    Args:
        count: levels.
        bucket, gradient: see :func:`limbeck.blocks.quantizers.quantise`.
        stochastic: round at random while training (uniform levels).

    Attributes:
        mode: ``off`` lets weights through, ``uniform`` has equally spaced levels, ``learned`` those of the parameter ``levels``.
    """

    def __init__(
        self,
        count: int,
        bucket: int | None = 256,
        *,
        gradient: Gradient = "straight-through",
        stochastic: bool = False,
        mode: Mode = "uniform",
    ) -> None:
        super().__init__()
        self.levels = nn.Parameter(uniform_levels(count))
        self.bucket, self.gradient, self.stochastic = bucket, gradient, stochastic
        self.mode: Mode = mode

    @property
    def count(self) -> int:
        return len(self.levels)

    def forward(self, weight: Tensor) -> Tensor:
        if self.mode == "off":
            return weight
        table = self.levels if self.mode == "learned" else self.count
        random = self.stochastic and self.training and self.mode == "uniform"
        return quantise(weight, table, self.bucket, stochastic=random, gradient=self.gradient)

    def set_levels(self, levels: Tensor) -> None:
        """Other levels, perhaps another number of them; optimisers made before do not know them then."""
        requires_grad = self.levels.requires_grad
        self.levels = nn.Parameter(levels.detach().to(self.levels), requires_grad)

    def place_levels(self, weight: Tensor, count: int) -> None:
        """Levels at the quantiles of the scaled weights."""
        self.set_levels(quantile_levels(weight, count, self.bucket))

    @torch.no_grad()
    def sort_levels(self) -> None:
        self.levels.copy_(self.levels.sort().values)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}levels")
        if isinstance(stored, Tensor) and stored.shape != self.levels.shape:
            self.set_levels(stored)
        super()._load_from_state_dict(dict(state_dict), prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.count} levels, bucket={self.bucket}, {self.mode}"


def attach_quantizers(
    layers: Mapping[str, nn.Module], make: Callable[[str], WeightQuantizer], weight: str = "weight"
) -> dict[str, WeightQuantizer]:
    """Quantise a weight of each layer from now on; layers that share it share the quantiser.

    Returns:
        quantisers by the name of their layer, each once.

    Raises:
        InputError: a layer has no such parameter, or is parametrised already.
    """
    made: dict[int, WeightQuantizer] = {}
    found = {}
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer):
            raise InputError(f"'{name}' is parametrised already (quantised, pruned?): give a plain module")
        tensor = getattr(layer, weight, None)
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            raise InputError(f"'{name}' ({type(layer).__name__}) has no parameter '{weight}' that can be quantised")
        quantizer = made.get(id(tensor))
        if quantizer is None:
            quantizer = found[name] = made[id(tensor)] = make(name)
            quantizer.to(tensor.device)
        parametrize.register_parametrization(layer, weight, quantizer, unsafe=True)
    return found


def original(layer: nn.Module, weight: str = "weight") -> nn.Parameter:
    """The full-precision parameter behind a quantised weight."""
    parameter = layer.parametrizations[weight].original  # type: ignore[index, union-attr]
    assert isinstance(parameter, nn.Parameter)
    return parameter


def quantizers_of(model: nn.Module) -> dict[str, WeightQuantizer]:
    """Quantisers by layer, also those that share one; of parameters called ``weight``."""
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            quantizer = module.parametrizations["weight"][0]
            if isinstance(quantizer, WeightQuantizer):
                found[name] = quantizer
    return found


def plain_copy(model: nn.Module, mode: Mode | None = None) -> nn.Module:
    """A copy of the model without quantisers, whose weights have the values that the layers compute with, in evaluation mode.

    Args:
        model: with or without quantisers.
        mode: of the quantisers; None: as they are.
    """
    plain = copy.deepcopy(model).eval()
    shared: dict[int, nn.Parameter] = {}
    for name, quantizer in quantizers_of(plain).items():
        layer = plain.get_submodule(name)
        quantizer.mode = quantizer.mode if mode is None else mode
        before = original(layer)
        if id(before) not in shared:
            with torch.no_grad():
                shared[id(before)] = nn.Parameter(quantizer(before.detach()).clone(), before.requires_grad)
        # torch's remove_parametrizations edits the layer's class, which the copy shares with the original
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.register_parameter("weight", shared[id(before)])
    return plain


def rounded_copy(
    model: nn.Module, layers: Iterable[str], count: int, bucket: int | None
) -> tuple[nn.Module, dict[str, QuantisedTensor]]:
    """A copy of a plain model whose layers' weights are rounded to uniform levels, and these weights as they are stored, by their names."""
    rounded = copy.deepcopy(model)
    made = {}
    with torch.no_grad():
        for name in layers:
            weight: Any = rounded.get_submodule(name).weight
            made[f"{name}.weight"] = encode(weight, count, bucket)
            weight.copy_(made[f"{name}.weight"].restored())
    return rounded, made
