"""Features of any module: what it gives, pooled to one row per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import call_model, first_tensor
from limbeck.core.errors import InputError

Pooling = Literal["mean", "flatten"]


class Encoder(nn.Module):
    """A module seen as an encoder: inputs in, features (B, D) out.

    A module with a method ``embed`` and a ``feature_dim`` (the networks of this library have both) is asked by that method, any
    other by its forward pass, of whose output the first tensor counts. Maps (B, C, H, W) and tokens (B, N, D) are pooled.

    Args:
        model: held, not copied.
        pooling: ``mean`` over positions, or ``flatten``.
    """

    def __init__(self, model: nn.Module, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Features (B, D).

        Raises:
            InputError: the model's output holds no tensor (B, ...).
        """
        return pooled(self._ask()(*args, **kwargs), self.pooling)

    def _ask(self) -> Callable[..., Any]:
        embed = getattr(self.model, "embed", None)
        # Elsewhere ``embed`` is often an embedding layer, which is not what is meant.
        ours = callable(embed) and not isinstance(embed, nn.Module) and isinstance(_said_width(self.model), int)
        return embed if ours and embed is not None else self.model


class RawInput(nn.Module):
    """The baseline of every representation: the first tensor of the inputs, one flat row per sample (B, D)."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Features (B, D).

        Raises:
            InputError: no tensor among the inputs.
        """
        tensor = first_tensor((args, kwargs))
        if tensor is None:
            raise InputError("the inputs hold no tensor")
        return tensor.flatten(1).float()


def pooled(output: Any, pooling: Pooling = "mean") -> Tensor:
    """One row per sample from a module's output: the first tensor in it, its positions averaged or everything flattened.

    Args:
        output: (B, D), (B, C, H, W) and other maps with channels second, (B, N, D), or a container whose first tensor is one.
        pooling: see :class:`Encoder`.

    Raises:
        InputError: no tensor, or one without a feature axis.
    """
    tensor = first_tensor(output)
    if tensor is None or tensor.ndim < 2:
        what = type(output).__name__ if tensor is None else f"shape {tuple(tensor.shape)}"
        raise InputError(f"an encoder must give features (batch, …), and this one gives {what}")
    if tensor.ndim == 2:
        return tensor
    if pooling == "flatten":
        return tensor.flatten(1)
    return tensor.mean(1) if tensor.ndim == 3 else tensor.flatten(2).mean(2)


@torch.no_grad()
def feature_width(model: nn.Module, sample: Any = None, pooling: Pooling = "mean") -> int:
    """D of a module's features: by a dry run on ``sample``, else as ``feature_dim`` or ``num_features`` says.

    The dry run is in evaluation mode; training flags and the random state are left as they were.

    Args:
        model, pooling: see :class:`Encoder`.
        sample: inputs of a few samples, on the model's device.

    Raises:
        InputError: no sample, and the module does not say.
    """
    if sample is None:
        said = _said_width(model) or getattr(model, "num_features", None)
        if isinstance(said, int) and said > 0 and pooling == "mean":
            return said
        raise InputError(
            f"the width of the features of this {type(model).__name__} is not known: give sample=… (inputs of a few samples)"
        )
    encoder = Encoder(model, pooling)
    flags = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            features: Tensor = call_model(encoder.eval(), sample)
    finally:
        for module, training in flags:
            module.training = training
    return features.shape[1]


def _said_width(model: nn.Module) -> int | None:
    said = getattr(model, "feature_dim", None)
    return said if isinstance(said, int) else None
