"""Guidance adapters on the blocks of a network, put on and taken off without touching its code, its modules or their names.

::

    adapters = GuidanceAdapters.probe(unet, lambda: unet(x, t, prompt), condition="tokens", size=768, w_range=(1, 12), t_range=1000)
    on = attach(unet, adapters.settings)
    with on.guided(adapters, w, t, prompt):  # the side channel of one forward pass
        unet(x, t, prompt)
    on.remove()

Hooks stand around the blocks, so an adapted network keeps its module tree and the keys of its state, and outside of ``guided`` it gives
what it gave before, bit for bit. Several sets of adapters can take turns on one network. The adapters are a module of their own:
``adapters.state_dict()`` holds nothing of the network.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from limbeck.blocks.guidance_adapters import AdapterSettings, Block, Signal, SignalEncoder
from limbeck.blocks.taps import Tap, Taps
from limbeck.core.batch import first_tensor
from limbeck.core.errors import InputError

Run = Callable[[], Any]
"""Runs the network once, without arguments."""
Selector = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""Paths or patterns of :mod:`limbeck.blocks.taps`, a function of path and module, or ``auto``."""
ATTENTIONS = ("attn", "attn2", "attn1")
TIME_EMBEDDERS = ("time_embedding", "time_text_embed", "t_embedder", "time_embed", "time")


class GuidanceAdapters(nn.Module):
    """One adapter for each chosen block, and the encoders of the side channel. See :class:`AdapterSettings` for what they can be.

    Args:
        settings: what they are.
    """

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__()
        self.settings = settings
        count = 1 if settings.shared else len(settings.blocks)
        self.encoders = nn.ModuleList(SignalEncoder(settings) for _ in range(count))
        self.adapters = nn.ModuleList(settings.adapter(block) for block in settings.blocks)

    @classmethod
    def probe(
        cls,
        network: nn.Module,
        run: Run,
        *,
        blocks: Selector = "auto",
        w_range: tuple[float, float] = (1.0, 6.0),
        t_range: float = 1.0,
        reuse: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Self:
        """Adapters for a network, whose widths are found by running it once.

        Args:
            network: any module.
            run: calls it.
            blocks: on which blocks. ``auto``: joint or self-attentions of a transformer (``attn``), cross-attentions of a UNet (``attn2``), or
                the items of a list of modules called ``blocks``.
            w_range: least and largest scale of training.
            t_range: difference between the largest and the least time that the network is told.
            reuse: ``t`` or ``c`` -> path of the network's own embedder.
            settings: the other fields of :class:`~limbeck.blocks.guidance_adapters.AdapterSettings`.

        Raises:
            InputError: no such blocks, or a range that is none.
        """
        low, high = map(float, w_range)
        if not low < high:
            raise InputError(f"the range of guidance scales must rise (got {low:g} to {high:g})")
        if t_range <= 0:
            raise InputError(f"the range of times must be above 0 (got {t_range:g})")
        paths = select_blocks(network, blocks)
        embedders = dict(reuse or {})
        inputs = {p: Tap(p, io="input", pick=_picked_input) for p in paths}
        outputs = {p: Tap(p) for p in (*paths, *embedders.values())}
        with torch.no_grad(), Taps(network, [*inputs.values(), *outputs.values()]) as found:
            run()
        made = AdapterSettings(
            tuple(Block(p, _width(found[inputs[p]]), _width(found[outputs[p]])) for p in paths),
            w_scale=1 / (high - low),
            t_scale=1 / float(t_range),
            reuse={what: (p, _width(found[outputs[p]])) for what, p in embedders.items()},
            **settings,
        )
        return cls(made)

    def hear(self, signal: Signal) -> None:
        """Encode the signal as soon as everything is there: outside of the blocks, which gradient checkpointing may repeat."""
        if all(path in signal.captured for path, _ in self.settings.reuse.values()):
            signal.encoded = [encoder(signal) for encoder in self.encoders]

    def addition(self, number: int, signal: Signal, h: Tensor, like: Tensor) -> Tensor:
        """What adapter ``number`` adds to a block's output ``like``, for the block's input ``h``; of the kind of ``like``.

        Raises:
            InputError: the signal is of another number of samples.
        """
        if len(signal.w) != len(h):
            raise InputError(
                f"a block sees {len(h)} samples, but there are {len(signal.w)} guidance scales: they must be as many "
                "(switch other guidance off, as it doubles the batch)"
            )
        block, tokens = self.settings.blocks[number], _tokens(h).to(signal.w.dtype)
        if tokens.shape[-1] != block.width_in:
            raise InputError(
                f"'{block.path}' takes a width of {tokens.shape[-1]}, but its adapter was made for {block.width_in}: "
                "the adapters belong to another architecture"
            )
        if not signal.encoded:
            missing = [path for path, _ in self.settings.reuse.values() if path not in signal.captured]
            raise InputError(
                f"the network calls '{missing[0]}' after the first block with an adapter, too late to reuse it"
            )
        added = self.adapters[number](tokens, signal.encoded[number % len(self.encoders)])
        added = _shaped(added, like).to(like.dtype)
        return added * signal.gate(like) if self.settings.exact_one else added


class Attachment:
    """The hooks on one network, and the side channel through which they are told what to add. Made by :func:`attach`.

    Attributes:
        enabled: False: the network is what it was, also inside of ``guided``.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.handles: list[Any] = []
        self.current: tuple[GuidanceAdapters, Signal] | None = None
        self.last: tuple[GuidanceAdapters, Signal] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What is told during a pass holds a graph, which can be neither copied nor stored.
        return {**self.__dict__, "current": None, "last": None}

    @contextmanager
    def guided(
        self,
        adapters: GuidanceAdapters,
        w: Tensor | float,
        t: Tensor | float | None = None,
        cond: Any = None,
        rows: int | None = None,
    ) -> Iterator[None]:
        """Inside, calls of the network are guided. Open it anew for each forward pass: time and condition change.

        Args:
            adapters: of the settings that the network was prepared for.
            w: (B,) scales, or one number for all.
            t: (B,) or one: the time exactly as the network is told it.
            cond: as the network is given it.
            rows: B, where neither w nor t nor cond tells it.
        """
        first = first_tensor(cond)
        sizes = [len(v) for v in (w, t) if isinstance(v, Tensor) and v.ndim == 1]
        count = rows if rows is not None else sizes[0] if sizes else 1 if first is None else len(first)
        where = next(adapters.parameters())
        times = None if t is None else _each(t, count, where, "times")
        before = self.current
        signal = Signal(_each(w, count, where, "guidance scales"), times, cond)
        adapters.hear(signal)
        self.current = (adapters, signal)
        try:
            yield
        finally:
            self.last, self.current = self.current, before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the network is without adapters."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def telling(self) -> tuple[GuidanceAdapters, Signal] | None:
        """What hooks are told: of the pass that runs, or of the last one where gradient checkpointing repeats it during backward."""
        if not self.enabled:
            return None
        repeated = self.current is None and torch._C._current_graph_task_id() != -1
        return self.last if repeated else self.current

    def remove(self) -> None:
        """Take all hooks off."""
        while self.handles:
            self.handles.pop().remove()


class _Adds:
    """A hook after a block: the block's output and what its adapter adds."""

    def __init__(self, attachment: Attachment, number: int) -> None:
        self.attachment, self.number = attachment, number

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        told = self.attachment.telling()
        if told is None:
            return None
        like = first_tensor(output)
        if like is None or not isinstance(output, Tensor | tuple):
            raise InputError(
                f"a block with an adapter must give a tensor or a tuple of them, not {type(output).__name__}"
            )
        adapters, signal = told
        added = adapters.addition(self.number, signal, _picked_input(*args, **kwargs), like)
        return output + added if isinstance(output, Tensor) else (output[0] + added, *output[1:])


class _Notes:
    """A hook after one of the network's embedders: notes its output for the encoders."""

    def __init__(self, attachment: Attachment, path: str) -> None:
        self.attachment, self.path = attachment, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        told = self.attachment.telling()
        captured = first_tensor(output)
        if told is not None and captured is not None:
            adapters, signal = told
            signal.captured[self.path] = captured
            adapters.hear(signal)


def attach(network: nn.Module, settings: AdapterSettings) -> Attachment:
    """Prepare a network for adapters. Do it before it is handed to DistributedDataParallel or compiled.

    The network may be another one than that the adapters were made for, as long as its blocks have the same paths and widths: a
    checkpoint that was fine-tuned from the same base, say.

    A network may carry several attachments; each is heard only inside of its own ``guided``.

    Raises:
        InputError: the network has no such blocks.
    """
    made = Attachment()
    hooks: list[tuple[str, Any]] = [(path, _Notes(made, path)) for path, _ in settings.reuse.values()]
    hooks += [(block.path, _Adds(made, number)) for number, block in enumerate(settings.blocks)]
    found = []
    for path, hook in hooks:
        try:
            module = network.get_submodule(path)
        except AttributeError:
            raise InputError(
                f"the network has no block '{path}': the adapters belong to another architecture"
            ) from None
        found.append((module, hook))
    for module, hook in found:
        made.handles.append(module.register_forward_hook(hook, with_kwargs=isinstance(hook, _Adds)))
    return made


def listen(
    network: nn.Module,
    adapters: GuidanceAdapters,
    guidance: float | Tensor,
    time: str = "timestep",
    cond: str | None = "encoder_hidden_states",
) -> Callable[[], None]:
    """Guide every call of a network, reading time and condition from the call's own arguments.

    For pipelines of other libraries, whose own guidance must be off (``guidance_scale=1``)::

        stop = listen(pipe.unet, adapters, guidance=5.0)
        pipe("a lighthouse", guidance_scale=1)
        stop()

    Args:
        network: of the other library.
        adapters: made for it, or for one of the same architecture.
        guidance: w, a number or (B,).
        time, cond: names of the network's parameters; no ``cond`` for adapters that are not told it.

    Returns:
        a function that puts everything back.

    Raises:
        InputError: the network has no such parameters or blocks.
    """
    signature = inspect.signature(network.forward)
    names = (time,) if cond is None else (time, cond)
    for name in names:
        if name not in signature.parameters:
            raise InputError(
                f"{type(network).__name__}.forward has no parameter '{name}': name those that it has for time and condition"
            )
    made = attach(network, adapters.settings)
    passes: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        count = len(_picked_input(*args, **kwargs))
        channel = made.guided(adapters, guidance, given.get(time), None if cond is None else given.get(cond), count)
        channel.__enter__()
        passes.append(channel)

    def after(*_: Any) -> None:
        while passes:
            passes.pop().__exit__(None, None, None)

    made.handles.append(network.register_forward_pre_hook(before, with_kwargs=True))
    made.handles.append(network.register_forward_hook(after, always_call=True))
    return made.remove


def select_blocks(network: nn.Module, selector: Selector = "auto") -> list[str]:
    """Paths of the chosen blocks, in the network's order.

    Raises:
        UnknownNameError, InputError: nothing is chosen.
    """
    layers = {path: module for path, module in network.named_modules() if path}
    if callable(selector):
        paths = [path for path, module in layers.items() if selector(path, module)]
    elif selector == "auto":
        paths = _automatic(layers)
    else:
        chosen = {tap.path for tap in Taps(network, [selector] if isinstance(selector, str) else list(selector)).taps}
        paths = [path for path in layers if path in chosen]
    if not paths:
        raise InputError(
            f"{type(network).__name__} has no block to put an adapter on: name some (blocks=…; list_taps shows all)"
        )
    return paths


def _automatic(layers: Mapping[str, nn.Module]) -> list[str]:
    for name in ATTENTIONS:
        found = [path for path in layers if path.rpartition(".")[2] == name]
        if found:
            return found
    stacks = [p for p, m in layers.items() if p.rpartition(".")[2] == "blocks" and isinstance(m, nn.ModuleList)]
    return [path for path in layers if path.rpartition(".")[0] in stacks]


def time_embedder(network: nn.Module) -> str:
    """Path of the module that embeds the time.

    Raises:
        InputError: none of the usual names.
    """
    names = dict(network.named_modules())
    found = [name for name in TIME_EMBEDDERS if name in names]
    if not found:
        raise InputError(
            f"{type(network).__name__} has no embedder of times by a usual name ({', '.join(TIME_EMBEDDERS)}): name it (blocks=…)"
        )
    return found[0]


# ---- shapes: vectors (B, C), tokens (B, T, C), maps (B, C, H, W) ---------------------------------------------------------


def _picked_input(*args: Any, **kwargs: Any) -> Tensor:
    """A block's main input: ``hidden_states`` by name, else the first tensor."""
    named = kwargs.get("hidden_states")
    tensor = named if isinstance(named, Tensor) else first_tensor((args, kwargs))
    if tensor is None:
        raise InputError("a block with an adapter must take a tensor")
    return tensor


def _width(value: Tensor) -> int:
    if value.ndim not in (2, 3, 4):
        raise InputError(
            f"adapters take vectors (B, C), tokens (B, T, C) or maps (B, C, H, W), not shape {tuple(value.shape)}"
        )
    return int(value.shape[1] if value.ndim == 4 else value.shape[-1])


def _tokens(value: Tensor) -> Tensor:
    if value.ndim == 2:
        return value[:, None]
    return value.flatten(2).transpose(1, 2) if value.ndim == 4 else value


def _shaped(added: Tensor, like: Tensor) -> Tensor:
    """(B, T or 1, C) in the layout of ``like``."""
    if like.ndim == 2:
        return added[:, 0]
    if like.ndim == 3:
        return added
    places = (1, 1) if added.shape[1] == 1 else like.shape[2:]
    return added.transpose(1, 2).reshape(*like.shape[:2], *places)


def _each(value: Tensor | float, count: int, where: Tensor, what: str) -> Tensor:
    made = torch.as_tensor(value, device=where.device).to(where.dtype)
    if made.ndim == 0 or made.shape == (1,):
        return made.reshape(1).expand(count)
    if made.shape != (count,):
        raise InputError(f"{what} must be one number or one for each of the {count} samples, not {tuple(made.shape)}")
    return made
