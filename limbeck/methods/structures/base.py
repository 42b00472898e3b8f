"""The contract of the ``structures`` family: a scikit-learn estimator does the work; a method runs it by name, in resumable steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from limbeck.core import config as configuration
from limbeck.core.batch import Batch
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.core.method import Method
from limbeck.core.stage import Stage, Stepper


class StructureMethod(Method):
    """Base of the methods whose work a scikit-learn estimator does.

    The estimator is what users take; this class builds a task for it, runs it with progress, judges it and keeps what came out. A method that
    takes long gives :meth:`work` in steps and keeps what is done in :meth:`state_dict`-like objects (``state``), so that a run resumes.

    Attributes:
        on: the task, if there is one.
        estimator: fitted when the run has ended.
    """

    family = "structures"

    class Config(configuration.Config):
        """What the estimator takes."""

    class Setup(configuration.Config):
        """What a run by name builds."""

    def __init__(self, config: Any = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.on: Any = None
        self.estimator: Any = None

    # ---- what a method defines -------------------------------------------------------------------------------------------

    def steps(self) -> int:
        """How many steps the work has."""
        return 1

    def work(self, step: int) -> Mapping[str, float]:
        """Step number ``step`` of the work; numbers for the log."""
        raise NotImplementedError(f"{type(self).__name__} does nothing")

    def state(self) -> Mapping[str, Any]:
        """Objects with ``state_dict`` and ``load_state_dict`` that hold what is done."""
        return {}

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Any]:
        """The method on a task (with ``train``, ``val``, ``test``, ``class_names`` and ``describe()``), and the task."""
        raise NotImplementedError(f"{cls.__name__} cannot be run by name")

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        """Estimators take arrays by themselves.

        Raises:
            InputError: always; it says what to call.
        """
        raise InputError(f"{cls.name} is an estimator: call its fit with your arrays instead of limbeck.fit")

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """``rows`` (the result first, then what it is compared with) and ``pictures``."""
        raise NotImplementedError(f"{type(self).__name__} does not judge its result")

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """What came out, in an open format."""
        raise NotImplementedError(f"{type(self).__name__} keeps nothing")

    # ---- running ---------------------------------------------------------------------------------------------------------

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        """Nothing is needed before a run."""

    def check(self, batch: Batch) -> None:
        """Estimators check their arrays themselves."""

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """The work, step by step."""

        def update(_: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            return {k: torch.tensor(float(v)) for k, v in self.work(stepper.step).items()}

        return [Stage("fit", self.steps(), update=update, state=self.state())]
