"""The engine: runs the stages of a method, on one CPU or many GPUs, and can be killed at any moment.

It is built on Accelerate for devices, precision, processes and trackers. One choice differs from what Accelerate does by
default: models are not wrapped for data parallelism. Distillation steps alternate optimisers, skip parameters and unroll
inner loops, which gradient hooks do not survive; instead the gradients of the optimisers that step are averaged over
processes explicitly, after the backward pass. The result is the same, and every method works on several processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pydantic import Field

from limbeck.core.allocator import keep_freed_memory
from limbeck.core.checkpoint import CHECKPOINT, load_checkpoint
from limbeck.core.config import Config
from limbeck.core.errors import InputError, RunError
from limbeck.core.interrupts import InterruptGuard
from limbeck.core.method import Method
from limbeck.core.records import Records
from limbeck.core.seeding import seed_everything
from limbeck.core.stage import Stage
from limbeck.core.stage_loop import StageLoop

METRICS = "metrics.jsonl"


class EngineConfig(Config):
    """How a run is executed; nothing here changes what is computed, except ``precision``."""

    precision: Literal["no", "fp16", "bf16"] = Field("no", description="mixed precision")
    device: Literal["auto", "cpu"] = Field("auto", description="auto takes a GPU where there is one")
    log_every: int = Field(20, ge=1, description="steps between logged means of the loss terms")
    checkpoint_seconds: float = Field(20.0, ge=0, description="time between checkpoints")
    checkpoint_steps: int | None = Field(None, ge=1, description="checkpoint after every so many steps as well")
    trackers: tuple[str, ...] = Field((), description="tensorboard, wandb, mlflow … (what Accelerate knows)")
    progress: bool = Field(True, description="show progress")


class Engine:
    """Runs methods.

    Args:
        directory: where metrics and checkpoints go; None keeps everything in memory and cannot resume.
        settings: how to execute.
        seed: seeds every random choice during training.
    """

    def __init__(self, directory: Path | None = None, settings: EngineConfig | None = None, *, seed: int = 0) -> None:
        self.directory = None if directory is None else Path(directory)
        self.settings = settings or EngineConfig()
        self.seed = seed
        self.accelerator = _accelerator(self.settings, self.directory)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self.cost: dict[str, Any] = {"stages": {}, "seconds": 0.0, "peak_memory_bytes": 0}
        self.records = Records(None)

    # ---- the loop over stages --------------------------------------------------------------------------------------

    def run(self, method: Method, stages: Sequence[Stage], *, resume: bool = False) -> list[dict[str, Any]]:
        """Run all stages; returns the metric rows.

        Raises:
            TrainingDiverged: a loss term is NaN or infinite; the last good checkpoint stays.
            Interrupted: Ctrl-C; the state is saved.
            RunError: the directory cannot be written, or its checkpoint does not fit.
        """
        names = [s.name for s in stages]
        if len(set(names)) != len(names):
            raise InputError(f"stages must have different names (got {', '.join(names)})")
        checkpoint = self._find_checkpoint(resume)
        self.records = Records(self._metrics_path())
        self._start_trackers(method)
        method.to(self.accelerator.device)
        seed_everything(self.seed)
        first = 0
        if checkpoint is not None:
            first = names.index(checkpoint["stage"]) if checkpoint["stage"] in names else -1
            if first < 0:
                raise RunError(f"the checkpoint is of a stage '{checkpoint['stage']}' that this method does not have")
            self.cost = checkpoint["cost"]
            if self.accelerator.is_main_process:
                self.records.rewind(checkpoint["metrics_offset"])
        elif self.accelerator.is_main_process:
            self.records.rewind(0)
        try:
            with InterruptGuard() as guard:
                for position in range(first, len(stages)):
                    loop = StageLoop(self, method, stages[position], guard)
                    loop.enter(checkpoint if position == first else None)
                    loop.run()
        finally:
            self.records.close()
            if self.settings.trackers:
                self.accelerator.end_training()
        return self.records.rows

    @property
    def resumable(self) -> bool:
        return self.directory is not None and (self.directory / CHECKPOINT).exists()

    def _find_checkpoint(self, resume: bool) -> dict[str, Any] | None:
        if self.directory is None or not resume or not self.resumable:
            return None
        return load_checkpoint(self.directory / CHECKPOINT)

    def _metrics_path(self) -> Path | None:
        return None if self.directory is None or not self.accelerator.is_main_process else self.directory / METRICS

    def _start_trackers(self, method: Method) -> None:
        if self.settings.trackers:
            plain = {k: v for k, v in method.config.model_dump().items() if isinstance(v, int | float | str | bool)}
            self.accelerator.init_trackers("limbeck", config=plain)

    def log(self, row: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        self.records.write(row)
        if self.settings.trackers:
            where = f"{row['stage']}/{row['split']}/"
            numbers = {where + k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            self.accelerator.log(numbers, step=row["step"])


def _accelerator(settings: EngineConfig, directory: Path | None) -> Accelerator:
    options: dict[str, Any] = {
        "mixed_precision": settings.precision,
        "cpu": settings.device == "cpu",
        "log_with": list(settings.trackers) or None,
        "project_dir": None if directory is None else str(directory / "trackers"),
    }
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != settings.precision:
        AcceleratorState._reset_state()
    try:
        return Accelerator(**options)
    except (ValueError, ImportError) as error:
        raise InputError(f"the engine cannot start: {str(error).splitlines()[0]}") from error
