r"""Small adapters that give a frozen conditional network the guidance scale as an input.

A chosen block B of the network becomes :math:`B(h, \ldots) + A(h, w, t, c)`. The scale w, the time t and the condition c reach the
adapters by a side channel that is set before each forward pass, so that the network's own signature stays as it is. Every adapter
ends in a linear map that starts at zero: a network with new adapters is exactly the network without.

Source: "Efficient Distillation of Classifier-Free Guidance using Adapters" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import InputError, UnknownNameError

AdapterKind = Literal["cross_attention", "offset", "gated"]
ADAPTERS: tuple[AdapterKind, ...] = ("cross_attention", "offset", "gated")
ConditionKind = Literal["none", "class", "vector", "tokens"]
Parts = Sequence[Tensor]
"""What an adapter is told: tensors (B, L_i, d), one for each of w, t and c, with L_i = 1 except for prompts."""


class ScalarEncoder(nn.Module):
    r"""A number as a vector: :math:`\cos(2\pi(f\,s\,v + p))` with fixed random f ~ N(0, 1)^d and p ~ U(0, 1)^d, then linear d -> 4d, ReLU,
    linear 4d -> d, LayerNorm.

    Args:
        dim: d.
        scale: s. With s = 1 / (range of v) the highest of the random frequencies (about three standard deviations) turns some three
            times over the range, so that values between those of training are interpolated. The released code multiplies w by 1000
            by default, which makes the map a hash of w; scaling by the range is our decision.

    Shapes: (B,) -> (B, dim).
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = float(scale)
        self.register_buffer("frequencies", torch.randn(dim))
        self.register_buffer("phases", torch.rand(dim))
        self.layers = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim), nn.LayerNorm(dim))

    def forward(self, value: Tensor) -> Tensor:
        turns = self.scale * value.to(self.frequencies.dtype)[:, None] * self.frequencies + self.phases
        encoded: Tensor = self.layers(torch.cos(2 * math.pi * turns))
        return encoded


# ---- the adapters ------------------------------------------------------------------------------------------------------


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def sinusoidal_positions(count: int, dim: int) -> Tensor:
    """(count, dim): sines of place * 10000^(-2i/dim) in the first half, cosines in the second; ``dim`` even."""
    angles = torch.arange(count)[:, None] * 10000.0 ** (-torch.arange(dim // 2) / (dim / 2))
    return torch.cat([angles.sin(), angles.cos()], 1)


class CrossAttentionAdapter(nn.Module):
    r"""The block's tokens ask the tokens M = [e_w; e_t; e_c] of the side channel.

    .. math:: A = W_o\,\mathrm{softmax}(q k^\top / \sqrt d)\,v, \qquad q = W_q h,\; k = W_k M,\; v = W_v M

    with one head; M has positions added. W_q, W_k and W_v have no bias; W_o and its bias start at zero. (In the released code the
    flag for that is inverted; zero is what the paper means.)

    Args:
        width_in, width_out: of the block's input and output.
        dim: d, of the side channel's vectors.
        positions: ``sinusoidal``, or ``learned`` for at most ``tokens`` tokens.

    Shapes: h (B, T, width_in) and parts (B, L_i, dim) -> (B, T, width_out).
    """

    def __init__(
        self, width_in: int, width_out: int, dim: int, *, positions: str = "sinusoidal", tokens: int = 3
    ) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, dim, bias=False) for width in (width_in, dim, dim))
        self.out = _zero(nn.Linear(dim, width_out))
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, dim)) if positions == "learned" else None

    def forward(self, h: Tensor, parts: Parts) -> Tensor:
        memory = torch.cat(list(parts), 1)
        count, dim = memory.shape[1:]
        if self.positions is None:
            memory = memory + sinusoidal_positions(count, dim).to(memory)
        else:
            if count > len(self.positions):
                raise InputError(f"the adapter has learned positions for {len(self.positions)} tokens, not for {count}")
            memory = memory + self.positions[:count]
        found = F.scaled_dot_product_attention(self.query(h), self.key(memory), self.value(memory))
        added: Tensor = self.out(found)
        return added


class OffsetAdapter(nn.Module):
    """A = MLP(e_w + e_t + e_c): one offset for all tokens of a sample, independent of h. A prompt counts by the mean of its tokens.

    The MLP is linear dim -> dim, ReLU, dropout, LayerNorm, linear dim -> width_out, which starts at zero.

    Shapes: parts (B, L_i, dim) -> (B, 1, width_out).
    """

    def __init__(self, width_in: int, width_out: int, dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(dim))
        self.out = _zero(nn.Linear(dim, width_out))

    def forward(self, h: Tensor, parts: Parts) -> Tensor:
        added: Tensor = self.out(self.layers(summed(parts)))
        return added[:, None]


class GatedAdapter(nn.Module):
    r"""A gated MLP: :math:`A = W_o\,\big(W_h h \odot \mathrm{silu}(W_e (e_w + e_t + e_c))\big)`, W_o and its bias starting at zero.

    The released code has a gated variant that the paper finds weaker and does not write down; this form is our decision.

    Shapes: h (B, T, width_in) and parts (B, L_i, dim) -> (B, T, width_out).
    """

    def __init__(self, width_in: int, width_out: int, dim: int) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(width_in, dim), nn.Linear(dim, dim)
        self.out = _zero(nn.Linear(dim, width_out))

    def forward(self, h: Tensor, parts: Parts) -> Tensor:
        added: Tensor = self.out(self.inner(h) * F.silu(self.gate(summed(parts)))[:, None])
        return added


def summed(parts: Parts) -> Tensor:
    """Sum of the parts' means over tokens: (B, dim)."""
    total = parts[0].mean(1)
    for part in parts[1:]:
        total = total + part.mean(1)
    return total


# ---- the side channel --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Where an adapter sits: the module's path, and the widths of its input and output (last axis; of maps the channels)."""

    path: str
    width_in: int
    width_out: int


@dataclass(frozen=True)
class AdapterSettings:
    """Everything that says what a set of adapters is, as plain values.

    Attributes:
        blocks: one adapter each.
        kind: ``cross_attention`` (best for text), ``offset`` (enough for classes) or ``gated``.
        dim: d of the side channel's vectors; even.
        inputs: which of w, t, c the adapters are told; w always.
        w_scale, t_scale: see :class:`ScalarEncoder`.
        condition: ``class`` ids (B,), ``vector`` (B, size), ``tokens`` (B, L, size) or ``none``.
        size: number of classes (the null class counts), or width of the vectors or tokens.
        key: which part of a condition that is a mapping.
        positions, tokens: of the cross-attention, see there.
        dropout: of the offset's MLP.
        shared: the encoders of w, t and c are shared by all adapters; otherwise each has its own. (The paper leaves it open; shared ones
            run once per forward pass, and in small networks they are most of the parameters.)
        exact_one: samples with w = 1 get the network without adapters, which is what no guidance means. (Our decision: the paper lets the
            adapters learn it. Where the network itself is trained too, the scale must be told always.)
        reuse: ``t`` or ``c`` -> (path, width) of a module of the network whose output (B, width) stands for it, such as the network's own
            frozen embedder of times; a linear map follows.
    """

    blocks: tuple[Block, ...]
    kind: str = "cross_attention"
    dim: int = 32
    inputs: tuple[str, ...] = ("w", "t", "c")
    w_scale: float = 1.0
    t_scale: float = 1.0
    condition: str = "none"
    size: int = 0
    key: str = "encoder_hidden_states"
    positions: str = "sinusoidal"
    tokens: int = 3
    dropout: float = 0.0
    shared: bool = True
    exact_one: bool = True
    reuse: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ADAPTERS:
            raise UnknownNameError("adapter", self.kind, ADAPTERS)
        if not self.blocks:
            raise InputError("adapters need at least one block to sit on")
        if self.dim < 2 or self.dim % 2:
            raise InputError(f"the dimension of adapters must be even and at least 2 (got {self.dim})")
        if "w" not in self.inputs or not set(self.inputs) <= {"w", "t", "c"}:
            raise InputError(f"inputs of adapters are w, and t and c if wanted (got {', '.join(self.inputs)})")
        if self.condition not in ("none", "class", "vector", "tokens"):
            raise UnknownNameError("kind of condition", self.condition, ("none", "class", "vector", "tokens"))
        if self.positions not in ("sinusoidal", "learned"):
            raise UnknownNameError("positions", self.positions, ("sinusoidal", "learned"))

    def describe(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {**asdict(self), "reuse": {k: list(v) for k, v in self.reuse.items()}}

    @classmethod
    def from_description(cls, values: Mapping[str, Any]) -> Self:
        """From what :meth:`describe` gave."""
        return cls(
            **{
                **values,
                "blocks": tuple(Block(**b) for b in values["blocks"]),
                "inputs": tuple(values["inputs"]),
                "reuse": {k: (str(v[0]), int(v[1])) for k, v in values["reuse"].items()},
            }
        )

    def adapter(self, block: Block) -> nn.Module:
        """A new adapter for a block."""
        widths = (block.width_in, block.width_out, self.dim)
        if self.kind == "offset":
            return OffsetAdapter(*widths, dropout=self.dropout)
        if self.kind == "gated":
            return GatedAdapter(*widths)
        return CrossAttentionAdapter(*widths, positions=self.positions, tokens=self.tokens)


@dataclass
class Signal:
    """The side channel during one forward pass.

    Attributes:
        w: (B,) guidance scales.
        t: (B,) times, exactly as the network is told.
        cond: the condition as the network is given it.
        captured: outputs of the network's own embedders in this pass.
        encoded: what each set of encoders made of it in this pass.
    """

    w: Tensor
    t: Tensor | None = None
    cond: Any = None
    captured: dict[str, Tensor] = field(default_factory=dict)
    encoded: list[list[Tensor]] = field(default_factory=list)

    def gate(self, like: Tensor) -> Tensor:
        """1 for samples with guidance, 0 where w = 1, as (B, 1, ...)."""
        return (self.w != 1).to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


class SignalEncoder(nn.Module):
    """w, t and c as vectors: a signal -> [(B, 1, d), (B, 1, d), (B, L, d)], as far as the settings ask for them."""

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__()
        self.settings = settings
        dim = settings.dim
        self.w = ScalarEncoder(dim, settings.w_scale)
        self.t: nn.Module | None = None
        self.c: nn.Module | None = None
        if "t" in settings.inputs:
            self.t = (
                nn.Linear(settings.reuse["t"][1], dim)
                if "t" in settings.reuse
                else ScalarEncoder(dim, settings.t_scale)
            )
        if "c" in settings.inputs and "c" in settings.reuse:
            self.c = nn.Linear(settings.reuse["c"][1], dim)
        elif "c" in settings.inputs and settings.condition != "none":
            classes = settings.condition == "class"
            self.c = nn.Embedding(settings.size, dim) if classes else nn.Linear(settings.size, dim)

    def forward(self, signal: Signal) -> list[Tensor]:
        found = [self.w(signal.w)[:, None]]
        if self.t is not None:
            value = self._reused(signal, "t") if "t" in self.settings.reuse else signal.t
            if value is None:
                raise InputError("the adapters need the time: set it with w before the forward pass")
            found.append(self.t(value)[:, None])
        if self.c is not None:
            encoded = self.c(self._reused(signal, "c") if "c" in self.settings.reuse else self._condition(signal.cond))
            found.append(encoded if encoded.ndim == 3 else encoded[:, None])
        return found

    def _reused(self, signal: Signal, what: str) -> Tensor:
        return signal.captured[self.settings.reuse[what][0]].detach().to(self.w.frequencies.dtype)

    def _condition(self, cond: Any) -> Tensor:
        kind, size = self.settings.condition, self.settings.size
        if isinstance(cond, Mapping):
            if self.settings.key not in cond:
                raise UnknownNameError("part of the condition", self.settings.key, cond)
            cond = cond[self.settings.key]
        dims = {"class": 1, "vector": 2, "tokens": 3}[kind]
        if not isinstance(cond, Tensor) or cond.ndim != dims or (dims > 1 and cond.shape[-1] != size):
            shape = tuple(cond.shape) if isinstance(cond, Tensor) else type(cond).__name__
            wanted = {"class": "class ids (B,)", "vector": f"(B, {size})", "tokens": f"(B, L, {size})"}[kind]
            raise InputError(f"the adapters take a condition {wanted}, not {shape}")
        if kind == "class":
            return cond
        return cond.to(self.w.frequencies.dtype)
