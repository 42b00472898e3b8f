"""What is said of quantised networks beside :func:`limbeck.tasks.judging.judge_classifiers`: a row in 8-bit integers, weights and levels in pictures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.adapters.int8 import compare_int8, to_int8
from limbeck.blocks.quantizers import QuantisedTensor, scaled, to_buckets
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.metrics.classification import classification_metrics
from limbeck.report.weight_histograms import level_histograms_png
from limbeck.tasks.teachers import predictions

COMPARED = 256
"""Test samples on which the integer network is compared with its simulation."""


def judge_int8(model: nn.Module, samples: Tensor | None, test: Data, who: str = "student in int8") -> dict[str, Any]:
    """Run a classifier in 8-bit integers by torch's own kernels, and measure it.

    Args:
        model: plain, in floats.
        samples: calibration inputs, of training data; None: linear layers only, dynamically.
        test: with labels and tensors as inputs.
        who: name of the row.

    Returns:
        ``rows``: one, with quality, size on disk and latency against the float model; and what :func:`~limbeck.adapters.int8.compare_int8` says of
        how it agrees with its simulation and the float model. Nothing, with a warning, where the model cannot run in integers.
    """
    inputs = test.fetch(torch.arange(min(COMPARED, len(test))), None).inputs
    try:
        if not isinstance(inputs, Tensor):
            raise InputError("inputs that are not one tensor are not supported")
        made = to_int8(model, samples)
    except InputError as error:
        warnings.warn(f"not measured in 8-bit integers: {error}", stacklevel=3)
        return {"rows": []}
    found = compare_int8(model, made, inputs)
    logits, labels = predictions(made.network, test)
    row = {"who": who, **classification_metrics(logits, labels, logits.shape[-1]), "stored_bytes": found["bytes"]}
    row.update({key: found[key] for key in ("bytes", "latency", "latency_ratio")})
    return {
        "rows": [row],
        "int8_scheme": f"{made.kind}, {made.engine}",
        "int8_agreement": found["agreement_simulated"],
        "int8_difference": found["difference_simulated"],
        "int8_agreement_float": found["agreement_float"],
        "int8_latency_ratio": found["latency_ratio"],
    }


def picture_levels(tensors: Mapping[str, QuantisedTensor], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """``title``, ``caption`` and ``png`` of the histograms of weights with the levels that they are rounded to.

    Args:
        tensors: as they are stored, by name.
        weights: the same in full precision.
    """
    shown = {}
    for name, tensor in tensors.items():
        values = scaled(to_buckets(weights[name].detach().float(), tensor.bucket))[0].reshape(-1)
        shown[name] = (values[: len(tensor.codes)].cpu().numpy(), tensor.levels.cpu().numpy())
    return {
        "title": "Weights and their levels",
        "caption": "Distribution of the weights before rounding, scaled within their buckets; the levels are red.",
        "png": level_histograms_png(shown),
    }
