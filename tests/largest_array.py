"""Counts memory by what operations make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestArray(TorchDispatchMode):
    """Notes the storage of the largest tensor that any operation inside the block gives; of sparse ones that of their entries.

    Attributes:
        entries: its size in elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor):
                held = made if made.layout == torch.strided else made._values() if made.is_sparse else None
                size = made._nnz() if held is None else held.untyped_storage().nbytes() // max(1, held.element_size())
                self.entries = max(self.entries, size)
        return out
