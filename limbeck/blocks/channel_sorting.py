"""Putting the most important middle channels first, without changing what the network computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError


def channel_importance(layer: nn.Module, group: int = 1) -> Tensor:
    """(C / group,) the L1 norm of the weights by which a linear or convolutional layer reads each (group of) input channel.

    Source: the channel sorting of "Once-for-All: Train One Network and Specialize it for Efficient Deployment" (2020).
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    sums = weight.detach().abs().transpose(0, 1).flatten(1).sum(1)
    return sums.view(-1, group).sum(1)


@torch.no_grad()
def sort_channels(
    producers: Sequence[nn.Module],
    consumer: nn.Module,
    through: Sequence[nn.Module] = (),
    *,
    group: int = 1,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> Tensor:
    """Permute the channels between layers so that those that the consumer reads with the largest weights come first.

    The function of the network at full width stays the same. What optimisers keep for a weight (momentum, Adam's means) moves with it.

    Args:
        producers: linear or convolutional layers whose outputs these channels are.
        consumer: the linear or convolutional layer that reads them.
        through: layers in between that keep channels apart (normalisation, depth-wise convolution) or gate them (squeeze-excite).
        group: neighbouring channels that stay together, such as an attention head.
        optimizers: of these weights.

    Returns:
        (C,) the order: channel ``order[i]`` is now channel i.

    Raises:
        InputError: a layer does not have these channels.
    """
    ranks = channel_importance(consumer, group).argsort(descending=True, stable=True)
    order = (ranks[:, None] * group + torch.arange(group, device=ranks.device)).flatten()
    outputs, inputs = [*producers], [consumer]
    for layer in through:
        if hasattr(layer, "reduce") and hasattr(layer, "expand"):  # a gate reads and writes these channels
            inputs.append(layer.get_submodule("reduce"))
            outputs.append(layer.get_submodule("expand"))
        else:
            outputs.append(layer)
    for axis, layers in ((0, outputs), (1, inputs)):
        for layer in layers:
            tensors = [layer.weight] if axis == 1 else [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
            for tensor in tensors:
                assert isinstance(tensor, Tensor)
                if tensor.ndim > axis:
                    _permute(tensor, axis, order, layer, optimizers)
    return order


def _permute(
    tensor: Tensor, axis: int, order: Tensor, layer: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    if tensor.shape[axis] != len(order):
        raise InputError(
            f"a {type(layer).__name__} with {tensor.shape[axis]} channels lies between layers that share {len(order)}"
        )
    kept = [t for o in optimizers for t in o.state.get(tensor, {}).values() if isinstance(t, Tensor)]
    for each in (tensor.data, *(t for t in kept if t.shape == tensor.shape)):
        each.copy_(each.index_select(axis, order))
