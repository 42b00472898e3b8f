"""Functions that build networks of one architecture with new random weights, as often as wanted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from limbeck.blocks.fresh import check_redrawable, redraw
from limbeck.core.errors import InputError
from limbeck.networks.registry import build, spec_of

Factory = Callable[[], nn.Module]
SMALL_NETWORK = "convnet-w32-d2"


def network_factory(name: str, in_shape: tuple[int, ...], num_classes: int) -> Factory:
    """Builds networks by name, with new weights from torch's random state."""
    build(name, in_shape=in_shape, num_classes=num_classes)  # a wrong name is refused here

    def make() -> nn.Module:
        return build(name, in_shape=in_shape, num_classes=num_classes)

    make.__name__ = name
    return make


def factory_of(network: Factory | nn.Module) -> Factory:
    """A function that builds networks with new weights, from one or from a module.

    Raises:
        InputError: neither, or a module that cannot be drawn anew.
    """
    if not isinstance(network, nn.Module):
        if not callable(network):
            raise InputError(
                f"the network must be a module or a function that builds one, not {type(network).__name__}"
            )
        return network
    spec = spec_of(network)
    if spec is not None:
        return network_factory(spec["name"], tuple(spec["in_shape"]), spec["num_classes"])
    check_redrawable(network)

    def make() -> nn.Module:
        fresh = copy.deepcopy(network)
        redraw(fresh)
        return fresh

    return make


def name_of(network: Any) -> str:
    """What a network is called in tables."""
    spec = spec_of(network) if isinstance(network, nn.Module) else None
    if spec is not None:
        return str(spec["name"])
    named: Callable[..., Any] | type = type(network) if isinstance(network, nn.Module) else network
    return getattr(named, "__name__", type(network).__name__)


def default_network(in_shape: Sequence[int]) -> str:
    """A small network for inputs of this shape: a ConvNet with two or three blocks for images, else an MLP."""
    if len(in_shape) != 3:
        return "mlp-128"
    side = min(in_shape[1:])
    return SMALL_NETWORK if side < 16 else "convnet-w32-d3"
