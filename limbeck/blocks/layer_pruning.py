"""Pruning the layers of a network as it stands, and keeping pruned weights at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limbeck.blocks.held_masks import HeldMasks
from limbeck.blocks.one_shot_pruning import (
    Pattern,
    as_matrix,
    calibrated,
    fast_obc,
    from_matrix,
    magnitude,
    transposed,
)
from limbeck.blocks.sparse_containers import Packed, pack
from limbeck.blocks.transformer_blocks import Block, inside
from limbeck.core.batch import Batch, call_model
from limbeck.core.errors import InputError

Solver = Literal["magnitude", "obc"]


class LayerPruner:
    """Cuts chosen layers of a network, each to the same pattern, again and again if wanted; what is gone stays gone.

    Args:
        model: the network, changed in place.
        layers: which of its layers, by name.
        held: masks of their weights (``NAME.weight``).
        blocks: its blocks in order, for the solver, which goes block by block; layers in none of them come last, one by one.
        solver: ``magnitude``: the smallest weights go. ``obc``: see :func:`limbeck.blocks.one_shot_pruning.fast_obc`.
        columns, damp: of the solver.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        held: HeldMasks,
        blocks: Sequence[Block] = (),
        *,
        solver: Solver = "magnitude",
        columns: int = 128,
        damp: float = 1.0,
    ) -> None:
        self.model, self.layers, self.held = model, dict(layers), held
        groups = [[name for name in self.layers if inside(name, [block])] for block in blocks]
        rest = [[name] for name in self.layers if not inside(name, list(blocks))]
        self.groups = [group for group in groups if group] + rest
        self.solver, self.columns, self.damp = solver, columns, damp

    @torch.no_grad()
    def prune(self, pattern: Pattern, batches: Sequence[Batch] = ()) -> None:
        """Set weights to zero, for good. Zeros that a layer came with stay zero, too, unless it has nothing else.

        Args:
            pattern: what share of each layer goes, or n:m.
            batches: what the solver looks at; unused by magnitude.

        Raises:
            InputError: the solver without batches, or a layer that it cannot prune.
        """
        kept = {name: self._kept(name) for name in self.layers}
        if self.solver == "magnitude":
            for name, layer in self.layers.items():
                self._cut(name, magnitude(as_matrix(layer), pattern, kept[name]))
            return
        if not batches:
            raise InputError("the OBC solver needs calibration batches: method.prune(batches), or pruner='magnitude'")
        for grams in calibrated(self.layers, self.groups, lambda: self._run(batches)):
            for name, gram in grams.items():
                layer = self.layers[name]
                weight, stays = fast_obc(
                    as_matrix(layer), gram, pattern, kept[name], block=self.columns, damp=self.damp
                )
                self.model.get_parameter(f"{name}.weight").copy_(from_matrix(layer, weight))
                self._cut(name, stays)

    def mask(self) -> None:
        """Set pruned weights to zero again."""
        self.held.masks().apply_(self.model)

    def hold(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Mask gradients from now on, and weights after every step of the optimiser; a handle whose ``remove()`` ends the latter."""
        self.held.stop_gradients(self.model)
        return optimizer.register_step_post_hook(lambda *_: self.mask())

    def _kept(self, name: str) -> Tensor:
        """(out, in) what may still be kept."""
        held = self.held[f"{name}.weight"]
        held = held.T if transposed(self.layers[name]) else held.flatten(1)
        there = as_matrix(self.layers[name]) != 0
        return held & there if bool(there.any()) else held

    def _cut(self, name: str, stays: Tensor) -> None:
        mask = from_matrix(self.layers[name], stays)
        self.held.put({f"{name}.weight": mask})
        self.model.get_parameter(f"{name}.weight").mul_(mask)

    def _run(self, batches: Sequence[Batch]) -> None:
        was_training = self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device
        for batch in batches:
            call_model(self.model, batch.to(device).inputs)
        self.model.train(was_training)


def packed_layers(
    model: nn.Module, names: Sequence[str], form: str, dtype: torch.dtype, pattern: Pattern
) -> dict[str, Packed]:
    """The weights of a network's layers as they are stored, by parameter name; see :func:`limbeck.blocks.sparse_containers.pack`."""
    nm = (pattern.keep, pattern.of) if pattern.structured else None
    return {f"{name}.weight": pack(as_matrix(model.get_submodule(name)), form, dtype, nm) for name in names}


def reshapers(layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """By parameter name, how a stored matrix becomes the layer's weight."""

    def reshaper(layer: nn.Module) -> Any:
        return lambda matrix: from_matrix(layer, matrix)

    return {f"{name}.weight": reshaper(layer) for name, layer in layers.items()}
