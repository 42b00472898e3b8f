"""The contract of the ``graphs`` family where a network over a graph becomes one that needs no graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck import networks
from limbeck.blocks.best_state import BestState
from limbeck.core.batch import Batch, Losses, logits_of
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.method import Method
from limbeck.core.optim import Optimised, OptimiserConfig, make_optimised
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage, Stepper
from limbeck.networks.artifacts import save_model
from limbeck.networks.feature_linear import thinned
from limbeck.networks.node_networks import Structure, node_network
from limbeck.tasks.judging_nodes import NodeModel, judge_nodes, on_device
from limbeck.tasks.node_classification import NodeData, NodeParts, NodeSetup, NodeTask, load_nodes

Teacher = nn.Module | Callable[[Tensor, Any], Tensor]


class NodeDistiller(Method):
    """Base of the methods that teach a student without a graph what a network over the graph knows.

    Two stages: the teacher is trained on the graph as it is in training (unless it is trained already), then the student, in both cases with all
    nodes in each update, and with the weights that did best on validation nodes kept. A method says what the student learns from
    (:meth:`student_losses`), and may say it of the teacher too (:meth:`teacher_losses`).

    Without the engine::

        method = LightHGNN(task, teacher, student)
        optimizer = torch.optim.Adam(method.student.parameters(), lr=0.01)
        for _ in range(200):
            loss = method.student_losses().total
            optimizer.zero_grad(); loss.backward(); optimizer.step()

    Args:
        task: nodes, their structure and split; see :meth:`limbeck.tasks.node_classification.NodeTask.of`.
        teacher: trained, ``teacher(features, structure) -> logits``; or the kind of a network of :mod:`limbeck.networks.node_networks`, which is then
            trained here. None: the method's own kind.
        student: ``student(features) -> logits``, trained in place. None: a perceptron.
        config: hyper-parameters; or give single ones as keyword arguments.
        train_teacher: train the teacher first; None: only if it was given by its kind.
        seed: of what is drawn outside of training.

    Attributes:
        task: as given. watched: the same without hidden nodes, which is all that training sees.
        said: (n, K) the teacher's logits on the watched nodes, once it was asked.

    Raises:
        InputError: a teacher that cannot be called or cannot be trained, a student that is no module.
    """

    family = "graphs"
    default_teacher: ClassVar[str] = "gcn"
    default_student: ClassVar[str] = "nodemlp-128-p50"

    class Config(OptimiserConfig):
        """Optimisation of both stages."""

        optimizer: Literal["adamw", "adam", "sgd"] = Field("adam", description="update rule")
        lr: float = Field(0.01, gt=0, description="peak learning rate of the student")
        weight_decay: float = Field(5e-4, ge=0, description="weight decay of the student (decoupled for adamw)")
        schedule: Literal["constant", "cosine", "linear", "poly", "step"] = Field(
            "constant", description="course of the learning rates after warm-up"
        )
        epochs: int = Field(200, ge=1, description="passes of the student over the nodes")
        node_batch: int | None = Field(
            None, ge=2, description="nodes per update of the student; none: all of them at once"
        )
        teacher_epochs: int = Field(200, ge=1, description="updates of the teacher, each over the whole graph")
        teacher_lr: float = Field(0.01, gt=0, description="peak learning rate of the teacher")
        teacher_weight_decay: float = Field(5e-4, ge=0, description="weight decay of the teacher")

    class Setup(NodeSetup):
        """What a run by name builds."""

        teacher_kind: str | None = Field(
            None, description="gcn, sage, gat, hgnn, hgnn+, hnhn or unigcn; none: the method's own"
        )
        teacher_hidden: int = Field(32, ge=1, description="width of the teacher's hidden layers")
        teacher_depth: int = Field(2, ge=1, description="layers of the teacher")
        teacher_dropout: float = Field(0.5, ge=0, lt=1, description="dropout of the teacher")
        student: str | None = Field(None, description="student network; none: the method's own perceptron")

    def __init__(
        self,
        task: NodeTask,
        teacher: Teacher | str | None = None,
        student: nn.Module | None = None,
        config: Any = None,
        *,
        train_teacher: bool | None = None,
        seed: int = 0,
        **overrides: Any,
    ) -> None:
        super().__init__(config, **overrides)
        if not isinstance(task, NodeTask):
            raise InputError(f"{type(self).__name__} takes a NodeTask, not {type(task).__name__}: see NodeTask.of")
        self.task, self.watched, self.seed = task, task.observed(), seed
        kind = self.default_teacher if teacher is None else teacher
        self.trains_teacher = isinstance(kind, str) if train_teacher is None else train_teacher
        teacher = self.fresh_teacher(task, kind, seed) if isinstance(kind, str) else kind
        module = teacher if isinstance(teacher, nn.Module) else _Called(teacher)
        self.teacher: nn.Module
        if self.trains_teacher:
            if not any(p.requires_grad for p in module.parameters()):
                raise InputError("the teacher has no parameters that could be trained: give train_teacher=False")
            self.add_module("teacher", module)
        else:
            self.add_frozen("teacher", module)
        self.student = self.fresh_student(task, self.default_student, seed) if student is None else student
        if not isinstance(self.student, nn.Module):
            raise InputError(f"the student must be an nn.Module, not {type(student).__name__}")
        self.said: Tensor | None = None

    # ---- parts -----------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def features(self) -> Tensor:
        """(n, F) of the watched nodes."""
        return on_device(self.watched, self.device)[0]

    @property
    def structure(self) -> Structure:
        """What joins the watched nodes."""
        return on_device(self.watched, self.device)[1]

    @property
    def labels(self) -> Tensor:
        """(n,) of the watched nodes; only those of ``watched.train`` may be learnt from."""
        return self.watched.labels.to(self.device)

    def teacher_logits(self, features: Tensor | None = None) -> Tensor:
        """(n, K) on the watched nodes, with their own features or others; in the teacher's present mode."""
        return logits_of(
            self.teacher(self.features_for(self.teacher) if features is None else features, self.structure)
        )

    def student_logits(self, nodes: Tensor | None = None) -> Tensor:
        """(n, K) of all watched nodes, or of some."""
        return logits_of(self.student(self.features_for(self.student) if nodes is None else self.features[nodes]))

    def features_for(self, network: nn.Module) -> Tensor:
        """All watched nodes' features, in sparse form where they are sparse and the network says that it takes them so."""
        if not getattr(network, "takes_sparse", False):
            return self.features
        held: dict[str, Tensor] = vars(self.watched).setdefault("_thinned", {})
        if str(self.device) not in held:
            held[str(self.device)] = thinned(self.features)
        return held[str(self.device)]

    def ask_teacher(self) -> Tensor:
        """The teacher's logits (n, K) on the watched nodes, in evaluation mode, without gradient; it is asked once."""
        if self.said is None:
            self.said = self._quietly(self.teacher, self.teacher_logits)
        return self.said.to(self.device)

    def draw_nodes(self) -> Tensor:
        """The watched nodes of one update of the student: all, or ``node_batch`` of them, drawn from torch's random state."""
        count, size = self.watched.num_nodes, self.config.node_batch
        if size is None or size >= count:
            return torch.arange(count, device=self.device)
        return torch.randperm(count)[:size].to(self.device)

    def labelled_loss(self, logits: Tensor, nodes: Tensor) -> Tensor:
        """Cross-entropy, the mean over the training nodes among ``nodes`` (m,), whose logits (m, K) are given; 0 where there are none."""
        known = torch.isin(nodes, self.watched.train.to(nodes.device))
        if not bool(known.any()):
            return logits.sum() * 0
        return F.cross_entropy(logits[known], self.labels[nodes[known]])

    # ---- what a method defines -------------------------------------------------------------------------------------------

    def teacher_losses(self) -> Losses:
        """What the teacher learns from: cross-entropy on the training nodes."""
        train = self.watched.train.to(self.device)
        return Losses(ce=F.cross_entropy(self.teacher_logits()[train], self.labels[train]))

    def student_losses(self) -> Losses:
        """What the student learns from, in one update."""
        raise NotImplementedError(f"{type(self).__name__} does not say what the student learns from")

    def losses(self, batch: Batch) -> Losses:
        """The student's losses; the batch is not looked at, since the method holds its nodes."""
        return self.student_losses()

    def contestants(self) -> dict[str, NodeModel]:
        """What is judged side by side, the result first."""
        return {"student": NodeModel(self.student, False), "teacher": NodeModel(self.teacher, True)}

    # ---- stages ----------------------------------------------------------------------------------------------------------

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """The teacher's, where it is trained here, and the student's."""
        found = [self.student_stage()]
        return [self.teacher_stage(), *found] if self.trains_teacher else found

    def teacher_stage(self) -> Stage:
        """Updates of the teacher over the whole graph."""
        config = self.config
        rate = config.replace(weight_decay=config.teacher_weight_decay)

        def begin() -> None:
            self.said = None

        def made() -> Mapping[str, Optimised]:
            return {
                "teacher": make_optimised(self.teacher.parameters(), rate, config.teacher_epochs, lr=config.teacher_lr)
            }

        return self.fitting_stage(
            "teacher", self.teacher, config.teacher_epochs, self.teacher_losses, self.teacher_logits, made, begin
        )

    def student_stage(self) -> Stage:
        """Updates of the student."""
        config = self.config
        size = min(config.node_batch or self.watched.num_nodes, self.watched.num_nodes)
        steps = config.epochs * math.ceil(self.watched.num_nodes / size)

        def made() -> Mapping[str, Optimised]:
            return {"student": make_optimised(self.student.parameters(), config, steps)}

        return self.fitting_stage("student", self.student, steps, self.student_losses, None, made)

    def fitting_stage(
        self,
        name: str,
        network: nn.Module,
        steps: int,
        losses: Callable[[], Losses],
        predict: Callable[[], Tensor] | None,
        optimisers: Callable[[], Mapping[str, Optimised]],
        begin: Callable[[], None] | None = None,
        step: Callable[[Stepper], Losses] | None = None,
    ) -> Stage:
        """A stage that keeps the weights with the best accuracy on validation nodes.

        Args:
            name: of the stage. network: what is trained. steps: how many.
            losses: of one update. predict: logits (n, K) of the watched nodes, for validation; None: the student on validation nodes alone.
            optimisers: see :class:`~limbeck.core.stage.Stage`. begin: called on a fresh entry.
            step: what an update does, where it is more than minimising ``losses`` (which is not called then); it returns what is logged.
        """
        best = BestState(network)

        def minimised(stepper: Stepper) -> Losses:
            found = losses()
            stepper.minimise(found)
            return found

        def update(_: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            found = (step or minimised)(stepper)
            val = self.watched.val.to(self.device)
            ask = (lambda: predict()[val]) if predict else (lambda: self.student_logits(val))
            said = self._quietly(network, ask)
            right = (said.argmax(1) == self.labels[val]).float().mean()
            best.offer(float(right))
            return {**found.logged(), "accuracy_val": right}

        kept = {"best": best}
        return Stage(name, steps, update=update, optimisers=optimisers, begin=begin, end=best.restore, state=kept)

    @staticmethod
    @torch.no_grad()
    def _quietly(network: nn.Module, ask: Callable[[], Tensor]) -> Tensor:
        """What a network says in evaluation mode, without gradient."""
        was_training = network.training
        network.eval()
        found = ask()
        network.train(was_training)
        return found

    # ---- building --------------------------------------------------------------------------------------------------------

    @classmethod
    def fresh_teacher(cls, task: NodeTask, kind: str, seed: int, **options: Any) -> nn.Module:
        """An untrained teacher, initialised from the seed."""
        with preserved_random_state():
            seed_everything(mix_seed(seed, 59))
            return node_network(kind, task.features.shape[1], task.num_classes, **options)

    @classmethod
    def fresh_student(cls, task: NodeTask, name: str, seed: int) -> nn.Module:
        """An untrained student, initialised from the seed."""
        with preserved_random_state():
            seed_everything(mix_seed(seed, 61))
            return networks.build(name, in_shape=(task.features.shape[1],), num_classes=task.num_classes)

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, NodeParts]:
        """The method on a task by name, and the task's parts."""
        task = load_nodes(setup)
        return cls.on_task(task, config, seed=seed, setup=setup), task.parts()

    @classmethod
    def on_task(cls, task: NodeTask, config: Any, *, seed: int = 0, setup: Any = None) -> Self:
        """The method for a task that is loaded already."""
        setup = cls.Setup() if setup is None else setup
        options = {"hidden": setup.teacher_hidden, "depth": setup.teacher_depth, "dropout": setup.teacher_dropout}
        teacher = cls.fresh_teacher(task, setup.teacher_kind or cls.default_teacher, seed, **options)
        student = cls.fresh_student(task, setup.student or cls.default_student, seed)
        return cls(task, teacher, student, config, train_teacher=True, seed=seed)

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        """The method on a user's own nodes: the training part of a :class:`~limbeck.tasks.node_classification.NodeTask`.

        Raises:
            InputError: the data is no part of such a task.
        """
        if not isinstance(data, NodeData):
            raise InputError(
                f"{cls.name} needs a graph: give NodeTask.of(structure, features, labels, train=…, val=…).parts().train as data"
            )
        return cls(data.task, teacher, student, config, seed=seed)

    # ---- running ---------------------------------------------------------------------------------------------------------

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        """Nothing is needed before a run."""

    def check(self, batch: Batch) -> None:
        """One prediction of the student and one of the teacher.

        Raises:
            InputError: one fails, is not finite, or has another number of classes.
        """
        some = self.watched.train[:2].to(self.device)
        asked = {
            "student": (self.student, lambda: self.student_logits(some)),
            "teacher": (self.teacher, self.teacher_logits),
        }
        with preserved_random_state():
            for who, (network, ask) in asked.items():
                try:
                    said = self._quietly(network, ask)
                except RuntimeError as error:
                    reason = " ".join(str(error).split())[:160]
                    raise InputError(
                        f"the {who} does not take features {tuple(self.features.shape)}: {reason}"
                    ) from error
                if said.ndim != 2 or said.shape[1] != self.task.num_classes or not bool(torch.isfinite(said).all()):
                    raise InputError(
                        f"the {who} must give finite logits (nodes, {self.task.num_classes}), not {tuple(said.shape)}"
                    )

    # ---- judging and keeping the result ----------------------------------------------------------------------------------

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """All contestants on the task's test nodes; see :func:`~limbeck.tasks.judging_nodes.judge_nodes`.

        Raises:
            InputError: the task has no test nodes.
        """
        task = test.task if isinstance(test, NodeData) else self.task
        if not len(task.test):
            raise InputError("the task has no test nodes: nothing can be judged")
        return judge_nodes(self.contestants(), task, seed=self.seed)

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The student, which needs a node's features and nothing else."""
        about = {"inputs": "features of nodes (B, F)", "features": self.task.features.shape[1], **description}
        save_model(self.student, folder, about)


class _Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        if not callable(function):
            raise InputError(
                f"the teacher must be callable as teacher(features, structure), not {type(function).__name__}"
            )
        self.function = function

    def forward(self, features: Tensor, structure: Any) -> Tensor:
        return self.function(features, structure)
