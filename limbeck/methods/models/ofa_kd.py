"""OFA-KD: exit branches carry a student's stages into logit space, where any teacher can supervise them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from limbeck.blocks.exits import init_exit, make_exit
from limbeck.blocks.taps import Tap, Taps, unwrap
from limbeck.blocks.teachers import TeacherOutput
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import mix_seed
from limbeck.core.errors import InputError
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.losses.features import full_precision
from limbeck.losses.logits import soft_cross_entropy, target_classes
from limbeck.methods.models.base import OfflineDistiller, make_network
from limbeck.tasks.base import Task

TOKEN_FAMILIES = ("vit", "mixer")


def ofa_weights(teacher_logits: Tensor, labels: Tensor, eps: float = 1.0, temperature: float = 1.0) -> Tensor:
    """The enhanced target: what each class's log-probability counts in :func:`ofa_loss`.

        p = softmax(teacher_logits / temperature),   M = onehot(target class)
        w = (p + M)^eps - M        that is (1 + p_c)^eps - 1 for the target class and p_c^eps for the others

    With eps = 1 it is p. A larger eps raises the target's weight, the more the surer the teacher is of it, and lowers the
    others'. The weights are not normalised; their sum reaches 2^eps - 1.

    Args:
        teacher_logits: (..., C).
        labels: (...) class indices, or (..., C) soft labels whose largest entry is the target class.
        eps: modulating exponent, at least 1.
        temperature: > 0.

    Returns:
        (..., C), non-negative, without a graph.

    Raises:
        InputError: eps below 1 (the slope at p = 0 would be infinite) or infinite, a temperature that is not positive, labels
            that do not fit.
    """
    if not 1 <= eps < math.inf:
        raise InputError(f"eps must be at least 1 and finite, not {eps}")
    if not temperature > 0:
        raise InputError(f"the temperature must be positive, not {temperature}")
    p = torch.softmax(full_precision(teacher_logits.detach()) / temperature, -1)
    target = target_classes(labels, p.shape).unsqueeze(-1)
    mark = torch.zeros_like(p).scatter_(-1, target, 1.0)
    return p if eps == 1 else (p + mark).pow(eps) - mark


def ofa_loss(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, eps: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Cross-entropy of the logits against the teacher's enhanced target.

        mean over rows of  - sum_c w_c · log softmax(logits / temperature)_c,   w of :func:`ofa_weights`

    With eps = 1 it is the soft cross-entropy with the teacher's probabilities. No gradient reaches the teacher. There is no
    factor temperature².

    Args:
        logits: (..., C), of the student or of one of its exit branches.
        teacher_logits, labels, eps, temperature: as in :func:`ofa_weights`.

    Returns:
        A scalar; not 0 where student and teacher agree.

    Raises:
        InputError: as :func:`ofa_weights`; logits of different shapes.

    Source: "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation" (2023).
    """
    return soft_cross_entropy(logits, ofa_weights(teacher_logits, labels, eps, temperature), temperature)


class OFAKD(OfflineDistiller):
    r"""One-for-all knowledge distillation, between networks of different families (CNN, transformer, MLP).

    Features of unlike families live in unlike spaces, logits do not. So the features :math:`f_k` of each stage
    :math:`k \in S` of the student pass through an exit branch :math:`h_k` of its own (:mod:`limbeck.blocks.exits`), and the
    branch's logits :math:`z_k = h_k(f_k)` are taught by the teacher's final logits :math:`z_T`, as the student's own logits
    :math:`z_S` are; all of them (B, C):

    .. math:: L = a\,\mathrm{CE}(z_S, y) + b\,L_{ofa}(z_S; \epsilon_{last}) + g \sum_{k \in S} L_{ofa}(z_k; \epsilon_k)

    .. math:: L_{ofa}(z; \epsilon) = -\frac1B \sum_{b,c} \big[(p + M)^\epsilon - M\big]_{bc} \log q_{bc}, \quad
              p = \mathrm{softmax}(z_T/\tau),\; q = \mathrm{softmax}(z/\tau),\; M = \mathrm{onehot}(c^*)

    with :math:`c^*` the label :math:`y`, or its largest entry where labels are soft (mixup). An :math:`\epsilon > 1` makes more
    of the target class where the teacher is sure of it, and less of all others, on which families disagree most. Student and
    branches are trained together by one optimiser; the gradient of every branch flows into the student; the teacher receives
    none, and its inner features are never looked at. The branches are dropped afterwards.

    The stages are tap paths of the student, shallow to deep, and must give maps (B, C, H, W) or tokens (B, N, D). So the plain
    MLP, whose layers give vectors, can teach but not learn; the paper's MLP students are MLP-Mixer and ResMLP, which have
    tokens. A layer that gives (B, H, W, C), as Swin's stages do in some libraries, is turned by
    ``Tap(path, pick=lambda y: y.permute(0, 3, 1, 2))``.

    Several teachers are joined by averaging their softened probabilities.

    Source: "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation" (NeurIPS 2023) and its
    released code. The paper searches epsilon in [1, 2] for each pair; 1.5 for DeiT-T to ResNet-18 on ImageNet and 1 for
    Swin-T to ResNet-18 on CIFAR-100 are published, values for other pairs could not be verified. Presets: ``paper``
    (convolutional students on CIFAR-100; its cosine ends at a rate of 1e-3, here at 0), ``paper-tokens`` (transformer and MLP
    students) and ``paper-imagenet`` (convolutional students on ImageNet). Augmentation and mixup belong to the data. The branches'
    linear weights start with deviation 0.02 in the presets as in the code; by default with ``1 / sqrt(inputs)``, because from
    0.02 the branches of networks a few dozen wide learn so late that they hold the student back.

    Args:
        student, teacher: see :class:`OfflineDistiller`.
        config: hyper-parameters; or give single ones as keyword arguments.
        sample: a batch of inputs (or ``(inputs, labels)``, or a :class:`Batch`) that shows the shapes; the student sees it
            once, in evaluation mode. Not needed for a student that knows its ``in_shape``.
        stages: tap paths or :class:`~limbeck.blocks.taps.Tap` objects, shallow to deep; instead of ``config.stages``, which
            holds paths only.

    Attributes:
        exits: the branches, in the order of the stages.

    Raises:
        InputError: no stages or no sample are known; a stage gives neither maps nor tokens, or the token grid does not fit;
            a number of ``eps`` that is neither 1 nor one more than there are stages.
        UnknownNameError: no such layer in the student.
    """

    name = "ofa-kd"

    class Config(OfflineDistiller.Config):
        eps: tuple[float, ...] = Field(
            (1.5,),
            description="modulating exponents >= 1: one for all, or one for each stage in order and one for the final logits",
        )
        temperature: float = Field(1.0, gt=0, description="softens both distributions")
        official_scale: bool = Field(
            True, description="as in the released code: no factor temperature² on the OFA terms; false multiplies by it"
        )
        ce_weight: float = Field(1.0, ge=0, description="weight of the labels")
        ofa_weight: float = Field(1.0, ge=0, description="weight of the OFA loss on the student's logits")
        exit_weight: float = Field(1.0, ge=0, description="weight of the OFA loss on each exit branch's logits")
        label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the labels in the cross-entropy")
        stages: tuple[str, ...] = Field(
            (), description="tap paths of the student's stages, shallow to deep; none: the student's own stage_paths"
        )
        prefix_tokens: int | None = Field(
            None, ge=0, description="tokens in front of the patch tokens; none: what the student says, else 0"
        )
        grid: tuple[int, int] | None = Field(
            None,
            description="rows and columns of the patch grid (other stages: same proportions); none: what the student says, "
            "else a square",
        )
        feature_dim: int | None = Field(
            None,
            ge=1,
            description="width in front of every branch's linear layer; none: the student's feature width, for maps the "
            "larger one of student and teacher",
        )
        target_grid: int | None = Field(
            7, ge=1, description="side of the patch grid at which merging ends; none: the smallest one of all stages"
        )

        exit_std: float | None = Field(
            None,
            gt=0,
            description="deviation of the branches' linear weights at the start; none: 1 / sqrt(inputs), for narrow networks",
        )

        presets = {
            "paper": {
                "epochs": 300,
                "batch_size": 1024,
                "optimizer": "sgd",
                "lr": 0.05,
                "weight_decay": 2e-3,
                "warmup": 0.01,
                "label_smoothing": 0.1,
                "eps": (1.0,),
                "exit_std": 0.02,
            },
            "paper-tokens": {
                "epochs": 300,
                "batch_size": 1024,
                "optimizer": "adamw",
                "lr": 5e-4,
                "weight_decay": 0.05,
                "warmup": 20 / 300,
                "clip_grad": 5.0,
                "eps": (1.0,),
                "exit_std": 0.02,
            },
            "paper-imagenet": {
                "epochs": 100,
                "optimizer": "sgd",
                "lr": 0.1,
                "weight_decay": 1e-4,
                "schedule": "step",
                "milestones": (0.3, 0.6, 0.9),
                "eps": (1.5,),
                "exit_std": 0.02,
            },
        }

        @field_validator("eps", mode="before")
        @classmethod
        def _one_or_several(cls, value: Any) -> Any:
            return (value,) if isinstance(value, int | float | str) else value

        @field_validator("eps")
        @classmethod
        def _at_least_one(cls, value: tuple[float, ...]) -> tuple[float, ...]:
            if not value or not all(1 <= e < math.inf for e in value):
                raise ValueError("must be one or several finite numbers >= 1")
            return value

    class Setup(OfflineDistiller.Setup):
        """What a run by name builds: networks of different families."""

        student: str | None = Field(
            None, description="student network, or package.module:factory; none: the task's own, a CNN"
        )
        teacher: tuple[str, ...] = Field(
            (),
            description="teacher networks, or package.module:factory with its weights loaded; none: a ViT, or the task's "
            "own CNN for a student with tokens",
        )

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        config: Config | None = None,
        *,
        sample: Any = None,
        stages: Sequence[str | Tap] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(student, teacher, config, **overrides)
        asked = tuple(stages) if stages is not None else self.config.stages or _own_stages(student)
        if not asked:
            raise InputError(
                "OFA-KD needs at least one stage of the student: stages=[…]; limbeck.list_taps shows layers"
            )
        self._taps = Taps(student, asked)
        count = len(self._taps.taps)
        eps = self.config.eps
        if len(eps) not in (1, count + 1):
            raise InputError(
                f"eps has {len(eps)} values, but the student has {count} stages: give one value, or {count + 1} "
                "(the stages in order, then the final logits)"
            )
        self._eps = eps * (count + 1) if len(eps) == 1 else eps
        self.exits = self._make_exits(_sample_for(student, sample))

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        cls.require(student=student, teacher=teacher)
        return cls(student, teacher, config, sample=sample)

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        name = setup.student or task.networks["student"]
        if not setup.teacher:
            other = task.networks["teacher"] if name.startswith(TOKEN_FAMILIES) else _transformer_for(task)
            setup = setup.replace(teacher=(other,))
        teachers = cls.teachers_for(task, setup, seed=seed, progress=progress)
        student = make_network(name, task, seed)
        with preserved_random_state():  # branches start alike whatever was drawn before
            seed_everything(mix_seed(seed, 17))
            return cls(student, teachers, config, sample=task.train.fetch(torch.arange(2), None))

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        config = self.config
        labels = self.labels(batch)
        teacher = self._joined(self.teach(batch))
        targets = {e: ofa_weights(teacher, labels, e, config.temperature) for e in set(self._eps)}
        scale = 1.0 if config.official_scale else config.temperature**2

        if config.exit_weight > 0:
            with self._taps as features:
                logits = self.student_logits(batch)
            exits = [branch(features[tap]) for branch, tap in zip(self.exits, self._taps.taps, strict=True)]
        else:
            logits, exits = self.student_logits(batch), []

        def ofa(z: Tensor, eps: float) -> Tensor:
            return soft_cross_entropy(z, targets[eps], config.temperature)

        ce = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        losses = Losses(ce=(config.ce_weight, ce), ofa=(scale * config.ofa_weight, ofa(logits, self._eps[-1])))
        for number, z in enumerate(exits):
            losses.add(f"exit_{number + 1}", ofa(z, self._eps[number]), scale * config.exit_weight)
        return losses

    def _joined(self, said: TeacherOutput) -> Tensor:
        """(B, C) logits whose softened probabilities are the teachers' mean ones."""
        if len(said.each) == 1:
            return said.logits
        temperature = self.config.temperature
        soft = torch.log_softmax(full_precision(said.each) / temperature, -1)
        return temperature * (torch.logsumexp(soft, 0) - math.log(len(said.each)))

    # ---- the branches -----------------------------------------------------------------------------------------------

    def _make_exits(self, batch: Batch) -> nn.ModuleList:
        config = self.config
        features, classes = self._look(batch)
        own = unwrap(self.student)
        prefix = config.prefix_tokens
        if prefix is None:
            prefix = _integer(own, "prefix_tokens", "num_prefix_tokens") or 0
        grids = [
            _scaled(config.grid or getattr(own, "grid", None), f.shape[1] - prefix) if f.ndim == 3 else None
            for f in features
        ]
        target = config.target_grid
        if target is None:
            target = min((min(g) for g in grids if g is not None), default=1)
        last = features[-1]
        width = (
            config.feature_dim or _integer(own, "feature_dim", "num_features") or last.shape[1 if last.ndim == 4 else 2]
        )
        taught = [_integer(unwrap(m), "feature_dim", "num_features") or 0 for m in self.teachers.models]
        branches = []
        for number, (feature, grid) in enumerate(zip(features, grids, strict=True)):
            wide = width if config.feature_dim or feature.ndim == 3 else max(width, *taught)
            try:
                branch = make_exit(
                    feature.shape, number + 1, len(features), wide, classes, prefix if grid else 0, grid, max(target, 1)
                )
            except InputError as error:
                raise InputError(f"stage '{self._taps.taps[number]}': {error}") from None
            init_exit(branch, config.exit_std)
            branches.append(branch.to(feature.device, feature.dtype))
        return nn.ModuleList(branches)

    def _look(self, batch: Batch) -> tuple[list[Tensor], int]:
        """What the stages give for the sample, and the number of classes; the student is left as it was."""
        parameter = next(self.student.parameters(), None)
        batch = batch if parameter is None else batch.to(parameter.device)
        modes = [(module, module.training) for module in self.student.modules()]
        try:
            self.student.eval()
            with preserved_random_state(), torch.no_grad(), self._taps as found:
                logits = logits_of(call_model(self.student, batch.inputs))
        finally:
            for module, mode in modes:
                module.training = mode
        features = []
        for tap in self._taps.taps:
            feature = found[tap]
            _check_feature(tap, feature, batch.inputs)
            features.append(feature)
        return features, logits.shape[-1]


def _own_stages(student: nn.Module) -> tuple[str, ...]:
    """The stages that the student itself names.

    Raises:
        InputError: it names none.
    """
    paths = getattr(unwrap(student), "stage_paths", None)
    if not paths:
        raise InputError(
            f"the student ({type(unwrap(student)).__name__}) does not say what its stages are: give their paths, shallow to "
            "deep, as stages=[…]; limbeck.list_taps(student, inputs) shows all layers and their shapes"
        )
    return tuple(paths)


def _sample_for(student: nn.Module, sample: Any) -> Batch:
    if sample is not None:
        return Batch.of(sample)
    shape = getattr(unwrap(student), "in_shape", None)
    if shape is None:
        raise InputError("OFA-KD must see what shapes the student's stages have: give sample=… (a batch of inputs)")
    return Batch(torch.zeros(2, *shape))


def _check_feature(tap: Tap, feature: Any, inputs: Any) -> None:
    if not isinstance(feature, Tensor):
        raise InputError(f"stage '{tap}' gives {len(feature)} tensors; tap a single call (call=-1 for the last one)")
    shape = ", ".join(map(str, ("B", *feature.shape[1:])))
    if feature.ndim not in (3, 4):
        raise InputError(
            f"stage '{tap}' gives features of shape ({shape}), but an exit branch reads maps (B, C, H, W) or tokens "
            "(B, N, D): choose other layers with stages=[…] (limbeck.list_taps shows them); a plain MLP has none, "
            "MLP-Mixer has tokens"
        )
    if feature.ndim == 4 and not callable(tap.pick) and isinstance(inputs, Tensor) and inputs.ndim == 4:
        height, width = inputs.shape[2:]
        first, second, third = feature.shape[1:]
        if second * width != third * height and first * width == second * height and third > second:
            raise InputError(
                f"stage '{tap}' gives features of shape ({shape}), which look like (B, H, W, C) for images of "
                f"{height}x{width}: turn them with Tap(path, pick=lambda y: y.permute(0, 3, 1, 2)), or, if they are "
                "(B, C, H, W), say so with pick=lambda y: y"
            )


def _scaled(grid: Sequence[int] | int | None, patches: int) -> tuple[int, int]:
    """Rows and columns for ``patches`` patches in the proportions of ``grid`` (a square if None).

    Numbers that do not fit are returned as they come out: :func:`make_exit` says what is wrong with them.
    """
    rows, columns = (1, 1) if grid is None else (grid, grid) if isinstance(grid, int) else (int(grid[0]), int(grid[1]))
    if rows * columns == patches:
        return rows, columns
    factor = math.sqrt(max(patches, 0) / max(rows * columns, 1))
    return round(rows * factor), round(columns * factor)


def _integer(module: nn.Module, *names: str) -> int | None:
    """The first of these attributes that is an integer."""
    found = (getattr(module, name, None) for name in names)
    return next((v for v in found if isinstance(v, int) and not isinstance(v, bool)), None)


def _transformer_for(task: Task) -> str:
    """A small ViT with at most 8 patches a side, by the smallest patch that divides the image (one patch if none does)."""
    _, height, width = task.in_shape
    side = math.gcd(height, width)
    fitting = [p for p in range(2, side + 1) if side % p == 0 and max(height, width) <= 8 * p]
    return f"vit-d48-l4-h4-p{fitting[0] if fitting else side}"
