"""TGeo-KD: how much each sample trusts the teacher is learned by looking one step ahead at validation data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.blocks.class_means import ClassMeans
from limbeck.blocks.classes import class_count
from limbeck.blocks.fusion import (
    FeatureSet,
    RatioController,
    feature_parts,
    trilateral_features,
    weighted_soft_label_ratio,
)
from limbeck.blocks.teachers import TeacherOutput, Teachers
from limbeck.blocks.unroll import (
    Form,
    Hypergradient,
    Parameters,
    Solver,
    hypergradient,
    linear_loss,
    stateless,
    trainable,
)
from limbeck.core.batch import Batch, Losses, logits_of
from limbeck.core.data import Data, Stream, as_data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage, Stepper
from limbeck.losses.logits import forward_kl
from limbeck.methods.models.base import OfflineDistiller, make_network
from limbeck.report.histograms import histogram_png
from limbeck.tasks.base import Task
from limbeck.tasks.holdout import hold_out

MOST_SUMMARISED = 10_000
"""Training samples whose ratios the result summarises, at most."""


class TGeoKD(OfflineDistiller):
    r"""Knowledge distillation whose mix of teacher and label is learned for each sample, by bilevel optimisation.

    For a sample, :math:`S = \mathrm{softmax}(z_s)`, :math:`T = \mathrm{softmax}(z_t)`, :math:`G` the one-hot label and
    :math:`\bar T` the mean of :math:`T` over the training samples of its class, all in :math:`R^C`. They span two triangles, S-T-G
    within the sample and S-:math:`\bar T`-G between samples. A small controller :math:`f_\omega` reads their vertices, edges or
    angles (:func:`~limbeck.blocks.fusion.trilateral_features`; S without gradient) and gives the sample's fusion ratio

    .. math::
        \alpha_n &= f_\omega(\Delta_n) \in [m, 1-m] \\
        J_{in}(\theta, \omega) &= \mathrm{mean}_n\big[\alpha_n \tau^2\,\mathrm{KL}(\mathrm{softmax}(z_t/\tau)\,\|\,
            \mathrm{softmax}(z_s/\tau))_n + (1-\alpha_n)\,\mathrm{CE}(z_s, y)_n\big] \quad\text{on training data} \\
        J_{out}(\theta) &= \mathrm{mean}\,\mathrm{CE}(z_s, y) \quad\text{on validation data} \\
        \omega^* &= \arg\min_\omega J_{out}(\theta^*(\omega)), \qquad \theta^*(\omega) = \arg\min_\theta J_{in}(\theta, \omega)

    Every ``controller_every`` steps, after a warm-up with constant ratios, :math:`\omega` takes an Adam step along
    :math:`dJ_{out}(\theta - \eta\nabla_\theta J_{in}(\theta,\omega))/d\omega` (:mod:`limbeck.blocks.unroll`); then the student
    takes its real step with the new ratios, which are constants there. So :math:`\alpha_n` rises where the teacher's gradient
    agrees better with the validation gradient than the label's does:
    :math:`dJ_{out}/d\alpha_n = -\tfrac{\eta}{B}\langle\nabla J_{out}, \nabla_\theta[\tau^2\mathrm{KL}_n - \mathrm{CE}_n]\rangle`.

    The validation data of :math:`J_{out}` is carved from the training data (``validation_fraction``, stratified, not trained on),
    unless ``validation`` is given. A run's own validation part is for choosing and is not touched, nor is its test part.

    In a loop of one's own::

        method.measure(train)                                  # class means of the teacher, once
        for batch, held_out in zip(train_loader, val_loader):
            method.controller_loss(batch, held_out).backward() # gradients for method.controller alone
            controller_optimizer.step(); controller_optimizer.zero_grad()
            method(batch).backward()                           # gradients for method.student alone
            optimizer.step(); optimizer.zero_grad()

    Without :meth:`measure`, class means are those of the batch at hand. After training, :meth:`ratios` gives the ratios of
    samples; the result of a run has the mean ratios that the student was trained with and a picture of those at the end. The two
    may differ: the decay of :math:`\omega` is part of Adam's gradient, and where the student no longer makes mistakes on the
    validation data the hypergradient falls below it. Adam then takes full steps towards :math:`\omega = 0`, and all ratios go
    back to one half. With ``controller_weight_decay=0`` they run to the ends of their range instead.

    ``ratio`` names what the ratio is. Besides ``learned``: ``untrained`` (a controller that stays as it was initialised; what the
    published script amounts to, where the controller gets no gradient), ``fixed`` (plain distillation), ``wls``
    (:math:`1-\exp(-\mathrm{CE}_s/\mathrm{CE}_t)`), ``annealing`` (falls linearly from ``alpha`` to 0 over training),
    ``confidence`` (the teacher's probability of the label).

    Args:
        student: see :class:`~limbeck.methods.models.base.ModelDistiller`. BatchNorm's running statistics are not moved by virtual
            steps.
        teacher: see :class:`~limbeck.methods.models.base.OfflineDistiller`; several are joined by their mean probabilities.
        config: hyper-parameters; or give single ones as keyword arguments.
        num_classes: C; None reads it off the student.
        validation: data for the outer loss (anything that :func:`limbeck.core.data.as_data` takes); None: carved from training.

    Source: "Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation" (2024). The paper does not say
    how the bilevel problem is solved, and the published script does not solve it; one-step unrolling with a plain gradient step
    of size ``virtual_lr`` is our decision, as are warm-up, margin, controller's rate, and class means from unaugmented samples.
    How the baselines ``annealing`` and ``confidence`` are defined in the paper's comparison is unverified.
    """

    name = "tgeo-kd"

    class Config(OfflineDistiller.Config):
        optimizer: Literal["adamw", "adam", "sgd"] = Field("sgd", description="update rule of the student")
        lr: float = Field(0.05, gt=0, description="peak learning rate of the student")
        weight_decay: float = Field(5e-4, ge=0, description="weight decay of the student (decoupled for adamw)")
        temperature: float = Field(4.0, gt=0, description="softens both distributions in the soft loss")
        ratio: Literal["learned", "untrained", "fixed", "wls", "annealing", "confidence"] = Field(
            "learned", description="how the weight of the teacher is set; all but 'learned' are baselines and controls"
        )
        alpha: float = Field(
            0.5, ge=0, le=1, description="ratio in the warm-up and of 'fixed'; where 'annealing' starts"
        )
        controller_features: FeatureSet = Field("option3", description="which geometry the controller reads")
        controller_lr: float = Field(5e-3, gt=0, description="learning rate of the controller (adam)")
        controller_weight_decay: float = Field(
            1e-4, ge=0, description="weight decay of the controller; against ratios that get stuck at 0 or 1"
        )
        controller_every: int = Field(1, ge=1, description="student steps per controller step")
        controller_warmup: float = Field(
            0.08, ge=0, lt=1, description="fraction of training with the constant ratio 'alpha' at first"
        )
        ratio_margin: float = Field(0.01, ge=0, lt=0.5, description="how far the controller's ratios stay from 0 and 1")
        hypergrad: Solver = Field(
            "one_step", description="one virtual step, its limit with identity as inverse Hessian, or a Neumann series"
        )
        hypergrad_form: Form = Field(
            "finite_difference", description="products with second derivatives: by differences (cheap), or exact"
        )
        hypergrad_eps: float = Field(1e-2, gt=0, description="norm of the perturbation in the finite differences")
        hypergrad_terms: int = Field(5, ge=0, description="terms of the Neumann series after the first")
        unroll: Literal["all", "last_layer"] = Field(
            "all", description="which student parameters take the virtual step; last_layer for big networks"
        )
        virtual_lr: float | None = Field(None, gt=0, description="step size of the virtual step; none: lr")
        validation_fraction: float = Field(
            0.1, gt=0, lt=1, description="part of the training data held out for the outer loss"
        )
        validation_batch: int = Field(256, ge=1, description="held-out samples per controller step, at most")

        presets = {
            "paper": {
                "epochs": 240,
                "schedule": "step",
                "milestones": (0.625, 0.75, 0.875),
            }
        }

        @model_validator(mode="after")
        def _whole_batches(self) -> Self:
            if self.accumulate != 1:
                raise ValueError("controller and student take turns within a step: set accumulate to 1")
            return self

    progress: Tensor
    ratio_means: Tensor
    ratio_counts: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        config: Config | None = None,
        *,
        num_classes: int | None = None,
        validation: Any = None,
        **overrides: Any,
    ) -> None:
        super().__init__(student, teacher, config, **overrides)
        self.num_classes = class_count(student, "the controller") if num_classes is None else num_classes
        self.validation = None if validation is None else as_data(validation)
        self._training: Data | None = None
        like = next((p for p in student.parameters() if p.is_floating_point()), torch.zeros(()))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        size = feature_parts(self.config.controller_features) * self.num_classes
        self.controller = RatioController(size, self.config.ratio_margin).to(like.device, dtype)
        self.class_means = ClassMeans(self.num_classes).to(like.device, dtype)
        self.register_buffer("progress", self.class_means.means.new_zeros(()))
        # Of the samples that the teacher gets wrong and right: the mean ratio after the warm-up, and over how many.
        self.register_buffer("ratio_means", self.class_means.means.new_zeros(2))
        self.register_buffer("ratio_counts", torch.zeros(2, dtype=torch.long, device=like.device))

    # ---- the inner loss ----------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        """The inner loss with the present ratios as constants; gradients for the student alone."""
        student, teacher = self.student_logits(batch), self.teach(batch)
        return self._mixed(student, teacher, batch, self._ratios(student, teacher, batch))

    def _mixed(self, student: Tensor, teacher: TeacherOutput, batch: Batch, ratio: Tensor) -> Losses:
        soft, hard = self._rows(student, teacher, batch)
        ratio = ratio.to(soft)
        out = Losses(kd=(ratio * soft).mean(), ce=((1 - ratio) * hard).mean())
        return out.observe(ratio=ratio.mean(), ratio_spread=ratio.std(correction=0))

    def _rows(self, student: Tensor, teacher: TeacherOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """Soft and hard loss of each sample, (B,) both."""
        tau = self.config.temperature
        if len(self.teachers) == 1:
            soft = forward_kl(student, teacher.logits, tau, "none")
        else:
            target = teacher.probabilities(tau).clamp_min(1e-12)
            soft = F.kl_div(F.log_softmax(student / tau, -1), target, reduction="none").sum(-1)
        return tau**2 * soft, F.cross_entropy(student, self.labels(batch), reduction="none")

    # ---- ratios ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def ratios(self, batch: Any) -> Tensor:
        """(B,) the weight of the teacher for each sample, with the student in evaluation mode; needs labels."""
        batch = Batch.of(batch).to(self.progress.device)
        was_training = self.student.training
        self.student.eval()
        try:
            return self._ratios(self.student_logits(batch), self.teachers(batch), batch)
        finally:
            self.student.train(was_training)

    @torch.no_grad()
    def _ratios(self, student: Tensor, teacher: TeacherOutput, batch: Batch) -> Tensor:
        config = self.config
        if config.ratio in ("learned", "untrained"):
            found: Tensor = self.controller(self.features(student, teacher, self.labels(batch)))
            return found
        if config.ratio in ("wls", "confidence"):
            truth = self.class_means.truth(self.labels(batch))
            likelihood = (truth * teacher.probabilities().to(truth)).sum(-1)
            if config.ratio == "confidence":
                return likelihood
            hard = F.cross_entropy(student, self.labels(batch), reduction="none")
            return weighted_soft_label_ratio(hard, -likelihood.clamp_min(1e-12).log())
        falling = 1 - self.progress if config.ratio == "annealing" else torch.ones_like(self.progress)
        return (config.alpha * falling).expand(len(student))

    @torch.no_grad()
    def features(self, student: Tensor, teacher: TeacherOutput, labels: Tensor) -> Tensor:
        """(B, k C) what the controller reads, from the student's logits (B, C); no gradients.

        Raises:
            InputError: the controller was made for another number of classes.
        """
        s, t = torch.softmax(student, -1).to(self.progress), teacher.probabilities().to(self.progress)
        if s.shape[-1] != self.num_classes or t.shape[-1] != self.num_classes:
            raise InputError(
                f"the controller was made for {self.num_classes} classes, but the student has {s.shape[-1]} and the teacher "
                f"{t.shape[-1]}: give num_classes=…"
            )
        truth = self.class_means.truth(labels)
        return trilateral_features(s, t, truth, self.class_means(t, truth), self.config.controller_features)

    @torch.no_grad()
    def measure(self, data: Any) -> None:
        """Fix the class means of the teacher's probabilities on ``data`` (anything that ``as_data`` takes), unaugmented."""
        data = as_data(data)
        batches = (batch.to(self.progress.device) for batch in data.batches())
        if data.augmented:  # a cache would take the plain sample for one of the views
            batches = (replace(batch, index=None) for batch in batches)
        self.class_means.measure((self.teach(batch).probabilities(), self.labels(batch)) for batch in batches)

    # ---- the outer step ----------------------------------------------------------------------------------------------

    def controller_loss(self, batch: Any, validation: Any) -> Tensor:
        """A scalar whose gradient for the controller is that of the outer loss after a virtual step; none for the student."""
        batch, validation = Batch.of(batch), Batch.of(validation)
        with torch.no_grad():
            student = self.student_logits(batch)
        found = self.hypergradient(batch, validation, student, self.teach(batch))
        return linear_loss(dict(self.controller.named_parameters()), found.gradient)

    def hypergradient(self, batch: Batch, validation: Batch, student: Tensor, teacher: TeacherOutput) -> Hypergradient:
        """dJ_out / d omega on one training and one validation batch; nothing is changed.

        Args:
            batch, validation: with labels.
            student: (B, C) logits on the training batch, from which the features come.
            teacher: what the teachers say about it.
        """
        config = self.config
        run, weigh = stateless(self.student), stateless(self.controller)
        features = self.features(student.detach(), teacher, self.labels(batch))
        labels = self.labels(validation)

        def inner(theta: Parameters, omega: Parameters) -> Tensor:
            ratio = weigh(omega, features)
            soft, hard = self._rows(logits_of(run(theta, batch.inputs)), teacher, batch)
            return (ratio * soft + (1 - ratio) * hard).mean()

        def outer(theta: Parameters) -> Tensor:
            return F.cross_entropy(logits_of(run(theta, validation.inputs)), labels)

        return hypergradient(
            inner,
            outer,
            trainable(self.student, last_layer=config.unroll == "last_layer"),
            trainable(self.controller),
            config.virtual_lr or config.lr,
            solver=config.hypergrad,
            form=config.hypergrad_form,
            eps=config.hypergrad_eps,
            terms=config.hypergrad_terms,
        )

    # ---- running -----------------------------------------------------------------------------------------------------

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One stage; with a learned (or untrained) ratio on what ``validation_fraction`` leaves of the training data."""
        held: Data | None = self.validation
        if held is None and self.config.ratio in ("learned", "untrained"):
            train, held = hold_out(train, self.config.validation_fraction, mix_seed(seed, 41))
        self._training = train
        outer = None if held is None else Stream(held, self.config.validation_batch, seed=mix_seed(seed, 42))
        stage = self.stage("distillation", train, val, seed=seed)
        steps = stage.steps

        def update(batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            assert batch is not None
            return self.update(batch, stepper, outer, steps)

        needs_means = self.config.ratio in ("learned", "untrained")
        begin = (lambda: self.measure(train)) if needs_means else None
        return [replace(stage, losses=None, update=update, begin=begin)]

    def update(self, batch: Batch, stepper: Stepper, outer: Stream | None, steps: int) -> Mapping[str, Tensor]:
        """One step: the controller where it is its turn, then the student.

        Args:
            batch: of training data.
            stepper: with optimisers ``student`` and, for a learned ratio, ``controller``.
            outer: batches of validation data, one for each controller step.
            steps: how many there are in all.
        """
        config = self.config
        self.progress.fill_(stepper.step / steps)
        has_controller = config.ratio in ("learned", "untrained")
        warming = has_controller and stepper.step < round(config.controller_warmup * steps)
        student, teacher = self.student_logits(batch), self.teach(batch)
        if config.ratio == "learned" and not warming and stepper.step % config.controller_every == 0:
            assert outer is not None
            validation = outer.batch(stepper.step // config.controller_every).to(student.device)
            found = self.hypergradient(batch, validation, student, teacher)
            stepper.minimise(linear_loss(dict(self.controller.named_parameters()), found.gradient), "controller")
        if warming:
            ratio = torch.full((len(student),), config.alpha, device=student.device)
        else:
            ratio = self._ratios(student, teacher, batch)
            self._remember(ratio, self.teacher_right(teacher, batch))
        losses = self._mixed(student, teacher, batch, ratio)
        stepper.minimise(losses, "student")
        return losses.logged()

    def optimisers(self, steps: int) -> Mapping[str, Optimised]:
        """The student's with its schedule; Adam at a constant rate for a controller that learns."""
        made = {
            "student": make_optimised([p for p in self.student.parameters() if p.requires_grad], self.config, steps)
        }
        if self.config.ratio == "learned":
            adam = torch.optim.Adam(
                self.controller.parameters(),
                lr=self.config.controller_lr,
                weight_decay=self.config.controller_weight_decay,
            )
            made["controller"] = Optimised(adam)
        return made

    # ---- building by name --------------------------------------------------------------------------------------------

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        student = make_network(setup.student or task.networks["student"], task, seed)
        teachers = cls.teachers_for(task, setup, seed=seed, progress=progress)
        with preserved_random_state():
            seed_everything(mix_seed(seed, 43))
            return cls(student, teachers, config, num_classes=task.num_classes)

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        cls.require(student=student, teacher=teacher)
        teachers = teacher if isinstance(teacher, Teachers) else Teachers(teacher)
        return cls(student, teachers, config, num_classes=teachers(sample).logits.shape[-1])

    # ---- judging -----------------------------------------------------------------------------------------------------

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """The family's measures, the mean ratios that the student was trained with, and the ratios at the end as a picture."""
        result = super().evaluate(test, class_names)
        if self._training is None or self.config.ratio in ("fixed", "annealing"):
            return result
        for name, mean, count in zip(("wrong", "right"), self.ratio_means, self.ratio_counts, strict=True):
            if int(count):
                result[f"ratio_teacher_{name}"] = float(mean)
        ratio, right = self.training_ratios(self._training)
        result["final_ratio"] = float(ratio.mean())
        caption = (
            f"How far each of {len(ratio):,} training samples trusts the teacher rather than its label at the end of training, "
            "where the teacher's answer is the label and where it is not. Earlier ratios may have been others."
        )
        groups = {"teacher right": ratio[right].tolist(), "teacher wrong": ratio[~right].tolist()}
        picture = {"title": "Fusion ratios", "caption": caption, "png": histogram_png(groups, "weight of the teacher")}
        result["pictures"] = [*result.get("pictures", []), picture]
        return result

    @torch.no_grad()
    def training_ratios(self, data: Data, most: int = MOST_SUMMARISED) -> tuple[Tensor, Tensor]:
        """Ratios (n,) of up to ``most`` evenly spaced samples, unaugmented, and whether the teacher gives their labels (n,)."""
        ids = torch.arange(0, len(data), -(-len(data) // most))
        ratios, right = [], []
        for part in ids.split(512):
            batch = replace(data.fetch(part, None).to(self.progress.device), index=None)
            ratios.append(self.ratios(batch).cpu())
            right.append(self.teacher_right(self.teachers(batch), batch).cpu())
        return torch.cat(ratios), torch.cat(right)

    def teacher_right(self, teacher: TeacherOutput, batch: Batch) -> Tensor:
        """(B,) whether the teacher's answer is the label."""
        return teacher.probabilities().argmax(-1) == self.class_means.truth(self.labels(batch)).argmax(-1)

    @torch.no_grad()
    def _remember(self, ratio: Tensor, right: Tensor) -> None:
        groups = F.one_hot(right.long(), 2)
        added = groups.sum(0)
        self.ratio_counts += added
        total = (ratio.to(self.progress)[:, None] * groups).sum(0)
        self.ratio_means += (total - added * self.ratio_means) / self.ratio_counts.clamp_min(1)
