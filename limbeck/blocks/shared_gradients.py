"""Gradients of weights that several sub-networks share in one step: their sum, or their mean over those that have the weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.blocks.elastic import active_parts

Aggregation = Literal["sum", "avg", "avg_sqrt"]
_POWER = {"sum": 0.0, "avg": 1.0, "avg_sqrt": 0.5}


class SharedGradients:
    r"""Divides the gradient of every entry of the shared weights by what touched it, as backward passes leave it.

    With weights :math:`w_k` of the sub-networks of a step and masks :math:`m_k` of the entries that sub-network k has, the gradient of
    :math:`\sum_k w_k L_k` becomes

    .. math:: g = \frac{\sum_k w_k m_k \nabla L_k}{\big(\sum_k w_k m_k\big)^a}, \qquad a = 0, 1, 1/2
              \text{ for } \texttt{sum}, \texttt{avg}, \texttt{avg\_sqrt}

    ::

        shared = SharedGradients(network, "avg")
        shared.clear()
        for each sub-network:
            loss = loss + weight * criterion(network(x))  # with that sub-network active
            shared.add(weight)  # right after its forward pass
        loss.backward()  # the gradients are divided on the way

    Entries that nothing touched keep their zero gradient. With :meth:`clear` and no :meth:`add`, gradients are left alone.

    Args:
        network: with elastic layers.
        aggregation: of the gradients.
    """

    def __init__(self, network: nn.Module, aggregation: Aggregation) -> None:
        self.network, self.power = network, _POWER[aggregation]
        self.touched: dict[str, Tensor] = {}
        if self.power:
            for name, parameter in network.named_parameters():
                parameter.register_hook(lambda gradient, name=name: self._divided(gradient, name))

    def clear(self) -> None:
        """Before the first sub-network of a step."""
        self.touched = {}

    @torch.no_grad()
    def add(self, weight: float) -> None:
        """Count the sub-network that was active in the last forward pass."""
        if not self.power:
            return
        parameters = dict(self.network.named_parameters())
        for name, index in active_parts(self.network).items():
            if name not in self.touched:
                self.touched[name] = torch.zeros_like(parameters[name])
            self.touched[name][index] += weight

    def _divided(self, gradient: Tensor, name: str) -> Tensor:
        if name not in self.touched:
            return gradient
        weights = self.touched[name]
        return gradient / torch.where(weights > 0, weights, 1.0) ** self.power
