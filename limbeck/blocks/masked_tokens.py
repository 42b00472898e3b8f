"""Masked language modelling: which tokens are hidden, and what stands in their place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import InputError


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that are no content. The defaults are those of :mod:`limbeck.tasks.tokens`."""

    pad: int = 0
    mask: int = 1
    cls: int = 2
    sep: int = 3

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        """Those of a 🤗 tokenizer.

        Raises:
            InputError: it lacks one of them.
        """
        found: dict[str, Any] = {f.name: getattr(tokenizer, f"{f.name}_token_id", None) for f in fields(cls)}
        lacking = [name for name, value in found.items() if value is None]
        if lacking:
            raise InputError(
                f"the tokenizer has no {', '.join(lacking)} token: give SpecialTokens(pad=…, mask=…, cls=…, sep=…)"
            )
        return cls(**{name: int(value) for name, value in found.items()})

    def positions(self, ids: Tensor) -> Tensor:
        """True where a token of ``ids`` is one of them; the same shape."""
        return torch.isin(ids, torch.tensor([getattr(self, f.name) for f in fields(self)], device=ids.device))


def mask_tokens(
    ids: Tensor, special: SpecialTokens, vocabulary: int, rate: float = 0.15, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Hide tokens as BERT does: of those chosen, 80 % become the mask token, 10 % a random token, 10 % stay.

    Args:
        ids: (B, T).
        special: never chosen, and never put in as a random token where they are the lowest ids.
        vocabulary: number of token ids.
        rate: share of the other tokens that is chosen, each by itself.
        generator: None: torch's global one.

    Returns:
        the ids that the model sees (B, T), and where the chosen tokens are (B, T), bool.

    Source: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2019).
    """

    def uniform() -> Tensor:
        return torch.rand(ids.shape, generator=generator).to(ids.device)

    chosen = (uniform() < rate) & ~special.positions(ids)
    fate = uniform()
    lowest = max(special.pad, special.mask, special.cls, special.sep) + 1
    lowest = lowest if lowest < vocabulary else 0
    random = lowest + (uniform() * (vocabulary - lowest)).long().clamp_max(vocabulary - lowest - 1)
    seen = torch.where(chosen & (fate < 0.8), torch.full_like(ids, special.mask), ids)
    return torch.where(chosen & (fate >= 0.9), random, seen), chosen
