"""Frozen teachers: one or several, asked once per batch, with tapped features and an optional cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.blocks.cache import OutputCache
from limbeck.blocks.taps import Tap, Taps
from limbeck.core.batch import Batch, call_model, first_tensor, logits_of
from limbeck.core.errors import InputError
from limbeck.core.method import fingerprint, freeze


@dataclass(frozen=True)
class TeacherOutput:
    """What the teachers say about a batch; no tensor carries a graph.

    Attributes:
        each: logits of every teacher, (M, B, C).
        features: tapped features of the first teacher by tap path (of further ones as ``"1:path"`` …).
    """

    each: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def logits(self) -> Tensor:
        """(B, C): the mean of the teachers' logits; for one teacher, its logits."""
        return self.each[0] if len(self.each) == 1 else self.each.mean(0)

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """(B, C): the mean of the teachers' softened probabilities."""
        soft = torch.softmax(self.each / temperature, -1)
        return soft[0] if len(soft) == 1 else soft.mean(0)


class Teachers(nn.Module):
    """One or several frozen teachers.

    Args:
        models: modules or callables from inputs to logits (see :func:`limbeck.core.batch.logits_of`). Modules are frozen in
            place: evaluation mode, no gradients.
        taps: layers whose outputs are wanted besides the logits; the same for every teacher.
        transforms: for each teacher a function of the inputs (own size, own normalisation), or None.

    Raises:
        InputError: no teacher, or as many transforms as there are not teachers.
    """

    def __init__(
        self,
        models: nn.Module | Callable[..., Any] | Sequence[nn.Module | Callable[..., Any]],
        taps: Sequence[str | Tap] = (),
        transforms: Sequence[Callable[[Any], Any] | None] | None = None,
    ) -> None:
        super().__init__()
        listed: list[Any] = list(models) if isinstance(models, Sequence | nn.ModuleList) else [models]
        if not listed:
            raise InputError("at least one teacher is needed")
        if transforms is not None and len(transforms) != len(listed):
            raise InputError(
                f"{len(listed)} teachers but {len(transforms)} transforms: give one for each (None for none)"
            )
        self.models = nn.ModuleList(freeze(m if isinstance(m, nn.Module) else _Callable(m)) for m in listed)
        self.transforms = list(transforms or [None] * len(listed))
        self.taps = list(taps)
        self._taps = [Taps(m, self.taps) for m in self.models] if self.taps else []
        self.cache: OutputCache | None = None
        self.forwards = 0
        """Samples that went through a teacher so far, counted for each teacher."""

    def __len__(self) -> int:
        return len(self.models)

    def key(self) -> str:
        """What the outputs depend on besides the data: all weights and taps (hex)."""
        digest = hashlib.sha256(repr([str(t) for t in self.taps]).encode())
        for model in self.models:
            digest.update(f"{type(model).__name__}:{fingerprint(model)}".encode())
        return digest.hexdigest()

    def train(self, mode: bool = True) -> Teachers:
        """Teachers stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> TeacherOutput:
        """Ask every teacher about the batch (its ``teacher_inputs`` if it has them).

        Raises:
            InputError: teachers that differ in their number of classes.
        """
        if self.cache is None or batch.index is None:
            return self._ask(batch)
        view = batch.view or 0
        rows, present = self.cache.lookup(batch.index, view)
        if not bool(present.all()):
            missing = ~present
            asked = self._ask(batch.map(lambda t: t[missing.to(t.device)]))
            fresh = {"logits": asked.each.transpose(0, 1), **{f"tap:{k}": v for k, v in asked.features.items()}}
            self.cache.store(batch.index[missing.to(batch.index.device)], view, fresh)
            rows, _ = self.cache.lookup(batch.index, view)
        tensor = first_tensor(batch.inputs)
        device = torch.device("cpu") if tensor is None else tensor.device
        each = rows.pop("logits").transpose(0, 1).to(device)
        return TeacherOutput(each, {k.removeprefix("tap:"): v.to(device) for k, v in rows.items()})

    def _ask(self, batch: Batch) -> TeacherOutput:
        inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
        each: list[Tensor] = []
        features: dict[str, Tensor] = {}
        for number, (model, transform) in enumerate(zip(self.models, self.transforms, strict=True)):
            given = inputs if transform is None else transform(inputs)
            if self._taps:
                with self._taps[number] as tapped:
                    output = call_model(model, given)
                features.update({path if number == 0 else f"{number}:{path}": tapped[path] for path in tapped})
            else:
                output = call_model(model, given)
            each.append(logits_of(output))
        self.forwards += len(each) * len(each[0])
        if any(z.shape != each[0].shape for z in each):
            raise InputError(f"teachers disagree about the number of classes: {[z.shape[-1] for z in each]}")
        return TeacherOutput(torch.stack(each), features)


class _Callable(nn.Module):
    """A plain function as a module, so that everything that holds teachers holds modules."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
