"""The contract of the ``samplers`` family: a generator of many steps in, one of few steps out, judged at equal noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from limbeck.adapters.denoising import save_sampler
from limbeck.blocks.ema import EMA
from limbeck.core.batch import Batch, map_tensors
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.method import Method
from limbeck.core.optim import Optimised, OptimiserConfig, make_optimised
from limbeck.core.seeding import preserved_random_state
from limbeck.core.stage import Stage, Stepper
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.pairs import PairData, PairStore
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.transforms import native
from limbeck.tasks.generation import GenerationTask
from limbeck.tasks.generators import GeneratorSetup, PipelineTask, load_generator
from limbeck.tasks.judging_samplers import judge_samplers, sample_pictures


class SamplerDistiller(Method):
    """Base of the methods whose product is a sampler.

    Args:
        teacher: the many-step model: a denoiser, or a pipeline that :func:`limbeck.adapters.diffusers_pipelines.load_teacher` read.
        conditions: what to be able to generate: class ids or embeddings (N, ...), a mapping of them, data with labels; None: unconditional.
        student: a denoiser of another size or of other conventions; None: a copy of the teacher.
        config: hyper-parameters; or give single ones as keyword arguments.
        shape: of one sample; None: as the network says.
        seed: of pairs and of the noise that results are judged at.

    Attributes:
        teacher: frozen.
        student: trained.
        averaged: the student with the running average of its weights: what is judged and saved.
        conditions: as a list to draw from.

    Raises:
        InputError: conditions for a network that takes none, or no shape.
    """

    family = "samplers"
    needs_images: ClassVar[bool] = False
    """True if the method learns from samples of the data; where there are none, the teacher's own are made first."""

    class Config(OptimiserConfig):
        """What the whole family has."""

        steps: int = Field(1000, ge=1, description="updates of the student")
        batch_size: int = Field(128, ge=1, description="samples per update, over all processes together")
        optimizer: Literal["adamw", "adam", "sgd"] = Field("adam", description="update rule")
        lr: float = Field(5e-4, gt=0, description="peak learning rate of the student")
        weight_decay: float = Field(0.0, ge=0, description="weight decay (decoupled for adamw)")
        clip_grad: float | None = Field(1.0, gt=0, description="largest gradient norm; none: no clipping")
        ema: float = Field(
            0.99,
            ge=0,
            le=1,
            description="decay of the average of the student's weights; its memory grows to that from short ones",
        )
        guidance: float = Field(1.0, ge=0, description="guidance weight w of the teacher; 1 is none")
        teacher_nfe: int = Field(25, ge=1, description="steps of the many-step teacher, for pairs and for comparison")
        teacher_solver: Literal["ddim", "euler", "heun", "dpm2m"] = Field("dpm2m", description="its solver")
        pairs: int = Field(4096, ge=1, description="samples of the teacher that are made where a method needs them")
        pair_folder: str | None = Field(
            None, description="keep them in memory-mapped files there; none: in memory and in checkpoints"
        )
        judge_count: int = Field(2000, ge=2, description="samples that results are judged by")

    class Setup(GeneratorSetup):
        """What a run by name builds."""

    def __init__(
        self,
        teacher: Any,
        conditions: Any = None,
        student: Denoiser | None = None,
        config: Any = None,
        *,
        shape: Sequence[int] | None = None,
        seed: int = 0,
        **overrides: Any,
    ) -> None:
        super().__init__(config, **overrides)
        self.pipeline: Any = None if isinstance(teacher, Denoiser) else teacher
        denoiser = getattr(teacher, "denoiser", teacher)
        if not isinstance(denoiser, Denoiser):
            raise InputError(
                f"the teacher must be a Denoiser or a loaded pipeline, not {type(teacher).__name__}: wrap a network as "
                "Denoiser(network, schedule, prediction)"
            )
        self.seed = seed
        self.shape = sample_shape(shape, teacher, denoiser)
        self.conditions = Conditions.of(conditions)
        if student is None:
            student = deepcopy(denoiser)
        self.teacher: Denoiser
        self.add_frozen("teacher", denoiser)
        self.student = student.train().requires_grad_(True)
        self.ema = EMA(self.student.module, self.config.ema, warmup=True)
        self.on: GenerationTask | None = None
        """The task that results are judged on, if there is one."""

    # ---- parts -----------------------------------------------------------------------------------------------------------

    @property
    def averaged(self) -> Denoiser:
        return self.student.with_module(self.ema.module)

    @property
    def device(self) -> torch.device:
        found = next(self.parameters(), None)
        return torch.device("cpu") if found is None else found.device

    def unit_noise(self, count: int) -> Tensor:
        """(count, ...) from N(0, I), from torch's random state."""
        return torch.randn((count, *self.shape), device=self.device)

    def unpack(self, batch: Batch) -> tuple[Tensor | None, Any]:
        """Clean samples (or None) and conditions (or None) of a batch.

        A batch holds ``{"x0": …, "cond": …}``, images with labels, or, for methods that need no images, conditions alone.

        Raises:
            InputError: the method needs images and there are none, or they have another shape.
        """
        inputs = batch.inputs
        x0: Any = None
        cond: Any = batch.labels
        if isinstance(inputs, Mapping) and ("x0" in inputs or "cond" in inputs or "number" in inputs):
            x0, cond = inputs.get("x0"), inputs.get("cond", cond)
        elif isinstance(inputs, Tensor) and (batch.labels is not None or self.needs_images):
            x0 = inputs
        elif not self.needs_images:
            cond = inputs
        if self.needs_images and x0 is None:
            raise InputError(f"{self.name} needs samples: give (images, labels) or {{'x0': …, 'cond': …}}")
        if x0 is not None and self.needs_images and tuple(x0.shape[1:]) != self.shape:
            raise InputError(f"the teacher makes samples of shape {self.shape}, the data has {tuple(x0.shape[1:])}")
        return x0, cond if self.teacher.conditional or cond is None or not isinstance(cond, Tensor) else None

    def teacher_sampler(self, steps: int | None = None, *, guidance: float | None = None) -> Sampler:
        """The teacher in ``steps`` steps (None: ``teacher_nfe``) of its solver."""
        config = self.config
        weight = config.guidance if guidance is None else guidance
        return Sampler.ode(self.teacher, steps or config.teacher_nfe, config.teacher_solver, weight)

    # ---- what a method defines -------------------------------------------------------------------------------------------

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """The loops of a run."""
        raise NotImplementedError(f"{type(self).__name__} defines no stages")

    def sampler(self) -> Sampler:
        """The result."""
        raise NotImplementedError(f"{type(self).__name__} defines no sampler")

    def contestants(self) -> dict[str, Sampler]:
        """The samplers to be judged: the result first, then the teacher at as many evaluations, then at many steps."""
        made = self.sampler()
        weight = 1.0 if self.config.guidance == 1 else 2.0
        few = max(1, int(made.nfe // weight))
        found = {"student": made}
        for steps in dict.fromkeys((few, self.config.teacher_nfe)):
            found[f"teacher, {steps} step{'s' * (steps > 1)}"] = self.teacher_sampler(steps)
        return found

    # ---- parts of stages -------------------------------------------------------------------------------------------------

    def optimised(self, steps: int, *, lr: float | None = None) -> Mapping[str, Optimised]:
        """The student's optimiser for a stage of ``steps`` updates."""
        return {"student": make_optimised(self.student.parameters(), self.config, steps, lr=lr)}

    def follow(self, _: int) -> None:
        """One update of the running average; an ``after_step``."""
        self.ema.update(self.student.module)

    def condition_stream(self, seed: int) -> Stream:
        """Batches of conditions."""
        return Stream(self.conditions, self.config.batch_size, seed=mix_seed(seed, 5))

    def make_store(self, name: str, count: int | None = None) -> PairStore:
        """An empty store of pairs."""
        folder = None if self.config.pair_folder is None else Path(self.config.pair_folder).expanduser() / name
        return PairStore(count or self.config.pairs, self.shape, folder)

    def pair_stage(
        self, name: str, store: PairStore, sampler: Callable[[], Sampler], seed: int, chunk: int = 512
    ) -> Stage:
        """A stage that fills a store with what a sampler makes of fresh noise, ``chunk`` pairs a step."""
        made: list[Sampler] = []

        def prepare() -> None:
            made[:] = [sampler()]

        def update(_: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            store.fill(made[0], self.conditions, stepper.step * chunk, chunk, seed, self.device)
            self.counters["pairs_made"] = self.counters["pairs_made"] + min(chunk, store.count - stepper.step * chunk)
            return {"pairs": torch.tensor(float(store.done))}

        return Stage(name, -(-store.count // chunk), update=update, prepare=prepare, state={"pairs": store})

    def samples_of(self, train: Data | None, seed: int) -> tuple[list[Stage], Stream, dict[str, Any]]:
        """Clean samples to learn from: those of ``train``, or where it has none, the teacher's own, which a first stage makes.

        Returns:
            the stages to begin with, batches of samples, and what later stages must keep in their checkpoints.
        """
        size = self.config.batch_size
        if train is not None and _has_samples(train):
            return [], Stream(train, size, seed=mix_seed(seed, 5)), {}
        store = self.make_store("samples")
        first = self.pair_stage("samples", store, self.teacher_sampler, mix_seed(seed, 19))
        return [first], Stream(PairData(store), size, seed=mix_seed(seed, 5)), {"samples": store}

    # ---- building ----------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Any]:
        """The method on a task with its reference teacher, or on a pipeline, and the task."""
        teacher, task = load_generator(setup, needs_images=cls.needs_images, progress=progress)
        return cls.on_task(task, teacher, config, seed=seed, setup=setup), task

    @classmethod
    def on_task(cls, task: Any, teacher: Any, config: Any, *, seed: int = 0, setup: Any = None) -> Self:
        """The method for a task and a teacher that are loaded already."""
        made = cls(
            teacher, task.conditions, cls.make_student(task, teacher, setup), config, shape=task.shape, seed=seed
        )
        made.on = task if isinstance(task, GenerationTask) else None
        return made

    @classmethod
    def make_student(cls, task: Any, teacher: Any, setup: Any) -> Denoiser | None:
        """The student of a run by name; None: a copy of the teacher."""
        if setup is None or setup.student is None or isinstance(task, PipelineTask):
            return None
        from limbeck.tasks.diffusion_teachers import fresh_denoiser

        return fresh_denoiser(task, teacher.schedule, setup.predicts, setup.student, classes=teacher.conditional)

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        """The method on a user's own conditions (or samples with labels) and teacher."""
        if teacher is None:
            raise InputError(f"{cls.name} needs teacher=… (a Denoiser, or a pipeline read by load_teacher)")
        return cls(teacher, conditions_of(data), student, config, seed=seed)

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        """Nothing is needed before a run."""

    def check(self, batch: Batch) -> None:
        """One prediction of the teacher and one of the student on the batch's conditions.

        Raises:
            InputError: it fails or is not finite.
        """
        inputs = batch.inputs
        if self.needs_images and isinstance(inputs, Mapping) and "x0" not in inputs:  # the teacher will make samples
            cond = inputs.get("cond")
        else:
            _, cond = self.unpack(batch)
        first = map_tensors(cond, lambda value: value[:2].to(self.device))
        count = 2 if cond is None else len(next(iter(first.values())) if isinstance(first, Mapping) else first)
        with torch.no_grad(), preserved_random_state():
            z = self.unit_noise(count)
            for who, denoiser in (("teacher", self.teacher), ("student", self.student)):
                before = denoiser.evaluations
                t = 0.5 * denoiser.schedule.t_max if denoiser.schedule.name != "edm" else 1.0
                x0 = denoiser.predict(z, t, first, "x0", self.config.guidance if denoiser is self.teacher else 1.0)
                denoiser.evaluations = before
                if not bool(torch.isfinite(x0).all()):
                    raise InputError(
                        f"the {who}'s prediction is not finite on the first batch: check its weights and conventions"
                    )

    # ---- judging and keeping the result -----------------------------------------------------------------------------------

    def pictured(self, samples: Tensor) -> Tensor:
        """Samples (B, ...) as pictures in [-1, 1], with gradient: through the pipeline's decoder, if there is one."""
        if self.pipeline is None:
            return samples
        found: Tensor = self.pipeline.decode(samples)
        return found

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """The same without gradient, for reports."""
        return self.pictured(samples)

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """All contestants at the same noise and conditions: fidelity, coverage, cost; and pictures."""
        contestants = self.contestants()
        rows = judge_samplers(
            contestants,
            shape=self.shape,
            conditions=self.conditions,
            test=test if _has_samples(test) else None,
            on=self.on,
            fine=self.teacher_sampler(2 * self.config.teacher_nfe),
            count=self.config.judge_count,
            seed=self.seed,
            device=self.device,
            progress=self.show_progress,
        )
        pictures = sample_pictures(
            contestants,
            shape=self.shape,
            conditions=self.conditions,
            seed=self.seed,
            decode=self.decode,
            on=self.on,
            device=self.device,
        )
        found: dict[str, Any] = {"rows": rows}
        return {**found, "pictures": pictures} if pictures else found

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The sampler: a diffusers pipeline where the teacher was one, else weights and conventions."""
        if self.pipeline is None:
            save_sampler(native(self.sampler()), folder, description)
            return
        from limbeck.adapters.diffusers_students import save_student

        save_student(folder, self.pipeline, native(self.sampler()), description)


def conditions_of(data: Data) -> Conditions:
    """The conditions in what users give as data: its labels, the data itself where it has none and is no image, or nothing but its size."""
    if isinstance(data, Conditions):
        return data
    first = data.fetch(torch.arange(1), None)
    inputs = first.inputs
    if first.labels is None and isinstance(inputs, Tensor) and not inputs.is_floating_point() and inputs.ndim == 1:
        return Conditions(torch.cat([b.inputs for b in data.batches()]))
    return Conditions.of(data)


def _has_samples(data: Data) -> bool:
    if isinstance(data, Conditions):
        return False
    inputs = data.fetch(torch.arange(1), None).inputs
    if isinstance(inputs, Mapping):
        return "x0" in inputs
    return isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim > 1


def sample_shape(shape: Sequence[int] | None, teacher: Any, denoiser: Denoiser) -> tuple[int, ...]:
    found = shape or getattr(teacher, "shape", None) or getattr(denoiser.module, "shape", None)
    means = getattr(denoiser.module, "means", None)  # of an exact mixture
    if found is None and isinstance(means, Tensor):
        found = tuple(means.shape[1:])
    if found is None:
        raise InputError("the shape of a sample is not known from the network: give shape=(channels, height, width)")
    return tuple(int(n) for n in found)
