"""Progress that people can read: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_EVERY = 15.0  # seconds between lines where there is no terminal
_BAR_EVERY = 0.1


class StageProgress:
    """The progress of one stage; ``update`` is cheap enough to call at every step."""

    def __init__(self, label: str, total: int, start: int = 0, enabled: bool = True) -> None:
        self.label, self.total, self.enabled = label, total, enabled
        self._start, self._began = start, time.monotonic()
        self._next = self._began + (_BAR_EVERY if sys.stderr.isatty() else _LINE_EVERY)
        self._bar: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=False,
            )
            self._task = self._bar.add_task(label, total=total, completed=start, note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def due(self) -> bool:
        """True when the display should change; asking costs a clock reading."""
        return self.enabled and time.monotonic() >= self._next

    def update(self, step: int, note: str = "") -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            self._next = now + _BAR_EVERY
        elif self.enabled:
            done = max(1, step - self._start)
            left = (now - self._began) / done * (self.total - step)
            print(
                f"{self.label}: {step}/{self.total}, about {left:.0f} s left {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )
            self._next = now + _LINE_EVERY
