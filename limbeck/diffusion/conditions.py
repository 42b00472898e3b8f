"""Conditions: what a sample is asked to be. None, a tensor (B, ...), or a mapping of tensors (B, ...)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch, first_tensor, join, map_tensors
from limbeck.core.data import Data
from limbeck.core.errors import InputError

Condition = Tensor | Mapping[str, Tensor] | None


def take(cond: Condition, ids: Tensor) -> Any:
    """The rows ``ids`` (any shape is flattened) of a condition."""
    return map_tensors(cond, lambda value: value[ids.flatten().to(value.device)])


def rows(cond: Condition) -> int | None:
    """How many rows a condition has; None for no condition.

    Raises:
        InputError: the parts of a mapping have different numbers of rows.
    """
    if cond is None:
        return None
    if isinstance(cond, Tensor):
        return len(cond)
    sizes = {name: len(value) for name, value in cond.items()}
    if len(set(sizes.values())) != 1:
        raise InputError(f"the parts of a condition must have as many rows each (got {sizes})")
    return next(iter(sizes.values()))


def concat(first: Condition, second: Condition) -> Any:
    """Two conditions one after the other.

    Raises:
        InputError: they are not of the same kind.
    """
    return join(first, second)


def null_like(null: Condition, cond: Condition, count: int) -> Any:
    """The null condition for ``count`` rows, of the kind of ``cond``.

    Args:
        null: one row without a batch axis (a class id, an embedding), or a mapping of them. Parts of a mapping that it leaves out
            (sizes, say) are those of ``cond``.

    Raises:
        InputError: there is no null condition, or it does not fit.
    """
    if null is None:
        raise InputError("guidance needs a null condition (null_cond=…): what the network is given for 'no condition'")
    if isinstance(null, Tensor):
        if not isinstance(cond, Tensor):
            raise InputError("the null condition is a tensor, the condition is not: both must be of one kind")
        if null.shape != cond.shape[1:]:
            raise InputError(
                f"the null condition has shape {tuple(null.shape)}, a condition {tuple(cond.shape[1:])}: they must be equal"
            )
        return null.to(cond.device, cond.dtype).expand(count, *null.shape)
    if not isinstance(cond, Mapping):
        raise InputError("the null condition is a mapping, the condition is not: both must be of one kind")
    return {k: null_like(null[k], v, count) if k in null else v for k, v in cond.items()}


def drop(cond: Condition, null: Condition, probability: float, generator: torch.Generator | None = None) -> Any:
    """The condition with each row replaced by the null condition with a probability in [0, 1]."""
    count = rows(cond)
    if probability == 0 or count is None:
        return cond
    first = first_tensor(cond)
    assert first is not None
    where = "cpu" if generator is not None else first.device
    dropped = (torch.rand(count, generator=generator, device=where) < probability).to(first.device)
    blank = null_like(null, cond, count)

    def mixed(value: Tensor, other: Tensor) -> Tensor:
        return torch.where(dropped.reshape(-1, *(1,) * (value.ndim - 1)), other, value)

    if isinstance(cond, Tensor):
        return mixed(cond, blank)
    assert cond is not None
    return {k: mixed(v, blank[k]) for k, v in cond.items()}


class Conditions(Data):
    """A list of conditions: class labels, embedded prompts, or nothing but a number of unconditional draws.

    Args:
        values: (N, ...) tensor or mapping of them; None: unconditional.
        count: N, where ``values`` is None.
        names: one for each row, for pictures.

    Raises:
        InputError: none at all, or parts of different lengths.
    """

    def __init__(self, values: Condition = None, count: int | None = None, names: Sequence[str] = ()) -> None:
        found = rows(values)
        if found is None and count is None:
            raise InputError("conditions need values, or a count where nothing is conditional")
        self.values, self.count, self.names = values, int(count or 0) if found is None else found, list(names)
        if self.count < 1:
            raise InputError("the list of conditions is empty: it needs at least one")

    @classmethod
    def of(cls, value: Any, count: int = 1024) -> Conditions:
        """Conditions from what users have: conditions, a tensor, a mapping of tensors, None, or data with labels.

        Raises:
            InputError: nothing of the kind.
        """
        if isinstance(value, Conditions):
            return value
        if value is None:
            return cls(None, count)
        if isinstance(value, Tensor) or (
            isinstance(value, Mapping) and all(isinstance(v, Tensor) for v in value.values())
        ):
            return cls(value)
        if isinstance(value, Data):
            first = value.fetch(torch.arange(1), None)
            if isinstance(first.inputs, Mapping) and "cond" in first.inputs:
                found: Any = None
                for batch in value.batches():
                    found = batch.inputs["cond"] if found is None else concat(found, batch.inputs["cond"])
                return cls(found)
            return cls(None, len(value)) if first.labels is None else cls(value.labels_tensor())
        raise InputError(f"conditions are a tensor, a mapping of tensors, or None, not {type(value).__name__}")

    def __len__(self) -> int:
        return self.count

    @property
    def augmented(self) -> bool:
        return False

    def rows(self, ids: Tensor) -> Any:
        """The conditions with these ids."""
        return take(self.values, ids)

    def draw(self, count: int, generator: torch.Generator | None = None) -> Any:
        """``count`` conditions, drawn with replacement."""
        return self.rows(torch.randint(self.count, (count,), generator=generator))

    def spread(self, count: int) -> Any:
        """``count`` conditions that go round the list evenly: the first of each different class first, where they are classes."""
        return self.rows(self.spread_ids(count))

    def spread_ids(self, count: int) -> Tensor:
        """Their ids."""
        if isinstance(self.values, Tensor) and self.values.ndim == 1 and not self.values.is_floating_point():
            labels = self.values.cpu()
            order = torch.argsort(labels, stable=True)
            sizes = torch.unique_consecutive(labels[order], return_counts=True)[1]
            rank = torch.arange(len(labels)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
            ids = order[torch.argsort(rank, stable=True)]
        else:
            ids = torch.arange(self.count)
        return ids[torch.arange(count) % self.count]

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        inputs: dict[str, Any] = {"number": index.clone()}
        if self.values is not None:
            inputs["cond"] = self.rows(index)
        return Batch(inputs, index=index, view=view)
