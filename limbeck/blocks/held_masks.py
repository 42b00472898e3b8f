"""Masks that belong to a training run: kept in its checkpoints, obeyed by gradients and weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limbeck.blocks.pruning import Masks
from limbeck.core.errors import InputError


class HeldMasks(nn.Module):
    """Which weights of a network are kept, as buffers that go into checkpoints.

    Args:
        model: the network. names: the parameters that are masked; everything is kept at first.

    Raises:
        InputError: see :meth:`limbeck.blocks.pruning.Masks.full`.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.names = list(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        for name, mask in Masks.full(model, self.names).kept.items():
            self.register_buffer(f"kept{self._numbers[name]}", mask.clone())
        self._handles: list[RemovableHandle] = []

    def __getitem__(self, name: str) -> Tensor:
        """The mask of a parameter, True where the weight is kept."""
        return self.get_buffer(f"kept{self._numbers[name]}")

    def masks(self) -> Masks:
        """As plain masks, which share memory with these."""
        return Masks({name: self[name] for name in self.names})

    @torch.no_grad()
    def put(self, kept: Mapping[str, Tensor]) -> None:
        """Set masks by name.

        Raises:
            InputError: a weight that was pruned would come back.
        """
        for name, mask in kept.items():
            if bool((mask.to(self[name].device) & ~self[name]).any()):
                raise InputError(f"pruned weights of '{name}' would come back: masks only shrink")
            self[name].copy_(mask)

    @property
    def sparsity(self) -> float:
        return self.masks().sparsity

    def by_name(self) -> dict[str, float]:
        """The share of zeros in each mask."""
        return {name: 1 - float(self[name].double().mean()) for name in self.names}

    def stop_gradients(self, model: nn.Module) -> None:
        """From now on gradients of pruned weights are 0, before anything clips or uses them; until :meth:`release`."""
        self.release()
        known = dict(model.named_parameters())

        def masked(name: str) -> Any:
            return lambda gradient: gradient * self[name]  # looked up when it is called: masks shrink

        self._handles = [known[name].register_hook(masked(name)) for name in self.names if known[name].requires_grad]

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
