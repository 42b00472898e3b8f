"""Where the files of graphs lie, and arrays out of ``.npz`` files, with a clear line where something is not what it should be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.errors import InputError


def data_folder(task: str, data_root: str | None, folder: str) -> Path:
    """The root that holds ``folder``: the one given, or ``$LIMBECK_DATA``.

    Raises:
        InputError: neither is.
    """
    root = data_root or os.environ.get("LIMBECK_DATA")
    if root is None:
        raise InputError(
            f"task '{task}' needs its data: give the folder that holds {folder}/ with --data-root or LIMBECK_DATA"
        )
    return Path(root).expanduser()


class ArrayFile(Mapping[str, NDArray[Any]]):
    """The arrays of an ``.npz`` file by name; nothing is unpickled.

    Args:
        path: the file.
        what: what it should be, for the message where it is not there.

    Raises:
        InputError: no such file, or no ``.npz`` of plain arrays; an array that is asked for is missing.
    """

    def __init__(self, path: Path, what: str = "a graph of your own is an .npz file") -> None:
        if not path.is_file():
            raise InputError(f"no file {path}: {what}")
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as file:
                self.held = {name: file[name] for name in file.files}
        except (ValueError, OSError, EOFError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"{path} is no .npz file of plain arrays ({type(error).__name__}: {reason})") from None

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.held:
            raise InputError(f"{self.path} has no array '{name}'; it holds {', '.join(sorted(self.held)) or 'nothing'}")
        return self.held[name]

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def __iter__(self) -> Any:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)

    def numbers(self, name: str, *, whole: bool = False) -> Tensor:
        """An array as int64 (``whole``) or float64.

        Raises:
            InputError: it is missing, or holds something else: text, or fractions and NaN where whole numbers belong.
        """
        values = self[name]
        fits = values.dtype.kind in "iufb"
        if not fits or (whole and not (np.isfinite(values) & (values == np.floor(values))).all()):
            raise InputError(f"array '{name}' of {self.path} must hold {'whole ' * whole}numbers")
        return torch.from_numpy(values.astype(np.int64 if whole else np.float64))
