"""ONNX files in 8-bit integers by onnxruntime's own quantisation, checked in onnxruntime against the float model."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from limbeck.adapters.export import export_onnx
from limbeck.core.errors import InputError, MissingDependencyError, RunError
from limbeck.core.files import atomic_path

LEAST_AGREEMENT = 0.9
CALIBRATION_BATCH = 64


def export_onnx_int8(
    model: nn.Module,
    samples: Tensor,
    path: str | Path,
    *,
    calibrate: bool = True,
    check: Tensor | None = None,
    least_agreement: float = LEAST_AGREEMENT,
) -> Path:
    """Write a model as ONNX whose weights are int8, and check it.

    With calibration the file is static: convolutions and linear layers have int8 weights for each output channel and uint8 activations, in ranges that
    the samples showed. Without, it is dynamic: matrix products only, activations quantised as they come. The check runs the file in onnxruntime; one
    that answers otherwise than the float model too often is not left behind. The file's metadata say what was found.

    Args:
        model: from one tensor to logits.
        samples: inputs (N, ...), N >= 2: for calibration some hundred of training data, without it any.
        path: the file to write.
        calibrate: static rather than dynamic.
        check: inputs that are answered with both; None: ``samples``.
        least_agreement: share of ``check`` with the same answer.

    Raises:
        MissingDependencyError: onnx or onnxruntime is absent.
        InputError: fewer than two samples.
        RunError: nothing in the model can be quantised, it cannot be exported, or the file disagrees with it.
    """
    try:
        import onnx
        from onnxruntime.quantization import quantize_dynamic
    except ImportError:
        raise MissingDependencyError("onnx and onnxruntime", "export", "ONNX export") from None
    if len(samples) < 2:
        raise InputError("onnx-int8 needs two samples at least: give some inputs of the training data")
    samples = samples.detach().cpu()
    was_training = model.training
    target = Path(path)
    with tempfile.TemporaryDirectory() as folder, atomic_path(target) as temporary:
        full, prepared, written = (Path(folder) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        export_onnx(model, samples[:2], full)
        with _quiet():
            try:
                if calibrate:
                    _prepare(full, prepared)
                    _static(prepared, written, samples)
                else:
                    quantize_dynamic(full, written, op_types_to_quantize=["MatMul", "Gemm"])
            except Exception as error:
                raise RunError(
                    f"the model cannot be quantised for ONNX: {' '.join(str(error).split())[:200]}"
                ) from error
        graph = onnx.load(written)
        if not any(t.data_type == onnx.TensorProto.INT8 for t in graph.graph.initializer):
            how = "" if calibrate else " without calibration samples (convolutions need them)"
            raise RunError(f"{type(model).__name__} has no weights that onnxruntime quantises{how}")
        agreement, difference = _compare(model, written, samples if check is None else check.cpu())
        if agreement < least_agreement:
            raise RunError(
                f"the int8 file gives the float model's answer for {agreement:.1%} of {len(samples if check is None else check)} samples only "
                f"(wanted {least_agreement:.0%}): not kept; calibrate with more training data, or export onnx"
            )
        onnx.helper.set_model_props(
            graph,
            {
                "limbeck.quantisation": "static" if calibrate else "dynamic",
                "limbeck.agreement": f"{agreement:.4f}",
                "limbeck.relative_difference": f"{difference:.4f}",
            },
        )
        onnx.save(graph, temporary)
    model.train(was_training)
    return target


class _Reader:
    """Batches for onnxruntime's calibration."""

    def __init__(self, samples: Tensor) -> None:
        self.parts = iter(samples.split(CALIBRATION_BATCH))

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        part = next(self.parts, None)
        return None if part is None else {"input": part.numpy()}


def _prepare(full: Path, prepared: Path) -> None:
    """Shapes inferred and batch normalisations folded into convolutions, where onnxruntime can."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(full, prepared, skip_symbolic_shape=True)


def _static(prepared: Path, written: Path, samples: Tensor) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(_Reader, CalibrationDataReader):
        pass

    quantize_static(
        prepared,
        written,
        Reader(samples),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


@torch.no_grad()
def _compare(model: nn.Module, file: Path, inputs: Tensor) -> tuple[float, float]:
    """Share of equal answers, and the largest difference relative to the largest logit."""
    import onnxruntime

    from limbeck.core.batch import logits_of

    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    expected = logits_of(model(inputs.to(device))).cpu().numpy()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": inputs.numpy()})[0]
    agreement = float((found.argmax(-1) == expected.argmax(-1)).mean())
    return agreement, float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's tools advise preprocessing steps on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
