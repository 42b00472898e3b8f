"""Runs, scoreboards and comparisons by hand, for the tests of the reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.catalogue import Card

SETUP = {
    "task": "digits",
    "data": None,
    "data_root": None,
    "train_size": None,
    "label_noise": 0.1,
    "image_size": None,
    "augment": False,
    "split_seed": 0,
    "student": None,
    "teacher": ["cnn-w16-s3"],
    "teacher_epochs": None,
    "cache_teacher": False,
}


def student_row(**changes: Any) -> dict[str, Any]:
    return {
        "who": "student", "accuracy": 0.962, "top5": 0.998, "nll": 0.121, "brier": 0.0603, "ece": 0.0212,
        "adaptive_ece": 0.0198, "macro_f1": 0.9618, "parameters": 2100, "bytes": 8600, "flops": 60000.0,
        "latency": 0.0008, "latency_ratio": 1.0, **changes,
    }  # fmt: skip


def teacher_row(**changes: Any) -> dict[str, Any]:
    return student_row(
        who="teacher", accuracy=0.984, nll=0.07, parameters=115500, bytes=462000, flops=3.1e6, latency=0.0042,
        latency_ratio=5.25, **changes,
    )  # fmt: skip


def metric_rows(stage: str = "distillation", count: int = 12) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for n in range(1, count + 1):
        ce = 2.3 * math.exp(-n / 4)
        rows.append(
            {"stage": stage, "step": 20 * n, "split": "train", "epoch": n / 2, "loss": 3 * ce, "ce": ce, "lr": 1e-3 / n}
        )
        if n % 3 == 0:
            rows.append({"stage": stage, "step": 20 * n, "split": "val", "accuracy": 1 - ce / 3, "nll": ce})
    return rows


def result(classes: int = 10, **changes: Any) -> dict[str, Any]:
    matrix = np.eye(classes, dtype=int) * 45
    matrix[1, 0] = 5
    return {
        "cost": {
            "stages": {"distillation": {"seconds": 12.5, "steps": 240}},
            "seconds": 12.5,
            "peak_memory_bytes": 503463936,
            "teacher_forwards": 9664,
        },
        "rows": [student_row(), teacher_row()],
        "agreement": {"top1_agreement": 0.97, "kl": 0.11},
        "confusion": {
            "labels": [f"<b>{n}</b>" if n == 1 else str(n) for n in range(classes)],
            "matrix": matrix.tolist(),
        },
        **changes,
    }


def run_folder(
    path: Path,
    found: dict[str, Any] | None = None,
    rows: list[dict[str, Any]] | None = None,
    **changes: Any,
) -> Path:
    """A run's folder; ``found`` None leaves the run without a result."""
    path.mkdir(parents=True)
    config = {
        "method": "kd",
        "family": "models",
        "setup": SETUP,
        "config": {"epochs": 60.0, "temperature": 2.0, "alpha": 0.9, "milestones": [0.625, 0.75, 0.875]},
        "preset": "small",
        "seed": 3,
        "engine": {"log_every": 20, "progress": False},
        "task": {"name": "digits", "source": "scikit-learn's digits", "train": 1000, "test": 500, "classes": 10},
        "environment": {
            "limbeck": "0.1.0",
            "started": "2026-02-03 04:05:06",
            "libraries": {"torch": "2.13.0"},
        },
        **changes,
    }
    (path / "config.json").write_text(json.dumps(config))
    lines = metric_rows() if rows is None else rows
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    if found is not None:
        (path / "result.json").write_text(json.dumps(found))
    return path


def entry(name: str, mean: float = 0.02, verdict: str = "holds", **changes: Any) -> dict[str, Any]:
    """A scoreboard result with the difference ``mean`` in accuracy."""
    base = [0.90, 0.91, 0.905]
    differences = [mean - 0.004, mean, mean + 0.004]
    pair = {
        "method": name, "baseline": "plain", "metric": "accuracy", "per_seed": differences, "mean": mean,
        "low": mean - 0.004, "high": mean + 0.004, "margin": 0.0,
    }  # fmt: skip
    nll = {
        "statement": "its likelihood is better", "method": name, "baseline": "plain", "metric": "nll",
        "per_seed": [0.01, 0.02, 0.0], "mean": 0.01, "low": 0.0, "high": 0.02, "margin": 0.0, "verdict": "undecided",
        "headline": False, "higher_is_better": False,
    }  # fmt: skip
    return {
        "name": name,
        "title": f"Title of {name}",
        "claim": f"Claim of {name}: better than plain.",
        "verdict": verdict,
        "metric": "accuracy",
        "higher_is_better": True,
        "arms": {
            name: {
                "role": "method", "description": "the method", "settings": {"lr": 0.01}, "candidates": 3,
                "metrics": {"accuracy": [b + d for b, d in zip(base, differences, strict=True)], "nll": [0.3, 0.31, 0.29]},
            },
            "plain": {
                "role": "baseline", "description": "labels alone",
                "metrics": {"accuracy": base, "nll": [0.31, 0.33, 0.29]},
            },
        },
        "difference": pair,
        "checks": [{"statement": "more accurate", **pair, "verdict": verdict}, nll],
        "seeds": [0, 1, 2],
        "data": {"name": "digits", "source": "scikit-learn's digits", "train": 1000, "test": 500},
        "seconds": 75.0,
        "commit": "0123456789ab",
        "date": "2026-02-03",
        "limbeck": "0.1.0",
        "note": f"Note on {name}.",
        **changes,
    }  # fmt: skip


def scoreboard_folder(path: Path, *entries: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for one in entries:
        (path / f"{one['name']}.json").write_text(json.dumps(one))
    return path


def card(name: str, family: str = "models", **changes: Any) -> Card:
    fields: dict[str, Any] = {
        "name": name, "title": f"Title of {name}", "family": family, "paper": f"Paper of {name}", "year": 2020,
        "summary": f"What {name} does | in short.", "needs": "a student", "gives": "a student",
        "claim": f"Claim of {name}.", "implementation": f"limbeck.methods.{family}.{name}:X",
    }  # fmt: skip
    return Card(**{**fields, **changes})


def comparison(**changes: Any) -> dict[str, Any]:
    return {
        "task": {"name": "digits", "source": "scikit-learn's digits", "train": 1000},
        "metric": "accuracy",
        "higher_is_better": True,
        "seeds": [0, 1, 2],
        "steps": 1200,
        "methods": {
            "supervised": {
                "metrics": {"accuracy": [0.90, 0.91, 0.92], "nll": [0.3, 0.31, 0.29]},
                "seconds": [3.0, 3.2, 3.1],
                "curve": [[100 * n, 0.92 - 0.6 / n] for n in range(1, 13)],
            },
            "kd": {
                "metrics": {"accuracy": [0.94, 0.93, 0.95], "nll": [0.2, 0.21, 0.19]},
                "seconds": [5.0, 5.2, 5.1],
                "curve": [[100 * n, 0.95 - 0.5 / n] for n in range(1, 13)],
            },
        },
        "differences": [
            {
                "method": "kd",
                "baseline": "supervised",
                "mean": 0.03,
                "low": 0.02,
                "high": 0.04,
                "per_seed": [0.04, 0.02, 0.03],
            }
        ],
        "settings": {"student": "cnn-w4-s3", "batch_size": 64},
        **changes,
    }
