"""Artifacts of encoders with exits: all of them in one file, or one exit by itself; 🤗 transformers encoders come back by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from limbeck.blocks.multi_exit import ExitEncoder, ExitHead, MultiExit, drop_parts
from limbeck.core.artifacts import DESCRIPTION, WEIGHTS, load_weights, save_weights
from limbeck.core.errors import InputError
from limbeck.core.files import write_json, write_text

KIND = "multi-exit"


def save_exits(model: MultiExit | ExitEncoder, folder: Path, description: dict[str, Any]) -> None:
    """Write the artifact of an encoder with its heads, or of one truncated encoder with its head.

    ``model.safetensors`` holds ``encoder.…`` and ``heads.<exit>.…`` (or ``head.…``), ``config.json`` the encoder's own configuration
    where it is a transformers model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / WEIGHTS)
    config: Any = getattr(model.encoder, "config", None)
    if hasattr(config, "to_json_string"):
        write_text(folder / "config.json", config.to_json_string(use_diff=False))
    head: Any = model.head if isinstance(model, ExitEncoder) else next(iter(model.heads.values()))
    said = {
        "encoder": type(model.encoder).__name__,
        "exits": [model.exit] if isinstance(model, ExitEncoder) else list(model.exits),
        "truncated": isinstance(model, ExitEncoder),
        "dropped": list(model.dropped) if isinstance(model, ExitEncoder) else [],
        "pooling": model.pooling,
        "dim": head.linear.out_features,
        "width": head.linear.in_features,
    }
    write_json(folder / DESCRIPTION, {**description, "kind": KIND, "multi_exit": said})


def read_exits(
    folder: Path, description: dict[str, Any], *, model: nn.Module | None = None, exit: int | None = None
) -> nn.Module:
    """The :class:`MultiExit` or :class:`ExitEncoder` of an artifact, filled and in evaluation mode.

    Args:
        folder: holds ``model.safetensors``.
        description: ``artifact.json``.
        model: a module of the same kind to fill, for encoders that are not transformers'.
        exit: give only this exit, truncated.

    Raises:
        InputError: the encoder cannot be built without ``model``, or there is no such exit.
    """
    said = description["multi_exit"]
    made = load_weights(_build(folder, said) if model is None else model, folder / WEIGHTS).eval()
    if exit is None or (isinstance(made, ExitEncoder) and made.exit == exit):
        return made
    if not isinstance(made, MultiExit):
        raise InputError(f"there is no exit {exit}; the artifact holds exit {said['exits'][0]} alone")
    return made.truncate(exit).eval()


def _build(folder: Path, said: dict[str, Any]) -> nn.Module:
    import transformers

    kind: Any = getattr(transformers, said["encoder"], None)
    if kind is None or not (folder / "config.json").exists():
        raise InputError(
            f"the artifact's encoder is a {said['encoder']}, which transformers does not have: pass model=… to be filled"
        )
    encoder: nn.Module = kind(kind.config_class.from_pretrained(folder))
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = list(file.keys())
    dropped = list(said["dropped"])
    if getattr(encoder, "pooler", None) is not None and not any(n.startswith("encoder.pooler.") for n in names):
        dropped.append("pooler")
    drop_parts(encoder, dropped)
    if not said["truncated"]:
        return MultiExit(encoder, said["exits"], said["dim"], said["pooling"])
    head = ExitHead(said["width"], said["dim"])
    return ExitEncoder(encoder, head, said["exits"][0], said["pooling"], dropped=dropped)
