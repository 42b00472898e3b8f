"""Execution in 8-bit integers by torch's own quantisation (``torch.ao.quantization``), on CPUs.

Networks that ``torch.fx`` can trace run statically: weights are int8 for each output channel, activations uint8 with ranges that calibration samples
show. Others keep float activations between layers, and their linear layers run dynamically: int8 weights, activations quantised as they come.
Beside the network that runs in integers stands its simulation, the same scheme computed in floats, to compare with.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import logits_of
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.metrics.cost import measure_latency

Kind = Literal["auto", "static", "dynamic"]
ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")
CALIBRATION_BATCH = 64


@dataclass
class Int8Network:
    """A network in 8-bit integers.

    Attributes:
        network: runs in integers, from inputs to logits, in evaluation mode.
        simulated: the same scheme in floats.
        kind: ``static`` or ``dynamic``.
        engine: whose kernels run.
    """

    network: nn.Module
    simulated: nn.Module
    kind: str
    engine: str


def to_int8(
    model: nn.Module, samples: Tensor | None = None, *, kind: Kind = "auto", engine: str | None = None, bits: int = 8
) -> Int8Network:
    """A copy of a network that runs in 8-bit integers on the CPU.

    Args:
        model: a plain float network (no quantisers left on it).
        samples: calibration inputs (N, ...), for static quantisation; some hundred of training data.
        kind: ``auto`` is static where there are samples and the network can be traced, else dynamic.
        engine: ``x86``, ``fbgemm``, ``onednn`` or ``qnnpack``; None: the first of them that this build of torch has.
        bits: of the weights; the engines have kernels for 8 only.

    Raises:
        InputError: another bit width, no samples for ``static``, nothing in the network that runs in integers.
        UnknownNameError: an engine that this build of torch does not have.
    """
    supported = [name for name in ENGINES if name in torch.backends.quantized.supported_engines]
    if not supported:
        raise InputError("this build of torch has no engine for 8-bit integers")
    engine = supported[0] if engine is None else engine
    if engine not in supported:
        raise UnknownNameError("engine", engine, supported, hint=f"This build of torch has {', '.join(supported)}.")
    if bits != 8:
        raise InputError(
            f"the {engine} engine has kernels for 8-bit weights, not for {bits}-bit ones: the stored form keeps {bits} bits, execution takes bits=8"
        )
    if kind == "static" and samples is None:
        raise InputError("static quantisation needs calibration samples: give some inputs, or kind='dynamic'")
    plain = copy.deepcopy(model).cpu().eval()
    with _quiet(), torch.no_grad(), _using(engine):
        made = None
        if kind != "dynamic" and samples is not None:
            made = _static(plain, samples.cpu(), engine, must=kind == "static")
        network, simulated = _dynamic(plain) if made is None else made
    return Int8Network(
        _OnEngine(network, engine), simulated.eval(), "static" if made is not None else "dynamic", engine
    )


@torch.no_grad()
def compare_int8(
    model: nn.Module, made: Int8Network, inputs: Tensor, *, batch_size: int = 64, repeats: int = 30
) -> dict[str, float]:
    """How an integer network stands to its simulation and to the float network.

    Args:
        model: the float network.
        made: of :func:`to_int8`.
        inputs: (N, ...), other than those it was calibrated on.
        batch_size: inputs of a timed pass.
        repeats: timed passes.

    Returns:
        ``agreement_simulated`` and ``agreement_float``: shares of inputs with the same answer; ``difference_simulated``: largest difference of a logit
        relative to the largest logit; ``latency_ratio``: time of a pass over the float network's, below 1 is faster; ``bytes``: of its state on disk.
    """
    plain = copy.deepcopy(model).cpu().eval()
    inputs = inputs.cpu()
    said, simulated, full = (logits_of(m(inputs)) for m in (made.network, made.simulated, plain))
    speed = measure_latency({"float": plain, "int8": made.network}, inputs[:batch_size], repeats)
    return {
        "agreement_simulated": float((said.argmax(-1) == simulated.argmax(-1)).double().mean()),
        "agreement_float": float((said.argmax(-1) == full.argmax(-1)).double().mean()),
        "difference_simulated": float((said - simulated).abs().max() / simulated.abs().max().clamp_min(1e-12)),
        "latency_ratio": speed["int8"]["ratio"],
        "latency": speed["int8"]["median_seconds"],
        "bytes": float(_bytes(made.network)),
    }


def _static(model: nn.Module, samples: Tensor, engine: str, must: bool) -> tuple[nn.Module, nn.Module] | None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

    try:
        prepared = prepare_fx(model, get_default_qconfig_mapping(engine), example_inputs=(samples[:1],))
        for part in samples.split(CALIBRATION_BATCH):
            prepared(part)
        simulated = convert_to_reference_fx(copy.deepcopy(prepared))
        network = convert_fx(prepared)
        network(samples[:2])
    except Exception as error:  # whatever a foreign forward does under tracing
        if must:
            raise InputError(
                f"{type(model).__name__} cannot run statically in integers ({' '.join(str(error).split())[:150]}): kind='dynamic' takes its linear layers"
            ) from None
        return None
    return network, simulated


def _dynamic(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    from torch.ao.quantization import quantize_dynamic

    if not any(isinstance(m, nn.Linear) for m in model.modules()):
        raise InputError(
            f"{type(model).__name__} has no layer that runs dynamically in integers; convolutions need calibration samples and a network that "
            "torch.fx can trace"
        )
    network = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    simulated = copy.deepcopy(model)
    for name, module in network.named_modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            parent, _, child = name.rpartition(".")
            setattr(simulated.get_submodule(parent), child, _SimulatedLinear(module))
    return network, simulated


class _SimulatedLinear(nn.Module):
    """A dynamically quantised linear layer in floats: the inputs' range of each call is cut into 7 bits, as the kernels do."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight().dequantize(), layer.bias()

    def forward(self, x: Tensor) -> Tensor:
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        steps = 127 if torch.backends.quantized.engine in ("x86", "fbgemm", "onednn") else 255
        scale = ((high - low) / steps).clamp_min(torch.finfo(torch.float32).eps)
        zero = (-low / scale).round().clamp(0, steps)
        levels = (x / scale + zero).round().clamp(0, steps)
        return nn.functional.linear((levels - zero) * scale, self.weight, self.bias)


class _OnEngine(nn.Module):
    """Runs with the engine that its weights were packed for, whichever is set."""

    def __init__(self, network: nn.Module, engine: str) -> None:
        super().__init__()
        self.network, self.engine = network, engine

    def forward(self, *inputs: Any) -> Any:
        with _using(self.engine):
            return self.network(*inputs)


@contextlib.contextmanager
def _using(engine: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The module is deprecated in favour of a package outside torch, and says so at every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _bytes(network: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.tell()
