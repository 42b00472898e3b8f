"""Ground-truth-guided self-distillation of networks: round after round, with an estimated weight of the labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from limbeck import networks
from limbeck.blocks.fresh import check_redrawable, redraw
from limbeck.blocks.gt_weight import AffineWeight, affine_weight
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError, RunError
from limbeck.core.method import freeze
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage
from limbeck.losses.logits import soft_cross_entropy
from limbeck.methods.models.base import ModelDistiller
from limbeck.tasks.judging import costs, judge_classifiers
from limbeck.tasks.teachers import predictions

EPS = 1e-10  # float32 outputs that agree to five digits show no difference between two networks


def _single(value: Any) -> Any:
    """A list of one, as a command line gives a single number, is that number."""
    return value[0] if isinstance(value, tuple | list) and len(value) == 1 else value


class GTSelfDistillation(ModelDistiller):
    r"""A network is distilled into fresh networks of its own architecture, guided by the labels.

    Round 1 trains the student on labels alone. Each later round :math:`\tau` freezes the previous student as teacher, draws new
    weights, and trains on both targets, with weight :math:`\alpha_\tau` on the *labels* (elsewhere such weights are often the
    teacher's). With logits :math:`z, z_T` (B, C), outputs :math:`p = \mathrm{softmax}(z)` and one-hot or soft labels y,

    .. math:: L = \alpha_\tau\, \mathrm{MSE}(p, y) + (1 - \alpha_\tau)\, \mathrm{MSE}(p, p_T) + \rho \sum_p \lVert p \rVert_2

    where the squared error is the mean over samples and outputs, and the last sum goes over the student's parameter tensors,
    with norms that are not squared.

    *Estimated weight* (default). In kernel ridge regression (:class:`limbeck.methods.models.KernelSelfDistillation`) the student
    is affine in the weight, :math:`f^{(\tau)} = \alpha f^{(1)} + (1-\alpha) g^{(\tau)}`, with the fit on labels :math:`f^{(1)}` and the fit
    on the teacher's outputs alone :math:`g^{(\tau)}`. Taking this as an approximation, each round first trains a network with
    :math:`\alpha = 0`, takes the weight that follows from its and the first round's outputs on validation data
    (:func:`limbeck.blocks.gt_weight.affine_weight`), and then trains the student: two trainings in place of a grid of them. The
    first network is trained once.

    Stages: ``round-1``, then for each round ``round-2-pure`` (where the weight is estimated) and ``round-2``, …. ``epochs`` and
    ``steps`` count for each of these trainings.

    Without the engine::

        method = GTSelfDistillation(network, rounds=3, gt_weight=0.5)
        for number in (1, 2, 3):
            method.begin_round(number)
            ...  # a new optimiser over method.trainable_parameters(); loss = method(batch)
            method.finish_round()

    To estimate a weight, call ``begin_round(number, pure=True)``, train, and ``estimate_weight(validation_data)`` first.

    Args:
        student: any module from inputs to logits. It is trained in place: first as it comes, later from new weights; at the end it
            is the last round's student.
        config: hyper-parameters; or give single ones as keyword arguments.
        fresh: builds the network with new random weights. None: a network of :mod:`limbeck.networks` is built again by its name,
            and every part of another one is asked to draw its weights anew (:func:`limbeck.blocks.fresh.redraw`).

    Attributes:
        archive: the students of the finished rounds but the last, frozen.
        weights: the weight of the labels in each round; 1 for the first.
        unclipped: the estimates before clipping, None where none was made.

    Source: "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation" (2021) and
    its published code, which takes the weight as an argument. Our decisions, since the recipe of the estimate is not spelt out: it
    uses the outputs p on validation data; both networks of a round start from the same new weights and see the same batches; where
    both networks say the same, the previous weight is kept. The learning rate stays constant in the ``paper`` preset.
    """

    name = "gt-self-distillation"

    class Config(ModelDistiller.Config):
        epochs: float = Field(40, gt=0, description="passes over the training data, for each network")
        rounds: int = Field(4, ge=1, description="networks trained one after the other; 1 is plain training")
        gt_weight: Annotated[
            float | Literal["estimated"] | tuple[float, ...],
            BeforeValidator(_single),
        ] = Field(
            "estimated",
            description="weight of the labels against the teacher: in [0, 1], one for each round (the first has no effect), "
            "or estimated from validation data",
        )
        clip: bool = Field(True, description="keep estimated weights in [0, 1]")
        loss: Literal["mse", "cross_entropy"] = Field(
            "mse", description="between outputs and each target: squared error, or cross-entropy (an extension)"
        )
        outputs: Literal["softmax", "identity"] = Field(
            "softmax", description="what is compared: class probabilities, or the raw outputs of a regressor"
        )
        regulariser: float = Field(1e-4, ge=0, description="weight of the sum of the parameter tensors' norms")
        weight_decay: float = Field(0.0, ge=0, description="weight decay on top of the regulariser")

        presets = {
            "paper": {
                "rounds": 5,
                "epochs": 75,
                "batch_size": 16,
                "optimizer": "adam",
                "lr": 1e-4,
                "schedule": "constant",
                "regulariser": 1e-4,
            }
        }

        @model_validator(mode="after")
        def _weights_fit(self) -> Self:
            given = self.gt_weight
            if given != "estimated":
                many = given if isinstance(given, tuple) else (given,)
                if not all(0 <= float(w) <= 1 for w in many):
                    raise ValueError(f"gt_weight must lie in [0, 1] (got {given})")
                if isinstance(given, tuple) and len(given) != self.rounds:
                    raise ValueError(f"gt_weight has {len(given)} weights for {self.rounds} rounds: give one for each")
            if self.outputs == "identity" and self.loss != "mse":
                raise ValueError("cross-entropy is for class probabilities: take loss=mse with outputs=identity")
            return self

    def __init__(
        self,
        student: nn.Module,
        config: Config | None = None,
        *,
        fresh: Callable[[], nn.Module] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(student, config, **overrides)
        self.fresh = fresh
        rounds, given = self.config.rounds, self.config.gt_weight
        if fresh is None and networks.spec_of(student) is None and rounds > 1:
            check_redrawable(student)
        self.archive = nn.ModuleList(freeze(copy.deepcopy(student)) for _ in range(rounds - 1))
        constant = 1.0 if given == "estimated" else given  # replaced round by round where it is estimated
        listed = constant if isinstance(constant, tuple) else (constant,) * rounds
        self.weights: list[float] = [1.0, *map(float, listed[1:])]
        self.unclipped: list[float | None] = [None] * rounds
        self.round, self.finished, self.pure = 1, 0, False

    # ---- the loss ----------------------------------------------------------------------------------------------------

    @property
    def gt_weight(self) -> float:
        """The weight of the labels in what is being trained now."""
        return 0.0 if self.pure else self.weights[self.round - 1]

    def losses(self, batch: Batch) -> Losses:
        weight = self.gt_weight
        student = _rows(self.student_logits(batch))
        out = Losses()
        if weight != 0:
            out.add("labels", self.distance(student, self.targets(batch, student)), weight)
        if weight != 1:
            out.add("teacher", self.distance(student, self.teach(batch)), 1 - weight)
        if self.config.regulariser:
            norms = [p.norm() for p in self.student.parameters() if p.requires_grad]
            out.add("norms", torch.stack(norms).sum(), self.config.regulariser)
        return out

    def distance(self, student: Tensor, target: Tensor) -> Tensor:
        """From the student's logits to target outputs, both (B, C); a scalar."""
        if self.config.loss == "cross_entropy":
            return soft_cross_entropy(student, target.to(student.dtype))
        return F.mse_loss(self.outputs(student), target.to(student.dtype))

    def outputs(self, logits: Tensor) -> Tensor:
        """(B, C) what is compared: probabilities, or a regressor's values."""
        return torch.softmax(logits, -1) if self.config.outputs == "softmax" else logits

    def targets(self, batch: Batch, like: Tensor) -> Tensor:
        """(B, C) the labels as outputs: one-hot, soft as they are, or a regressor's values."""
        labels = self.labels(batch)
        if labels.is_floating_point():
            return _rows(labels)
        return F.one_hot(labels, like.shape[-1])

    @torch.no_grad()
    def teach(self, batch: Batch) -> Tensor:
        """(B, C) outputs of the previous round's student, counted in ``counters['teacher_forwards']``."""
        self.counters["teacher_forwards"] += len(batch)
        return self.outputs(_rows(logits_of(call_model(self.archive[self.round - 2], batch.inputs))))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.archive.eval()
        return self

    # ---- rounds ------------------------------------------------------------------------------------------------------

    def begin_round(self, number: int, *, pure: bool = False, seed: int | None = None) -> None:
        """From now on the loss is that of a round, and the student has new weights (but in round 1).

        Args:
            number: from 1.
            pure: train on the teacher alone, in order to estimate the weight.
            seed: of the new weights; None draws them from the global random state.

        Raises:
            InputError: no such round, the one before is not finished, or the network cannot be drawn anew.
        """
        if not 1 <= number <= self.config.rounds:
            raise InputError(f"there are rounds 1 to {self.config.rounds}, and no round {number}")
        if number > self.finished + 1:
            raise InputError(f"round {number} needs the student of round {number - 1}, which is not finished")
        if pure and number == 1:
            raise InputError("round 1 has no teacher: it trains on labels")
        self.round, self.finished, self.pure = number, number - 1, pure
        if number == 1:
            return
        if seed is None:
            self._redraw()
            return
        with preserved_random_state():
            seed_everything(mix_seed(seed, 43, number))
            self._redraw()

    def finish_round(self) -> None:
        """Keep the student as the next round's teacher."""
        if self.pure:
            raise InputError(f"round {self.round} trains on its teacher alone: estimate its weight, and begin it again")
        if self.round < self.config.rounds:
            self.archive[self.round - 1].load_state_dict(self.student.state_dict())
        self.finished = self.round

    def estimate_weight(self, data: Data) -> AffineWeight:
        """The weight of the labels in this round, from the outputs of round 1's student and the present one on validation data.

        Raises:
            InputError: the student was not trained on its teacher alone, or the data has no labels.
        """
        if not self.pure:
            raise InputError(
                "a weight is estimated after training on the teacher alone: begin_round(number, pure=True)"
            )
        first, pure = self._answers(self.archive[0], data), self._answers(self.student, data)
        wanted = self.targets(Batch(None, data.labels_tensor()), first)
        before = self.weights[self.round - 2]
        found = affine_weight(wanted, first, pure, clip=self.config.clip, otherwise=before, eps=EPS)
        self.weights[self.round - 1] = found.value
        self.unclipped[self.round - 1] = found.unconstrained if found.told else None
        return found

    def _answers(self, model: nn.Module, data: Data) -> Tensor:
        """(N, C) outputs in evaluation mode, on the CPU."""
        was_training = model.training
        model.eval()
        logits, _ = predictions(model, data)
        model.train(was_training)
        return self.outputs(_rows(logits))

    def _redraw(self) -> None:
        spec = networks.spec_of(self.student)
        if self.fresh is None and spec is None:
            redraw(self.student)
            return
        made = self.fresh() if self.fresh is not None else networks.rebuild(spec or {})
        try:
            self.student.load_state_dict(made.state_dict())
        except RuntimeError as error:
            raise InputError(
                f"the function for new networks builds another architecture than the student's: {str(error).splitlines()[-1].strip()}"
            ) from error

    # ---- building by name --------------------------------------------------------------------------------------------

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        if teacher is not None:
            raise InputError(f"{cls.name} has no teacher but the student's own earlier self: leave teacher=… out")
        if student is None:
            raise InputError(f"{cls.name} needs student=… (an nn.Module, or a function that builds one)")
        if not isinstance(student, nn.Module) and callable(student):
            return cls(student(), config, fresh=student)
        return cls(student, config)

    # ---- running -----------------------------------------------------------------------------------------------------

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One for each training.

        Raises:
            InputError: weights are to be estimated, and there is no labelled validation data.
        """
        estimated = self.config.gt_weight == "estimated"
        if estimated and self.config.rounds > 1 and (val is None or _unlabelled(val)):
            raise InputError(
                "gt_weight=estimated needs labelled validation data: give val=(inputs, labels), or a constant such as gt_weight=0.5"
            )
        found = []
        for number in range(1, self.config.rounds + 1):
            order = seed if number == 1 else mix_seed(seed, 45, number)
            if estimated and number > 1:
                assert val is not None
                begin = partial(self.begin_round, number, pure=True, seed=seed)
                end = partial(self.estimate_weight, val)
                found.append(self.stage(f"round-{number}-pure", train, val, seed=order, begin=begin, end=end))
            begin = partial(self.begin_round, number, seed=seed)
            found.append(self.stage(f"round-{number}", train, val, seed=order, begin=begin, end=self.finish_round))
        return found

    def training_state(self) -> dict[str, Any]:
        """As every method's, with the archive, the position and the weights."""
        position = {"round": self.round, "finished": self.finished, "pure": self.pure}
        weights = {"weights": list(self.weights), "unclipped": list(self.unclipped)}
        return {**super().training_state(), "rounds": {**position, **weights}}

    def load_training_state(self, state: dict[str, Any]) -> None:
        super().load_training_state(state)
        rounds = state["rounds"]
        if len(rounds["weights"]) != self.config.rounds:
            raise RunError(f"the checkpoint has {len(rounds['weights'])} rounds, and the method {self.config.rounds}")
        self.round, self.finished, self.pure = rounds["round"], rounds["finished"], rounds["pure"]
        self.weights, self.unclipped = list(rounds["weights"]), list(rounds["unclipped"])

    # ---- judging -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_outputs(self, batch: Batch) -> None:
        if self.config.outputs == "softmax":
            super().check_outputs(batch)
            return
        values, labels = _rows(self.student_logits(batch)), self.labels(batch)
        if not labels.is_floating_point():
            raise InputError(f"labels are {labels.dtype}; the targets of a regressor must be floating-point")
        if values.shape != _rows(labels).shape:
            raise InputError(
                f"the student gives values of shape {tuple(values.shape)} for targets {tuple(labels.shape)}"
            )

    def quick_metrics(self, data: Data) -> dict[str, float]:
        """Of the student: accuracy and negative log-likelihood, or a regressor's mean squared error."""
        if self.config.outputs == "softmax":
            return super().quick_metrics(data)
        return {"mse": self._regression(self.student, data)["mse"]}

    def contestants(self) -> dict[str, nn.Module]:
        """The student, and those of earlier rounds."""
        earlier = {f"round {n}": model for n, model in enumerate(self.archive[: self.finished], 1) if n < self.round}
        return {"student": self.student, **earlier}

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """The family's measures for the student of every round, and what the labels weighed in each.

        Lists by round, from round 1 to the last: ``gt_weight_per_round``, ``accuracy_per_round`` (``mse_per_round`` for a
        regressor), and ``unclipped_gt_weight_per_round`` where weights were estimated.
        """
        models = self.contestants()
        if self.config.outputs == "softmax":
            result, measure = judge_classifiers(models, test, class_names), "accuracy"
        else:
            price = costs(models, test)
            rows = [{"who": role, **self._regression(model, test), **price[role]} for role, model in models.items()]
            result, measure = {"rows": rows}, "mse"
        student, *earlier = result["rows"]
        in_order = [*earlier, student]
        for row, weight in zip(in_order, self.weights, strict=False):
            row["gt_weight"] = weight
        result["gt_weight_per_round"] = self.weights[: len(in_order)]
        result[f"{measure}_per_round"] = [row[measure] for row in in_order]
        if any(w is not None for w in self.unclipped):
            result["unclipped_gt_weight_per_round"] = [
                w if u is None else u for w, u in zip(self.weights, self.unclipped, strict=True)
            ]
        return result

    def _regression(self, model: nn.Module, data: Data) -> dict[str, float]:
        from sklearn.metrics import mean_squared_error, r2_score

        values, wanted = self._answers(model, data).numpy(), _rows(data.labels_tensor()).numpy()
        return {"mse": float(mean_squared_error(wanted, values)), "r2": float(r2_score(wanted, values))}


def _rows(values: Tensor) -> Tensor:
    """(B,) values as (B, 1); others as they are."""
    return values[:, None] if values.ndim == 1 else values


def _unlabelled(data: Data) -> bool:
    return data.fetch(torch.arange(1), None).labels is None
