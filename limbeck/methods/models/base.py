"""The contract of the ``models`` family: models in, a smaller model out, judged on quality, calibration and cost.

The base classes are for classifiers; other kinds of model override :meth:`ModelDistiller.check_outputs`,
:meth:`~ModelDistiller.quick_metrics` and :meth:`~ModelDistiller.evaluate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck import networks
from limbeck.blocks.cache import OutputCache
from limbeck.blocks.taps import Tap
from limbeck.blocks.teachers import TeacherOutput, Teachers
from limbeck.core.batch import Batch, call_model, logits_of
from limbeck.core.config import Config
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.method import Method
from limbeck.core.optim import Optimised, TrainingConfig, make_optimised
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage
from limbeck.networks.artifacts import save_model
from limbeck.tasks.base import Task, TaskConfig, cache_folder, load_task
from limbeck.tasks.judging import judge_classifiers
from limbeck.tasks.teachers import predictions, reference_teacher

IGNORED = -100
"""The label of padding in token-level data."""


class ModelDistiller(Method):
    """Base of the methods that train a student classifier.

    Args:
        student: any module from inputs to logits (see :func:`limbeck.core.batch.logits_of`). It is trained in place.
        config: hyper-parameters; or give single ones as keyword arguments.
    """

    family = "models"

    class Config(TrainingConfig):
        """Optimisation, shared by the whole family."""

        views: int | None = Field(
            None, ge=1, description="number of different augmented views of each sample; none: a new one every epoch"
        )
        evaluations: int = Field(8, ge=0, description="how often to evaluate on validation data while training")

    class Setup(TaskConfig):
        """What a run by name builds."""

        student: str | None = Field(
            None, description="student network, or package.module:factory; none: the task's own"
        )

    student: nn.Module

    def __init__(self, student: nn.Module, config: Config | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        if not isinstance(student, nn.Module):
            raise InputError(f"the student must be an nn.Module, not {type(student).__name__}")
        self.student = student

    # ---- what methods use ---------------------------------------------------------------------------------------------

    def student_logits(self, batch: Batch) -> Tensor:
        """(B, C) logits of the student on the batch."""
        return logits_of(call_model(self.student, batch.inputs))

    @staticmethod
    def labels(batch: Batch) -> Tensor:
        """(B,) or (B, C) labels.

        Raises:
            InputError: the batch has none.
        """
        if batch.labels is None:
            raise InputError("this loss needs labels, and the batch has none: give (inputs, labels)")
        return batch.labels

    # ---- building by name --------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, setup: Setup, config: Config, *, seed: int = 0, progress: bool = True) -> tuple[Self, Task]:
        """The method on its task's own networks, and the task."""
        task = load_task(setup)
        return cls.on_task(task, setup, config, seed=seed, progress=progress), task

    @classmethod
    def on_task(cls, task: Task, setup: Setup, config: Config, *, seed: int = 0, progress: bool = True) -> Self:
        """The method for a task that is already loaded. Networks are initialised from ``seed``."""
        return cls(make_network(setup.student or task.networks["student"], task, seed), config)

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Config, *, sample: Batch) -> Self:
        """The method on a user's own modules; ``sample`` is a batch that shows the shapes."""
        cls.require(student=student)
        return cls(student, config)

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        """The method on a user's own modules, for data of their own."""
        return cls.from_modules(student, teacher, config, sample=data.fetch(torch.arange(min(2, len(data))), None))

    @classmethod
    def require(cls, **modules: Any) -> None:
        """That modules which the method cannot do without were given.

        Raises:
            InputError: one is None.
        """
        for role, value in modules.items():
            if value is None:
                raise InputError(f"{cls.name} needs {role}=… (an nn.Module)")

    # ---- running -----------------------------------------------------------------------------------------------------

    def optimisers(self, steps: int) -> Mapping[str, Optimised]:
        """One optimiser over everything trainable."""
        return {"main": make_optimised(self.trainable_parameters(), self.config, steps)}

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One stage; methods with several override this."""
        return [self.stage("distillation", train, val, seed=seed)]

    def stage(
        self,
        name: str,
        train: Data,
        val: Data | None,
        *,
        seed: int,
        recipe: TrainingConfig | None = None,
        stream: Stream | None = None,
        **changes: Any,
    ) -> Stage:
        """The family's usual stage: gradient steps on ``self.losses``, the student evaluated now and then.

        Args:
            name: of the stage.
            train, val: data.
            seed: seeds the order of the batches.
            recipe: budget and batch size, where they are others than the config's.
            stream: batches; None: of all training data, shuffled by ``seed``.
            changes: fields of :class:`~limbeck.core.stage.Stage` that differ.
        """
        recipe = self.config if recipe is None else recipe
        if stream is None:
            stream = Stream(train, recipe.batch_size, seed=mix_seed(seed, 5), views=self.config.views)
        steps = recipe.total_steps(stream.steps_per_epoch)
        count = self.config.evaluations
        settings: dict[str, Any] = {
            "losses": self.losses,
            "optimisers": lambda: self.optimisers(steps),
            "accumulate": recipe.accumulate,
            "normalisers": self.normalisers,
            "evaluate": None if val is None or count == 0 else lambda: self.quick_metrics(val),
            "evaluate_every": max(1, steps // count) if count else 0,
        }
        return Stage(name, steps, stream, **{**settings, **changes})

    @staticmethod
    def normalisers(batch: Batch) -> dict[str, float]:
        """Over how many items the mean of a term goes: samples, or for token labels (B, N) those that are not padding."""
        labels = batch.labels
        if labels is None or labels.is_floating_point() or labels.ndim < 2:
            return {}
        return {"": float((labels != IGNORED).sum())}

    def quick_metrics(self, data: Data) -> dict[str, float]:
        """Accuracy and negative log-likelihood of the student."""
        logits, labels = predictions(self.student, data)
        nll = torch.nn.functional.cross_entropy(logits, labels)
        return {"accuracy": float((logits.argmax(1) == labels).double().mean()), "nll": float(nll)}

    def prepare_run(self, train: Data, val: Data | None, setup: Config | None = None) -> None:
        """Last preparations before a run: caches, sanity checks. Nothing that a resume would have to restore."""

    def check(self, batch: Batch) -> None:
        """Dry run on one batch: what would fail at the first step, or silently never work, fails here with a clear line.

        Weights, buffers, gradients and random state are left as they were.

        Raises:
            InputError: no logits, wrong labels, a loss term that is not finite, no gradient to the student, or a gradient
                into a frozen part.
        """
        was_training = self.training
        buffers = {name: b.clone() for name, b in self.named_buffers()}
        with preserved_random_state():
            try:
                self.train()
                self.check_outputs(batch)
                losses = self.losses(batch)
                for name, value in losses.items():
                    if not bool(torch.isfinite(value)):
                        raise InputError(
                            f"loss term '{name}' is {value.item()} on the first batch: check inputs and settings"
                        )
                total = losses.total
                if total.requires_grad:
                    total.backward()
                if all(p.grad is None for p in self.student.parameters()):
                    raise InputError("no gradient reaches the student: is it frozen, or does its forward detach?")
                for name in self._frozen:
                    if any(p.grad is not None for p in getattr(self, name).parameters()):
                        raise InputError(f"a gradient reaches the frozen '{name}'")
            finally:
                self.zero_grad(set_to_none=True)
                with torch.no_grad():
                    for name, b in self.named_buffers():
                        b.copy_(buffers[name])
                self.train(was_training)

    @torch.no_grad()
    def check_outputs(self, batch: Batch) -> None:
        """That the student's outputs and the labels fit each other; part of :meth:`check`.

        Raises:
            InputError: they do not.
        """
        logits = self.student_logits(batch)
        if logits.ndim != 2 or logits.shape[0] != len(batch):
            raise InputError(
                f"the student gives logits of shape {tuple(logits.shape)}; expected ({len(batch)}, classes)"
            )
        labels = batch.labels
        if labels is None:
            return
        if labels.ndim == 2:
            if labels.shape[-1] != logits.shape[-1]:
                raise InputError(f"soft labels for {labels.shape[-1]} classes, but the student has {logits.shape[-1]}")
            return
        if labels.is_floating_point():
            raise InputError(f"labels are {labels.dtype}; class indices must be integers")
        counted = labels[labels != IGNORED] if labels.ndim > 1 else labels
        if counted.numel() == 0:
            raise InputError("every label of the first batch is padding (-100): nothing could be learnt from it")
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= logits.shape[-1]:
            raise InputError(f"labels go from {low} to {high}, but the student has classes 0 to {logits.shape[-1] - 1}")

    # ---- judging and keeping the result ------------------------------------------------------------------------------

    def contestants(self) -> dict[str, nn.Module]:
        """The models to be judged, by role; the student first."""
        return {"student": self.student}

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """The family's measures on test data: quality, agreement with the teacher, calibration, size and speed."""
        return judge_classifiers(self.contestants(), test, class_names)

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The plain student, without projectors, heads or teachers."""
        save_model(self.student, folder, description)


class OfflineDistiller(ModelDistiller):
    """Base of the methods with frozen, already trained teachers.

    Args:
        student: see :class:`ModelDistiller`.
        teacher: a module or callable from inputs to logits, several of them, or :class:`limbeck.blocks.teachers.Teachers`.
            Modules are frozen in place.
        config: hyper-parameters; or give single ones as keyword arguments.
    """

    default_teachers: ClassVar[int] = 1
    teachers: Teachers

    class Setup(ModelDistiller.Setup):
        """What a run by name builds."""

        teacher: tuple[str, ...] = Field(
            (), description="teacher networks, or package.module:factory with its weights loaded; none: the task's own"
        )
        teacher_epochs: float | None = Field(None, gt=0, description="passes over the data for reference teachers")
        cache_teacher: bool = Field(
            False, description="keep teacher outputs on disk, computed once per sample and view"
        )

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        config: ModelDistiller.Config | None = None,
        *,
        teacher_taps: Sequence[str | Tap] = (),
        **overrides: Any,
    ) -> None:
        super().__init__(student, config, **overrides)
        teachers = teacher if isinstance(teacher, Teachers) else Teachers(teacher, teacher_taps)
        if any(m is student for m in teachers.models):
            raise InputError("teacher and student are the same module: give a copy as the teacher (copy.deepcopy)")
        self.add_frozen("teachers", teachers)

    def teach(self, batch: Batch) -> TeacherOutput:
        """What the teachers say about the batch, without gradients; counted in ``counters['teacher_forwards']``."""
        before = self.teachers.forwards
        output: TeacherOutput = self.teachers(batch)
        self.counters["teacher_forwards"] += self.teachers.forwards - before
        return output

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        student = make_network(setup.student or task.networks["student"], task, seed)
        return cls(student, cls.teachers_for(task, setup, seed=seed, progress=progress), config)

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        cls.require(student=student, teacher=teacher)
        return cls(student, teacher, config)

    @classmethod
    def teachers_for(cls, task: Task, setup: Any, *, seed: int, progress: bool) -> list[nn.Module]:
        """Reference teachers: as many as the method wants, or those named in the setup."""
        names = setup.teacher or (task.networks["teacher"],) * cls.default_teachers
        return [
            make_network(name, task, seed)
            if ":" in name
            else reference_teacher(task, name, seed=number, epochs=setup.teacher_epochs, progress=progress)
            for number, name in enumerate(names)
        ]

    def check(self, batch: Batch) -> None:
        with torch.no_grad():
            classes = self.teachers(batch).logits.shape[-1]
            own = self.student_logits(batch).shape[-1] if not self.training else None
        if own is not None and own != classes:
            raise InputError(f"the student has {own} classes and the teacher {classes}: they must be the same")
        super().check(batch)

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        if getattr(setup, "cache_teacher", False):
            self.cache_teacher(train)
        if val is not None:
            self.check_teacher(val)

    def cache_teacher(self, data: Data, folder: Path | None = None) -> None:
        """Keep the teachers' outputs on this data on disk from now on (in the cache folder if none is given).

        Raises:
            InputError: the data's augmentation cannot be replayed, or shows a new view in every epoch.
        """
        if data.augmented and self.config.views is None:
            raise InputError(
                "a teacher cache needs a number of views: with a new one every epoch nothing is read twice; set views"
            )
        self.teachers.cache = OutputCache(folder or cache_folder() / "outputs", data, self.teachers.key())

    def check_teacher(self, data: Data) -> list[float]:
        """Each teacher's accuracy through the student's own pipeline; warns when one is no better than chance.

        A wrong normalisation or class order is the usual hidden cause of distillation that does not work.
        """
        found = []
        for number, model in enumerate(self.teachers.models):
            transform = self.teachers.transforms[number]
            view = model if transform is None else _Transformed(model, transform)
            logits, labels = predictions(view, data)
            accuracy = float((logits.argmax(1) == labels).double().mean())
            chance = float(torch.bincount(labels).max() / len(labels))
            if accuracy <= chance + 2 * (chance * (1 - chance) / len(labels)) ** 0.5:
                which = "the teacher" if len(self.teachers) == 1 else f"teacher {number}"
                warnings.warn(
                    f"{which} has {accuracy:.1%} accuracy on validation data, no better than always guessing one class "
                    f"({chance:.1%}): check its weights, normalisation and class order",
                    stacklevel=2,
                )
            found.append(accuracy)
        return found

    def contestants(self) -> dict[str, nn.Module]:
        models: dict[str, nn.Module] = {"student": self.student}
        for number, model in enumerate(self.teachers.models):
            transform = self.teachers.transforms[number]
            role = "teacher" if len(self.teachers) == 1 else f"teacher {number + 1}"
            models[role] = model if transform is None else _Transformed(model, transform)
        return models


class _Transformed(nn.Module):
    def __init__(self, model: nn.Module, transform: Any) -> None:
        super().__init__()
        self.model, self.transform = model, transform

    def forward(self, x: Any) -> Any:
        return call_model(self.model, self.transform(x))


def make_network(name: str, task: Task, seed: int) -> nn.Module:
    """A network for a task, initialised from ``seed`` without touching the caller's random state."""
    with preserved_random_state():
        seed_everything(mix_seed(seed, 1))
        return networks.build(name, in_shape=task.in_shape, num_classes=task.num_classes)
