"""Quantised distillation and differentiable quantisation."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.blocks.level_allocation import gradient_norms, share_bits, share_levels
from limbeck.blocks.packed import save_packed, stored
from limbeck.blocks.quantizers import Gradient, QuantisedTensor, encode, uniform_levels
from limbeck.blocks.storage import Storage
from limbeck.blocks.weight_quantizer import WeightQuantizer, attach_quantizers, original, plain_copy, rounded_copy
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.stage import Stage, Stepper
from limbeck.losses.logits import entropy, forward_kl
from limbeck.methods.compression.base import Compressor
from limbeck.methods.models.base import IGNORED
from limbeck.tasks.judging_quantised import judge_int8, picture_levels

PACKED = "quantised.safetensors"
ROUNDED = "rounded only"
NORM_BATCHES = 5
CALIBRATION = 256
Phase = Literal["float", "weights", "levels"]


class QuantizedDistillation(Compressor):
    r"""Distillation into a student whose weights live on a small grid of levels.

    Each chosen weight tensor is cut into buckets of k numbers, scaled to [0, 1] in each (:math:`v = (w - \beta)/\alpha`), and rounded to levels
    :math:`p_1 < \dots < p_s`: :math:`w_q = \alpha\,p_{c} + \beta`, c the nearest (see :mod:`limbeck.blocks.quantizers`). The student always computes
    with :math:`w_q`. With teacher logits :math:`z_t`, student logits z and temperature T:

    .. math:: L = (1-a)\,\mathrm{CE}(z, y) + a\,T^2\,\mathrm{KL}\big(\mathrm{softmax}(z_t/T)\,\|\,\mathrm{softmax}(z/T)\big)

    The first stage distils the student in full precision (``warm_epochs``; 0 takes it as it is). Then, by ``mode``:

    ``weights`` (quantised distillation)
        :math:`s = 2^b` equally spaced levels; the gradient at :math:`w_q` is applied to w (straight-through). ``alpha=0`` is quantisation-aware
        training on labels alone.
    ``levels`` (differentiable quantisation)
        all weights are fixed and the levels of each tensor are learned, from the quantiles of its weights:
        :math:`\partial L/\partial p_j = \sum_{c_i = j} \alpha_i\,\partial L/\partial w_{q,i}`; they are sorted after each step. Batch statistics go on.
        The teacher is the student before quantisation, or the big one (``level_teacher``).
    ``mixed``
        an epoch of one and an epoch of the other in turn, both with the learned levels; the last one trains the weights.
    ``none``
        the weights are rounded after training (what the paper calls post-mortem quantisation).

    ``redistribute`` shares the levels (``levels``, ``mixed``) or bits (else) among the tensors by gradient norms over five batches.

    The student carries its quantisers (parametrisations) while the method lives; :meth:`compressed` is the plain network.

    Source: "Model compression via distillation and quantization" (2018) and its published code. Ours: the code divides its divergence by the number
    of classes as well (``kl_reduction="mean"``); its learning rate follows a validation plateau, ours a fixed schedule; gradients are clipped by
    norm (``clip_grad``), not by value; the gradient norms for sharing are those of the student before quantisation. In ``mixed`` the published code
    is read as: one table of levels serves both kinds of epochs.
    """

    name = "quantized-distillation"
    compressible = (*Compressor.compressible, nn.Embedding)

    class Config(Compressor.Config):
        mode: Literal["weights", "levels", "mixed", "none"] = Field(
            "weights", description="what is trained on the grid: the weights, its levels, both in turn, or nothing"
        )
        bits: int = Field(2, ge=1, le=8, description="bits of a weight; 2^bits levels")
        bucket: int | None = Field(256, ge=2, description="weights that share a scale; none: all of a tensor")
        temperature: float = Field(2.0, gt=0, description="softens both distributions")
        alpha: float = Field(0.7, ge=0, le=1, description="weight of the teacher; 0: labels alone")
        kl_reduction: Literal["batchmean", "mean"] = Field(
            "batchmean", description="divergence averaged over samples, or also over classes"
        )
        ask: Literal["always", "uncertain", "random", "mistaken"] = Field(
            "always",
            description="which samples the teacher is asked about: all, of high entropy, drawn by entropy, misclassified; others count by labels",
        )
        entropy_cutoff: float = Field(1.0, ge=0, description="entropy of the student above which it is uncertain, bits")
        gradient: Gradient = Field("straight-through", description="how gradients pass the rounding")
        rounding: Literal["nearest", "stochastic"] = Field("nearest", description="of weights while training")
        keep_ends: bool = Field(False, description="leave the first and the last layer in full precision")
        redistribute: bool = Field(False, description="share levels or bits among layers by gradient norms")
        warm_epochs: float = Field(30, ge=0, description="passes that distil the student before; 0: it is trained")
        warm_lr: float | None = Field(None, gt=0, description="peak learning rate of these; none: the same as lr")
        level_init: Literal["quantiles", "uniform"] = Field("quantiles", description="where learned levels start")
        level_lr: float = Field(1e-3, gt=0, description="peak learning rate of the levels")
        level_optimizer: Literal["adam", "sgd"] = Field("adam", description="update rule of the levels")
        level_teacher: Literal["self", "teacher"] = Field(
            "self", description="who teaches the levels: the student before quantisation, or the teacher"
        )
        int8: bool = Field(True, description="measure the result in 8-bit integers too")
        optimizer: Literal["adamw", "adam", "sgd"] = Field("sgd", description="update rule")
        lr: float = Field(0.02, gt=0, description="peak learning rate")
        weight_decay: float = Field(2.2e-4, ge=0, description="weight decay (decoupled for adamw)")
        epochs: float = Field(30, gt=0, description="passes over the training data on the grid")
        batch_size: int = Field(32, ge=1, description="samples per update, over all processes together")

        presets = {
            "paper": {
                "epochs": 200,
                "warm_epochs": 200,
                "batch_size": 25,
                "lr": 1e-3,
                "kl_reduction": "mean",
                "level_optimizer": "sgd",
                "level_lr": 1e-6,
            }
        }

        @model_validator(mode="after")
        def _fits(self) -> Self:
            if self.rounding == "stochastic" and self.mode in ("levels", "mixed"):
                raise ValueError(f"rounding: stochastic needs equally spaced levels, mode {self.mode} learns them")
            if self.mode == "mixed" and self.accumulate > 1:
                raise ValueError("accumulate must be 1 in mode mixed")
            return self

    full_precision: nn.Module

    def __init__(self, student: nn.Module, teacher: Any, config: Config | None = None, **overrides: Any) -> None:
        super().__init__(student, teacher, config, **overrides)
        layers = self.chosen()
        if self.config.keep_ends and not (layers := dict(list(layers.items())[1:-1])):
            raise InputError("keep_ends leaves no layer to be quantised: the student has only two")
        self.full_precision = copy.deepcopy(student).eval().requires_grad_(False)
        self.quantizers = attach_quantizers(layers, self._quantizer)
        tables = {id(table) for table in self.levels()}
        self._own = [n for n, p in student.named_parameters() if p.requires_grad and id(p) not in tables]
        if self._learned:
            self._place_levels([2**self.config.bits] * len(self.quantizers))
        self._samples: Tensor | None = None
        self.enter("levels" if self.config.mode == "levels" else "weights")

    def _quantizer(self, name: str) -> WeightQuantizer:
        config = self.config
        return WeightQuantizer(
            2**config.bits, config.bucket, gradient=config.gradient, stochastic=config.rounding == "stochastic"
        )

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.full_precision.eval()
        return self

    # ---- what is on the grid, and what is trained ----------------------------------------------------------------------

    @property
    def _learned(self) -> bool:
        return self.config.mode in ("levels", "mixed")

    def enter(self, phase: Phase) -> None:
        """What is trained from now on: ``float``, the weights without a grid; ``weights``, through it; ``levels``, the grid."""
        self.phase = phase
        for quantizer in self.quantizers.values():
            quantizer.mode = "off" if phase == "float" else "learned" if self._learned else "uniform"
        for parameter in self.levels():
            parameter.requires_grad_(phase == "levels")
        for parameter in self.weights():
            parameter.requires_grad_(phase != "levels")

    def levels(self) -> list[nn.Parameter]:
        """The tables of levels, a vector for each tensor."""
        return [q.levels for q in self.quantizers.values()]

    def weights(self) -> list[nn.Parameter]:
        """The student's own parameters that are trained, in full precision."""
        return [self.student.get_parameter(name) for name in self._own]

    def sort_levels(self) -> None:
        """To be called after each step on the levels in a loop of one's own."""
        for quantizer in self.quantizers.values():
            quantizer.sort_levels()

    def _place_levels(self, counts: Sequence[int]) -> None:
        for (name, quantizer), count in zip(self.quantizers.items(), counts, strict=True):
            if self._learned and self.config.level_init == "quantiles":
                quantizer.place_levels(self._weight(name), count)
            else:
                quantizer.set_levels(uniform_levels(count))

    def _weight(self, name: str) -> nn.Parameter:
        return original(self.student.get_submodule(name))

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        config = self.config
        student = _rows(self.student_logits(batch))
        needed = config.alpha < 1 or config.ask == "mistaken"
        labels = self.labels(batch) if needed else batch.labels
        ce = valid = None
        if labels is not None:
            soft = labels.is_floating_point()
            labels = labels.flatten(0, -2) if soft else labels.flatten()
            valid = None if soft else labels != IGNORED
            ce = F.cross_entropy(student, labels, reduction="none", ignore_index=IGNORED)
        if config.alpha == 0 and ce is not None:
            return Losses(ce=_mean(ce, valid))
        kl = forward_kl(student, self._taught(batch), config.temperature, "none")
        if config.kl_reduction == "mean":
            kl = kl / student.shape[-1]
        out, weight = Losses(), config.alpha * config.temperature**2
        if config.ask != "always":
            asked = self.asked(student.detach(), labels).to(kl.dtype)
            if ce is not None:
                out.add("ce", _mean((1 - config.alpha * asked) * ce, valid))
            return out.add("kd", _mean(asked * kl, valid), weight).observe(asked=_mean(asked, valid))
        if config.alpha < 1 and ce is not None:
            out.add("ce", _mean(ce, valid), 1 - config.alpha)
        return out.add("kd", _mean(kl, valid), weight)

    def asked(self, student: Tensor, labels: Tensor | None) -> Tensor:
        """(R,) which rows of student logits (R, C) the teacher is asked about."""
        if self.config.ask == "mistaken":
            assert labels is not None
            return student.argmax(-1) != (labels.argmax(-1) if labels.is_floating_point() else labels)
        bits = entropy(student) / math.log(2)
        if self.config.ask == "uncertain":
            return bits > self.config.entropy_cutoff
        return torch.rand_like(bits) < bits / math.log2(student.shape[-1])

    def _taught(self, batch: Batch) -> Tensor:
        """(R, C) what the logits are to become: the teachers', or those of the student before quantisation."""
        if self.phase == "levels" and self.config.level_teacher == "self":
            with torch.no_grad():
                return _rows(logits_of(call_model(self.full_precision, batch.inputs)))
        output = self.teach(batch)
        if len(self.teachers) == 1:
            return _rows(output.logits)
        temperature = self.config.temperature  # the logits of the mean of the softened probabilities
        return _rows(output.probabilities(temperature).clamp_min(1e-12).log() * temperature)

    # ---- stages ------------------------------------------------------------------------------------------------------

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """``distillation`` in full precision, if asked for, then ``quantisation``, ``levels`` or ``mixed``."""
        config = self.config
        stages = []
        if config.warm_epochs:
            recipe = config.replace(epochs=config.warm_epochs, steps=None, lr=config.warm_lr or config.lr)
            stream = Stream(train, config.batch_size, seed=mix_seed(seed, 41), views=config.views)
            steps = recipe.total_steps(stream.steps_per_epoch)
            warm = self.stage(
                "distillation",
                train,
                val,
                seed=seed,
                recipe=recipe,
                stream=stream,
                optimisers=lambda: {"main": make_optimised(self.weights(), recipe, steps)},
                prepare=lambda: self.enter("float"),
                end=self.remember,
            )
            stages.append(warm)
        if config.mode != "none":
            stages.append(self._grid_stage(train, val, seed))
        return stages

    def _grid_stage(self, train: Data, val: Data | None, seed: int) -> Stage:
        config = self.config
        name = {"weights": "quantisation", "levels": "levels", "mixed": "mixed"}[config.mode]
        stage = self.stage(name, train, val, seed=seed)
        assert stage.stream is not None
        stream, steps = stage.stream, stage.steps
        phase: Phase = "levels" if config.mode == "levels" else "weights"
        stage.prepare = partial(self.enter, phase)
        stage.begin = partial(self._begin, train, seed, phase)
        of_levels = config.replace(optimizer=config.level_optimizer, lr=config.level_lr, weight_decay=0.0)
        if config.mode == "mixed":
            last = (steps - 1) // stream.steps_per_epoch
            rounds = (last - torch.arange(steps) // stream.steps_per_epoch) % 2
            stage.losses = None
            stage.update = partial(self._alternate, stream, last)
            stage.optimisers = lambda: {
                "weights": make_optimised(self.weights(), config, int((rounds == 0).sum())),
                "levels": make_optimised(self.levels(), of_levels, max(1, int((rounds == 1).sum()))),
            }
        elif config.mode == "levels":
            stage.optimisers = lambda: {"levels": make_optimised(self.levels(), of_levels, steps)}
            stage.after_step = lambda step: self.sort_levels()
        else:
            stage.optimisers = lambda: {"main": make_optimised(self.weights(), config, steps)}
        return stage

    def _alternate(self, stream: Stream, last: int, batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
        assert batch is not None
        epoch = stepper.step // stream.steps_per_epoch
        phase: Phase = "weights" if (last - epoch) % 2 == 0 else "levels"
        self.enter(phase)
        losses = self.losses(batch)
        stepper.minimise(losses, phase)
        if phase == "levels":
            self.sort_levels()
        return losses.logged()

    def optimisers(self, steps: int) -> Mapping[str, Optimised]:
        """Of what is trained at present."""
        return {"main": make_optimised(self.levels() if self.phase == "levels" else self.weights(), self.config, steps)}

    def _begin(self, train: Data, seed: int, phase: Phase) -> None:
        """The grid is laid: the student before it is kept, levels are shared and placed."""
        self.remember()
        counts = [2**self.config.bits] * len(self.quantizers)
        if self.config.redistribute:
            self.enter("float")
            device = next(self.student.parameters()).device
            stream = Stream(train, self.config.batch_size, seed=mix_seed(seed, 43))
            norms = gradient_norms(
                self.student,
                lambda batch: self.losses(batch.to(device)).total,
                [self._weight(name) for name in self.quantizers],
                (stream.batch(number) for number in range(NORM_BATCHES)),
            )
            if self._learned:
                counts = share_levels(counts, norms)
            else:
                counts = [2**bits for bits in share_bits([self.config.bits] * len(counts), norms)]
        self._place_levels(counts)
        self.enter(phase)

    def remember(self) -> None:
        """Keep the student as it is without a grid, in ``full_precision``."""
        self.full_precision.load_state_dict(plain_copy(self.student, "off").state_dict())

    # ---- what comes out ----------------------------------------------------------------------------------------------

    def compressed(self) -> nn.Module:
        return plain_copy(self.student, "learned" if self._learned else "uniform")

    def tensors(self) -> dict[str, QuantisedTensor]:
        """The quantised weights as they are stored, by their names in the plain network."""
        table = (lambda q: q.levels) if self._learned else (lambda q: q.count)
        return {
            f"{name}.weight": encode(self._weight(name).detach(), table(q), q.bucket, q.gradient)
            for name, q in self.quantizers.items()
        }

    def rounded(self) -> tuple[nn.Module, Storage]:
        """The student of full precision rounded to ``2^bits`` uniform levels without further training, and what that takes."""
        model, made = rounded_copy(self.full_precision, self.quantizers, 2**self.config.bits, bucket=self.config.bucket)
        return model, Storage.of(model, {name: stored(tensor) for name, tensor in made.items()})

    def storage(self) -> Storage:
        return Storage.of(self.compressed(), {name: stored(tensor) for name, tensor in self.tensors().items()})

    def save_compact(self, folder: Path) -> None:
        """``quantised.safetensors``, see :mod:`limbeck.blocks.packed`."""
        tensors = self.tensors()
        state = self.compressed().state_dict()
        place = {state[name].data_ptr(): name for name in tensors}
        tied = {n: place[t.data_ptr()] for n, t in state.items() if n not in tensors and t.data_ptr() in place}
        plain = {n: t for n, t in state.items() if n not in tensors and n not in tied}
        save_packed(folder / PACKED, tensors, plain, tied)

    def contestants(self) -> dict[str, nn.Module]:
        student, *others = super().contestants().items()
        between = {"full precision": self.full_precision}
        if self.config.mode != "none":
            between[ROUNDED] = self.rounded()[0]
        return dict([student, *between.items(), *others])

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        super().prepare_run(train, val, setup)
        inputs = train.fetch(torch.arange(min(CALIBRATION, len(train))), None).inputs
        self._samples = inputs if isinstance(inputs, Tensor) else None

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """As all classifiers, with what is stored, the same network in 8-bit integers, and pictures of weights and levels."""
        result = super().evaluate(test, class_names)
        simple = self.rounded()[1]
        for row in result["rows"]:
            if row["who"] == ROUNDED:
                row.update(stored_bytes=simple.bytes, compression=simple.ratio())
                row["bits_per_weight"] = simple.bits_per_number
        if self.config.int8:
            found = judge_int8(self.compressed(), self._samples, test)
            result = {**result, **found, "rows": [*result["rows"], *found["rows"]]}
        weights = {f"{name}.weight": self._weight(name) for name in self.quantizers}
        return {**result, "pictures": [picture_levels(self.tensors(), weights), *result.get("pictures", [])]}


def _rows(logits: Tensor) -> Tensor:
    return logits.flatten(0, -2) if logits.ndim > 2 else logits


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    return rows.mean() if valid is None else (rows * valid).sum() / valid.sum().clamp_min(1)
