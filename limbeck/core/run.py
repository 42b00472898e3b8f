"""A run's folder: what was asked, what happened, what came out."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import limbeck
from limbeck.core.errors import RunError
from limbeck.core.files import explained, read_json, write_json
from limbeck.core.method import Method
from limbeck.core.records import read_rows

CONFIG = "config.json"
RESULT = "result.json"
ARTIFACT = "artifact"


@dataclass
class Run:
    """One execution of a method.

    Attributes:
        method: the trained method (its student, heads, teachers).
        result: measures on test data, cost, and what else the family reports.
        rows: the metric rows, as in ``metrics.jsonl``.
        path: the run's folder, or None if it was kept in memory.
    """

    method: Method
    result: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None

    def measures(self, who: str = "student") -> dict[str, Any]:
        """The row of measures of one contestant.

        Raises:
            RunError: no such row.
        """
        for row in self.result.get("rows", []):
            if row["who"] == who:
                return dict(row)
        raise RunError(f"the result has no row '{who}'")


@dataclass(frozen=True)
class RunFolder:
    """Access to a run's files."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """What was asked: method, setup, hyper-parameters, seed, versions."""
        if not (self.path / CONFIG).exists():
            raise RunError(f"{self.path} is not a run: it has no {CONFIG}")
        found = read_json(self.path / CONFIG)
        return dict(found)

    @property
    def result(self) -> dict[str, Any] | None:
        """What came out, or None while the run has not ended."""
        return dict(read_json(self.path / RESULT)) if (self.path / RESULT).exists() else None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(read_rows(self.path / "metrics.jsonl"))

    def begin(self, config: dict[str, Any]) -> None:
        """Create the folder and write what is asked.

        Raises:
            RunError: the folder holds a run already, or cannot be written.
        """
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / CONFIG).exists():
            raise RunError(
                f"{self.path} holds a run already: continue it with 'limbeck resume {self.path}', or choose another --out"
            )
        write_json(self.path / CONFIG, {**config, "environment": environment()})

    def finish(self, result: dict[str, Any]) -> None:
        write_json(self.path / RESULT, result)


def environment() -> dict[str, Any]:
    """Versions and machine: what one needs to know to reproduce a run."""
    libraries = {}
    for name in ("torch", "accelerate", "transformers", "datasets", "scikit-learn", "numpy"):
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            libraries[name] = "absent"
    return {
        "limbeck": limbeck.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "device": torch.cuda.get_device_name(0)
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "libraries": libraries,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
