"""Transformers, whoever wrote them: their blocks, which tokens count there, and what a decoder takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import InputError
from limbeck.losses.tokens import IGNORED

Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Block:
    """A block.

    Attributes:
        path: as in ``named_modules()``.
        side: of a network of two halves the half it is in, else ``encoder``: its positions are those of the input.
    """

    path: str
    side: Side = "encoder"


def find_blocks(model: nn.Module, patterns: tuple[str, ...] = ()) -> list[Block]:
    """The blocks of a network, in its own order.

    Without patterns they are the members of every list or sequence of at least two modules of one class that have weights, lists inside other blocks left
    out; else what the network itself calls its stages (``stage_paths``).

    Args:
        model: any module.
        patterns: regular expressions, each of which must match a whole path: ``transformer\\.h\\.\\d+``.

    Raises:
        InputError: a pattern that is broken or matches nothing, or no blocks.
    """
    modules = dict(model.named_modules())
    if patterns:
        paths: dict[str, None] = {}
        for pattern in patterns:
            try:
                found = [path for path in modules if path and re.fullmatch(pattern, path)]
            except re.error as error:
                raise InputError(f"'{pattern}' is no regular expression: {error.msg}") from None
            if not found:
                raise InputError(
                    f"no module's path matches '{pattern}'; there are {', '.join([p for p in modules if p][:6])}, …"
                )
            paths |= dict.fromkeys(found)
        return [Block(path, _side(model, path)) for path in modules if path in paths]
    found = []
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(path.startswith(f"{b}.") for b in found):
            continue
        members = dict(module.named_children())
        alike = len({type(m) for m in members.values()}) == 1
        if len(members) > 1 and alike and all(_is_block(m) for m in members.values()):
            found += [f"{path}.{name}" if path else name for name in members]
    found = found or list(getattr(model, "stage_paths", ()))
    if not found:
        raise InputError(
            f"no blocks are found in {type(model).__name__}: name them with blocks=…, regular expressions of whole module paths"
        )
    return [Block(path, _side(model, path)) for path in found]


def inside(path: str, blocks: list[Block]) -> bool:
    """Whether a path is a block or lies in one."""
    return any(path == block.path or path.startswith(f"{block.path}.") for block in blocks)


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def predicts_next(model: Any) -> bool:
    """Whether a model of 🤗 transformers is a causal one, whose logits are about the next token."""
    can = getattr(model, "can_generate", None)
    return callable(can) and bool(can()) and not is_encoder_decoder(model)


def _is_block(module: nn.Module) -> bool:
    """Something composed, with weights: no single layer."""
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _side(model: nn.Module, path: str) -> Side:
    return "decoder" if is_encoder_decoder(model) and "decoder" in path.split(".") else "encoder"


def valid_tokens(block: Block, batch: Batch) -> Tensor | None:
    """(B, N) which positions of a block's output count: those of the attention mask, in a decoder of two halves those with a label; None: all."""
    if block.side == "decoder":
        return None if batch.labels is None else batch.labels != IGNORED
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def with_decoder_inputs(model: Any, batch: Batch) -> Batch:
    """The batch with what the decoder of a network of two halves takes, if it is missing: the labels, one place later.

    Raises:
        InputError: the model's config does not say what a decoder begins with.
    """
    if not is_encoder_decoder(model) or batch.labels is None:
        return batch
    inputs = dict(batch.inputs) if isinstance(batch.inputs, Mapping) else {"input_ids": batch.inputs}
    if not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        first, padding = model.config.decoder_start_token_id, model.config.pad_token_id
        if first is None or padding is None:
            raise InputError("the model's config has no decoder_start_token_id or pad_token_id: give decoder_input_ids")
        moved = torch.cat([torch.full_like(batch.labels[:, :1], first), batch.labels[:, :-1]], 1)
        inputs["decoder_input_ids"] = moved.masked_fill(moved == IGNORED, padding)
    return batch.with_inputs(inputs)
