"""Which layers of two networks represent the data alike: a map of CKA between tapped layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.blocks.taps import Tap, Taps, unwrap
from limbeck.core.batch import Batch, call_model
from limbeck.core.data import as_data
from limbeck.core.errors import InputError
from limbeck.metrics.similarity import Kernel, MinibatchCKA

TapList = str | Tap | Sequence[str | Tap]


@dataclass(frozen=True)
class CKAMap:
    """CKA of every layer of one network with every layer of another.

    Attributes:
        values: float64 (teacher layers, student layers), see :meth:`limbeck.metrics.similarity.MinibatchCKA.compute`.
        teacher_layers, student_layers: the tapped layers, in order.
    """

    values: Tensor
    teacher_layers: tuple[str, ...]
    student_layers: tuple[str, ...]

    @property
    def diagonal(self) -> float:
        """Mean CKA of the layers at equal places, a number of at most 1.

        Raises:
            InputError: the networks have different numbers of layers here.
        """
        rows, columns = self.values.shape
        if rows != columns:
            raise InputError(f"a map of {rows} by {columns} layers has no diagonal: tap as many layers of each network")
        return float(self.values.diagonal().mean())


def cka_map(
    teacher: nn.Module,
    student: nn.Module,
    data: Any,
    teacher_taps: TapList | None = None,
    student_taps: TapList | None = None,
    *,
    batch_size: int = 64,
    kernel: Kernel = "linear",
) -> CKAMap:
    """CKA of all pairs of tapped layers of two networks, over mini-batches with the unbiased estimator.

    Networks of one family give a bright diagonal, networks of different families mostly do not: what one has in its middle the
    other may have nowhere, and a loss that pulls the two together layer by layer pulls wrongly.

    Both networks run in evaluation mode without gradients, and are left in the mode that they were in.

    Args:
        teacher, student: any two modules on the same inputs (the teacher gets ``teacher_inputs`` where a batch has them).
        data: tensors, a data set, a ``DataLoader`` or a task's part, see :func:`limbeck.core.data.as_data`.
        teacher_taps, student_taps: layers; None: the ``stage_paths`` that the network names.
        batch_size: samples per estimate, at least 4. A last batch of fewer than 4 samples is left out.
        kernel: ``"linear"`` or ``"rbf"``.

    Returns:
        the map, teacher by student.

    Raises:
        InputError: no layers are given and the network names none; fewer than 4 samples; a layer that gives several tensors;
            features that are not finite.
        UnknownNameError: no such layer, or no such kernel.

    Source: the diagnostic of "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation"
    (2023), with the estimator of "Do Wide and Deep Networks Learn the Same Things?" (2021).
    """
    read = as_data(data)
    if batch_size < 4 or len(read) < 4:
        raise InputError(f"CKA needs batches of at least 4 samples (batch_size is {batch_size}, samples {len(read)})")
    cka = MinibatchCKA(kernel)
    taps = (_taps_of("teacher", teacher, teacher_taps), _taps_of("student", student, student_taps))
    with ExitStack() as stack, torch.no_grad():
        for model in (teacher, student):
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
        teacher.eval()
        student.eval()
        for batch in read.batches(batch_size):
            if len(batch) >= 4:
                inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
                cka.update(_features(teacher, taps[0], inputs), _features(student, taps[1], batch.inputs))
    return CKAMap(cka.compute(), *(tuple(map(str, t.taps)) for t in taps))


def _taps_of(role: str, model: nn.Module, asked: TapList | None) -> Taps:
    found = getattr(unwrap(model), "stage_paths", None) if asked is None else asked
    if not found:
        raise InputError(
            f"which layers of the {role} to compare is not known: give {role}_taps=[…] (limbeck.list_taps shows them)"
        )
    return Taps(model, found)


def _features(model: nn.Module, taps: Taps, inputs: Any) -> list[Tensor]:
    parameter = next(model.parameters(), None)
    given = Batch(inputs) if parameter is None else Batch(inputs).to(parameter.device)
    with taps as features:
        call_model(model, given.inputs)
    found = [features[tap] for tap in taps.taps]
    several = [str(tap) for tap, feature in zip(taps.taps, found, strict=True) if not isinstance(feature, Tensor)]
    if several:
        raise InputError(f"layer '{several[0]}' gives several tensors; tap a single call (call=-1 for the last one)")
    return found
