"""What several tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.method import Method


class Stopped(Exception):
    """Stands for a crash."""


def resumed_equals_uninterrupted(
    make_method: Callable[[], Any], data: Any, folder: Path, stops: tuple[int, ...] = (7, 19), every: int = 5
) -> Method:
    """Run a method through, run it again with a crash after each of ``stops`` steps, and compare bit for bit."""
    settings = EngineConfig(progress=False, checkpoint_steps=every, log_every=3)
    whole = make_method()
    Engine(folder / "whole", settings, seed=3).run(whole, whole.stages(data, None, seed=0))
    for stop in stops:
        method = make_method()
        stages = method.stages(data, None, seed=0)
        for stage in stages:
            stage.after_step = _crash_after(stop, stage.after_step)
        with pytest.raises(Stopped):
            Engine(folder / "broken", settings, seed=3).run(method, stages, resume=True)
    method = make_method()
    Engine(folder / "broken", settings, seed=3).run(method, method.stages(data, None, seed=0), resume=True)
    expected, found = whole.training_state()["tensors"], method.training_state()["tensors"]
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert lines(folder / "whole") == lines(folder / "broken")
    return method


def _crash_after(stop: int, then: Callable[[int], None] | None) -> Callable[[int], None]:
    def after(step: int) -> None:
        if then is not None:
            then(step)
        if step == stop:
            raise Stopped

    return after


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
