"""One encoder with several exits: an embedding after each chosen layer, and a stand-alone shallow encoder for each of them.

Source: "One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early Layer Embeddings" (2025).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.taps import Taps, unwrap
from limbeck.core.errors import InputError

Pooling = Literal["mean", "last", "cls"]
_SHARES = (1 / 6, 1 / 3, 2 / 3, 1)


class ExitHead(nn.Module):
    """Layer norm, then a linear map, then unit length: ``(B, D) -> (B, dim)``. Each exit has its own.

    The norm is part of the head because inside a pre-norm encoder the layers write on a stream that nobody has normalised yet.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.linear(self.norm(pooled)), dim=-1)


class MultiExit(nn.Module):
    r"""An encoder that gives an embedding after each of several layers.

    .. math:: v_i(x) = \mathrm{normalise}\big(P_i(\mathrm{pool}(h_i(x)))\big), \qquad i \in E

    with hidden states :math:`h_i` (B, T, D) after layer i of L, counted from 1, and an :class:`ExitHead` :math:`P_i` for each exit.
    A transformers encoder is asked for its hidden states; those of its last layer are after its final norm, if it has one, the
    others before it. Any other stack of equal layers is read through forward taps, always before whatever follows the layer.

    Args:
        encoder: a 🤗 transformers encoder (of a model with a task's head, its base model), or any module with ``layers``.
            It is not copied.
        exits: layers, 1 to L; None: at a sixth, a third, two thirds and all of the depth.
        dim: width of the embeddings.
        pooling: ``mean`` over the tokens that are not padding, the ``last`` of them, or the first one (``cls``). It goes by the
            attention mask, so the padding may be on either side.
        layers: paths of all L layers in order, shallow to deep, for encoders that are not transformers'. Each gives (B, T, D).
        width: D, needed with ``layers``.

    Called with the encoder's own arguments, it returns a dict of embeddings (B, dim), unit length, by exit.

    Raises:
        InputError: no such layers, exits that are not layers, an encoder-decoder; when called, an input longer than the window.
    """

    def __init__(
        self,
        encoder: nn.Module,
        exits: Sequence[int] | None = None,
        dim: int = 64,
        pooling: Pooling = "mean",
        *,
        layers: Sequence[str] | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise InputError(f"pooling must be {', '.join(get_args(Pooling))}, not '{pooling}'")
        self.pooling: Pooling = pooling
        self.layers = None if layers is None else tuple(layers)
        if self.layers is None:
            encoder = getattr(unwrap(encoder), "base_model", encoder)
            self.depth, width = _depth_and_width(encoder)
        elif width is None or not self.layers:
            raise InputError(
                "exits read through taps need layers=[…] (at least one path) and width=… (of their tokens)"
            )
        else:
            Taps(encoder, self.layers)  # complains about paths that do not exist
            self.depth = len(self.layers)
        self.encoder = encoder
        self.exits = check_exits(exits, self.depth)
        self.dim, self.width = dim, width
        heads = {str(i): ExitHead(width, dim) for i in self.exits}
        like = next((p for p in encoder.parameters() if p.is_floating_point()), torch.zeros(()))
        self.heads = nn.ModuleDict(heads).to(like.device, like.dtype)

    def hidden(self, *args: Any, **kwargs: Any) -> dict[int, Tensor]:
        """Hidden states (B, T, D) by exit."""
        if self.layers is not None:
            taps = Taps(self.encoder, [self.layers[i - 1] for i in self.exits])
            with taps as features:
                self.encoder(*args, **kwargs)
            return {i: features[self.layers[i - 1]] for i in self.exits}
        inputs = encoder_inputs(self.encoder, args, kwargs)
        states = self.encoder(**inputs, output_hidden_states=True).hidden_states
        if len(states) != self.depth + 1:
            raise InputError(
                f"the encoder has {self.depth} layers but gives {len(states) - 1} hidden states after layers"
            )
        return {i: states[i] for i in self.exits}

    def forward(self, *args: Any, **kwargs: Any) -> dict[int, Tensor]:
        mask = kwargs.get("attention_mask")
        return {i: self.heads[str(i)](pool(h, mask, self.pooling)) for i, h in self.hidden(*args, **kwargs).items()}

    def truncate(self, exit: int) -> ExitEncoder:
        """A stand-alone encoder of the first ``exit`` layers with this exit's head (copies), which gives its embeddings exactly.

        Raises:
            InputError: no such exit, or an encoder that cannot be cut there.
        """
        if exit not in self.exits:
            raise InputError(f"there is no exit {exit}; the exits are {', '.join(map(str, self.exits))}")
        head = copy.deepcopy(self.heads[str(exit)])
        if self.layers is None:
            encoder, dropped = _cut(self.encoder, self.depth, exit)
            small = ExitEncoder(encoder, head, exit, self.pooling, dropped=dropped)
            self._check_cut(small)
            return small
        encoder = copy.deepcopy(self.encoder)
        parent, _, last = self.layers[exit - 1].rpartition(".")
        stack = encoder.get_submodule(parent)
        if not isinstance(stack, nn.ModuleList | nn.Sequential) or not last.isdigit():
            raise InputError(
                f"layer '{self.layers[exit - 1]}' is no item of a ModuleList or Sequential, so what follows cannot be cut off"
            )
        del stack[int(last) + 1 :]
        return ExitEncoder(encoder, head, exit, self.pooling, layer=self.layers[exit - 1])

    @torch.no_grad()
    def _check_cut(self, small: ExitEncoder) -> None:
        """Encoders differ in what they do after their last layer, so the cut one proves itself on two short inputs."""
        vocabulary = getattr(self.encoder.config, "vocab_size", None)
        if not isinstance(vocabulary, int) or "input_ids" not in _parameters(self.encoder):
            return
        device = next(self.encoder.parameters()).device
        ids = torch.arange(8, device=device).view(2, 4) % vocabulary
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        flags = [(module, module.training) for module in self.modules()]
        self.eval()
        small.eval()
        expected, found = self(**inputs)[small.exit], small(**inputs)
        for module, training in flags:
            module.training = training
        if not torch.allclose(expected, found, atol=1e-5):
            raise InputError(
                f"a {type(self.encoder).__name__} cut after layer {small.exit} does not give what that layer gives: "
                "read it through taps with layers=[…]"
            )


class ExitEncoder(nn.Module):
    """The first layers of an encoder with one exit's head: what is deployed. Made by :meth:`MultiExit.truncate`.

    Called with the encoder's own arguments, it returns embeddings (B, dim) of unit length.

    Attributes:
        encoder: the layers up to the exit.
        head: the exit's head.
        exit: its layer's number in the full encoder.
        dropped: parts of the full encoder that stood behind the layers and are gone: norms are identities, a pooler is None.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        exit: int,
        pooling: Pooling = "mean",
        *,
        dropped: Sequence[str] = (),
        layer: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.exit, self.pooling = encoder, head, exit, pooling
        self.dropped, self.layer = tuple(dropped), layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        mask = kwargs.get("attention_mask")
        if self.layer is None:
            hidden = self.encoder(**encoder_inputs(self.encoder, args, kwargs)).last_hidden_state
        else:
            with Taps(self.encoder, self.layer) as features:
                self.encoder(*args, **kwargs)
            hidden = features[self.layer]
        embedding: Tensor = self.head(pool(hidden, mask, self.pooling))
        return embedding


def pool(hidden: Tensor, mask: Tensor | None = None, how: Pooling = "mean") -> Tensor:
    """One vector per sequence, ``(B, T, D) -> (B, D)``.

    Args:
        hidden: token vectors.
        mask: (B, T), nonzero where there is a token; None: everywhere.
        how: see :class:`MultiExit`.

    Raises:
        InputError: the mask does not fit.
    """
    if hidden.ndim != 3:
        raise InputError(f"an exit reads tokens (B, T, D), not features of shape {tuple(hidden.shape)}")
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2])
    if mask.shape != hidden.shape[:2]:
        raise InputError(f"an attention mask of shape {tuple(mask.shape)} does not fit tokens {tuple(hidden.shape)}")
    if how == "mean":
        weight = mask.to(hidden.dtype)[..., None]
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
    there = (mask != 0).int()
    place = there.argmax(1) if how == "cls" else there.shape[1] - 1 - there.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]


def check_exits(exits: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Exits in ascending order, each once; those of :class:`MultiExit` where none are named.

    Raises:
        InputError: none at all, or one that is no layer.
    """
    if exits is None:
        return tuple(sorted({math.ceil(depth * share - 1e-9) for share in _SHARES}))
    wrong = [i for i in exits if not 1 <= i <= depth]
    if wrong or not exits:
        said = f"exit {wrong[0]} is no layer" if wrong else "there is no exit"
        raise InputError(f"{said}: the encoder has layers 1 to {depth}")
    return tuple(sorted(set(exits)))


def encoder_inputs(encoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a transformers encoder, with position ids that count tokens and not padding.

    Raises:
        InputError: positional arguments, or an input longer than the encoder's window.
    """
    if args:
        name = next(iter(_parameters(encoder)), "input_ids")
        if len(args) > 1:
            raise InputError(
                "a transformers encoder takes its inputs by name: give a mapping (input_ids, attention_mask)"
            )
        kwargs = {name: args[0], **kwargs}
    inputs = dict(kwargs)
    ids, window = inputs.get("input_ids"), getattr(encoder.config, "max_position_embeddings", None)
    if isinstance(ids, Tensor) and isinstance(window, int) and 0 < window < ids.shape[-1]:
        raise InputError(
            f"an input of {ids.shape[-1]} tokens is longer than the encoder's window of {window}: truncate it to {window} tokens"
        )
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and "position_ids" not in inputs and _wants_positions(encoder):
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return inputs


def _parameters(encoder: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(encoder.forward).parameters


def _wants_positions(encoder: nn.Module) -> bool:
    """Whether positions are 0, 1, … of the sequence with its padding, unless they are given.

    RoBERTa and its kin count without padding by themselves, from another first number.
    """
    counts = any(hasattr(m, "create_position_ids_from_input_ids") for m in encoder.modules())
    return "position_ids" in _parameters(encoder) and not counts


def _depth_and_width(encoder: nn.Module) -> tuple[int, int]:
    config = getattr(encoder, "config", None)
    depth, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not isinstance(depth, int) or not isinstance(width, int):
        raise InputError(
            f"a {type(encoder).__name__} does not say its number of layers and width (config.num_hidden_layers and hidden_size): "
            "give layers=[…] and width=… to read it through taps"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"a {type(encoder).__name__} has a decoder too: give its encoder alone (model.get_encoder())")
    return depth, width


def _cut(encoder: nn.Module, depth: int, exit: int) -> tuple[nn.Module, list[str]]:
    """A copy with the first ``exit`` layers, and the names of what else was taken out."""
    small = copy.deepcopy(encoder)
    for mark in ("limbeck_spec", "limbeck_name"):
        vars(small).pop(mark, None)
    path = next((n for n, m in small.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
    if path is None:
        raise InputError(f"a {type(encoder).__name__} holds no list of its {depth} layers, so it cannot be cut")
    stack: Any = small.get_submodule(path)
    del stack[exit:]
    config: Any = small.config
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == depth:
            setattr(config, key, value[:exit])
    config.num_hidden_layers = exit
    dropped = [name for name, module in small.named_children() if name == "pooler" and module is not None]
    if exit < depth:
        dropped += _norms_behind(small, path)
    drop_parts(small, dropped)
    return small, dropped


def drop_parts(encoder: nn.Module, names: Sequence[str]) -> None:
    """Put identities in the place of the norms ``names``, and None in that of a pooler, in place."""
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(encoder.get_submodule(parent), last, None if last == "pooler" else nn.Identity())


def _norms_behind(model: nn.Module, path: str) -> list[str]:
    """Norms that stand behind the list of layers, in the module that holds it and in those around it."""
    parts, found = path.split("."), []
    for level in range(len(parts)):
        holder = ".".join(parts[:level])
        children = list(model.get_submodule(holder).named_children())
        place = [name for name, _ in children].index(parts[level])
        found += [
            f"{holder}.{name}".lstrip(".")
            for name, child in children[place + 1 :]
            if "norm" in type(child).__name__.lower()
        ]
    return found
