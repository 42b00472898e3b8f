"""Prepared banks on disk: safetensors for what they hold, JSON for the rest. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from limbeck.blocks.inverse_convolution import Bank, DenseBank, LocalBank
from limbeck.core.errors import RunError
from limbeck.core.files import atomic_path, read_json, write_json

TENSORS, ABOUT = "transform.safetensors", "transform.json"


def save_banks(folder: Path, banks: Mapping[str, Bank | None], about: Mapping[str, Any]) -> None:
    """Write banks by name, and whatever JSON can hold about them.

    Raises:
        RunError: they cannot be written.
    """
    parts: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    for name, bank in banks.items():
        if bank is None:
            continue
        parts |= {f"{name}.{part}": value.cpu().contiguous() for part, value in bank.tensors().items()}
        shapes[name] = (
            {"size": bank.size}
            if isinstance(bank, DenseBank)
            else {"k": bank.k, "skip_copies": bank.skip_copies, "bank_rows": bank.bank_rows}
        )
    with atomic_path(folder / TENSORS) as path:
        save_file(parts, path)
    write_json(folder / ABOUT, {**about, "banks": shapes})


def load_banks(folder: Path) -> tuple[dict[str, Bank], dict[str, Any]]:
    """What :func:`save_banks` wrote.

    Raises:
        RunError: nothing there, or damaged.
    """
    about = read_json(folder / ABOUT)
    try:
        parts = load_file(folder / TENSORS)
        banks: dict[str, Bank] = {
            name: LocalBank(parts[f"{name}.rows"], **shape)
            if "k" in shape
            else DenseBank(parts[f"{name}.second"], parts[f"{name}.mean"], shape["size"])
            for name, shape in about.pop("banks").items()
        }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise RunError(f"the transform in {folder} is damaged or incomplete: save it again") from None
    return banks, about
