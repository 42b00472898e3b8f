"""Learning rates that fall from a transformer's head to its patch embedding, for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from limbeck.blocks.patch_tokens import PatchEncoder


def layer_decay_groups(
    encoder: PatchEncoder, rest: Iterable[nn.Parameter], *, lr: float, decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: with N blocks, block i (from 0) learns at ``lr * decay ** (N - i)``, what stands in front
    of the blocks at ``lr * decay ** (N + 1)``, the final norm and ``rest`` (heads) at ``lr``.

    Vectors (biases, norms) and tokens get no weight decay. Frozen parameters are left out.

    Source: "BEiT: BERT Pre-Training of Image Transformers" (2021), as used to fine-tune masked autoencoders.
    """
    depth = len(encoder.blocks)
    layers: list[tuple[int, Iterable[nn.Parameter]]] = [
        (depth + 1, encoder.embeddings),
        *((depth - n, block.parameters()) for n, block in enumerate(encoder.blocks)),
        (0, [*encoder.norm.parameters(), *rest]),
    ]
    seen: set[int] = set()
    groups: list[dict[str, Any]] = []
    for distance, parameters in layers:
        chosen = [p for p in parameters if p.requires_grad and id(p) not in seen]
        seen.update(map(id, chosen))
        for decayed in (True, False):
            part = [p for p in chosen if decays(p) == decayed]
            if part:
                groups.append(
                    {"params": part, "lr": lr * decay**distance, "weight_decay": weight_decay if decayed else 0.0}
                )
    return groups


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices with weight decay; vectors (biases, norms) and tokens without. Frozen ones are left out."""
    chosen = [p for p in parameters if p.requires_grad]
    parts = ([p for p in chosen if decays(p)], weight_decay), ([p for p in chosen if not decays(p)], 0.0)
    return [{"params": part, "weight_decay": value} for part, value in parts if part]


def decays(parameter: nn.Parameter) -> bool:
    """True for weights of layers; False for vectors, scalars and (1, 1, D) tokens."""
    return parameter.ndim >= 2 and not (parameter.ndim == 3 and parameter.shape[:2] == (1, 1))
