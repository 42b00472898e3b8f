"""Export of students: ONNX (in floats or 8-bit integers) checked against the original in onnxruntime, or plain safetensors."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.core.artifacts import WEIGHTS, load
from limbeck.core.batch import logits_of
from limbeck.core.errors import InputError, MissingDependencyError, RunError
from limbeck.core.files import atomic_path

TOLERANCE = 1e-4


def export_artifact(
    folder: str | Path,
    to: Literal["onnx", "onnx-int8", "safetensors"],
    out: str | Path | None = None,
    samples: Tensor | None = None,
) -> Path:
    """Export the model of a run's or artifact's folder.

    Args:
        folder: a run's or an artifact's.
        to: the format.
        out: file to write; None: ``student.onnx``, ``student-int8.onnx`` or ``student.safetensors`` in the folder.
        samples: training inputs (N, ...) that calibrate ``onnx-int8``; None: only matrix products run in integers.

    Raises:
        RunError: no artifact there, or the exported file does not agree with the original.
        InputError: the artifact is no model, or does not say the shape of its input.
        MissingDependencyError: ONNX libraries are absent.
    """
    artifact = load(folder)
    if artifact.kind != "model":
        raise InputError(f"only models export to {to}; this artifact is a {artifact.kind}")
    names = {"onnx": "student.onnx", "onnx-int8": "student-int8.onnx", "safetensors": "student.safetensors"}
    target = Path(out) if out is not None else Path(folder) / names[to]
    if to == "safetensors":
        assert artifact.path is not None
        with atomic_path(target) as temporary:
            shutil.copyfile(artifact.path / WEIGHTS, temporary)
        return target
    shape = (artifact.description.get("network") or {}).get("in_shape")
    if shape is None:
        raise InputError(
            "the artifact does not say the shape of its input: use limbeck.adapters.export.export_onnx(model, sample, path)"
        )
    from limbeck.adapters.token_export import FromTokens, takes_tokens, token_sample

    model = artifact.content
    if takes_tokens(model):
        sample, model, samples = token_sample(model, shape[0]), FromTokens(model), None
    else:
        sample = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    if to == "onnx":
        return export_onnx(model, sample, target)
    from limbeck.adapters.onnx_int8 import export_onnx_int8

    return export_onnx_int8(model, sample if samples is None else samples, target, calibrate=samples is not None)


def export_onnx(model: nn.Module, sample: Tensor, path: str | Path, tolerance: float = TOLERANCE) -> Path:
    """Write a model as ONNX (inputs ``input`` (B, ...), outputs ``logits`` (B, C), B free), and check it.

    The check runs the file in onnxruntime on ``sample`` and on a batch of another size and compares the logits with the
    model's; a file that fails it is not left behind.

    Args:
        model: from one tensor to logits.
        sample: an input batch (B, ...), B >= 2.
        path: the file to write.
        tolerance: largest difference relative to the largest logit.

    Raises:
        MissingDependencyError: onnx or onnxruntime is absent.
        RunError: the model cannot be traced, or the file disagrees with it.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        raise MissingDependencyError("onnx and onnxruntime", "export", "ONNX export") from None
    was_training = model.training
    plain = _LogitsOnly(model).eval()
    target = Path(path)
    try:
        with torch.no_grad(), atomic_path(target) as temporary:
            try:
                with _quiet():
                    torch.onnx.export(
                        plain,
                        (sample,),
                        str(temporary),
                        input_names=["input"],
                        output_names=["logits"],
                        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
                        opset_version=18,
                        dynamo=False,
                    )
            except Exception as error:
                raise RunError(f"the model cannot be exported to ONNX: {' '.join(str(error).split())[:200]}") from error
            session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
            for batch in (sample, torch.cat([sample, sample.flip(0)])):
                expected = plain(batch).cpu().numpy()
                found = session.run(None, {"input": batch.cpu().numpy()})[0]
                worst = float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
                if not worst <= tolerance:
                    raise RunError(
                        f"the ONNX file disagrees with the model by {worst:.2g} (allowed {tolerance:g}): not kept"
                    )
    finally:
        model.train(was_training)
    return target


class _LogitsOnly(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> Tensor:
        return logits_of(self.model(input))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about its own plans; none of it is for the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
