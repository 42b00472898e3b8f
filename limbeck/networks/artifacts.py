"""Reading and describing model artifacts: networks built by name come back by name, others need the user's module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.core.artifacts import WEIGHTS, load_weights, save_model_artifact
from limbeck.core.errors import InputError
from limbeck.networks.registry import rebuild, spec_of


def save_model(model: nn.Module, folder: Path, description: dict[str, Any]) -> None:
    """Write a model artifact, with the name it can be rebuilt from where it has one."""
    spec = spec_of(model)
    save_model_artifact(model, folder, {**description, "network": spec, "class": type(model).__name__})


def read_model(
    folder: Path, description: dict[str, Any], *, model: nn.Module | None = None, allow_import: bool = False
) -> nn.Module:
    """The network of a model artifact, filled and in evaluation mode.

    Args:
        folder: holds ``model.safetensors``.
        description: ``artifact.json``.
        model: a module to fill, for architectures that are not built by name.
        allow_import: permit a factory named in the description to be imported, which runs its code.

    Raises:
        InputError: the network cannot be built without one of these.
    """
    if model is None:
        spec = description.get("network")
        config = folder / "config.json"
        if spec is not None and ":" in spec["name"] and not allow_import:
            raise InputError(
                f"the artifact was built by '{spec['name']}': pass model=… to fill, or allow_import=True to import it"
            )
        if spec is not None:
            model = rebuild(spec)
        elif config.exists() and "architectures" in json.loads(config.read_text()):
            return _read_transformers(folder, json.loads(config.read_text()))
        else:
            raise InputError(
                f"the artifact holds a {description.get('class')}: pass model=… of that class to be filled"
            )
    return load_weights(model, folder / WEIGHTS).eval()


def _read_transformers(folder: Path, config: dict[str, Any]) -> nn.Module:
    import transformers

    kind = getattr(transformers, config["architectures"][0], None)
    if kind is None:
        raise InputError(f"transformers has no class {config['architectures'][0]}: pass model=… to be filled")
    model: nn.Module = kind.from_pretrained(folder)
    return model.eval()
