"""Teacher outputs kept on disk, so that a frozen teacher looks at every sample once.

A row is named by (sample id, view); the file by the teacher's fingerprint, the tapped layers, the data's fingerprint and
the number format, so that a change of any of them starts a new file. Files are ordinary safetensors, laid out at full size
when created, filled in place through a memory map, and never loaded whole.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.core.data import Data
from limbeck.core.errors import InputError, RunError
from limbeck.core.files import explained, write_json

_NAMES = {np.dtype("float32"): "F32", np.dtype("float16"): "F16", np.dtype("uint8"): "U8"}
FILLED = "filled"


class OutputCache:
    """Rows of teacher outputs by sample id and view; what is missing is computed and kept.

    Args:
        folder: where files go; shared between runs.
        data: the data set whose ids name the rows.
        key: what else the outputs depend on (teacher fingerprint, taps).
        dtype: storage precision; float16 halves the size at about three digits of precision.

    Raises:
        InputError: the data's augmentation cannot be replayed, or its content cannot be named.
    """

    def __init__(
        self, folder: str | Path, data: Data, key: str, dtype: Literal["float32", "float16"] = "float32"
    ) -> None:
        if not data.replayable:
            raise InputError(
                "a teacher cache needs an augmentation that can be replayed: this data set draws its own random transforms; "
                "mark it replayable=True if items never change, or augment with a replayable augmentation"
            )
        mark = data.fingerprint()
        if mark is None:
            raise InputError("a teacher cache needs to know its data: give the data set a fingerprint()")
        self.folder = Path(folder) / f"{key[:24]}-{mark}-{dtype}"
        self.samples = len(data)
        self.dtype = np.dtype(dtype)
        self.hits = self.misses = 0
        self._open: dict[int, dict[str, np.memmap]] = {}

    def lookup(self, index: Tensor, view: int) -> tuple[dict[str, Tensor], Tensor]:
        """Rows that are there, and which those are.

        Returns:
            the stored tensors, each (B, ...), with arbitrary values in missing rows; and a mask (B,), True where present.
        """
        arrays = self._arrays(view)
        ids = index.cpu().numpy()
        if arrays is None:
            self.misses += len(ids)
            return {}, torch.zeros(len(ids), dtype=torch.bool)
        present = arrays[FILLED][ids] == 1
        self.hits += int(present.sum())
        self.misses += int((~present).sum())
        rows = {
            name: torch.from_numpy(np.ascontiguousarray(array[ids])).float()
            for name, array in arrays.items()
            if name != FILLED
        }
        return rows, torch.from_numpy(present)

    def store(self, index: Tensor, view: int, rows: Mapping[str, Tensor]) -> None:
        """Keep rows (B, ...); the mark that they are there is written last."""
        arrays = self._arrays(view) or self._create(view, rows)
        ids = index.cpu().numpy()
        for name, value in rows.items():
            arrays[name][ids] = value.detach().float().cpu().numpy().astype(self.dtype)
        arrays[FILLED][ids] = 1

    def _path(self, view: int) -> Path:
        return self.folder / f"view-{view}.safetensors"

    def _arrays(self, view: int) -> dict[str, np.memmap] | None:
        if view not in self._open:
            path = self._path(view)
            if not path.exists():
                return None
            self._open[view] = _map(path, self.samples)
        return self._open[view]

    def _create(self, view: int, rows: Mapping[str, Tensor]) -> dict[str, np.memmap]:
        shapes = {name: (self.samples, *value.shape[1:]) for name, value in rows.items()}
        path = self._path(view)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            _lay_out(temporary, shapes, self.dtype)
            os.replace(temporary, path)
            if not (self.folder / "about.json").exists():
                write_json(self.folder / "about.json", {"samples": self.samples, "tensors": list(shapes)})
        return self._arrays(view) or {}


def _lay_out(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> None:
    """An empty safetensors file of the final size (sparse where the file system can)."""
    header: dict[str, object] = {}
    end = 0
    entries = {
        **{n: (s, dtype) for n, s in shapes.items()},
        FILLED: ((next(iter(shapes.values()))[0],), np.dtype("uint8")),
    }
    for name, (shape, kind) in entries.items():
        size = int(np.prod(shape)) * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _map(path: Path, samples: int) -> dict[str, np.memmap]:
    kinds = {v: k for k, v in _NAMES.items()}
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        arrays = {
            name: np.memmap(  # type: ignore[call-overload]
                path, kinds[entry["dtype"]], "r+", 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (struct.error, ValueError, KeyError, OSError) as error:
        raise RunError(f"the teacher cache {path} is damaged ({error}): delete it, it will be made anew") from error
    if arrays[FILLED].shape != (samples,):
        raise RunError(f"the teacher cache {path} is for {arrays[FILLED].shape[0]} samples, not {samples}: delete it")
    return arrays
