"""Feature taps: read what any layer of any model takes or gives, by its path, without touching the model's code.

::

    taps = Taps(model, ["layer1", "layer3.1.conv2", Tap("fc", io="input")])
    with taps as features:
        logits = model(x)
    features["layer1"]  # the tensor itself, with its graph

A path is a dotted name as in ``named_modules()``; ``blocks[11]`` is ``blocks.11``; ``""`` or ``"."`` is the whole
model. ``*`` and ``?`` match within one level (``layer*.0``), ``**`` matches any depth (``**.conv2``, ``encoder.**``);
a pattern stands for all layers it matches, in the model's order. :func:`list_taps` shows what there is.

Hooks see calls of modules. A layer whose weights are used without calling it, and a graph that ``torch.compile`` made
before the taps were opened, call no hooks: the tap then captures nothing, which is an error. A model compiled while
taps are open works, with a graph break at each tapped layer (so not with ``fullgraph=True``).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError, UnknownNameError, nearest

Pick = int | str | Callable[..., Tensor] | None

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# These save their input or, in place, their output for backward. If the flag changed between a checkpoint's forward
# and its recomputation, after the taps are closed, gradients would be wrong without a word.
_FIXED_INPLACE = (nn.ELU, nn.CELU, nn.SELU, nn.RReLU)
_PARALLEL = ("DataParallel", "DistributedDataParallel", "DeepSpeedEngine")


@dataclass(frozen=True)
class Tap:
    """Which tensor to read.

    Attributes:
        path: layer path or pattern; see the module's description.
        io: what the layer gives ("output"), or what it takes ("input").
        call: which call, for a layer that runs several times while the taps are open: a number from 0, or from the
            end if negative (-1: the last), or "all" for the list of all calls.
        pick: which part of a tuple, list, dict or dataclass. None: the tensor itself, or the container's first tensor.
            int: the item at this place. str: the item or attribute of this name; for an input, the parameter of
            ``forward`` with this name. A callable: ``pick(output)``, or for an input ``pick(*args, **kwargs)``; it
            returns the tensor.

    Raises:
        InputError: a field has a wrong value.
    """

    path: str
    io: Literal["output", "input"] = "output"
    call: int | Literal["all"] = -1
    pick: Pick = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise InputError(f"a tap's path must be a string, got {self.path!r}.")
        if self.io not in ("output", "input"):
            raise InputError(f"tap '{self.path}': io must be 'output' or 'input', got {self.io!r}.")
        if self.call != "all" and (isinstance(self.call, bool) or not isinstance(self.call, int)):
            raise InputError(f"tap '{self.path}': call must be an integer or 'all', got {self.call!r}.")
        valid = self.pick is None or callable(self.pick) or isinstance(self.pick, int | str)
        if not valid or isinstance(self.pick, bool):
            raise InputError(f"tap '{self.path}': pick must be None, int, str or a callable, got {self.pick!r}.")

    @classmethod
    def of(cls, value: str | Tap) -> Tap:
        """``value`` as a tap: a string is the path of an output."""
        return value if isinstance(value, Tap) else cls(value)

    def __str__(self) -> str:
        label = self.path or "."
        if self.io == "input":
            label += ":input"
        if self.call != -1:
            label += f"#{self.call}"
        if self.pick is not None:
            label += f"/{getattr(self.pick, '__name__', self.pick)}"
        return label


@dataclass(frozen=True)
class TapInfo:
    """One layer that ran: path, class name, shape and dtype of its first tensor (None if it has none), calls."""

    path: str
    type: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    calls: int


class Features(Mapping[str, Any]):
    """What the taps captured: a tensor each, or a list of tensors where ``call="all"``.

    Look up by path, or by the :class:`Tap` where several taps share a path. Iteration gives the taps' names in order:
    the path where it is unique, else the path with what tells the taps apart (``fc:input``).
    """

    def __init__(self, captures: Iterable[_Capture]) -> None:
        captures = list(captures)
        paths = [c.tap.path for c in captures]
        self._by_tap = {c.tap: c for c in captures}
        self._by_name: dict[str, _Capture] = {}
        for capture in captures:
            path = capture.tap.path
            name = (path or ".") if paths.count(path) == 1 else str(capture.tap)
            while name in self._by_name:  # two lambdas print alike
                name += "'"
            self._by_name[name] = capture

    def __getitem__(self, key: str | Tap) -> Any:
        found = self._find(key)
        if found is None:
            raise UnknownNameError("tap", str(key), self._by_name)
        return found.result()

    def _find(self, key: object) -> _Capture | None:
        if isinstance(key, Tap):
            return self._by_tap.get(dataclasses.replace(key, path=_normal(key.path)))
        if not isinstance(key, str):
            return None
        return self._by_name.get(key) or self._by_name.get(_normal(key) or ".")

    def __contains__(self, key: object) -> bool:
        return self._find(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)


class Taps:
    """Opens taps on a model for the time of a ``with`` block.

    Entering is cheap (paths are resolved once, here) and may be repeated without end, also while already open; each
    entry returns fresh :class:`Features`, so those of an earlier entry stay valid. All hooks are gone after the
    block, whatever happened in it. Modules with ``inplace=True`` work out of place while the taps are open, so that
    they cannot overwrite what was captured; the ELU family stays as it is, since its gradient depends on the flag,
    and may need ``clone``. Recomputation by gradient checkpointing during backward is not captured a second time.

    Args:
        model: any module; DistributedDataParallel and ``torch.compile`` wrappers are looked through.
        taps: taps or paths, one or several. Repeated ones count once.
        clone: copy each tensor when it is captured (gradients still flow), for models that overwrite it afterwards.

    Raises:
        UnknownNameError: no such layer; the message names the nearest paths.
        InputError: at construction, if a path is a container that is never called, or a pattern matches nothing.
            During the forward, if a layer gives no tensor where one is asked for, or reentrant checkpointing has cut
            a tensor off its graph. On leaving the block, if a tap captured nothing, or a captured tensor was
            overwritten.
    """

    def __init__(self, model: nn.Module, taps: str | Tap | Iterable[str | Tap], clone: bool = False) -> None:
        self._root = unwrap(model)
        self._clone = clone
        layers = _layers(self._root)
        asked = [taps] if isinstance(taps, str | Tap) else taps
        resolved = dict.fromkeys(tap for item in asked for tap in _resolve(Tap.of(item), layers))
        self.taps: tuple[Tap, ...] = tuple(resolved)
        self._modules = [layers[tap.path] for tap in self.taps]
        self._switchable: list[Any] = [
            m for m in self._root.modules() if hasattr(m, "inplace") and not isinstance(m, _FIXED_INPLACE)
        ]
        self._open: list[tuple[ExitStack, list[_Capture]]] = []

    def __enter__(self) -> Features:
        grad = _GradMode(torch.is_grad_enabled())
        captures = [_Capture(tap, self._clone, grad) for tap in self.taps]
        with ExitStack() as stack:  # undoes a half-finished entry
            if captures:
                for module in self._switchable:
                    if module.inplace is True:
                        module.inplace = False
                        stack.callback(setattr, module, "inplace", True)
                stack.callback(self._root.register_forward_pre_hook(grad.note).remove)
            for capture, module in zip(captures, self._modules, strict=True):
                stack.callback(capture.listen(module).remove)
            self._open.append((stack.pop_all(), captures))
        return Features(captures)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        stack, captures = self._open.pop()
        stack.close()
        if kind is not None:
            return
        missed = ", ".join(f"'{c.tap}' ({c.calls} calls)" for c in captures if not c.complete)
        if missed:
            raise InputError(
                f"nothing captured for {missed}: the layer was not called (so often) while the taps were open. "
                "list_taps() shows what is called; a graph compiled before ignores taps, so call unwrap(model) instead."
            )
        changed = ", ".join(f"'{c.tap}'" for c in captures if c.overwritten())
        if changed:
            raise InputError(
                f"the tensor captured for {changed} was modified in place afterwards: open the taps with clone=True."
            )


def list_taps(model: nn.Module, sample: Any, io: Literal["output", "input"] = "output") -> list[TapInfo]:
    """All layers that one forward calls, with the shapes they give or take.

    The forward runs in eval mode without gradients and leaves the model (training flags, buffers) and the random
    state as they were.

    Args:
        model: any module; it runs uncompiled.
        sample: a tensor, a tuple of positional arguments, or a mapping of keyword arguments, on the model's device.
        io: list outputs or inputs.

    Returns:
        One entry a path in the model's order, "." (the whole model) first. A layer with several paths has an entry
        for each. Shape and dtype are those of its first call.
    """
    Tap("", io=io)  # checks io
    root = unwrap(model)
    layers = _layers(root)
    calls: dict[nn.Module, int] = {}
    first: dict[nn.Module, tuple[tuple[int, ...] | None, torch.dtype | None]] = {}

    def note(module: nn.Module, value: Any) -> None:
        if module not in calls:
            found = _first_tensor(value)
            first[module] = (None, None) if found is None else (tuple(found.shape), found.dtype)
        calls[module] = calls.get(module, 0) + 1

    modes = [(module, module.training) for module in root.modules()]
    cards = sorted({p.device.index for p in root.parameters() if p.is_cuda})
    with ExitStack() as stack:
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
        root.eval()
        for module in set(layers.values()):
            if io == "output":
                handle = module.register_forward_hook(lambda module, _, output: note(module, output))
            else:
                handle = module.register_forward_pre_hook(
                    lambda module, args, kwargs: note(module, (args, kwargs)), with_kwargs=True
                )
            stack.callback(handle.remove)
        stack.enter_context(torch.random.fork_rng(devices=cards))
        stack.enter_context(torch.no_grad())
        if isinstance(sample, Mapping):
            root(**sample)
        elif isinstance(sample, tuple):
            root(*sample)
        else:
            root(sample)
    infos = []
    for path, module in layers.items():
        if module in calls:
            shape, dtype = first[module]
            infos.append(TapInfo(path or ".", type(unwrap(module)).__name__, shape, dtype, calls[module]))
    return infos


def format_taps(infos: Iterable[TapInfo]) -> str:
    """The layers as an aligned text table, one line each under a header."""
    rows = [("path", "type", "shape", "dtype", "calls")]
    for info in infos:
        shape = "-" if info.shape is None else "x".join(map(str, info.shape)) or "scalar"
        dtype = "-" if info.dtype is None else str(info.dtype).removeprefix("torch.")
        rows.append((info.path, info.type, shape, dtype, str(info.calls)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside wrappers: (Distributed)DataParallel, DeepSpeed, FSDP and ``torch.compile``."""
    inner = _wrapped(model)
    while inner is not None:
        model, inner = inner, _wrapped(inner)
    return model


def _wrapped(module: nn.Module) -> nn.Module | None:
    children = module._modules
    for name in _WRAPPED:
        if children.get(name) is not None:
            return children[name]
    if any(c.__name__ in _PARALLEL for c in type(module).__mro__):
        return children.get("module")
    return None


# --- paths ---


def _layers(root: nn.Module) -> dict[str, nn.Module]:
    """Every path, a shared module under each of its own; an inner wrapper stands at the path of what it wraps."""
    found: dict[str, nn.Module] = {}

    def walk(path: str, module: nn.Module, above: frozenset[nn.Module]) -> None:
        found[path] = module
        for name, child in unwrap(module)._modules.items():
            if child is not None and child not in above:  # some models keep a reference to their parent
                walk(f"{path}.{name}" if path else name, child, above | {child})

    walk("", root, frozenset({root}))
    return found


def _normal(path: str) -> str:
    dotted = re.sub(r"\[\s*['\"]?(\w+)['\"]?\s*\]", r".\1", path.strip())
    return ".".join(part for part in dotted.split(".") if part and part not in _WRAPPED)


def _resolve(tap: Tap, layers: Mapping[str, nn.Module]) -> list[Tap]:
    path = _normal(tap.path)
    if path in layers:
        if _never_called(layers[path]):
            children = [p for p in layers if p.startswith(f"{path}.")][:1]
            remedy = f"tap its children, '{children[0]}' or '{path}.*'" if children else "tap another layer"
            raise InputError(f"layer '{path}' is a {type(layers[path]).__name__}, never called itself: {remedy}.")
        return [dataclasses.replace(tap, path=path)]
    hint = "list_taps(model, sample) shows all layers."
    if not set("*?") & set(path):
        raise UnknownNameError("layer", tap.path, filter(None, layers), hint=hint)
    pattern = _pattern(path)
    matches = [name for name in layers if name and pattern.fullmatch(name)]
    if not matches:
        near = " or ".join(nearest(path, filter(None, layers)))
        raise InputError(f"pattern '{tap.path}' matches no layer{f'; near it are {near}' if near else ''}; {hint}")
    called = [name for name in matches if not _never_called(layers[name])]
    if not called:
        raise InputError(
            f"pattern '{tap.path}' matches only containers that are never called themselves "
            f"({', '.join(matches[:3])}): tap their children, '{path}.*'."
        )
    return [dataclasses.replace(tap, path=name) for name in called]


def _pattern(path: str) -> re.Pattern[str]:
    pieces, parts = [], path.split(".")
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if part == "**":
            pieces.append(r".+" if last else r"(?:[^.]+\.)*")
        else:
            piece = re.escape(part).replace(r"\*", r"[^.]*").replace(r"\?", r"[^.]")
            pieces.append(piece if last else piece + r"\.")
    return re.compile("".join(pieces))


def _never_called(module: nn.Module) -> bool:
    """Whether the module has no ``forward`` of its own, as ModuleList and ModuleDict."""
    return getattr(module.forward, "__func__", None) is nn.Module.forward


# --- capturing ---


@dataclass(eq=False)
class _GradMode:
    """Whether gradients are on for the forward as a whole; reentrant checkpointing turns them off inside."""

    enabled: bool

    def note(self, *_: Any) -> None:
        if torch.is_grad_enabled() or _reentrant_frame() is None:
            self.enabled = torch.is_grad_enabled()


@dataclass(eq=False)
class _Capture:
    """One tap during one entry."""

    tap: Tap
    clone: bool
    grad: _GradMode
    calls: int = 0
    kept: list[Tensor] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)

    def listen(self, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def taken(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not _in_backward():
                self.add(module, _pick_input(self.tap, module, args, kwargs))

        def given(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not _in_backward():
                self.add(module, _pick_output(self.tap, output))

        if self.tap.io == "input":
            return module.register_forward_pre_hook(_eager(taken), with_kwargs=True)
        return module.register_forward_hook(_eager(given))

    def add(self, module: nn.Module, tensor: Tensor) -> None:
        self.check_graph(module, tensor)
        number, call = self.calls, self.tap.call
        self.calls += 1
        if call == -1:  # keep no more calls alive than asked for
            self.kept.clear()
            self.versions.clear()
        elif call != "all" and call >= 0 and call != number:
            return
        tensor = tensor.clone() if self.clone else tensor
        self.kept.append(tensor)
        self.versions.append(None if tensor.is_inference() else tensor._version)

    def check_graph(self, module: nn.Module, tensor: Tensor) -> None:
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        if tensor.requires_grad or not differentiable or not self.grad.enabled or torch.is_grad_enabled():
            return
        frame = _reentrant_frame()
        if frame is None:
            return  # the model's own no_grad block: meant so
        upstream = [*frame.f_locals.values(), *([module] if self.tap.io == "output" else [])]
        if any(_trainable(value) for value in upstream):
            raise InputError(
                f"tap '{self.tap}' lies inside a reentrant gradient checkpoint, so its tensor has no graph and no "
                "gradient would reach the model: checkpoint with use_reentrant=False."
            )

    @property
    def complete(self) -> bool:
        call = self.tap.call
        return self.calls > (0 if call == "all" else call if call >= 0 else -call - 1)

    def result(self) -> Tensor | list[Tensor]:
        if not self.complete:
            raise InputError(f"tap '{self.tap}' has captured nothing yet: run the model first.")
        if self.tap.call == "all":
            return list(self.kept)
        return self.kept[self.tap.call if self.tap.call < 0 else 0]

    def overwritten(self) -> bool:
        return any(v is not None and t._version != v for t, v in zip(self.kept, self.versions, strict=True))


def _eager(hook: Callable[..., None]) -> Callable[..., None]:
    # Traced into a graph, a hook would be guarded on objects that live for one entry only: a new compilation each time.
    # Where the compiler is not loaded there is nothing to keep out, and loading it takes a second.
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def _in_backward() -> bool:
    """Whether autograd is running: a module called then is recomputed by gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def _reentrant_frame() -> FrameType | None:
    """The innermost running forward of a reentrant checkpoint.

    The call stack alone tells it from a ``no_grad`` block that the model's author wrote.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_qualname.endswith("CheckpointFunction.forward"):
        frame = frame.f_back
    return frame


def _trainable(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_trainable, value))
    if isinstance(value, Tensor):
        return value.requires_grad
    value = getattr(value, "func", value)  # functools.partial
    value = getattr(value, "__self__", value)  # bound method
    return isinstance(value, nn.Module) and any(p.requires_grad for p in value.parameters())


def _pick_output(tap: Tap, output: Any) -> Tensor:
    if callable(tap.pick):
        return _checked(tap, tap.pick(output), output)
    if tap.pick is None:
        return _checked(tap, _first_tensor(output), output)
    return _checked(tap, _item(tap, output, tap.pick), output)


def _pick_input(tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if callable(tap.pick):
        return _checked(tap, tap.pick(*args, **kwargs), (args, kwargs))
    if tap.pick is None:
        return _checked(tap, _first_tensor((args, kwargs)), (args, kwargs))
    named = dict(kwargs)
    if isinstance(tap.pick, str) and tap.pick not in named:
        named = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    return _checked(tap, _item(tap, args if isinstance(tap.pick, int) else named, tap.pick), (args, kwargs))


def _checked(tap: Tap, picked: Any, source: Any) -> Tensor:
    if not isinstance(picked, Tensor):
        raise InputError(
            f"tap '{tap}' got a {type(picked).__name__} out of {_outline(source)} where a tensor is needed: "
            "choose one with pick=."
        )
    return picked


def _item(tap: Tap, value: Any, pick: int | str) -> Any:
    if isinstance(value, Tensor):
        raise InputError(f"tap '{tap}': the layer gives one tensor, so pick={pick!r} has nothing to choose: drop it.")
    items = _items(value)
    if isinstance(pick, str):
        if pick in items:
            return items[pick]
        if hasattr(value, pick):
            return getattr(value, pick)
    elif items and -len(items) <= pick < len(items):
        return list(items.values())[pick]
    raise InputError(f"tap '{tap}': pick={pick!r} is not in {_outline(value)}.")


def _items(value: Any) -> dict[Any, Any]:
    """The parts of a container, in order; empty for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {}


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    return next((t for t in map(_first_tensor, _items(value).values()) if t is not None), None)


def _outline(value: Any) -> str:
    """A container in a few words: ``dict(logits, loss)``, ``tuple of 2``."""
    items = _items(value)
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(items)}"
    return f"a {type(value).__name__}({', '.join(map(str, items))})" if items else f"a {type(value).__name__}"
