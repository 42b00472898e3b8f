"""MEAL V2: squeezing the last points out of a trained student with an ensemble's mean probabilities, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.blocks.classes import class_count
from limbeck.blocks.discriminators import LogitDiscriminator
from limbeck.blocks.mixing import CutMix
from limbeck.blocks.teachers import TeacherOutput, Teachers
from limbeck.core.batch import Batch, Losses, map_tensors
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised, trainable
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage
from limbeck.losses.adversarial import discriminator_bce, gradient_reversal
from limbeck.losses.logits import soft_cross_entropy
from limbeck.methods.models.base import OfflineDistiller, make_network
from limbeck.tasks.base import Task

STUDENT_EPOCHS = 40.0


class MEALV2(OfflineDistiller):
    r"""An already trained student is trained on against the mean probabilities of several teachers; labels play no part.

    With the logits :math:`z_m` of teachers :math:`m = 1 \dots M` and :math:`z_S` of the student, all (B, C),

    .. math::
        \bar p &= \tfrac1M \sum_m \mathrm{softmax}(z_m), \qquad \bar z = \tfrac1M \sum_m z_m \\
        L_{sim} &= \mathrm{mean}_b\Big[-\sum_c \bar p_{bc} \log \mathrm{softmax}(z_S)_{bc}\Big] \\
        L_D &= \mathrm{BCE}\big(D([z_S; \bar z]),\, [[1, 0]^B; [0, 1]^B]\big) \\
        L &= L_{sim} + w\,L_D

    Probabilities are averaged, not logits, and nothing is softened (temperature 1). The teachers are frozen and in evaluation
    mode. The discriminator :math:`D` (:class:`~limbeck.blocks.discriminators.LogitDiscriminator`) scores the final output only;
    its loss is the mean over all 2 B rows and its two independent sigmoid units. What the student gets from :math:`L_D` is set
    by ``adversarial``:

    - ``min_max`` (default): the gradient is reversed between student and discriminator, so D learns to tell them apart and the
      student to be mistaken for the teachers. This is the game that the paper describes.
    - ``official``: the plain sum is minimised by both, as in the published code. The student is then *rewarded* for being
      recognised; D has a ReLU after its last layer, which can die.
    - ``none``: no discriminator.

    ``w`` scales the term for D and student alike. It is 1 in the paper, for 1,000 classes. Against few classes D dominates (with
    10 of them the student's logits grow to the teachers' scale and its likelihood suffers), so the default is 0.1.

    Options. ``cutmix`` pastes a box from another image of the batch into each image before anybody looks; the target is simply
    :math:`\bar p` of the mixed image. ``compress_top_k`` trains on what a store of soft labels would keep, see
    :func:`compress_top_k`; raw logits are not in such a store, so D then compares :math:`\mathrm{softmax}(z_S)` with the stored
    probabilities. For ablations: ``teacher_choice="random"`` asks one teacher per batch, drawn uniformly (as the first MEAL);
    ``hard_label_weight`` adds cross-entropy on the labels.

    Stages. The student must come trained. ``student_epochs`` of cross-entropy on the labels are a stage ``student`` before the
    stage ``distillation``; a run by name has it, since its student starts from random weights, while a student of your own is
    taken as it is. Learning rate of the distillation: a tenth of that which trained the student; weight decay 0; the rate falls
    to a tenth after 100/180 of training.

    Args:
        student: a trained network from inputs to logits. It is trained on in place.
        teacher: see :class:`~limbeck.methods.models.base.OfflineDistiller`; each may have its own transform
            (:class:`~limbeck.blocks.teachers.Teachers`).
        config: hyper-parameters; or give single ones as keyword arguments.
        num_classes: C, for the discriminator; None reads it off the student (``num_classes``, ``config.num_labels``, or the
            last linear layer), and the first batch checks it.

    Source: "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks" (2020) and its published
    code; compressed labels: "A Fast Knowledge Distillation Framework for Visual Recognition" (2022). Our decisions: gradient
    reversal for the game whose updates the paper leaves open; lower bounds on D's widths for few classes; SGD is Nesterov's
    here; the student's rate and weight decay in its own stage (the paper downloads trained students); one CutMix box per image.
    """

    name = "meal-v2"
    further_teachers: ClassVar[tuple[str, ...]] = ("cnn-w16-s3-b2", "cnn-w24-s3")
    """Networks that join the task's own teacher where a run by name is not told which teachers to take."""

    class Config(OfflineDistiller.Config):
        lr: float = Field(1e-3, gt=0, description="peak learning rate of the distillation; a tenth of student_lr")
        weight_decay: float = Field(
            0.0, ge=0, description="weight decay of the distillation; 0, soft labels regularise"
        )
        schedule: Literal["constant", "cosine", "linear", "step"] = Field(
            "step", description="course of the learning rate after warm-up"
        )
        milestones: tuple[float, ...] = Field(
            (100 / 180,), description="fractions of training where 'step' divides the rate by 10"
        )
        adversarial: Literal["min_max", "official", "none"] = Field(
            "min_max",
            description="student against the discriminator (the paper), with it (the published code), or no discriminator",
        )
        discriminator_weight: float = Field(
            0.1, ge=0, description="weight of the discriminator's loss; lower for few classes, where it dominates"
        )
        discriminator_lr: float | None = Field(
            None,
            gt=0,
            description="peak learning rate of the discriminator; none: lr, which the published schedule sets for both",
        )
        cutmix: bool = Field(
            False, description="teachers and student see images with boxes from other images pasted in"
        )
        teacher_choice: Literal["ensemble", "random"] = Field(
            "ensemble", description="mean of all teachers, or one drawn for each batch (ablation)"
        )
        hard_label_weight: float = Field(0.0, ge=0, description="weight of cross-entropy on the labels (ablation)")
        compress_top_k: int | None = Field(
            None, ge=1, description="keep so many of the teachers' probabilities per sample; none: all"
        )
        compression: Literal["marginal", "renormalise"] = Field(
            "marginal", description="the mass of dropped classes: spread evenly over them, or over the kept ones"
        )
        student_epochs: float | None = Field(
            None,
            ge=0,
            description="passes over labelled data that train the student first; "
            f"none: {STUDENT_EPOCHS:.0f} by name, 0 for a student of your own",
        )
        student_lr: float = Field(1e-2, gt=0, description="peak learning rate of that first stage (cosine)")
        student_weight_decay: float = Field(1e-4, ge=0, description="weight decay of that first stage")

        presets = {
            "paper": {
                "epochs": 180,
                "batch_size": 512,
                "optimizer": "sgd",
                "lr": 0.01,
                "student_lr": 0.1,
                "discriminator_weight": 1.0,
            },
            "official": {
                "epochs": 180,
                "batch_size": 512,
                "optimizer": "sgd",
                "lr": 0.01,
                "student_lr": 0.1,
                "adversarial": "official",
                "discriminator_weight": 1.0,
            },
        }

        @model_validator(mode="after")
        def _no_label_of_a_mixed_image(self) -> Self:
            if self.cutmix and self.hard_label_weight:
                raise ValueError("cutmix mixes images and not labels: set hard_label_weight to 0, or turn cutmix off")
            return self

    discriminator: LogitDiscriminator | None

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        config: Config | None = None,
        *,
        num_classes: int | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(student, teacher, config, **overrides)
        self.discriminator = None
        if self.config.adversarial != "none":
            like = next((p for p in student.parameters() if p.is_floating_point()), torch.zeros(()))
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            self.discriminator = LogitDiscriminator(
                class_count(student, "the discriminator") if num_classes is None else num_classes,
                final_relu=self.config.adversarial == "official",
            ).to(like.device, dtype)

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        config = self.config
        if config.cutmix:
            batch = self.mixed(batch)
        teacher = self.ask(batch)
        target = teacher.probabilities()
        if config.compress_top_k is not None:
            target = compress_top_k(target, config.compress_top_k, config.compression)
        student = self.student_logits(batch)
        out = Losses(similarity=soft_cross_entropy(student, target))
        if self.discriminator is not None:
            stored = config.compress_top_k is not None
            seen = (torch.softmax(student, -1), target) if stored else (student, teacher.logits)
            loss, accuracy = self.compare(self.discriminator, *seen)
            out.add("discriminator", loss, config.discriminator_weight).observe(discriminator_accuracy=accuracy)
        if config.hard_label_weight:
            out.add("ce", F.cross_entropy(student, self.labels(batch)), config.hard_label_weight)
        return out

    def ask(self, batch: Batch) -> TeacherOutput:
        """What all teachers say about the batch, or one that is drawn from torch's global random state."""
        if self.config.teacher_choice == "ensemble":
            return self.teach(batch)
        number = int(torch.randint(len(self.teachers), ()))
        if self.teachers.cache is not None:  # its rows hold all teachers
            return TeacherOutput(self.teach(batch).each[number : number + 1])
        single = Teachers([self.teachers.models[number]], transforms=[self.teachers.transforms[number]])
        output: TeacherOutput = single(batch)
        self.counters["teacher_forwards"] += single.forwards
        return output

    def compare(self, discriminator: LogitDiscriminator, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's loss, and the share of rows that it recognises; both scalars.

        Args:
            student, teacher: (B, C); gradients flow into the student's, reversed unless ``adversarial`` is ``official``.
        """
        if self.config.adversarial == "min_max":
            student = gradient_reversal(student)
        scores = discriminator(torch.cat([student, teacher.to(student.dtype)]))
        own, others = scores.split(len(student))
        return discriminator_bce(own, others), discriminator.accuracy(own, others)

    def mixed(self, batch: Batch) -> Batch:
        """The batch with boxes pasted in, at the same places for student and teachers; its samples have no ids any more.

        Raises:
            InputError: the inputs are not images (B, C, H, W), or teacher outputs are being kept.
        """
        if self.teachers.cache is not None:
            raise InputError(_UNCACHEABLE)
        mixing = CutMix.draw(len(batch))
        inputs, teacher_inputs = map_tensors((batch.inputs, batch.teacher_inputs), mixing)
        return replace(batch, inputs=inputs, teacher_inputs=teacher_inputs, index=None, view=None)

    def cache_teacher(self, data: Data, folder: Path | None = None) -> None:
        if self.config.cutmix:
            raise InputError(_UNCACHEABLE)
        super().cache_teacher(data, folder)

    # ---- building by name --------------------------------------------------------------------------------------------

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        if config.student_epochs is None:
            config = config.replace(student_epochs=STUDENT_EPOCHS)
        student = make_network(setup.student or task.networks["student"], task, seed)
        teachers = cls.teachers_for(task, setup, seed=seed, progress=progress)
        with preserved_random_state():
            seed_everything(mix_seed(seed, 33))
            return cls(student, teachers, config, num_classes=task.num_classes)

    @classmethod
    def teachers_for(cls, task: Task, setup: Any, *, seed: int, progress: bool) -> list[nn.Module]:
        if not setup.teacher:
            setup = setup.replace(teacher=(task.networks["teacher"], *cls.further_teachers))
        return super().teachers_for(task, setup, seed=seed, progress=progress)

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        cls.require(student=student, teacher=teacher)
        teachers = teacher if isinstance(teacher, Teachers) else Teachers(teacher)
        return cls(student, teachers, config, num_classes=teachers(sample).logits.shape[-1])

    # ---- running -----------------------------------------------------------------------------------------------------

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """``distillation``, after ``student`` where ``student_epochs`` are asked for.

        Raises:
            InputError: the student is to be trained first, and the data has no labels.
        """
        distillation = self.stage("distillation", train, val, seed=seed)
        if not self.config.student_epochs:
            return [distillation]
        if train.fetch(torch.arange(1), None).labels is None:
            raise InputError(
                f"student_epochs={self.config.student_epochs:g} train the student on labels, and the data has none: "
                "give a trained student and student_epochs=0"
            )
        return [self._student_stage(train, val, seed), distillation]

    def _student_stage(self, train: Data, val: Data | None, seed: int) -> Stage:
        config = self.config
        stage = self.stage("student", train, val, seed=mix_seed(seed, 34), losses=self._cross_entropy)
        assert stage.stream is not None
        steps = max(1, round(config.student_epochs * stage.stream.steps_per_epoch))
        recipe = config.replace(lr=config.student_lr, weight_decay=config.student_weight_decay, schedule="cosine")
        return replace(
            stage,
            steps=steps,
            optimisers=lambda: {"student": make_optimised(trainable(self.student), recipe, steps)},
            evaluate_every=max(1, steps // config.evaluations) if config.evaluations else 0,
        )

    def _cross_entropy(self, batch: Batch) -> Losses:
        return Losses(ce=F.cross_entropy(self.student_logits(batch), self.labels(batch)))

    def optimisers(self, steps: int) -> Mapping[str, Optimised]:
        """One for the student and one for the discriminator, alike but for ``discriminator_lr``; both step in every step."""
        made = {"student": make_optimised(trainable(self.student), self.config, steps)}
        if self.discriminator is not None:
            made["discriminator"] = make_optimised(
                trainable(self.discriminator), self.config, steps, lr=self.config.discriminator_lr
            )
        return made


def compress_top_k(
    probabilities: Tensor, k: int, compression: Literal["marginal", "renormalise"] = "marginal"
) -> Tensor:
    """Soft labels of which only the ``k`` largest probabilities of each row are kept.

    ``marginal`` (marginal smoothing) spreads the mass of the dropped classes evenly over them, so the kept ones stay exact:
    (1 - sum of the kept) / (C - k) each. ``renormalise`` gives them 0 and divides the kept ones by their sum. Between equal
    probabilities at the threshold, which are kept is arbitrary.

    Args:
        probabilities: (..., C), each row non-negative with sum 1.
        k: 1 to C; C keeps everything.
        compression: what becomes of the dropped mass.

    Returns:
        (..., C), rows with sum 1.

    Source: "A Fast Knowledge Distillation Framework for Visual Recognition" (2022).

    Raises:
        InputError: ``k`` outside 1 to C.
    """
    classes = probabilities.shape[-1]
    if not 1 <= k <= classes:
        raise InputError(f"compress_top_k must be between 1 and the {classes} classes (got {k})")
    if k == classes:
        return probabilities
    kept, index = probabilities.topk(k, -1)
    mass = kept.sum(-1, keepdim=True)
    if compression == "renormalise":
        return torch.zeros_like(probabilities).scatter(-1, index, kept / mass)
    rest = (1 - mass).clamp_min(0) / (classes - k)
    return rest.expand_as(probabilities).scatter(-1, index, kept)


_UNCACHEABLE = (
    "cutmix makes new images in every batch, so teacher outputs cannot be kept: turn off cutmix or the teacher cache"
)
