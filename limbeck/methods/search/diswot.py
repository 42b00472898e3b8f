"""DisWOT: the student that fits a teacher best, found among untrained networks, and then distilled."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from limbeck.blocks.evolution import RandomSearch
from limbeck.blocks.heads import HeadPaths, answer
from limbeck.blocks.scored_search import ScoredSearch, ScoredSearchConfig
from limbeck.blocks.search_spaces import Budget, Code, SearchSpace
from limbeck.blocks.teachers import Teachers
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data, as_data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.files import write_json
from limbeck.core.method import Method
from limbeck.core.optim import make_optimised, trainable
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage, Stepper
from limbeck.losses.channels import Semantics, inter_channel_correlation
from limbeck.losses.logits import forward_kl
from limbeck.losses.relations import similarity_preserving
from limbeck.methods.models.base import OfflineDistiller
from limbeck.methods.search.base import SearchMethod, budget_for
from limbeck.metrics.cost import count_parameters
from limbeck.metrics.distillability import PAIR_SCORES, Init, PairScorer, draw_batches
from limbeck.networks.artifacts import save_model
from limbeck.networks.spaces import SPACES, named_space
from limbeck.tasks.base import Task
from limbeck.tasks.judging import judge_classifiers
from limbeck.tasks.judging_search import search_pictures, search_table

BUDGET_SHARE = 0.5
CHOSEN, RANDOM = "student", "random member"


class DisWOT(SearchMethod, OfflineDistiller):
    r"""Candidates are ranked by how much they, untrained, resemble the untrained teacher on one batch; the best is distilled.

    Teacher and candidate are copied, their weights drawn from N(0, 1) (biases 0, norms the identity), and run in training mode on the same B labelled samples. With
    last maps :math:`A` flattened to (B, D), :math:`G = A A^\top` with rows of length 1, and :math:`g` (N, C) the gradient of the mean
    cross-entropy with regard to the last linear layer's weight,

    .. math::
        M_r &= -\tfrac{1}{B^2}\,\|G_t - G_s\|_F^2 \\
        M_s &= -\tfrac{1}{N C} \sum_n \|E_n^t - E_n^s\|_F^2, \qquad E_n = \text{rows of length 1 of } g_n g_n^\top \ (C, C)

    where the last widths C differ, :math:`M_s` compares the classes' Gram matrix :math:`g g^\top` (N, N) instead. The scores are joined as ``combine`` says. The plain
    sum is the paper's; :math:`M_s` is some hundred times larger and decides it alone, so by default each score is standardised over the candidates seen so far. A
    candidate whose features are the same for all samples, or not finite, comes last.

    Stages. ``search`` judges one candidate per step: ageing evolution (or random draws) within the budget; equal candidates are judged once. At its end the
    ``recheck`` best are judged again on other batches and draws, and the best of these is the student. ``distillation`` trains it with

    .. math:: L = (1-\alpha)\,\mathrm{CE} + \alpha\,\tau^2\,\mathrm{KL}_\tau + b_r\,\mathrm{SP}(A_t, A_s) + b_s\,\mathrm{ICKD}(A_t, A_s)

    from the teacher's own weights; the last two terms (weights 0 by default) are the scores as losses. A run by name then trains the first random draw of the search
    in the same way, to be judged beside it.

    In a loop of your own::

        method = DisWOT(space, teacher, budget={"parameters": 1e5})
        student = method.search((x, y))  # the whole data set, or some of it
        for batch in loader:
            loss = method(batch)

    Args:
        space: a :class:`~limbeck.blocks.search_spaces.SearchSpace` of classifiers that end in a linear layer.
        teacher: a module, trained; its weights matter for the distillation only. It is frozen in place, and copied to be scored.
        config: hyper-parameters; or give single ones as keyword arguments.
        budget: bounds by name (``parameters``, ``flops``), or a :class:`~limbeck.blocks.search_spaces.Budget` with costs of your own.

    Attributes:
        record: what was judged so far (:class:`~limbeck.blocks.scored_search.ScoredSearch`).
        sizes: for each judged candidate its parameters.
        members: the codes of the networks that were built to be trained, by role.

    Source: "DisWOT: Student Architecture Search for Distillation WithOut Training" (2023) and its published code, whose evolution sorts scores upwards and so takes the
    worst of a sample as parents; here they are the best, as the paper says. Our decisions: the comparison of classes, standardised scores, how the best are judged
    again (the published code only says that it does), the weights of the two loss terms (left to the user).
    """

    name = "diswot"

    class Config(SearchMethod.Config, OfflineDistiller.Config, ScoredSearchConfig):
        epochs: float = Field(30, gt=0, description="passes over the training data that the found student gets")
        scores: tuple[str, ...] = Field(
            ("relation", "semantic"),
            min_length=1,
            description=f"what is judged; some are distillation losses with a minus sign: {', '.join(PAIR_SCORES)}",
        )
        compare: Semantics = Field(
            "auto", description="gradients are compared by channels or by classes; auto: by channels where widths agree"
        )
        init: Init = Field("gaussian", description="candidates' weights when judged: N(0, 1), or as they are built")
        teacher_init: Init = Field("gaussian", description="the teacher's when candidates are judged: N(0, 1), or own")
        score_batch: int = Field(64, ge=2, description="samples that candidates are judged on")
        features: str | None = Field(None, description="path of candidates' last map; none: found by itself")
        teacher_features: str | None = Field(None, description="path of the teacher's last map; none: found by itself")
        temperature: float = Field(4.0, gt=0, description="softens both distributions in the distillation")
        alpha: float = Field(0.9, ge=0, le=1, description="weight of the teacher; 1 - alpha is that of the labels")
        relation_weight: float = Field(0.0, ge=0, description="weight of the samples' relations as a loss")
        semantic_weight: float = Field(0.0, ge=0, description="weight of the channels' correlations as a loss")

        @field_validator("scores")
        @classmethod
        def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
            unknown = [name for name in names if name not in PAIR_SCORES]
            if unknown:
                raise ValueError(f"'{unknown[0]}' is none of {', '.join(PAIR_SCORES)}")
            return names

        presets = {
            "paper": {
                "epochs": 240,
                "optimizer": "sgd",
                "lr": 0.05,
                "weight_decay": 5e-4,
                "schedule": "step",
                "milestones": (0.625, 0.75, 0.875),
                "candidates": 1000,
                "combine": "sum",
            }
        }

    class Setup(SearchMethod.Setup):
        """What a run by name builds: task, space and budget."""

        space: str = Field(
            "cells",
            description="cells (NAS-Bench-201), depths (residual networks), networks' names with commas between them, or package.module:factory",
        )
        width: int = Field(8, ge=1, description="channels of the first stage in cells and depths")
        stages: int = Field(3, ge=1, description="stages in cells and depths")
        max_parameters: float | None = Field(
            None,
            gt=0,
            description=f"parameters that a student may have; none: {BUDGET_SHARE:g} of the teacher's unless FLOPs are bounded",
        )
        teacher: tuple[str, ...] = Field(
            (), description="teacher network, or package.module:factory with its weights loaded; none: the space's own"
        )
        teacher_epochs: float | None = Field(None, gt=0, description="passes over the data for a reference teacher")

    def __init__(
        self,
        space: SearchSpace,
        teacher: Any,
        config: Any = None,
        *,
        budget: Budget | Mapping[str, float] | None = None,
        **overrides: Any,
    ) -> None:
        Method.__init__(self, config, **overrides)
        if not isinstance(space, SearchSpace):
            raise InputError(f"{self.name} searches a SearchSpace, not a {type(space).__name__}")
        teachers = teacher if isinstance(teacher, Teachers) else Teachers(teacher)
        if len(teachers) != 1:
            raise InputError(f"{self.name} searches a student for one teacher, not {len(teachers)}")
        self.space, self.budget = space, budget
        self.add_frozen("teachers", teachers)
        self.networks = nn.ModuleDict()
        self.members: dict[str, Code] = {}
        self.sizes: dict[Code, int] = {}
        self.record: ScoredSearch | None = None
        self.with_random = False
        self._scorer: PairScorer | None = None
        self._data: Data | None = None
        self._seed = 0

    # ---- the search ------------------------------------------------------------------------------------------------------

    def search(self, data: Any, *, seed: int = 0) -> nn.Module:
        """The whole search at once.

        Args:
            data: labelled samples, as :func:`~limbeck.core.data.as_data` takes them; the batches of the scores are drawn from them.
            seed: of every draw.

        Returns:
            the student, with fresh weights; also :attr:`student`.
        """
        record = self.prepare_search(as_data(data), seed)
        for step in range(len(record)):
            record.step(step)
        return self.build_member(CHOSEN)

    def prepare_search(self, data: Data, seed: int) -> ScoredSearch:
        """The search before its first step; what was found before is forgotten."""
        self._data, self._seed, self._scorer = data, seed, None
        self.members, self.sizes = {}, {}
        self.networks.clear()
        budget = budget_for(self.space, data.fetch(torch.arange(1), None).inputs, self.budget)
        self.record = ScoredSearch(self.space, budget, self.judge, self.config, seed=mix_seed(seed, 33))
        return self.record

    def judge(self, code: Code, repeats: range | None = None) -> dict[str, float]:
        """The scores of any member, by name; ``repeats`` are numbers of batches and draws (None: those of a first judgement).

        Raises:
            InputError: nothing was searched yet, so that there is nothing to judge it on.
        """
        if self._scorer is None:
            if self._data is None:
                raise InputError("there is nothing to judge candidates on: call method.search(data) first")
            seed = mix_seed(self._seed, 34)
            batches = draw_batches(self._data, self.config.score_batch, self.config.all_repeats, seed)
            self._scorer = self._scorer_on(batches, seed)
        network = self._fresh(code)
        self.sizes[code] = count_parameters(network)
        repeats = range(self.config.repeats) if repeats is None else repeats
        self.counters["candidate_forwards"] += sum(len(self._scorer.batches[n]) for n in repeats)
        return self._scorer(network, *code, repeats=repeats)

    def _fresh(self, code: Code) -> nn.Module:
        """A member, whose weights depend on the seed and its code alone."""
        with preserved_random_state():
            seed_everything(mix_seed(self._seed, 31, *code))
            network = self.space.build(code)
        if not isinstance(network, nn.Module):
            raise InputError(f"the space '{self.space.name}' builds a {type(network).__name__}, not an nn.Module")
        return network.to(self._device())

    def _device(self) -> torch.device:
        return next(self.teachers.parameters(), torch.zeros(())).device

    def _scorer_on(self, batches: Sequence[Batch], seed: int) -> PairScorer:
        config = self.config
        return PairScorer(
            self.teachers.models[0],
            [batch.to(self._device()) for batch in batches],
            config.scores,
            teacher_init=config.teacher_init,
            init=config.init,
            seed=seed,
            compare=config.compare,
            teacher_paths=HeadPaths(config.teacher_features),
            paths=HeadPaths(config.features),
        )

    # ---- the distillation ------------------------------------------------------------------------------------------------

    @property
    def student(self) -> nn.Module:  # type: ignore[override]
        """The found network.

        Raises:
            InputError: nothing was searched yet.
        """
        if CHOSEN not in self.networks:
            raise InputError("there is no student yet: call method.search(data) first")
        return self.networks[CHOSEN]

    def build_member(self, role: str) -> nn.Module:
        """Build the network of a role with fresh weights: the best candidate, or the first random draw that is another one."""
        assert self.record is not None
        best = self.record.best()
        others = [code for code, _ in self.record.searcher.history if code != best]
        code = best if role == CHOSEN else [*others, best][0]
        self.members[role] = code
        self.networks[role] = self._fresh(code)
        return self.networks[role]

    def losses(self, batch: Batch) -> Losses:
        return self.losses_of(self.student, batch)

    def losses_of(self, network: nn.Module, batch: Batch) -> Losses:
        """The terms of the distillation of one network."""
        config, out = self.config, Losses()
        if config.relation_weight or config.semantic_weight:
            own = answer(network, batch.inputs, HeadPaths(config.features))
            with torch.no_grad():
                given = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
                other = answer(self.teachers.models[0], given, HeadPaths(config.teacher_features))
            self.counters["teacher_forwards"] += len(batch)
            logits, target = own.logits, other.logits
            if config.relation_weight:
                out.add("relation", similarity_preserving(own.features, other.features), config.relation_weight)
            if config.semantic_weight:
                out.add("semantic", inter_channel_correlation(own.features, other.features), config.semantic_weight)
        else:
            logits, target = logits_of(call_model(network, batch.inputs)), self.teach(batch).logits
        out.add("ce", F.cross_entropy(logits, self.labels(batch)), 1 - config.alpha)
        return out.add("kd", forward_kl(logits, target, config.temperature), config.alpha * config.temperature**2)

    # ---- running ---------------------------------------------------------------------------------------------------------

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        sizes = {"width": setup.width, "stages": setup.stages} if setup.space in SPACES else {}
        found = named_space(setup.space, task.in_shape, task.num_classes, **sizes)
        names = setup.teacher or (found.teacher or task.networks["teacher"],)
        teachers = Teachers(cls.teachers_for(task, setup.replace(teacher=names), seed=seed, progress=progress))
        bounds = cls.bounds(setup) or {"parameters": BUDGET_SHARE * count_parameters(teachers)}
        made = cls(found.space, teachers, config, budget=bounds)
        made.with_random = True
        return made

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        """``student`` is the space, or a pair of the space and the budget."""
        cls.require(student=student, teacher=teacher)
        space, budget = student if isinstance(student, tuple) and len(student) == 2 else (student, None)
        return cls(space, teacher, config, budget=budget)

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        record = self.prepare_search(train, seed)

        def judge_next(_: Batch | None, stepper: Stepper) -> dict[str, Tensor]:
            record.step(stepper.step)
            best = max(record.joined().values())
            judged = {"judged": torch.tensor(float(len(record.scores)))}
            return judged if best == -math.inf else {**judged, "best_score": torch.tensor(best)}

        search = Stage("search", len(record), update=judge_next)
        student = self.distillation("distillation", CHOSEN, train, val, seed)
        random = [self.distillation("random", RANDOM, train, None, seed)] if self.with_random else []
        return [search, student, *random]

    def distillation(self, name: str, role: str, train: Data, val: Data | None, seed: int) -> Stage:
        """The distillation of one network, which is built when the stage begins."""
        changes: dict[str, Any] = {
            "begin": lambda: self.build_member(role),
            "losses": lambda batch: self.losses_of(self.networks[role], batch),
        }
        stage = self.stage(name, train, val, seed=seed, **changes)
        stage.optimisers = lambda: {"main": make_optimised(trainable(self.networks[role]), self.config, stage.steps)}
        return stage

    def training_state(self) -> dict[str, Any]:
        found = {
            "record": None if self.record is None else self.record.state_dict(),
            "sizes": list(self.sizes.items()),
            "members": dict(self.members),
        }
        return {**super().training_state(), "search": found}

    def load_training_state(self, state: dict[str, Any]) -> None:
        found = state["search"]
        if found["record"] is not None and self.record is not None:
            self.record.load_state_dict(found["record"])
        self.sizes = {tuple(code): size for code, size in found["sizes"]}
        self.members = {role: tuple(code) for role, code in found["members"].items()}
        self.networks.clear()
        for role, code in self.members.items():
            self.networks[role] = self._fresh(code)
        super().load_training_state(state)

    def check(self, batch: Batch) -> None:
        """Dry run: a member within the budget is judged against the teacher, and its loss computed.

        Raises:
            InputError: no member within the budget, no last linear layer, different numbers of classes, labels that do not fit, shapes that a
                score cannot compare.
        """
        budget = budget_for(self.space, batch.map(lambda t: t[:1]).inputs, self.budget)
        network = self._fresh(RandomSearch(self.space, budget).ask())
        counters = self.counters.copy()
        with preserved_random_state():
            self._scorer_on([batch], 0)(copy.deepcopy(network))
            losses = self.losses_of(network, batch)
            if not bool(torch.isfinite(losses.total)):
                raise InputError("the loss is not finite on the first batch: check inputs and settings")
        self.counters = counters

    # ---- judging and keeping the result ------------------------------------------------------------------------------

    def contestants(self) -> dict[str, nn.Module]:
        return {CHOSEN: self.student, "teacher": self.teachers.models[0], **self.networks}

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """As all classifiers, with the joined score of those that were judged, and pictures of the search."""
        assert self.record is not None
        result = judge_classifiers(self.contestants(), test, class_names)
        joined = self.record.joined()
        for row in result["rows"]:
            if row["who"] in self.members:
                row["score"] = joined[self.members[row["who"]]]
        pictures = search_pictures(self.record, self.sizes, self.members, result["rows"])
        result["pictures"] = [*pictures, *result.get("pictures", [])]
        return {**result, "chosen": self.space.text(self.members[CHOSEN]), "judged": len(joined)}

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The plain student, and ``search.json``: every judged candidate with its options, scores and parameters, best first."""
        assert self.record is not None
        save_model(self.student, folder, {**description, "options": self.space.options(self.members[CHOSEN])})
        write_json(folder / "search.json", search_table(self.record, self.sizes))
