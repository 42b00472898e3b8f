"""Inputs that show a network's usual range of activations, from the training data of the run that made it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.core.files import read_json
from limbeck.tasks.base import TaskConfig, load_task

SAMPLES = 256


def calibration_inputs(folder: str | Path, samples: int = SAMPLES) -> Tensor | None:
    """Training inputs (N, ...), as the student got them, without augmentation.

    Args:
        folder: of a run by name.
        samples: at most so many.

    Returns:
        None where the folder does not say which task it was, or the data is no longer there.
    """
    file = Path(folder).expanduser() / "config.json"
    if not file.exists():
        return None
    setup = read_json(file).get("setup") or {}
    known = {key: value for key, value in setup.items() if key in TaskConfig.model_fields}
    if not known:
        return None
    try:
        train = load_task(TaskConfig.make(**known)).train
    except LimbeckError:
        return None
    inputs = train.fetch(torch.arange(min(samples, len(train))), None).inputs
    return inputs if isinstance(inputs, Tensor) else None
