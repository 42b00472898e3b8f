"""What a model costs: parameters, bytes, floating-point operations, latency."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from limbeck.core.batch import first_tensor, map_tensors
from limbeck.core.errors import InputError


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters; a parameter that several modules share counts once.

    Args:
        model: any module.
        trainable_only: only those with ``requires_grad``.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def count_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in their present types; shared tensors count once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def count_flops(model: nn.Module, sample: Any) -> float:
    """Floating-point operations of one forward pass, per sample.

    Counts matrix products, convolutions and attention, a multiply-add as **2** operations (FLOPs = 2 · MACs); activations,
    normalisations and other elementwise work are not counted. Fused kernels of attention, transformer layers and recurrent
    layers are switched off meanwhile, because the counter does not see into all of them. The model runs in evaluation mode
    without gradients; its training flags, buffers and the random state are as before afterwards.

    Args:
        model: any module.
        sample: a tensor, a tuple (positional arguments) or a mapping (keyword arguments), on the model's device. The first
            axis of its first tensor is the batch.

    Returns:
        Operations divided by the batch size.

    Raises:
        InputError: ``sample`` holds no tensor with a batch axis, or an empty batch.
    """
    batch = _batch_size(sample)
    with _undisturbed(model, sample), _visible_kernels(), FlopCounterMode(display=False) as counter:
        _call(model, sample)
    return counter.get_total_flops() / batch


def count_function_flops(model: nn.Module, function: Callable[[Any], Any], sample: Any) -> float:
    """As :func:`count_flops`, of a function that uses ``model``'s modules in its own way (an early exit, a masked pass).

    Args:
        model: the module whose state must be left as it is.
        function: called with ``sample``.
        sample: see :func:`count_flops`.
    """
    return count_flops(_Function(model, function), sample)


class _Function(nn.Module):
    def __init__(self, model: nn.Module, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, sample: Any) -> Any:
        return self.function(sample)


def measure_latency(
    models: Mapping[str, nn.Module], sample: Any, repeats: int = 30, warmup: int = 5
) -> dict[str, dict[str, float]]:
    """Time of one forward pass on this machine, all models side by side.

    The models take turns, in an order that rotates every round, so that drift of the machine (clock, other load) hits all of
    them alike. Evaluation mode without gradients; flags, buffers and random state are as before afterwards. Accelerators are
    synchronised around every pass.

    Args:
        models: by name; the first is the reference.
        sample: what every model takes: a tensor, a tuple (positional arguments) or a mapping (keyword arguments).
        repeats: measured rounds, at least 2.
        warmup: rounds thrown away.

    Returns:
        By name: ``median_seconds`` and ``iqr_seconds`` (75th minus 25th percentile) of a pass of the whole sample, and
        ``ratio``, the median over rounds of this model's time divided by the reference's time in the same round.

    Raises:
        InputError: no models, ``repeats`` below 2, ``warmup`` negative.
    """
    if not models:
        raise InputError("there is no model to time")
    if repeats < 2 or warmup < 0:
        raise InputError(f"latency needs repeats >= 2 and warmup >= 0, not repeats={repeats}, warmup={warmup}")
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    synchronise = _synchroniser(models, sample)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(_undisturbed(model, sample))
        for turn in range(warmup + repeats):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                synchronise()
                start = time.perf_counter()
                _call(models[name], sample)
                synchronise()
                elapsed = time.perf_counter() - start
                if turn >= warmup:
                    seconds[name].append(elapsed)
    reference = seconds[names[0]]
    result = {}
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        ratio = statistics.median(a / b for a, b in zip(times, reference, strict=True))
        result[name] = {"median_seconds": median, "iqr_seconds": high - low, "ratio": ratio}
    return result


def _call(model: nn.Module, sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return model(**sample)
    if isinstance(sample, tuple | list):
        return model(*sample)
    return model(sample)


def _batch_size(sample: Any) -> int:
    tensor = first_tensor(sample)
    if tensor is None or tensor.ndim == 0 or not len(tensor):
        raise InputError("the sample must hold a tensor with a non-empty batch axis")
    return len(tensor)


def _devices(model: nn.Module, sample: Any) -> set[torch.device]:
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    map_tensors(sample, lambda t: devices.add(t.device))
    return devices


def _synchroniser(models: Mapping[str, nn.Module], sample: Any) -> Callable[[], None]:
    devices = set().union(*(_devices(model, sample) for model in models.values()))
    waits = [(getattr(torch, d.type).synchronize, d) for d in devices if d.type in ("cuda", "xpu")]
    on_mps = any(d.type == "mps" for d in devices)

    def synchronise() -> None:
        for wait, device in waits:
            wait(device)
        if on_mps:
            torch.mps.synchronize()

    return synchronise


@contextmanager
def _undisturbed(model: nn.Module, sample: Any) -> Iterator[None]:
    """Evaluation mode without gradients; training flags, buffers and the random state are put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    owners = [(module, name, b) for module in model.modules() for name, b in module.named_buffers(recurse=False)]
    values = [b.detach().clone() for _, _, b in owners]
    gpus = sorted({d.index or 0 for d in _devices(model, sample) if d.type == "cuda"})
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=gpus):
            yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for (module, name, buffer), value in zip(owners, values, strict=True):
                buffer.copy_(value)
                module._buffers[name] = buffer  # a forward pass may have assigned a new tensor


@contextmanager
def _visible_kernels() -> Iterator[None]:
    """Only kernels that the counter knows: no fused attention, transformer-layer or recurrent ones."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # raised by the switch itself
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
