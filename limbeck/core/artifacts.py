"""Artifacts: what carries the knowledge afterwards, in open formats that load without this library.

A model artifact is a folder with ``model.safetensors`` (the plain student's keys, nothing else) and ``artifact.json``
(what it is, how to build it, how to prepare inputs). Loading never unpickles. Families register how their kind of
artifact is read with :func:`register_kind`, so that :func:`load` knows all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limbeck.core.errors import RunError, UnknownNameError
from limbeck.core.files import atomic_path, read_json, write_json

DESCRIPTION = "artifact.json"
WEIGHTS = "model.safetensors"


@dataclass
class Artifact:
    """A loaded artifact.

    Attributes:
        kind: ``model``, ``dataset``, ``generator``, …
        content: the thing itself (for ``model`` an ``nn.Module`` in evaluation mode).
        description: what ``artifact.json`` says.
        path: the folder it came from.
    """

    kind: str
    content: Any
    description: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None


Reader = Callable[..., Any]
_READERS: dict[str, str | Reader] = {
    "model": "limbeck.networks.artifacts:read_model",
    "multi-exit": "limbeck.networks.multi_exit:read_exits",
    "dataset": "limbeck.adapters.distilled:read",
    "graph-dataset": "limbeck.adapters.distilled_graphs:read",
    "sampler": "limbeck.adapters.denoising:read_sampler",
    "field": "limbeck.rendering.fields:read_field",
    "fields": "limbeck.rendering.particles:read_particles",
    "anchors": "limbeck.rendering.anchors:read_anchors",
    "diffusers-pipeline": "limbeck.adapters.diffusers_students:read_student",
    "guidance-adapters": "limbeck.diffusion.guided:read_adapters",
    "link-predictor": "limbeck.networks.link_networks:read_link_predictor",
    "embedding-transform": "limbeck.methods.structures.invgc:read_transform",
    "representations": "limbeck.blocks.representation_files:read_representations",
    "dag": "limbeck.adapters.dag_files:read_dag",
}


def register_kind(kind: str, reader: Reader) -> None:
    """Teach :func:`load` a kind of artifact; ``reader(path, description, **options)`` returns its content."""
    _READERS[kind] = reader


def load(path: str | Path, **options: Any) -> Artifact:
    """Load an artifact, or the artifact of a run's folder.

    Args:
        path: a folder with ``artifact.json``, or a run's folder that has one under ``artifact/``.
        options: passed to the kind's reader; for models ``model=`` (the module to fill, where it cannot be built by name)
            and ``allow_import=True`` (the description may name a user's factory).

    Raises:
        RunError: nothing there, or damaged.
    """
    import importlib

    folder = Path(path)
    if not (folder / DESCRIPTION).exists() and (folder / "artifact" / DESCRIPTION).exists():
        folder = folder / "artifact"
    if not (folder / DESCRIPTION).exists():
        raise RunError(f"no artifact in {path}: expected {DESCRIPTION} there or in its 'artifact' folder")
    description = read_json(folder / DESCRIPTION)
    kind = description.get("kind", "")
    if kind not in _READERS:
        raise UnknownNameError("kind of artifact", kind, _READERS)
    reader = _READERS[kind]
    if isinstance(reader, str):
        module, _, name = reader.partition(":")
        reader = getattr(importlib.import_module(module), name)
    assert callable(reader)
    return Artifact(kind, reader(folder, description, **options), description, folder)


def save_weights(model: nn.Module, path: Path) -> None:
    """A module's state as safetensors; tensors that share memory are stored once per name, as copies."""
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        state[name] = tensor
    with atomic_path(path) as temporary:
        save_file(state, temporary)


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Fill a module from safetensors, strictly; a tensor that shares memory with another one (tied weights) may be stored once.

    Raises:
        RunError: no such file, not safetensors, or keys and shapes that do not fit.
    """
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise RunError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is not a safetensors file or is damaged ({error})") from None
    own = model.state_dict()
    stored = {own[name].data_ptr(): name for name in own if name in state}
    ties = {name: stored.get(t.data_ptr()) for name, t in own.items() if name not in state and t.numel()}
    state.update({name: state[other] for name, other in ties.items() if other and own[other].shape == own[name].shape})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"{path} does not fit {type(model).__name__}: {' '.join(str(error).split())[:200]}") from None
    return model


def save_model_artifact(model: nn.Module, folder: Path, description: dict[str, Any]) -> None:
    """Write a model artifact; models with ``save_pretrained`` also get their own library's layout.

    Args:
        model: the plain student.
        folder: created if needed.
        description: goes into ``artifact.json`` (with ``kind`` set): how to rebuild it, preprocessing, metrics.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pretrained = getattr(model, "save_pretrained", None)
    if pretrained is not None:
        pretrained(folder, safe_serialization=True)
    if not (folder / WEIGHTS).exists() or pretrained is None:
        save_weights(model, folder / WEIGHTS)
    write_json(folder / DESCRIPTION, {"kind": "model", **description})
