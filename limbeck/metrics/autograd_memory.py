"""How much memory automatic differentiation holds: the bytes of tensors saved for backward passes."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor


class SavedTensorMeter:
    """Counts the bytes of distinct storages that graphs built inside the block keep alive.

    ::

        with SavedTensorMeter() as meter:
            loss = f(x)
            loss.backward()
        print(meter.peak)

    Each storage counts once, from the first graph node that saves it until the last one lets it go. What Python variables hold
    besides (parameters that are kept in a list, say) does not count. Exact on every device, unlike the resident set of a process.

    Attributes:
        live: bytes now.
        peak: the most there were.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self._holders: dict[int, int] = {}
        self._hooks: Any = None

    def __enter__(self) -> Self:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._holders:
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        self._holders[key] = self._holders.get(key, 0) + 1
        return _Held(tensor.detach(), self, key)  # autograd puts the history back; kept here, it would make cycles

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.live -= size


class _Held:
    """A saved tensor; when the graph drops it, the meter hears of it."""

    def __init__(self, tensor: Tensor, meter: SavedTensorMeter, key: int) -> None:
        self.tensor, self._meter, self._key = tensor, meter, key
        self._size = tensor.untyped_storage().nbytes()

    def __del__(self) -> None:
        self._meter._release(self._key, self._size)


def _unpack(held: _Held) -> Tensor:
    return held.tensor
