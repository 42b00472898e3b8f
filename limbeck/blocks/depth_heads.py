"""Prediction heads that all exits of an encoder share, told by a learned embedding which depth they read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError


class DepthConditionedHead(nn.Module):
    r"""One head for hidden states of every depth.

    .. math:: \mathrm{logits} = W\,\mathrm{LayerNorm}\big(\mathrm{GELU}(V [h_i; e_i])\big)

    with :math:`h_i` (..., D) after layer i and :math:`e_i` (conditional_size,) its learned embedding. That one head serves all exits
    makes the layers use one space; without :math:`e_i` it would have to ignore how far a state has come.

    Args:
        width: D.
        outputs: number of logits: the vocabulary, or classes.
        depth: number of layers L of the encoder.
        embedding: the embedding of layers, to share it between heads; None makes one of ``conditional_size``.
        conditional_size: its width.

    Raises:
        InputError: when called, a layer outside 1 to L.

    Source: "One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early Layer Embeddings" (2025).
    """

    def __init__(
        self, width: int, outputs: int, depth: int, embedding: nn.Embedding | None = None, conditional_size: int = 4
    ) -> None:
        super().__init__()
        self.depth = depth
        self.layers = nn.Embedding(depth, conditional_size) if embedding is None else embedding
        self.dense = nn.Linear(width + self.layers.embedding_dim, width)
        self.activation = nn.GELU()
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, outputs)

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """``(..., D)`` after layer ``layer`` (1 to L) -> logits ``(..., outputs)``."""
        if not 1 <= layer <= self.depth:
            raise InputError(f"layer {layer} is none of the layers 1 to {self.depth}")
        place = self.layers.weight[layer - 1].to(hidden.dtype).expand(*hidden.shape[:-1], -1)
        logits: Tensor = self.output(self.norm(self.activation(self.dense(torch.cat([hidden, place], -1)))))
        return logits
