"""Checkpoints: one file, written aside and renamed, loaded without unpickling objects."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from limbeck.core.errors import RunError
from limbeck.core.files import atomic_path

CHECKPOINT = "checkpoint.pt"
"""What the file is called in a run's folder."""
FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain containers; a crash at any moment leaves the previous checkpoint in place.

    Raises:
        RunError: no space, or the folder cannot be written.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        writer = _Writer(file)
        try:
            torch.save({"format": FORMAT, **state}, cast(IO[bytes], writer))
        except RuntimeError:
            if writer.refused is not None:  # torch hides the system's refusal behind an error of its own
                raise writer.refused from None
            raise


class _Writer:
    """A file for ``torch.save`` that remembers why the system refused to write."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.refused: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.refused = error
            raise

    def flush(self) -> None:
        self._file.flush()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``: a file from somebody else cannot run code.

    Raises:
        RunError: damaged, or of a newer format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:
        raise RunError(f"{path} is not a checkpoint or is damaged: remove it to start the run anew") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RunError(f"{path} has another checkpoint format than this version writes ({FORMAT}): start the run anew")
    return state
