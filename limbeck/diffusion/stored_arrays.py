"""Large tensors in memory, or in memory-mapped files of a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import RunError


def stored_array(folder: Path | None, name: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor to write into: zeros in memory, or the file ``NAME.npy`` in a folder, which keeps what was written before.

    Args:
        folder: made if needed; None: in memory.
        size: of the tensor.
        dtype: ``torch.float16`` or ``torch.float32``.

    Raises:
        RunError: the file is no array, or one of another size or kind.
    """
    if folder is None:
        return torch.zeros(size, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    path, kind = folder / f"{name}.npy", np.dtype(np.float16 if dtype == torch.float16 else np.float32)
    if not path.exists():
        return torch.from_numpy(np.lib.format.open_memmap(path, "w+", dtype=kind, shape=size))
    try:
        found = np.lib.format.open_memmap(path, "r+")
    except (ValueError, OSError) as error:
        raise RunError(f"{path} is not a stored array: {error}") from None
    if found.shape != size or found.dtype != kind:
        raise RunError(f"{path} holds {found.shape} of {found.dtype}, not {size} of {kind}: give another folder")
    return torch.from_numpy(found)
