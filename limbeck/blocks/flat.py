"""A network as a function of one flat parameter vector: what trajectories, ensembles and inner loops compute with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.core.batch import logits_of
from limbeck.core.errors import InputError


class FlatNetwork:
    """A network's forward pass with its parameters given from outside, as one vector.

    It is a pure function of ``(flat, x)``: it works under ``torch.func.vmap`` (many networks at once, ``flat`` (K, P)) and may be
    differentiated any number of times.

    Args:
        network: any module from inputs to logits. It is copied; its weights do not matter, its structure and mode do. Batch
            normalisation uses the statistics of the batch and keeps none.
        training: the mode of the copy.

    Attributes:
        size: number of parameters P.
        names, shapes: of the parameters, in the order of the vector.

    Raises:
        InputError: nothing to train in the network.
    """

    def __init__(self, network: nn.Module, *, training: bool = True) -> None:
        self.skeleton = copy.deepcopy(network).train(training)
        for part in self.skeleton.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.track_running_stats = False
                part.running_mean = part.running_var = part.num_batches_tracked = None
        named = dict(self.skeleton.named_parameters())
        if not named:
            raise InputError(f"{type(network).__name__} has no parameters, so there is nothing to train in it")
        for parameter in named.values():
            parameter.requires_grad_(False)
        self.names = list(named)
        self.shapes = [p.shape for p in named.values()]
        self.sizes = [p.numel() for p in named.values()]
        self.size = sum(self.sizes)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters by name, views of ``flat`` (P,).

        Raises:
            InputError: another length.
        """
        if flat.shape[-1] != self.size:
            raise InputError(f"a parameter vector of {flat.shape[-1]} numbers does not fit a network of {self.size}")
        parts = flat.split(self.sizes, -1)
        return {name: part.reshape(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def __call__(self, flat: Tensor, x: Any) -> Tensor:
        """Logits (B, C) of the network with parameters ``flat`` (P,) on inputs ``x`` (B, ...)."""
        return logits_of(functional_call(self.skeleton, self.split(flat), (x,)))

    def flatten(self, network: nn.Module) -> Tensor:
        """(P,) parameters of a network of this structure; a copy.

        Raises:
            InputError: it is of another structure.
        """
        found = dict(network.named_parameters())
        if list(found) != self.names or [p.shape for p in found.values()] != self.shapes:
            raise InputError(f"{type(network).__name__} has other parameters than the network of this trajectory")
        return torch.cat([p.detach().reshape(-1) for p in found.values()])

    def write(self, flat: Tensor) -> nn.Module:
        """A copy of the network with the parameters ``flat`` (P,)."""
        network = copy.deepcopy(self.skeleton)
        with torch.no_grad():
            for name, value in self.split(flat).items():
                network.get_parameter(name).copy_(value)
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        return network

    def weights(self) -> list[bool]:
        """For each parameter, whether it is a weight (two axes or more) and not a bias or a scale."""
        return [len(shape) > 1 for shape in self.shapes]

    def bounds(self) -> list[tuple[int, int]]:
        """Where in the vector each parameter begins and ends."""
        edges = [0]
        for size in self.sizes:
            edges.append(edges[-1] + size)
        return list(pairwise(edges))


def draw_flat(factory: Callable[[], nn.Module], count: int) -> tuple[FlatNetwork, Tensor]:
    """``count`` freshly initialised networks as (K, P) parameters, and the function that runs them.

    Args:
        factory: builds a network with new random weights, from torch's random state.
        count: K.
    """
    networks = [factory() for _ in range(count)]
    flat = FlatNetwork(networks[0])
    return flat, torch.stack([flat.flatten(n) for n in networks])
