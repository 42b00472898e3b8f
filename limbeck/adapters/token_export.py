"""Language models of 🤗 transformers as plain functions from token ids to logits, in the form in which they can be exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import logits_of


class FromTokens(nn.Module):
    """Token ids (B, T) -> logits, every token valid.

    The attention mask is spelt out: without one the library looks for packed sequences in the positions, which no exporter can follow.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return logits_of(self.model(input_ids=ids, attention_mask=torch.ones_like(ids)))


def takes_tokens(model: Any) -> bool:
    """Whether a model is one of 🤗 transformers' that takes token ids alone; encoder-decoders take more."""
    config = getattr(model, "config", None)
    return getattr(config, "vocab_size", None) is not None and not getattr(config, "is_encoder_decoder", False)


def token_sample(model: Any, tokens: int, size: int = 3) -> Tensor:
    """(size, tokens) random ids of a model's vocabulary, always the same ones."""
    return torch.randint(model.config.vocab_size, (size, tokens), generator=torch.Generator().manual_seed(0))
