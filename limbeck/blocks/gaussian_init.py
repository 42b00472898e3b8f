"""Copies of networks with weights from the standard normal distribution."""

from __future__ import annotations

import copy

import torch
from torch import nn

NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def gaussian_copy(network: nn.Module, seed: int) -> nn.Module:
    """A copy of a network, redrawn by :func:`gaussian_`; the network itself stays as it is."""
    drawn = copy.deepcopy(network)
    for parameter in drawn.parameters():
        parameter.grad = None
    return gaussian_(drawn, seed)


@torch.no_grad()
def gaussian_(network: nn.Module, seed: int) -> nn.Module:
    """Draw every weight (a parameter with two axes or more) from N(0, 1), in place; biases become 0, norms the identity.

    Other parameters with one axis stay as they are, unless they are called ``bias``. Running statistics start anew. The network's own
    scale is lost, so norms in training mode are what keeps its activations finite.

    Args:
        network: any module.
        seed: of a generator of its own: torch's random state is left alone, and the draw does not depend on the device.

    Returns:
        the network.

    Source: the initialisation of "DisWOT" (2023), after "Zen-NAS" (2021).
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        norm = isinstance(module, NORMS)
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
        for name, parameter in module.named_parameters(recurse=False):
            if norm:
                parameter.fill_(0.0 if "bias" in name else 1.0)
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif "bias" in name:
                parameter.zero_()
    return network
