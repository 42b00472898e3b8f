"""Networks that say how likely two nodes are linked, from their states."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.artifacts import WEIGHTS, load_weights
from limbeck.core.errors import InputError

Encoder = Callable[[Tensor, Tensor], Tensor]
"""Features (N, F) and a sparse adjacency (N, N) -> states (N, d)."""
_ENTRIES = 8_000_000


class HadamardPredictor(nn.Module):
    """A perceptron on the product of two states, entry by entry; symmetric in the two.

    Args:
        width: d of a state.
        hidden: width of the hidden layers.
        layers: linear maps, with ReLU between them; 1: a weighted inner product.
    """

    def __init__(self, width: int, hidden: int = 128, layers: int = 1) -> None:
        super().__init__()
        if layers < 1:
            raise InputError(f"a predictor has 1 layer or more, not {layers}")
        self.spec = {"width": width, "hidden": hidden, "layers": layers}
        sizes = [width, *[hidden] * (layers - 1), 1]
        parts: list[nn.Module] = []
        for before, after in pairwise(sizes):
            parts += [nn.Linear(before, after), nn.ReLU()]
        self.net = nn.Sequential(*parts[:-1])

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Logits (B,) of pairs of states (B, d)."""
        found: Tensor = self.net(one * other)
        return found[..., 0]

    def with_all(self, some: Tensor, every: Tensor) -> Tensor:
        """Logits (B, N) of states (B, d) with all of (N, d)."""
        if len(self.net) == 1:
            last: Any = self.net[0]
            found: Tensor = (some * last.weight) @ every.T + last.bias
            return found
        return pair_logits(self, some, every)


def pair_logits(predictor: Callable[[Tensor, Tensor], Tensor], some: Tensor, every: Tensor) -> Tensor:
    """Logits (B, N) of states (B, d) with all of (N, d), by any function of pairs (·, d), (·, d) -> (·,)."""
    block = max(1, _ENTRIES // max(1, every.numel()))
    rows = []
    for part in some.split(block):
        one = part[:, None].expand(len(part), len(every), -1).reshape(-1, part.shape[1])
        other = every[None].expand(len(part), -1, -1).reshape(-1, every.shape[1])
        rows.append(predictor(one, other).view(len(part), len(every)))
    return torch.cat(rows) if rows else some.new_zeros(0, len(every))


class LinkPredictor(nn.Module):
    """An encoder of nodes and a predictor of links.

    Args:
        encoder: a module, ``encoder(x, adjacency) -> (N, d)``.
        predictor: a module, ``predictor(one, other) -> logits (B,)``.
        embedding: (N, F) initial states that are learned, for graphs whose nodes have no features; None: they have.
    """

    def __init__(self, encoder: nn.Module, predictor: nn.Module, embedding: Tensor | None = None) -> None:
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.embedding = None if embedding is None else nn.Parameter(embedding)

    def states(self, features: Tensor | None, adjacency: Tensor) -> Tensor:
        """(N, d).

        Raises:
            InputError: neither features nor an embedding, or an encoder that gives anything else.
        """
        x = self.embedding if self.embedding is not None else features
        if x is None:
            raise InputError("the nodes have no features: give them, or an embedding to be learned")
        found = self.encoder(x, adjacency)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != adjacency.shape[0]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"an encoder gives states ({adjacency.shape[0]}, d), not {shape}")
        return found

    def forward(self, features: Tensor | None, adjacency: Tensor, pairs: Tensor) -> Tensor:
        """Logits (B,) of pairs (B, 2) of nodes."""
        h = self.states(features, adjacency)
        found: Tensor = self.predictor(h[pairs[:, 0]], h[pairs[:, 1]])
        return found

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Those of the encoder, and the embedding."""
        more = [] if self.embedding is None else [self.embedding]
        return [*self.encoder.parameters(), *more]


def read_link_predictor(folder: Path, description: dict[str, Any], *, model: nn.Module | None = None) -> nn.Module:
    """The link predictor of an artifact, filled and in evaluation mode.

    Args:
        folder: holds ``model.safetensors``.
        description: ``artifact.json``.
        model: a module to fill, for encoders that are not built by name.

    Raises:
        InputError: the encoder is a user's own and no module is given.
    """
    if model is None:
        spec = description.get("network")
        if spec is None:
            raise InputError("the artifact holds an encoder of one's own: pass model=… to be filled")
        model = link_predictor(**spec)
    return load_weights(model, folder / WEIGHTS).eval()


def link_predictor(
    encoder: str,
    width: int,
    *,
    hidden: int = 128,
    depth: int = 1,
    dropout: float = 0.0,
    layers: int = 1,
    embedded: int = 0,
) -> LinkPredictor:
    """A link predictor with new weights.

    Args:
        encoder: a kind of network over nodes, such as ``gcn`` or ``sage``.
        width: F of the features, or of the embedding.
        hidden: width of states and hidden layers. depth: convolutions. dropout: between them. layers: of the predictor.
        embedded: nodes with an embedding, from N(0, 1 / F); 0: nodes have features.

    Raises:
        UnknownNameError: no such kind.
    """
    from limbeck.networks.node_networks import node_network

    network = node_network(encoder, width, hidden, hidden=hidden, depth=depth, dropout=dropout)
    embedding = torch.randn(embedded, width) / width**0.5 if embedded else None
    return LinkPredictor(network, HadamardPredictor(hidden, hidden, layers), embedding)
