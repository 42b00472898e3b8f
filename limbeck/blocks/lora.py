r"""Low-rank adapters on the linear and convolutional layers of any model, switched on and off at will.

The adapters live outside of the model and act through forward hooks. So the model's own tree, keys, parameters and fingerprint are the
same with adapters as without: a frozen teacher can carry the adapters of a second model (teacher with the switch off, its fine-tuned
version with the switch on, one copy of the weights in memory), and a checkpoint holds the adapters alone.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from limbeck.blocks.taps import unwrap
from limbeck.core.errors import InputError, nearest

_SHOWN = 4  # layers named in a message


class LoRA(nn.Module):
    r"""Low-rank adapters on the layers of a module: \(W x + \frac{\alpha}{r} B A x\) in place of \(W x\).

    A is (r, in), drawn as ``nn.Linear`` draws its weights (Kaiming, from torch's random state); B is (out, r), zero, so the module's output
    is unchanged at first. On a convolution A is a convolution to r channels with the layer's kernel, stride, padding, dilation and groups,
    and B one of size 1.

    The module's parameters are frozen while adapters are on it; gradients still flow through it to its input. Training, ``.to()``,
    ``state_dict`` and ``parameters()`` concern the adapters alone. Several on one module add up (remove them in reverse order).

    ::

        lora = LoRA(network, rank=8)
        optimizer = torch.optim.Adam(lora.parameters())
        network(x)  # with adapters
        with lora.disabled():
            network(x)  # as before

    Copies: ``deepcopy(lora)`` copies the module with it (``lora.base`` of the copy), so ``EMA(lora)`` averages the adapters and
    ``EMA(lora).module(x)`` runs the averaged model. A copy of the module alone keeps a private copy of the adapters, which nothing trains:
    copy before attaching, or take :meth:`merged`. When this object is gone, so are its hooks. A layer whose weight is used without calling the layer does not see its adapter.

    Args:
        module: any module; wrappers such as ``torch.compile`` are looked through.
        rank: r >= 1 (on a grouped convolution for all groups together, a multiple of their number).
        alpha: numerator of the scale; ``rank`` if None, that is, a scale of 1.
        targets: endings of paths (``"to_q"``, ``"attn.to_v"``) or full paths; layers below a named container count. None: every linear and
            2-D convolutional layer, but those inside ``nn.MultiheadAttention`` (which reads their weights itself) and grouped convolutions
            whose groups do not divide the rank.

    Attributes:
        paths: of the layers that have adapters, in the module's order.
        rank, alpha: as given.

    Raises:
        InputError: a rank or alpha out of range, no layer that matches a target, a layer that cannot have adapters.

    Source: "LoRA: Low-Rank Adaptation of Large Language Models" (2021); names and the form for convolutions are those of PEFT.
    """

    def __init__(
        self, module: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"the rank of adapters must be at least 1 (got {rank})")
        if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
            raise InputError(f"alpha of adapters must be a positive number (got {alpha})")
        root = unwrap(module)
        found = _chosen(root, rank, targets)
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.paths: tuple[str, ...] = tuple(found)
        self._base = [root]  # in a list, so that it is no sub-module
        self._thawed = [p for p in root.parameters() if p.requires_grad]
        for parameter in self._thawed:
            parameter.requires_grad_(False)
            parameter.grad = None
        self.adapters = nn.Module()
        self._handles: list[Any] = []
        for path, layer in found.items():
            adapter = _Adapter(layer, rank, self.alpha / rank)
            _put(self.adapters, path, adapter)
            self._handles.append(layer.register_forward_hook(adapter.add, with_kwargs=True))
        # Once nobody holds the adapters, the module gets rid of them too.
        weakref.finalize(self, _release, self._handles).atexit = False

    # ---- using ---------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> nn.Module:
        """The module that the adapters are on."""
        return self._base[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, with the adapters as they are switched."""
        return self.base(*args, **kwargs)

    @property
    def enabled(self) -> bool:
        """Whether the adapters act; may be set."""
        return all(adapter.enabled for adapter in self._each())

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for adapter in self._each():
            adapter.enabled = bool(value)

    @property
    def scale(self) -> float:
        """What the adapters' product is multiplied by, alpha / rank; may be set (1 is not special, 0 is as disabled)."""
        return next(iter(self._each())).scale if self.paths else 0.0

    @scale.setter
    def scale(self, value: float) -> None:
        for adapter in self._each():
            adapter.scale = float(value)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """The module without adapters inside the block; afterwards as they were, also on errors."""
        before = self.enabled
        self.enabled = False
        try:
            yield self.base
        finally:
            self.enabled = before

    def describe(self) -> dict[str, Any]:
        """Plain values: ``rank``, ``alpha``, ``targets`` (the paths), ``parameters`` (how many numbers the adapters have)."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": list(self.paths),
            "parameters": sum(p.numel() for p in self.parameters()),
        }

    # ---- ending --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the adapters to the weights, take them off, and return the module.

        Raises:
            InputError: an adapted weight is computed from others (spectral norm and the like), or shared with another layer.
        """
        pairs = list(self._pairs())
        for path, layer, _ in pairs:
            if parametrize.is_parametrized(layer, "weight"):
                raise InputError(f"the weight of '{path}' is parametrised: remove that before merging adapters")
        shared = _names_of_shared(self.base)
        for path, layer, _ in pairs:
            others = shared.get(id(layer.weight), [])
            if len(others) > 1:
                raise InputError(
                    f"{' and '.join(others)} are one tensor: adapters of '{path}' cannot be merged into it"
                )
        for _, layer, adapter in pairs:
            layer.weight.add_(adapter.delta().to(layer.weight))
        return self.remove()

    def remove(self) -> nn.Module:
        """Take the adapters off; the module is as it was before, and is returned."""
        _release(self._handles)
        for parameter in self._thawed:
            parameter.requires_grad_(True)
        self._thawed = []
        return self.base

    def merged(self) -> nn.Module:
        """A copy of the module with the adapters in its weights; this one stays as it is."""
        return deepcopy(self).merge()

    # ---- the adapters --------------------------------------------------------------------------------------------------

    def _each(self) -> Iterator[_Adapter]:
        return (m for m in self.adapters.modules() if isinstance(m, _Adapter))

    def _pairs(self) -> Iterator[tuple[str, Any, _Adapter]]:
        for path in self.paths:
            adapter = self.adapters.get_submodule(path) if path else self.adapters.get_submodule(_ROOT)
            assert isinstance(adapter, _Adapter)
            yield path, self.base.get_submodule(path), adapter


class Adapted(nn.Module):
    """A network with adapters that are on while it is called, and off else."""

    def __init__(self, lora: LoRA) -> None:
        super().__init__()
        self.lora = lora

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before, self.lora.enabled = self.lora.enabled, True
        try:
            return self.lora(*args, **kwargs)
        finally:
            self.lora.enabled = before


_ROOT = "root"  # the adapter's place where the module itself is the layer


class _Adapter(nn.Module):
    """A and B of one layer, and the hook that adds their product to the layer's output."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, scale: float) -> None:
        super().__init__()
        self.scale, self.enabled = scale, True
        weight = layer.weight
        # Adapters of a layer in half precision are kept in single: their updates would be rounded away.
        kind: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.lora_A: nn.Linear | nn.Conv2d
        self.lora_B: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Linear):
            self.lora_A = nn.Linear(layer.in_features, rank, bias=False, **kind)
            self.lora_B = nn.Linear(rank, layer.out_features, bias=False, **kind)
        else:
            self.lora_A = nn.Conv2d(
                layer.in_channels,
                rank,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                layer.dilation,  # type: ignore[arg-type]
                layer.groups,
                bias=False,
                padding_mode=layer.padding_mode,
                **kind,
            )
            self.lora_B = nn.Conv2d(rank, layer.out_channels, 1, groups=layer.groups, bias=False, **kind)
        nn.init.zeros_(self.lora_B.weight)

    def add(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """The forward hook."""
        if not self.enabled:
            return None
        x = args[0] if args else kwargs["input"]
        change = self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))
        return output + (self.scale * change).to(output.dtype)

    def delta(self) -> Tensor:
        """The change of the layer's weight, of its shape."""
        a, b = self.lora_A.weight, self.lora_B.weight
        if isinstance(self.lora_A, nn.Linear):
            return self.scale * (b @ a)
        groups = self.lora_A.groups
        kernel = a.shape[1:]
        product = b.view(groups, len(b) // groups, -1) @ a.view(groups, len(a) // groups, -1)
        return self.scale * product.reshape(len(b), *kernel)


def _release(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _put(tree: nn.Module, path: str, adapter: _Adapter) -> None:
    """Register an adapter under the path of its layer, so that its keys read as the layer's."""
    *above, last = path.split(".") if path else [_ROOT]
    for part in above:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
    tree.add_module(last, adapter)


def _chosen(root: nn.Module, rank: int, targets: Sequence[str] | None) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that get adapters, by path."""
    layers = {path: m for path, m in root.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    inside = tuple(
        f"{path}." if path else "" for path, m in root.named_modules() if isinstance(m, nn.MultiheadAttention)
    )
    unusable = {path for path in layers if inside and path.startswith(inside)}
    if targets is None:
        found = {p: m for p, m in layers.items() if p not in unusable and not _undivided(m, rank)}
        if not found:
            raise InputError(f"{type(root).__name__} has no linear or 2-D convolutional layer that adapters fit on")
        return found
    wanted = [targets] if isinstance(targets, str) else list(targets)
    found = {}
    for target in wanted:
        matching = [p for p in layers if _matches(p, target)]
        if not matching:
            near = nearest(target, layers) or list(layers)[:_SHOWN]
            raise InputError(
                f"no linear or 2-D convolutional layer matches the target '{target}'; there are "
                f"{', '.join(repr(p) for p in near) if near else 'none'}"
            )
        for path in matching:
            if path in unusable:
                raise InputError(
                    f"'{path}' belongs to an nn.MultiheadAttention, which never calls it: no adapters there"
                )
            if _undivided(layers[path], rank):
                raise InputError(f"'{path}' has {layers[path].groups} groups: the rank must be a multiple, not {rank}")
        found.update({p: layers[p] for p in matching})
    return {p: m for p, m in layers.items() if p in found}


def _matches(path: str, target: str) -> bool:
    """Whether a path ends with the target, or lies below a container that does."""
    parts, wanted = path.split("."), target.strip(".").split(".")
    return any(parts[i : i + len(wanted)] == wanted for i in range(len(parts) - len(wanted) + 1))


def _undivided(layer: nn.Module, rank: int) -> bool:
    return isinstance(layer, nn.Conv2d) and rank % layer.groups != 0


def _names_of_shared(root: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
