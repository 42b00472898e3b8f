"""Adapters in PEFT's file format, and back.

A folder has ``adapter_config.json`` and ``adapter_model.safetensors``, which ``peft.PeftModel.from_pretrained(model, folder)`` reads. For
networks of diffusers there is also ``pytorch_lora_weights.safetensors``, for ``pipeline.load_lora_weights(folder)`` and
``network.load_lora_adapter(folder, prefix="unet")``. Paths of layers are those within the model of the other library: wrappers of this one
around it are looked through. The files are written and read without PEFT.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limbeck.blocks.lora import LoRA
from limbeck.core.errors import InputError, RunError
from limbeck.core.files import atomic_path, read_json, write_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_PREFIX = "base_model.model."
_METADATA = "lora_adapter_metadata"
_KEY = re.compile(r"(.+)\.lora_([AB])\.weight")


def save_lora(folder: str | Path, lora: LoRA, *, base: str | None = None, component: str | None = None) -> None:
    """Write adapters in PEFT's format.

    Args:
        folder: made if needed.
        lora: adapters; the scale written is the one they have now.
        base: name or path of the model that they are for, a note for the reader.
        component: what a pipeline calls the network, for ``pytorch_lora_weights.safetensors``; None: ``unet`` or ``transformer``, by its class.

    Raises:
        InputError: adapters on a layer that is the whole module, or on convolutions that dilate or pad with other than zeros.
        RunError: the folder cannot be written.
    """
    owner, inside = _owner(lora.base, lora.paths)
    paths = {path: path[len(inside) + 1 :] if inside else path for path in lora.paths}
    for path in lora.paths:
        layer: Any = lora.base.get_submodule(path)
        if not path:
            raise InputError("the adapters are on a single layer that is the whole module: PEFT has no path for it")
        _check_convolution(path, layer)
    state = lora.state_dict()
    tensors: dict[str, Tensor] = {}
    for path in lora.paths:
        a, b = (state[f"adapters.{path}.lora_{side}.weight"].detach().cpu() for side in "AB")
        tensors[f"{paths[path]}.lora_A.weight"] = _dense(a, lora.base.get_submodule(path)).contiguous()
        tensors[f"{paths[path]}.lora_B.weight"] = b.contiguous()
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    alpha = lora.scale * lora.rank
    # A list would match layers whose paths merely end with one of these; an expression matches whole paths.
    targets = "^(" + "|".join(re.escape(path) for path in paths.values()) + ")$"
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or "",
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_json(target / CONFIG, config)
    _write(target / WEIGHTS, {_PREFIX + name: value for name, value in tensors.items()})
    if _of_diffusers(owner):
        part = component or ("unet" if type(owner).__name__.startswith("UNet") else "transformer")
        said = {f"{part}.{key}": config[key] for key in ("r", "lora_alpha", "target_modules")}
        _write(
            target / DIFFUSERS_WEIGHTS,
            {f"{part}.{name}": value for name, value in tensors.items()},
            {_METADATA: json.dumps(said)},
        )


def load_lora(folder: str | Path, module: nn.Module) -> LoRA:
    """Adapters from a folder, put on a module: a :class:`~limbeck.blocks.lora.LoRA`, which has to be kept, or the adapters go with it.

    Args:
        folder: in PEFT's format, or with ``pytorch_lora_weights.safetensors`` alone.
        module: the model that they are for, or a wrapper of this library around it.

    Raises:
        RunError: no adapters there, or a damaged file.
        InputError: a kind of adapter that is not plain LoRA, layers that the module has not, sizes that do not fit.
    """
    place = Path(folder)
    if (place / CONFIG).is_file():
        config = read_json(place / CONFIG)
        tensors, _ = _read(place / WEIGHTS)
        found = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    elif (place / DIFFUSERS_WEIGHTS).is_file():
        tensors, metadata = _read(place / DIFFUSERS_WEIGHTS)
        parts = {name.partition(".")[0] for name in tensors}
        if len(parts) != 1:
            raise InputError(
                f"{place / DIFFUSERS_WEIGHTS} adapts {', '.join(sorted(parts))}: only adapters of one network are read"
            )
        part = parts.pop()
        said = json.loads(metadata.get(_METADATA, "{}"))
        config = {name.removeprefix(f"{part}."): value for name, value in said.items()}
        found = {name.removeprefix(f"{part}."): value for name, value in tensors.items()}
    else:
        raise RunError(f"no adapters in {place}: expected {CONFIG} or {DIFFUSERS_WEIGHTS} there")
    pairs = _pairs(found, place)
    rank, scale = _settings(config, pairs, place)
    inside = _place_of(module, list(pairs))
    full = {f"{inside}.{path}" if inside else path: pair for path, pair in pairs.items()}
    lora = LoRA(module, rank, alpha=scale * rank, targets=list(full))
    state = lora.state_dict()
    try:
        for path, (a, b) in full.items():
            layer = lora.base.get_submodule(path)
            _check_convolution(path, layer)
            for side, value in (("A", _grouped(path, a, layer)), ("B", b)):
                name = f"adapters.{path}.lora_{side}.weight"
                if state[name].shape != value.shape:
                    raise InputError(
                        f"the adapters of '{path}' have shape {tuple(value.shape)}, its layer needs {tuple(state[name].shape)}"
                    )
                state[name] = value
    except InputError:
        lora.remove()
        raise
    lora.load_state_dict(state)
    return lora


def _check_convolution(path: str, layer: Any) -> None:
    """Raises an InputError for convolutions that adapters of PEFT do not follow: they pad with zeros and do not dilate."""
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or any(d != 1 for d in layer.dilation)):
        raise InputError(
            f"the convolution '{path}' pads with '{layer.padding_mode}' and has dilation {layer.dilation}: adapters of PEFT pad with zeros "
            "and have none"
        )


def _dense(a: Tensor, layer: Any) -> Tensor:
    """A of a convolution with groups as PEFT has it: over all channels, zero outside each row's group."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if groups == 1:
        return a
    rows, width = len(a) // groups, a.shape[1]
    made = a.new_zeros(len(a), width * groups, *a.shape[2:])
    for g in range(groups):
        made[g * rows : (g + 1) * rows, g * width : (g + 1) * width] = a[g * rows : (g + 1) * rows]
    return made


def _grouped(path: str, a: Tensor, layer: Any) -> Tensor:
    """The inverse of :func:`_dense`.

    Raises:
        InputError: an A that mixes groups, which adapters here cannot.
    """
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if groups == 1 or a.shape[1] != layer.in_channels or len(a) % groups:
        return a
    rows, width = len(a) // groups, a.shape[1] // groups
    made = torch.cat([a[g * rows : (g + 1) * rows, g * width : (g + 1) * width] for g in range(groups)])
    if not torch.equal(_dense(made, layer), a):
        raise InputError(f"the adapters of '{path}' mix the groups of its convolution: adapters here keep them apart")
    return made


def _pairs(tensors: dict[str, Tensor], place: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the path of their layer."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise InputError(
                f"{place} has '{name}', which plain LoRA adapters have not: only lora_A and lora_B weights are read"
            )
        sides.setdefault(match[1], {})[match[2]] = value
    for path, both in sides.items():
        if set(both) != {"A", "B"}:
            raise RunError(f"{place} has only lora_{next(iter(both))} of '{path}': it was changed or damaged")
    if not sides:
        raise RunError(f"{place} has no adapters: it was changed or damaged")
    return {path: (both["A"], both["B"]) for path, both in sides.items()}


def _settings(config: dict[str, Any], pairs: dict[str, tuple[Tensor, Tensor]], place: Path) -> tuple[int, float]:
    """Rank and scale.

    Raises:
        InputError: adapters of several ranks or scales, or of another kind.
    """
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        raise InputError(
            f"{place} has adapters of another kind ({config.get('peft_type', 'LORA')}, DoRA or saved modules): only plain LoRA is read"
        )
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise InputError(f"{place} has ranks or alphas of its own for some layers: only one for all is read")
    ranks = {len(a) for a, _ in pairs.values()}
    if len(ranks) != 1:
        raise InputError(
            f"{place} has adapters of ranks {', '.join(map(str, sorted(ranks)))}: only one rank for all is read"
        )
    rank = ranks.pop()
    alpha = float(config.get("lora_alpha", rank))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_diffusers(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("diffusers.") for kind in type(model).__mro__)


def _owner(base: nn.Module, paths: tuple[str, ...]) -> tuple[nn.Module, str]:
    """The other library's model that holds all the adapted layers, and where it is; the module itself if there is none."""
    for place, module in base.named_modules():
        if hasattr(module, "save_pretrained") and all(path.startswith(f"{place}.") or not place for path in paths):
            return module, place
    return base, ""


def _place_of(module: nn.Module, paths: list[str]) -> str:
    """Where in a module the layers with these paths are: at its root, or in a wrapped model.

    Raises:
        InputError: nowhere.
    """
    names = {name for name, _ in module.named_modules()}
    if all(path in names for path in paths):
        return ""
    for place, inner in module.named_modules():
        if place and hasattr(inner, "save_pretrained") and all(f"{place}.{path}" in names for path in paths):
            return place
    missing = next(path for path in paths if path not in names)
    raise InputError(f"{type(module).__name__} has no layer '{missing}': the adapters are for another model")


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", **(metadata or {})})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    if not path.is_file():
        raise RunError(f"{path} does not exist: is the folder complete?")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).to(torch.float32) for name in list(file.keys())}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is not a safetensors file or is damaged ({error})") from None
