"""What one step sees, and what it returns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import InputError


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply ``function`` to every tensor in nested tuples, lists and mappings; leave the rest as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, function) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(v, function) for v in value)
    return value


def join(first: Any, second: Any) -> Any:
    """Two nested values of the same structure, their tensors concatenated along the first axis.

    Raises:
        InputError: their structures differ.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return {k: join(v, second[k]) for k, v in first.items()}
    if isinstance(first, tuple | list) and type(first) is type(second) and len(first) == len(second):
        joined = [join(a, b) for a, b in zip(first, second, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    if first is None and second is None:
        return None
    raise InputError(
        f"inputs of different structure cannot be joined: {type(first).__name__} and {type(second).__name__}"
    )


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in nested containers, or None."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            found = first_tensor(item)
            if found is not None:
                return found
    return None


@dataclass(frozen=True)
class Batch:
    """One batch as every method sees it.

    Attributes:
        inputs: what the student takes: a tensor (B, ...), a tuple (positional arguments) or a mapping (keyword arguments).
        labels: (B,) class indices, (B, C) soft labels, or None where there are none.
        index: (B,) int64 ids of the samples in their data set. With ``view`` they name an input exactly, which is what a
            teacher cache needs.
        view: which augmentation view the inputs show; None means: as stored, without augmentation.
        teacher_inputs: what the teacher takes, if it differs from ``inputs`` (own size, own normalisation).
        unlabelled: batches of inputs without labels that come along, for semi-supervised methods; their sizes may differ from
            that of ``inputs``.
    """

    inputs: Any
    labels: Tensor | None = None
    index: Tensor | None = None
    view: int | None = None
    teacher_inputs: Any = None
    unlabelled: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, value: Any) -> Batch:
        """A batch from what data loaders give: a ``Batch``, ``(x, y)``, ``x`` alone, or a mapping with ``labels``/``label``.

        Raises:
            InputError: none of these.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Tensor):
            return cls(value)
        if isinstance(value, Mapping):
            rest = dict(value)
            labels = rest.pop("labels", rest.pop("label", None))
            index = rest.pop("index", None)
            view = rest.pop("view", None)
            teacher_inputs = rest.pop("teacher_inputs", None)
            unlabelled = rest.pop("unlabelled", None)
            inputs = rest.pop("inputs", None) if set(rest) == {"inputs"} else rest
            return cls(inputs, labels, index, view, teacher_inputs, unlabelled)
        if isinstance(value, tuple | list) and len(value) == 2:
            return cls(value[0], value[1])
        raise InputError(f"a batch is a Batch, (inputs, labels), a tensor or a mapping, not {type(value).__name__}")

    def __len__(self) -> int:
        tensor = first_tensor(self.inputs)
        if tensor is None:
            raise InputError("a batch holds no tensor")
        return tensor.shape[0]

    def map(self, function: Callable[[Tensor], Any]) -> Batch:
        return Batch(
            map_tensors(self.inputs, function),
            map_tensors(self.labels, function),
            map_tensors(self.index, function),
            self.view,
            map_tensors(self.teacher_inputs, function),
            map_tensors(self.unlabelled, function),
        )

    def to(self, device: torch.device | str) -> Batch:
        return self.map(lambda t: t.to(device, non_blocking=True))

    def chunks(self, k: int) -> list[Batch]:
        """``k`` micro-batches of (almost) equal size, in order."""
        if k == 1:
            return [self]
        bounds = [round(i * len(self) / k) for i in range(k + 1)]
        return [self._rows(a, b) for a, b in itertools.pairwise(bounds) if b > a]

    def _rows(self, start: int, end: int) -> Batch:
        size = len(self)
        part = replace(self, unlabelled=None).map(lambda t: t[start:end])
        if self.unlabelled is None:
            return part
        # Unlabelled batches have sizes of their own and are divided in the same proportion.
        others = map_tensors(self.unlabelled, lambda t: t[round(start * len(t) / size) : round(end * len(t) / size)])
        return part.with_unlabelled(others)

    def with_inputs(self, inputs: Any) -> Batch:
        return replace(self, inputs=inputs)

    def with_unlabelled(self, unlabelled: tuple[Any, ...]) -> Batch:
        return replace(self, unlabelled=unlabelled)


class Losses(Mapping[str, Tensor]):
    """The named terms of a loss; the total is their weighted sum.

    ``Losses(ce=ce, kd=(0.9, kl))``: a value alone has weight 1. Weighted terms keep their unweighted value for the log.
    ``observed`` are numbers worth logging that are no part of the loss.

    As a mapping it gives the unweighted terms.
    """

    def __init__(self, **terms: Tensor | tuple[float | Tensor, Tensor]) -> None:
        self.terms: dict[str, Tensor] = {}
        self.weights: dict[str, float | Tensor] = {}
        self.observed: dict[str, Tensor] = {}
        for name, term in terms.items():
            if isinstance(term, tuple):
                self.add(name, term[1], term[0])
            else:
                self.add(name, term)

    def add(self, name: str, value: Tensor, weight: float | Tensor = 1.0) -> Losses:
        if value.ndim != 0:
            raise InputError(f"loss term '{name}' has shape {tuple(value.shape)}; a term is a scalar: reduce it first")
        self.terms[name] = value
        self.weights[name] = weight
        return self

    def observe(self, **values: Tensor | float) -> Losses:
        """Numbers for the log that no gradient comes from."""
        for name, value in values.items():
            self.observed[name] = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        return self

    @property
    def total(self) -> Tensor:
        """The weighted sum, a scalar. A weight of 0 removes the term (0 times infinity is not NaN here)."""
        parts = [
            value if isinstance(weight, float) and weight == 1.0 else weight * value
            for value, weight in zip(self.terms.values(), self.weights.values(), strict=True)
            if not (isinstance(weight, float | int) and weight == 0)
        ]
        if not parts:
            return torch.zeros((), requires_grad=True)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def scaled(self, factors: Mapping[str, float]) -> Losses:
        """The same terms with every weight multiplied by ``factors[name]`` (for accumulation over micro-batches)."""
        out = Losses()
        for name, value in self.terms.items():
            out.add(name, value, self.weights[name] * factors[name])
        out.observed = self.observed
        return out

    def logged(self) -> dict[str, Tensor]:
        """Every detached term and observed number; ``loss`` is the total."""
        return {"loss": self.total.detach(), **{k: v.detach() for k, v in self.terms.items()}, **self.observed}

    def __getitem__(self, name: str) -> Tensor:
        return self.terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v.item():.4g}" for k, v in self.terms.items())
        return f"Losses({inside})"


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, ``.logits``, ``["logits"]``, or the first element of a tuple.

    Raises:
        InputError: none of these.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise InputError(
            f"no logits in a model's output of type {type(output).__name__}: return a tensor, a tuple, or '.logits'"
        )
    return logits


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model with inputs as a tensor, a tuple (positional) or a mapping (keywords)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)
