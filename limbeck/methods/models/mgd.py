"""Multi-granularity distillation: a wide and a deep teacher for a light segmenter with few labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.blocks.cutmix_masks import MixedPair
from limbeck.blocks.taps import Taps
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.losses.segmentation import (
    IGNORED,
    ohem_cross_entropy,
    pixel_cross_entropy,
    pooled_logit_l1,
    self_similarity_loss,
)
from limbeck.methods.models.base import make_network
from limbeck.methods.models.segmentation_base import SegmentationDistiller, check_maps
from limbeck.tasks.base import Task
from limbeck.tasks.judging_segmentation import segmenter_metrics
from limbeck.tasks.segmenters import reference_segmenter

ROLES = ("wide", "deep")


class MGD(SegmentationDistiller):
    r"""Two frozen, complementary teachers, one wide (W) and one deep (D), teach a light segmenter S at three granularities.

    A step has labelled images x with label maps y, unlabelled batches :math:`u_0, u_1` (B, channels, H, W) and a CutMix mask
    :math:`m \in \{0, 1\}^{B \times 1 \times H \times W}` of several boxes (:func:`~limbeck.blocks.cutmix_masks.box_masks`). With
    :math:`u = (1 - m)\,u_0 + m\,u_1` and the teachers' logits on the clean images mixed by the same mask, before the largest is
    taken,

    .. math::
        p^k &= \arg\max_c \big[(1 - m)\,T_k(u_0) + m\,T_k(u_1)\big]_c, \qquad k \in \{W, D\} \\
        L_{sup} &= \mathrm{CE}(S(x), y) \\
        L_{pix,l} &= \sum_k \mathrm{CE}\big(S(x), \arg\max T_k(x)\big), \qquad
        L_{pix,u} = \sum_k \mathrm{CE}\big(S(u), p^k\big) \\
        L_{img} &= \lambda_1 \sum_{b,c} \big|\overline{S(u)}_{bc} - \overline{T_D(u)}_{bc}\big| \\
        L_{reg} &= \lambda_2\,\mathrm{mean}_{b,i,j} \big(M^S_{bij} - M^W_{bij}\big)^2 \\
        L &= L_{sup} + L_{pix,u} + L_{pix,l} + L_{img} + L_{reg}

    Cross-entropies are means over the pixels that count. A bar is the mean over H and W. :math:`M` (B, 49, 49) holds the cosines
    between the regions of a feature map that is averaged over a 7 x 7 grid, so the features' channels and sizes need not agree
    and there is no projector. Image semantics come from the deep teacher and the regions' content from the wide one. There is no
    confidence threshold and no ramp-up. Pixels that are padding in the unlabelled images (see
    :meth:`~limbeck.blocks.cutmix_masks.MixedPair.draw`), or -100 in y, are left out of the pseudo-label terms as well.

    Teachers. They are frozen and in evaluation mode. The published code leaves them in training mode, where their batch norm
    uses the batch's statistics: ``teacher_bn_train`` does that (running statistics are left alone; nothing reads them then). That
    code also adds the teachers' own cross-entropies, against y and against the student's pseudo labels
    :math:`p^S`, without a gradient to anybody: constants, which are dropped here. ``teacher_terms`` computes them for the log; the
    student then also runs over :math:`u_0, u_1`, in evaluation mode so that nothing is trained by looking.

    Ablations. ``pixel_labelled``, ``pixel_unlabelled``, ``weight_image`` and ``weight_region`` set the levels' weights (0 turns one
    off); ``pixel_teachers``, ``image_teacher`` and ``region_teacher`` say who gives what, so one teacher or the swap are
    settings. A teacher that nothing needs may be None.

    Args:
        student: from images to logits at the images' size. It is trained in place.
        teacher_wide, teacher_deep: trained segmenters of the same classes in the same order; modules are frozen in place.
        config: hyper-parameters; or give single ones as keyword arguments.

    In a loop of your own a batch is ``{"inputs": x, "labels": y, "unlabelled": (u0, u1)}``.

    By name both teachers are trained first, by cross pseudo supervision with CutMix on the same labelled and unlabelled images,
    and kept in the cache folder (:func:`~limbeck.tasks.segmenters.reference_segmenter`).

    Source: "Multi-Granularity Distillation Scheme Towards Lightweight Semi-Supervised Semantic Segmentation" (2022) and its
    published code. Our decisions: evaluation mode of the teachers; padding left out of pseudo labels but not of the image and
    region levels; regions shorter than 1e-6 have similarity 0, where the published division gives NaN; the sum of
    :math:`L_{img}` goes over the whole batch also where it is cut into micro-batches or divided among processes; the published
    schedule's momentum is Nesterov's here; small-scale defaults (AdamW, cosine) are ours.
    """

    name = "mgd"
    teachers: nn.ModuleDict

    class Config(SegmentationDistiller.Config):
        pixel_labelled: float = Field(1.0, ge=0, description="weight of the teachers' hard labels on labelled images")
        pixel_unlabelled: float = Field(1.0, ge=0, description="weight of the teachers' hard labels on mixed images")
        weight_image: float = Field(0.002, ge=0, description="weight of the pooled logits' difference (lambda 1)")
        weight_region: float = Field(100.0, ge=0, description="weight of the region similarities (lambda 2)")
        image_reduction: Literal["sum", "mean"] = Field(
            "sum", description="over batch and classes; with mean, weight_image is about 0.05 / classes"
        )
        pixel_teachers: Literal["both", "wide", "deep"] = Field("both", description="whose hard labels are learnt")
        image_teacher: Literal["wide", "deep"] = Field("deep", description="whose pooled logits are matched")
        region_teacher: Literal["wide", "deep"] = Field("wide", description="whose region similarities are matched")
        feature_tap: str | None = Field(
            None, description="the student's layer for the region level; none: its feature_path"
        )
        teacher_tap: str | None = Field(
            None, description="the same for the region teacher; none: its feature_path, or feature_tap"
        )
        regions: int = Field(7, ge=2, description="regions along each side")
        supervised: Literal["ce", "ohem"] = Field("ce", description="loss on the labels; ohem counts hard pixels only")
        ohem_threshold: float = Field(0.7, gt=0, le=1, description="a pixel is hard up to this probability")
        ohem_keep: float = Field(0.08, ge=0, le=1, description="fraction of the batch's pixels that counts at least")
        boxes: int = Field(3, ge=1, description="boxes of a CutMix mask")
        box_area_low: float = Field(0.25, gt=0, le=1, description="smallest area of a mask's boxes, of the image's")
        box_area_high: float = Field(0.5, gt=0, le=1, description="largest area of a mask's boxes, of the image's")
        teacher_bn_train: bool = Field(
            False, description="the teachers' batch norm uses the batch's statistics, as in the published code"
        )
        teacher_terms: bool = Field(
            False, description="log the published code's terms that are constant for the student (slower)"
        )

        presets = {
            "paper": {
                "epochs": 34,
                "batch_size": 8,
                "unlabelled_batch_size": 8,
                "optimizer": "sgd",
                "lr": 0.0025,
                "weight_decay": 1e-4,
                "schedule": "poly",
                "warmup": 0.0,
            },
            "cityscapes": {
                "epochs": 137,
                "batch_size": 8,
                "unlabelled_batch_size": 8,
                "optimizer": "sgd",
                "lr": 0.04,
                "weight_decay": 1e-4,
                "schedule": "poly",
                "warmup": 0.0,
                "weight_image": 0.001,
                "supervised": "ohem",
                "ohem_keep": 50000 / 800**2,
            },
        }

        @model_validator(mode="after")
        def _areas_in_order(self) -> Self:
            if self.box_area_low > self.box_area_high:
                raise ValueError(f"box_area_low {self.box_area_low} is above box_area_high {self.box_area_high}")
            return self

    class Setup(SegmentationDistiller.Setup):
        """What a run by name builds."""

        teacher: tuple[str, ...] = Field(
            (),
            description="wide and deep teacher network, or package.module:factory with weights; none: the task's own",
        )
        teacher_steps: int | None = Field(None, ge=1, description="updates of each reference teacher; none: 400")

    def __init__(
        self,
        student: nn.Module,
        teacher_wide: nn.Module | None,
        teacher_deep: nn.Module | None,
        config: Config | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(student, config, **overrides)
        given = {"wide": teacher_wide, "deep": teacher_deep}
        for role, model in given.items():
            if model is None and role in self.needed():
                raise InputError(f"teacher_{role} is needed by these settings and is None: give it, or change {_WHERE}")
            if model is not None and not isinstance(model, nn.Module):
                raise InputError(f"teacher_{role} must be an nn.Module, not {type(model).__name__}")
            if model is student:
                raise InputError(f"teacher_{role} and the student are the same module: give a copy (copy.deepcopy)")
        self.add_frozen("teachers", nn.ModuleDict({r: m for r, m in given.items() if m is not None}))
        self._taps: tuple[Taps, Taps] | None = None
        if self.config.weight_region:
            teacher = self.teachers[self.config.region_teacher]
            own = _feature_path(student, self.config.feature_tap, "student", "feature_tap")
            other = self.config.teacher_tap or getattr(teacher, "feature_path", None) or self.config.feature_tap
            other = _feature_path(teacher, other, f"{self.config.region_teacher} teacher", "teacher_tap")
            self._taps = Taps(student, own), Taps(teacher, other)
            self._paths = own, other

    def needed(self) -> set[str]:
        """The teachers that the settings ask for."""
        config = self.config
        pixel = ROLES if config.pixel_teachers == "both" else (config.pixel_teachers,)
        found = set(pixel) if config.pixel_labelled or config.pixel_unlabelled else set()
        found |= {config.image_teacher} if config.weight_image else set()
        return found | ({config.region_teacher} if config.weight_region else set())

    def unlabelled_batches(self) -> int:
        config = self.config
        return 2 if config.pixel_unlabelled or config.weight_image or config.weight_region else 0

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        config = self.config
        labels = self.labels(batch)
        logits = self.student_logits(batch)
        out = Losses(supervised=self.supervised_loss(logits, labels))
        if config.pixel_labelled:
            for role in self.pixel_roles:
                said = self.ask(role, batch.inputs)
                pseudo = said.argmax(1).masked_fill(labels == IGNORED, IGNORED)
                out.add(f"pixel_labelled_{role}", pixel_cross_entropy(logits, pseudo), config.pixel_labelled)
                if config.teacher_terms:
                    out.observe(**{f"{role}_supervised": pixel_cross_entropy(said, labels)})
        if self.unlabelled_batches():
            pair = MixedPair.draw(
                batch.unlabelled, boxes=config.boxes, area=(config.box_area_low, config.box_area_high)
            )
            self._unlabelled_terms(out, pair)
        return out

    def supervised_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with the labels, of all pixels or of the hard ones."""
        config = self.config
        if config.supervised == "ohem":
            return ohem_cross_entropy(logits, labels, config.ohem_threshold, round(config.ohem_keep * labels.numel()))
        return pixel_cross_entropy(logits, labels)

    def _unlabelled_terms(self, out: Losses, pair: MixedPair) -> None:
        config = self.config
        images = pair.images
        taps: AbstractContextManager[Any] = nullcontext() if self._taps is None else self._taps[0]
        with taps as own:
            logits = logits_of(call_model(self.student, images))
        if config.pixel_unlabelled:
            for role in self.pixel_roles:
                pseudo = pair.pseudo_labels(self.ask(role, pair.both))
                out.add(f"pixel_mixed_{role}", pixel_cross_entropy(logits, pseudo), config.pixel_unlabelled)
        mixed: dict[str, Tensor] = {}
        if self._taps is not None:
            with self._taps[1] as other:
                mixed[config.region_teacher] = self.ask(config.region_teacher, images)
            regions = self_similarity_loss(own[self._paths[0]], other[self._paths[1]].detach(), config.regions)
            out.add("region", regions, config.weight_region)
        if config.weight_image:
            if config.image_teacher not in mixed:
                mixed[config.image_teacher] = self.ask(config.image_teacher, images)
            image = pooled_logit_l1(logits, mixed[config.image_teacher], config.image_reduction)
            parts = self._parts() if config.image_reduction == "sum" else 1
            out.add("image", image, config.weight_image * parts)
        if config.teacher_terms:
            own_labels = self._own_pseudo_labels(pair)
            for role in self.pixel_roles:
                said = mixed[role] if role in mixed else self.ask(role, images)
                out.observe(**{f"{role}_against_student": pixel_cross_entropy(said, own_labels)})

    @property
    def pixel_roles(self) -> tuple[str, ...]:
        """Whose hard labels are learnt."""
        return ROLES if self.config.pixel_teachers == "both" else (self.config.pixel_teachers,)

    @torch.no_grad()
    def ask(self, role: str, images: Tensor) -> Tensor:
        """A teacher's logits (B, C, H, W), without a graph; counted in ``counters['teacher_forwards']``.

        Raises:
            InputError: logits of another size than the images.
        """
        teacher = self.teachers[role]
        self.counters["teacher_forwards"] += len(images)
        with _batch_statistics(teacher) if self.config.teacher_bn_train else nullcontext():
            logits = logits_of(call_model(teacher, images))
        check_maps(f"{role} teacher", logits, Batch(images))
        return logits

    @torch.no_grad()
    def _own_pseudo_labels(self, pair: MixedPair) -> Tensor:
        flags = [(module, module.training) for module in self.student.modules()]
        self.student.eval()
        try:
            return pair.pseudo_labels(logits_of(call_model(self.student, pair.both)))
        finally:
            for module, training in flags:
                module.training = training

    def _parts(self) -> int:
        """In how many equal parts a batch is differentiated: gradients are averaged over them, and a sum must not be."""
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        return int(self.config.accumulate) * (torch.distributed.get_world_size() if spread else 1)

    # ---- checks and results ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_outputs(self, batch: Batch) -> None:
        super().check_outputs(batch)
        own = self.student_logits(batch)
        for role in self.teachers:
            said = self.ask(role, batch.inputs)
            if said.shape[1] != own.shape[1]:
                raise InputError(
                    f"the student has {own.shape[1]} classes and the {role} teacher {said.shape[1]}: they must be the same"
                )

    def check(self, batch: Batch) -> None:
        counted = self.counters.copy()
        super().check(batch)
        self.counters = counted

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        if val is not None:
            self.check_teachers(val)

    def check_teachers(self, data: Data) -> dict[str, float]:
        """Each teacher's mean IoU through the student's own pipeline; warns where it is no better than one class everywhere.

        A wrong normalisation or class order is the usual hidden cause of distillation that does not work.
        """
        labels = data.labels_tensor()
        counts = torch.bincount(labels[labels != IGNORED])
        chance = float(counts.max() / counts.sum()) / int((counts > 0).sum())
        found = {}
        for role, model in self.teachers.items():
            found[role] = segmenter_metrics(model, data)["miou"]
            if found[role] <= chance:
                warnings.warn(
                    f"the {role} teacher has {found[role]:.1%} mean IoU on validation data, no better than one class "
                    f"everywhere ({chance:.1%}): check its weights, normalisation and class order",
                    stacklevel=2,
                )
        return found

    def contestants(self) -> dict[str, nn.Module]:
        return {"student": self.student, **{f"teacher {role}": model for role, model in self.teachers.items()}}

    # ---- building by name --------------------------------------------------------------------------------------------

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        student = make_network(setup.student or task.networks["student"], task, seed)
        teachers = cls.teachers_for(task, setup, seed=seed, progress=progress)
        return cls(student, teachers["wide"], teachers["deep"], config)

    @classmethod
    def teachers_for(cls, task: Task, setup: Any, *, seed: int = 0, progress: bool = True) -> Mapping[str, nn.Module]:
        """Reference teachers by role, or those named in the setup.

        Raises:
            InputError: one name, or more than two; a task without networks for these roles.
        """
        names = setup.teacher
        if not names:
            if any(f"teacher_{role}" not in task.networks for role in ROLES):
                raise InputError(f"task '{task.name}' knows no wide and deep teacher: name two networks with teacher")
            names = tuple(task.networks[f"teacher_{role}"] for role in ROLES)
        if len(names) != 2:
            raise InputError(f"mgd takes two teachers, the wide and the deep one (got {len(names)})")
        return {
            role: make_network(name, task, seed)
            if ":" in name
            else reference_segmenter(task, name, seed=number, steps=setup.teacher_steps, progress=progress)
            for number, (role, name) in enumerate(zip(ROLES, names, strict=True))
        }

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        """``teacher`` is the pair (wide, deep), or a mapping with these keys."""
        if student is None:
            raise InputError(f"{cls.name} needs student=… (an nn.Module)")
        if isinstance(teacher, Mapping):
            teacher = tuple(teacher.get(role) for role in ROLES)
        if not isinstance(teacher, tuple | list | nn.ModuleList) or len(teacher) != 2:
            raise InputError(f"{cls.name} needs teacher=(wide, deep), two trained nn.Modules")
        return cls(student, teacher[0], teacher[1], config)


_WHERE = "pixel_teachers, image_teacher and region_teacher"


def _feature_path(model: nn.Module, said: str | None, who: str, setting: str) -> str:
    path = said or getattr(model, "feature_path", None)
    if not isinstance(path, str):
        raise InputError(
            f"the region level needs a layer of the {who}, and {type(model).__name__} names none: "
            f"give {setting}='path.of.layer' (limbeck.list_taps shows the layers), or weight_region=0"
        )
    return path


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm that uses the batch's statistics and leaves the running ones alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.training, m.track_running_stats) for m in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracked) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracked
