"""Exponential moving average of a model's weights, as a frozen model of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.blocks.taps import unwrap
from limbeck.core.errors import InputError


class EMA(nn.Module):
    r"""A frozen copy of a model that follows it slowly: \(\bar\theta \leftarrow d\,\bar\theta + (1-d)\,\theta\).

    The copy (``.module``) starts equal to the model, is always in eval mode and needs no gradients; gradients still
    flow through it to its inputs. It may be moved or cast on its own: ``EMA(model).float()`` keeps a precise average
    of a model in bfloat16, where a decay near 1 would otherwise round every update away.

    Args:
        model: the model to follow; DistributedDataParallel and ``torch.compile`` wrappers are looked through.
        decay: \(d\) in [0, 1]; 0 copies the model at each update, 1 never changes.
        warmup: begin with a shorter memory, \(d_t = \min(d, (1+t)/(10+t))\) at the \(t\)-th update counted from 0, as
            TensorFlow's ExponentialMovingAverage does with ``num_updates``.
        buffers: "copy" the model's buffers at each update, or "average" the floating-point ones (BatchNorm's
            statistics) as the weights; integer buffers are copied either way.

    Attributes:
        updates: how many updates were made; saved in the state dict.

    Raises:
        InputError: ``decay`` or ``buffers`` is out of range, or a model with other weights is given to a method.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.999, warmup: bool = False, buffers: Literal["copy", "average"] = "copy"
    ) -> None:
        super().__init__()
        if buffers not in ("copy", "average"):
            raise InputError(f"EMA: buffers must be 'copy' or 'average', got {buffers!r}.")
        self.decay = _checked(decay)
        self.warmup = warmup
        self.buffers_mode = buffers
        self.updates = 0
        self.module = deepcopy(unwrap(model)).requires_grad_(False)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged model's output."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> EMA:
        """Stays in eval mode, also when a parent module is switched to training."""
        return super().train(False)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float | None = None) -> None:
        """One step towards ``model``, in place; ``decay`` replaces the set one (and its warm-up) for this step."""
        if decay is None:
            start = (1 + self.updates) / (10 + self.updates)
            decay = min(self.decay, start) if self.warmup else self.decay
        averaged, weights = self._pairs(dict(self.module.named_parameters()), dict(unwrap(model).named_parameters()))
        mine, theirs = self._pairs(dict(self.module.named_buffers()), dict(unwrap(model).named_buffers()))
        copied: list[Tensor] = []
        sources: list[Tensor] = []
        for own, other in zip(mine, theirs, strict=True):
            averages = self.buffers_mode == "average" and (own.is_floating_point() or own.is_complex())
            (averaged if averages else copied).append(own)
            (weights if averages else sources).append(other)
        if averaged:
            near = [w.to(a.device, a.dtype) for w, a in zip(weights, averaged, strict=True)]
            torch._foreach_lerp_(averaged, near, 1 - _checked(decay))
        _copy(copied, sources)
        self.updates += 1

    @contextmanager
    def swap_into(self, model: nn.Module) -> Iterator[nn.Module]:
        """``model`` with the averaged weights and buffers inside the block; its own come back after it, also on errors.

        Costs one copy of the model's tensors. The model keeps its training or eval mode: set eval to evaluate.
        """
        inner = unwrap(model)
        averaged, weights = self._pairs(dict(self.module.named_parameters()), dict(inner.named_parameters()))
        mine, theirs = self._pairs(dict(self.module.named_buffers()), dict(inner.named_buffers()))
        targets = weights + theirs
        backup = [t.detach().clone() for t in targets]
        try:
            _copy(targets, averaged + mine)
            yield model
        finally:
            _copy(targets, backup)

    def get_extra_state(self) -> Tensor:
        """The number of updates, which the warm-up needs."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        self.updates = int(state)

    @staticmethod
    def _pairs(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        for name in [*own, *other]:
            if name not in own or name not in other or own[name].shape != other[name].shape:
                raise InputError(
                    f"EMA: '{name}' differs between the averaged and the given model: give the same model."
                )
        return list(own.values()), [other[name] for name in own]


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _checked(decay: float) -> float:
    if not 0 <= decay <= 1:
        raise InputError(f"EMA: decay must be in [0, 1], got {decay}.")
    return float(decay)
