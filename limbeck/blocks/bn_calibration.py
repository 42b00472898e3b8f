"""Batch normalisation's running statistics estimated anew, for a network whose weights others have shared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck.core.batch import call_model


@torch.no_grad()
def recalibrate(network: nn.Module, inputs: Iterable[Any]) -> nn.Module:
    """Forget the running mean and variance of every batch normalisation, and average them over some batches.

    All else runs in evaluation mode, without dropout. Every batch weighs the same. Modes and momenta are as before afterwards; weights
    are not touched. A network without batch normalisation costs nothing.

    Args:
        network: changed in place.
        inputs: batches of what it takes, without labels.

    Returns:
        the network.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return network
    modes = [(m, m.training) for m in network.modules()]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    try:
        for batch in inputs:
            call_model(network, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return network
