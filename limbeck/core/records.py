"""What a run writes while it goes: one JSON line per logged step, and any tracker Accelerate knows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from limbeck.core.files import explained


class Records:
    """The metrics of a run, in memory and (with a path) as JSON lines.

    A line is ``{"stage", "step", "split", <name>: <number>, …}``. On resuming, :meth:`rewind` cuts the file back to where
    the checkpoint was made, so that no step is recorded twice.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        if path is not None:
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "ab")  # noqa: SIM115 - stays open for the run; close() ends it

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        if self._file is not None:
            assert self.path is not None
            with explained(self.path):
                self._file.write(json.dumps(row, allow_nan=True).encode() + b"\n")
                self._file.flush()

    @property
    def offset(self) -> int:
        return 0 if self._file is None else self._file.tell()

    def rewind(self, offset: int) -> None:
        """Forget everything written after ``offset`` bytes."""
        if self.path is None or self._file is None:
            return
        self._file.truncate(offset)
        self._file.seek(offset)
        self.rows = list(read_rows(self.path))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
