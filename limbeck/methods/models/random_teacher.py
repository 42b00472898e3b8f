"""Random teachers: an untrained, frozen network is distilled into a copy of itself, without labels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.dino_head import DINOHead
from limbeck.blocks.encoders import Encoder, Pooling, RawInput, feature_width
from limbeck.blocks.interpolation import Plane, blend_initialisations, linear_path, shuffle_parameters
from limbeck.core.batch import Batch, Losses, call_model, first_tensor
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.semi import SemiSupervisedData
from limbeck.core.stage import Stage
from limbeck.losses.logits import chunked_forward_kl, forward_kl
from limbeck.methods.models.base import ModelDistiller, make_network
from limbeck.metrics.landscape import mean_at, surface
from limbeck.report.landscapes import landscape_picture
from limbeck.tasks.base import Task
from limbeck.tasks.judging import costs
from limbeck.tasks.judging_probes import at_most, halves, has_labels, probe_encoder, probes_along

WATCHED = 2000
"""Samples at most, of training and of validation data, that a probe sees while training."""
SHOWN = 100
"""Test samples at most that the picture of the loss landscape is measured on."""
NEEDS_FULL_PRECISION = 1e-4
"""Below this alpha, bfloat16 and float16 cannot hold the difference between student and teacher."""


class RandomTeacher(ModelDistiller):
    r"""Label-free distillation of a frozen random network into a student of the same architecture that starts next to it.

    Encoder :math:`g : R^d \to R^r` and head :math:`h` (:class:`~limbeck.blocks.dino_head.DINOHead`: an MLP, a unit sphere, m
    unit-length prototypes) make :math:`f = h \circ g`, whose logits (B, m) are cosines. The teacher's :math:`\theta_T` are a random
    initialisation, frozen, in evaluation mode. The student starts between it and another initialisation :math:`\tilde\theta`,

    .. math::
        \theta_S = \frac{(1-\alpha)\,\theta_T + \alpha\,\tilde\theta}{\delta}, \qquad \delta = \sqrt{\alpha^2 + (1-\alpha)^2}

    which keeps the variance of the weights; constants of the initialisation (gains, zero biases) are left out of it
    (:func:`~limbeck.blocks.interpolation.blend_initialisations`). Student and teacher see the same inputs, and

    .. math::
        L(\theta_S) = \frac1B \sum_i \mathrm{KL}\big(\mathrm{softmax} f_T(x_i) \,\|\, \mathrm{softmax} f_S(x_i)\big)

    at temperature 1, or with ``loss="mse"`` the mean squared difference of the logits. No labels, no augmentation, no centring or
    sharpening, no moving average. The teacher is the global minimum of L, so a low loss is no success: success is that probes of the
    student's features beat those of the teacher's **and** of the raw input, which are always reported side by side. Labels serve the
    probes only.

    Near :math:`\alpha = 0` gradients are tiny, and adaptive steps are what scales them up: Adam with a small ``adam_eps``. Its first
    steps throw the student out of the teacher's neighbourhood, and it is the way back that changes the features; small networks that
    stayed near their teacher, at a low learning rate or a large ``adam_eps``, gained nothing in our pilots. In single precision an alpha below 1e-7 rounds almost away, and rounding errors
    of the softmax set the student in motion as well; mixed precision is turned off below 1e-4. Encoders with batch normalisation work
    (the student uses batch statistics, the teacher the initial ones), but then the two differ at :math:`\alpha = 0` already; one
    without it rules that explanation out.

    As a plain object::

        method = RandomTeacher(make_encoder(), make_encoder(), sample=images[:2], alpha=1e-10)
        loss = method(images)

    Args:
        student: the encoder, trained in place; any module that gives features (B, D), maps or tokens (pooled), or a network of this
            library, whose ``embed`` is used. With a teacher it brings :math:`\tilde\theta`, a fresh initialisation, and is moved to
            :math:`\theta_S`; alone it is :math:`\theta_T`, the teacher becomes a copy, and :math:`\tilde\theta` has its entries in
            another order, tensor by tensor, drawn from torch's global random state.
        teacher: another initialisation of the same architecture, frozen in place.
        config: hyper-parameters; or give single ones as keyword arguments.
        sample: inputs of a few samples, by which a dry run finds the width of the features; not needed where the encoder says it
            (``feature_dim`` or ``num_features``).

    Source: "Random Teachers are Good Teachers" (2023). Our decisions, where the paper leaves it open: the heads are interpolated like
    the encoders; the linear probe is converged logistic regression with C = 0.1 (the paper's ten epochs of AdamW are an option); the
    nearest-neighbour probe takes Euclidean distances of standardised features; a narrow head starts from
    stronger weights than the published 0.02 (``head_std``); sizes of the head and the batch are for small data, and the ``paper``
    preset leaves ``adam_eps`` at ours, since the paper names none.
    """

    name = "random-teacher"

    class Config(ModelDistiller.Config):
        epochs: float = Field(30, gt=0, description="passes over the training data")
        batch_size: int = Field(128, ge=1, description="samples per update, over all processes together")
        optimizer: Literal["adamw", "adam", "sgd"] = Field(
            "adam", description="update rule; sgd hardly moves a student that starts next to its teacher"
        )
        lr: float = Field(1e-3, gt=0, description="peak learning rate")
        weight_decay: float = Field(0.0, ge=0, description="weight decay (decoupled for adamw)")
        adam_eps: float = Field(1e-10, gt=0, description="added to the denominator of adam's and adamw's steps")
        schedule: Literal["constant", "cosine", "linear", "poly", "step"] = Field(
            "constant", description="course of the learning rate after warm-up"
        )
        alpha: float = Field(
            1e-10, ge=0, le=1, description="where the student starts: 0 at the teacher, 1 independent of it"
        )
        loss: Literal["kl", "mse"] = Field("kl", description="KL of the softmaxes, or squared difference of the logits")
        pooling: Pooling = Field("mean", description="of an encoder's maps and tokens: mean, or flatten")
        head_outputs: int = Field(1024, ge=2, description="logits, m")
        head_hidden: int = Field(256, ge=1, description="width of the head's MLP")
        head_bottleneck: int = Field(64, ge=1, description="width before the last layer")
        head_layers: int = Field(3, ge=1, description="linear layers of the head's MLP")
        head_activation: Literal["gelu", "relu"] = Field("gelu", description="between them")
        head_normalise: bool = Field(
            True, description="unit-length bottleneck and prototypes; off: a plain linear last layer"
        )
        chunk_rows: int | None = Field(
            None,
            ge=1,
            description="samples whose softmax is held at once, to save memory with very many logits; none: all",
        )
        probe_solver: Literal["logistic", "adamw"] = Field(
            "logistic", description="linear probe: converged logistic regression, or ten epochs of AdamW"
        )
        probe_c: float = Field(0.1, gt=0, description="inverse strength of the logistic regression's L2 penalty")
        probe_k: int = Field(20, ge=1, description="neighbours of the nearest-neighbour probe")
        head_std: float | None = Field(
            None, gt=0, description="deviation of the head's initial weights; none: 0.02 at 2048 inputs, more for fewer"
        )
        landscape: int = Field(
            13, ge=0, le=101, description="points on each side of the loss landscape in the result; 0 or 1: no picture"
        )

        presets = {
            "paper": {
                "epochs": 100,
                "batch_size": 256,
                "head_outputs": 65536,
                "head_hidden": 2048,
                "head_bottleneck": 256,
                "head_std": 0.02,
                "probe_solver": "adamw",
            }
        }

    class Setup(ModelDistiller.Setup):
        """What a run by name builds."""

        augment: bool = Field(
            False, description="random shifts (and flips where they make sense); the method wants none"
        )
        student: str | None = Field(
            None, description="encoder, or package.module:factory; none: vgg-w32-s4, without normalisation"
        )

    default_encoder = "vgg-w32-s4"
    teacher: Projected

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        config: Config | None = None,
        *,
        sample: Any = None,
        **overrides: Any,
    ) -> None:
        super().__init__(student, config, **overrides)
        settings = self.config
        if teacher is student:
            raise InputError(
                "teacher and student are the same module: give another initialisation, or no teacher at all"
            )
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise InputError(f"the teacher must be an nn.Module, not {type(teacher).__name__}")
        width = feature_width(student, sample, settings.pooling)
        like = next((p for p in student.parameters() if p.is_floating_point()), None)
        if like is None:
            raise InputError("the student has no parameters: there is nothing to distil into it")
        if teacher is None:
            teacher = copy.deepcopy(student)
            shuffle_parameters(student)
        self.head, target = (self._head(width).to(like) for _ in range(2))
        blend_initialisations(student, teacher, settings.alpha)
        blend_initialisations(self.head, target, settings.alpha)
        self.add_frozen("teacher", Projected(teacher, target, settings.pooling))
        self.probed: tuple[Data, str] | None = None
        """Labelled data that probes are fitted on, and what it is; :meth:`prepare_run` sets it."""

    def _head(self, width: int) -> DINOHead:
        c = self.config
        return DINOHead(
            width,
            c.head_outputs,
            hidden=c.head_hidden,
            bottleneck=c.head_bottleneck,
            layers=c.head_layers,
            activation=c.head_activation,
            normalise=c.head_normalise,
            init_std=c.head_std,
        )

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        """One term, ``kl`` or ``mse``."""
        student, teacher = self.both(batch)
        if self.config.loss == "mse":
            return Losses(mse=F.mse_loss(student, teacher))
        if self.config.chunk_rows is not None:
            return Losses(kl=chunked_forward_kl(student, teacher, chunk_rows=self.config.chunk_rows))
        return Losses(kl=forward_kl(student, teacher))

    def both(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, m) of student and teacher; those of the teacher without a graph."""
        tensor = first_tensor(batch.inputs)
        kind = "cpu" if tensor is None else tensor.device.type
        mixed = self.config.alpha >= NEEDS_FULL_PRECISION and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=mixed):
            with torch.no_grad():
                teacher: Tensor = call_model(self.teacher, batch.inputs)
            self.counters["teacher_forwards"] += len(teacher)
            student: Tensor = self.head(call_model(self.encoder, batch.inputs))
        return student, teacher

    @property
    def encoder(self) -> Encoder:
        """The student as a module from inputs to features (B, D)."""
        return Encoder(self.student, self.config.pooling)

    @property
    def teacher_encoder(self) -> Encoder:
        """The same of the teacher."""
        return Encoder(self.teacher.encoder.model, self.config.pooling)

    # ---- building by name --------------------------------------------------------------------------------------------

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        """Two initialisations of the encoder from ``seed``; the teacher's does not depend on alpha."""
        name = setup.student or cls.default_encoder
        student, teacher = (make_network(name, task, mix_seed(seed, number)) for number in (41, 42))
        sample = task.train.fetch(torch.arange(min(2, len(task.train))), None).inputs
        with preserved_random_state():
            seed_everything(mix_seed(seed, 43))
            return cls(student, teacher, config, sample=sample)

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        if student is None:
            raise InputError(f"{cls.name} needs student=… (an nn.Module that gives features)")
        return cls(student, teacher, config, sample=sample.inputs)

    # ---- running -----------------------------------------------------------------------------------------------------

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One stage, on all inputs, labelled or not."""
        everything = train.everything() if isinstance(train, SemiSupervisedData) else train
        return [self.stage("distillation", everything, val, seed=seed)]

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        """Remember the labelled data that probes will be fitted on: the training data, else the validation data."""
        for data, what in ((train, "training data"), (val, "validation data")):
            if data is not None and has_labels(data):
                self.probed = data, what
                return
        self.probed = None

    @torch.no_grad()
    def check_outputs(self, batch: Batch) -> None:
        features: Tensor = call_model(self.encoder, batch.inputs)
        if features.shape[0] != len(batch):
            raise InputError(f"the encoder gives {features.shape[0]} rows of features for {len(batch)} samples")
        if features.shape[1] != self.head.in_features:
            raise InputError(
                f"the encoder's features are {features.shape[1]} wide, but the head was made for {self.head.in_features}"
            )
        student, teacher = self.both(batch)
        exact = self.config.loss == "mse" or self.config.chunk_rows is not None
        if exact and torch.equal(student, teacher):
            raise InputError(
                f"with alpha={self.config.alpha:g} student and teacher compute exactly the same in {student.dtype}, and the loss has no "
                "gradient there: take a larger alpha (1e-4), double precision, or loss='kl' without chunk_rows"
            )

    def quick_metrics(self, data: Data) -> dict[str, float]:
        """Probes of the student on validation data where there are labels, and the loss there; at most 2,000 samples of each part."""
        found = self._validation_loss(data)
        if self.probed is not None and self.probed[0] is not data and has_labels(data):
            fitted, tested = (at_most(part, WATCHED) for part in (self.probed[0], data))
            scores = probe_encoder(self.encoder, fitted, tested, **self._probing)
            found.update(linear_probe=scores["linear_probe"], knn_probe=scores["knn_probe"])
        return found

    @torch.no_grad()
    def _validation_loss(self, data: Data) -> dict[str, float]:
        was_training, counted = self.training, self.counters.copy()
        self.eval()
        part = at_most(data, WATCHED)
        device = next(self.student.parameters()).device
        sums: dict[str, float] = {}
        for batch in part.batches():
            for name, value in self.losses(batch.to(device)).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
        self.train(was_training)
        self.counters = counted
        return {name: total / len(part) for name, total in sums.items()}

    # ---- judging -----------------------------------------------------------------------------------------------------

    def contestants(self) -> dict[str, nn.Module]:
        return {"student": self.encoder, "teacher": self.teacher_encoder}

    def probe(self, train: Data, test: Data) -> dict[str, dict[str, float]]:
        """Probes of the features of ``student``, ``teacher`` and raw ``input``: fitted on ``train``, measured on ``test``.

        Returns:
            by role ``linear_probe``, ``knn_probe`` (accuracies) and ``features``, the width.

        Raises:
            InputError: data without labels.
        """
        models = {**self.contestants(), "input": RawInput()}
        return {role: probe_encoder(model, train, test, **self._probing) for role, model in models.items()}

    @property
    def _probing(self) -> dict[str, Any]:
        return {"solver": self.config.probe_solver, "c": self.config.probe_c, "k": self.config.probe_k}

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """The probing report: student, teacher and raw input side by side, what the two networks cost, and the landscape.

        Probes are fitted on the labelled training data, else on validation data, else on one half of the test data and measured on
        the other.
        """
        fitted, what = (self.probed[0], self.probed[1]) if self.probed is not None else (None, "half of the test data")
        if fitted is None:
            fitted, test = halves(test)
        price = costs(self.contestants(), test)
        rows = [{"who": role, **found, **price.get(role, {})} for role, found in self.probe(fitted, test).items()]
        result: dict[str, Any] = {"rows": rows, "probes_fitted_on": f"{what}, {len(fitted):,} samples"}
        picture = self.picture(fitted, test) if self.config.landscape > 1 else None
        if picture is not None:
            result["pictures"] = [picture]
        return result

    @torch.no_grad()
    def picture(self, train: Data, test: Data) -> dict[str, str] | None:
        """The loss in the plane of teacher, student and another initialisation, and probes on the line from teacher to student.

        None where the student has not moved away from its teacher.
        """
        student = copy.deepcopy(Projected(self.student, self.head, self.config.pooling)).eval()
        teacher = copy.deepcopy(self.teacher)
        if all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True)):
            return None
        other = copy.deepcopy(teacher)
        with preserved_random_state():
            seed_everything(17)
            shuffle_parameters(other)
        part = at_most(test, SHOWN)

        def distance(output: Tensor, batch: Batch) -> Tensor:
            wanted = call_model(teacher, batch.inputs)
            return forward_kl(output, wanted, reduction="none")

        def value(states: dict[str, Tensor]) -> Tensor:
            return mean_at(student, states, part, {"kl": distance}, vectorise=False)["kl"]

        plane = Plane.through(teacher, student, other)
        loss = surface(plane, value, points=self.config.landscape)
        positions = torch.linspace(-0.5, 1.5, 9, dtype=torch.float64)
        states, few = linear_path(teacher, student, positions), [at_most(data, WATCHED // 2) for data in (train, test)]
        accuracy = probes_along(student.encoder, student, states, few[0], few[1], **self._probing)
        names = ("teacher", "student", "another initialisation")
        png = landscape_picture(
            loss.x.numpy(),
            loss.y.numpy(),
            loss.values.numpy(),
            dict(zip(names, loss.corners.tolist(), strict=True)),
            "KL(teacher, network)",
            positions=positions.numpy(),
            curves=accuracy,
            ends=("teacher", "student"),
        )
        return {
            "title": "Where the student went",
            "caption": f"Left: the loss on {len(part)} test samples in the plane of teacher, student and another random "
            "initialisation; the teacher is its global minimum. Right: probes of the features on the line through teacher and student.",
            "png": png,
        }


class Projected(nn.Module):
    """An encoder and its head, inputs in and logits (B, m) out."""

    def __init__(self, encoder: nn.Module, head: DINOHead, pooling: Pooling) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(encoder, pooling), head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(B, m)."""
        logits: Tensor = self.head(self.encoder(*args, **kwargs))
        return logits
