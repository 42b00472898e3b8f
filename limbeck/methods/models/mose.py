"""MoSE: one encoder trained through all its exits at once, so that it can be deployed at any depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.blocks.depth_heads import DepthConditionedHead
from limbeck.blocks.masked_tokens import SpecialTokens, mask_tokens
from limbeck.blocks.multi_exit import ExitEncoder, MultiExit, Pooling, pool
from limbeck.core.batch import Batch, Losses, call_model, map_tensors
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised, trainable
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage
from limbeck.losses.contrastive import similarity_logits
from limbeck.losses.logits import forward_kl
from limbeck.methods.models.base import ModelDistiller, make_network
from limbeck.networks.multi_exit import save_exits
from limbeck.tasks.base import Task, load_task
from limbeck.tasks.pairs import PairTask
from limbeck.tasks.retrieval import judge_retrieval, search, sides_of
from limbeck.tasks.tokens import SPECIAL, HashTokenizer

QUERY_INSTRUCTION = "represent this text for code retrieval"
DOCUMENT_INSTRUCTION = "represent this python code for retrieval"


class MoSE(ModelDistiller):
    r"""Hierarchical self-distillation: one loss at every exit, deeper exits weighing more, one backward pass through all layers.

    An encoder of L layers has exits :math:`E \subset \{1 \dots L\}`. With hidden states :math:`h_i` (B, T, D) after layer i and a
    projection head :math:`P_i` for each exit (its own layer norm and linear map),

    .. math::
        v_i(x) &= \mathrm{normalise}\big(P_i(\mathrm{pool}(h_i(x)))\big) \\
        S_i &= \tau\, v_i(a)\, v_i(b)^\top, \qquad
        L_i = \tfrac12\big(\mathrm{CE}(S_i, \mathrm{diag}) + \mathrm{CE}(S_i^\top, \mathrm{diag})\big) \\
        L &= \sum_{i \in E} \alpha_i L_i, \qquad \alpha_i = i / L

    over a batch of N pairs (a, b): the weight goes by the layer's number over the depth, not by the exit's rank. There is no teacher.
    The distillation is implicit: gradients of deep exits reach the layers that shallow exits read, and nothing is detached.
    ``code_share`` of the batch (half) are pairs of code and code, the others of text and code, where the data brings a second way of
    writing each document (``other``). Pairs of one group (``labels``; equal texts) are no negatives for each other. Means are over
    rows; logits are in single precision; with several processes the negatives come from all of them.

    Pre-training (``pretrain_epochs`` > 0) is a stage before, on windows ``[SEP] a [SEP] b … [CLS]`` of joined snippets:

    .. math:: L = \sum_{i \in E} \alpha_i \big(\mathrm{MLM}_i + \mathrm{ICC}_i\big)

    MLM is cross-entropy on the masked tokens; ICC (in-context classification) asks, of the state at the last token ([CLS]), whether
    all parts are from one repository. The two heads are shared by all exits and are told the depth by a learned embedding, see
    :class:`~limbeck.blocks.depth_heads.DepthConditionedHead`. They are dropped afterwards.

    Extension, not in the paper: ``exit_kd_weight`` adds explicit distillation from the deepest exit l into the others,
    :math:`\sum_{i < l} \mathrm{KL}(\mathrm{softmax}(S_l / T) \,\|\, \mathrm{softmax}(S_i / T))`, S_l detached, mean over rows and both
    directions.

    A batch is ``{"query": …, "document": …[, "other": …]}`` or ``(query, document)``, each as the encoder takes it
    (``{"input_ids": (B, T), "attention_mask": (B, T)}``), ``labels`` the groups (B,) or none::

        method = MoSE(transformers_encoder, exits=(2, 4, 8, 12))
        loss = method({"query": queries, "document": documents})
        small = method.truncate(4)  # layers 1 to 4 with their head: a module of its own

    Args:
        student: a 🤗 transformers encoder, trained in place, or a :class:`~limbeck.blocks.multi_exit.MultiExit` (for other encoders,
            through taps).
        config: hyper-parameters; or give single ones as keyword arguments.
        special_tokens: ids of the encoder's special tokens, for pre-training.

    Source: "One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early Layer Embeddings" (2025). Our decisions,
    where the paper leaves it open: pooling is the mean over tokens; the masking rate is 15 % with the usual 80/10/10; frequent words
    are replaced each by itself with probability 0.3; the weights alpha_i are those of the pre-training losses too; the classifier on
    [CLS] has the form of the MLM head. Without a translator the pairs of code and code are a function and the same function with its
    local identifiers renamed and words replaced, which is easier than two programming languages.
    """

    name = "mose"
    student: MultiExit

    class Config(ModelDistiller.Config):
        epochs: float = Field(3, gt=0, description="passes over the training data")
        lr: float = Field(2e-3, gt=0, description="peak learning rate")
        weight_decay: float = Field(0.01, ge=0, description="weight decay (decoupled for adamw)")
        warmup: float = Field(0.1, ge=0, lt=1, description="fraction of training with a linearly rising rate")
        clip_grad: float | None = Field(1.0, gt=0, description="largest gradient norm; none: no clipping")
        exits: tuple[int, ...] | None = Field(
            None, description="layers with an exit, from 1; none: at a sixth, a third, two thirds and all of the depth"
        )
        dim: int = Field(64, ge=1, description="width of the embeddings")
        pooling: Pooling = Field("mean", description="mean of the tokens, the last one, or the first one (cls)")
        scale: float = Field(10.0, gt=0, description="logit scale of the contrastive loss")
        code_share: float = Field(
            0.5,
            ge=0,
            lt=1,
            description="part of a batch that pairs code with code, where the data has a second document",
        )
        exit_kd_weight: float = Field(
            0.0, ge=0, description="weight of explicit distillation from the deepest exit (extension, not in the paper)"
        )
        exit_kd_temperature: float = Field(1.0, gt=0, description="softens both sides of that distillation")
        pretrain_epochs: float = Field(
            0.0,
            ge=0,
            description="passes over joined snippets that pre-train the encoder first (MLM and same repository?)",
        )
        pretrain_lr: float | None = Field(None, gt=0, description="peak learning rate of pre-training; none: lr")
        pretrain_window: int | None = Field(
            None, ge=8, description="tokens of a pre-training input; none: the encoder's window"
        )
        mask_rate: float = Field(0.15, gt=0, lt=1, description="share of tokens that pre-training masks")
        conditional_size: int = Field(4, ge=1, description="width of the depth embedding in the pre-training heads")

        presets = {
            "paper": {"exits": (4, 9, 18, 27, 36), "batch_size": 2048, "steps": 20_000, "lr": 1e-5, "scale": 10.0}
        }

        @model_validator(mode="after")
        def _whole_batches(self) -> Self:
            if self.accumulate > 1:
                raise ValueError(
                    "accumulate must be 1: the negatives of a contrastive loss come from the whole batch, and micro-batches have fewer"
                )
            return self

    class Setup(ModelDistiller.Setup):
        """What a run by name builds."""

        task: str = Field(
            "stdlib-code", description="stdlib-code, or with --data a jsonl or parquet file of text pairs"
        )
        instruction: bool = Field(
            False, description="put an instruction in front of every text (represent this … for retrieval)"
        )

    def __init__(
        self,
        student: nn.Module,
        config: Config | None = None,
        *,
        special_tokens: SpecialTokens = SPECIAL,
        **overrides: Any,
    ) -> None:
        super().__init__(student, config, **overrides)
        settings = self.config
        if not isinstance(student, MultiExit):
            self.student = MultiExit(student, settings.exits, settings.dim, settings.pooling)
        self.special = special_tokens
        self.preparation: dict[str, Any] = {}
        self.pretraining: nn.ModuleDict | None = None
        if settings.pretrain_epochs:
            self.pretraining = self._pretraining_heads()

    @property
    def weights(self) -> dict[int, float]:
        """alpha_i = i / L by exit."""
        return {i: i / self.student.depth for i in self.student.exits}

    # ---- the losses --------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        """One InfoNCE term ``exit_<i>`` for each exit, and ``exit_kd`` where it is asked for."""
        config = self.config
        groups = batch.labels if isinstance(batch.labels, Tensor) else None
        first, second = self.embed_pairs(batch)
        out, logits = Losses(), {}
        for i, weight in self.weights.items():
            forth, back, target = similarity_logits(first[i], second[i], config.scale, groups)
            logits[i] = (forth, back)
            out.add(f"exit_{i}", 0.5 * (F.cross_entropy(forth, target) + F.cross_entropy(back, target)), weight)
        if config.exit_kd_weight and len(logits) > 1:
            out.add("exit_kd", self._exit_kd(list(logits.values())), config.exit_kd_weight)
        return out

    def embed_pairs(self, batch: Batch) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Embeddings (N, dim) of the two sides of all pairs, by exit; the last ``code_share`` of the rows are code and code."""
        sides = sides_of(batch)
        size = len(Batch(sides["document"]))
        text = size - (round(size * self.config.code_share) if "other" in sides else 0)

        def rows(side: str, start: int, end: int) -> dict[int, Tensor]:
            found: dict[int, Tensor] = call_model(self.student, map_tensors(sides[side], lambda t: t[start:end]))
            return found

        document = rows("document", 0, size)
        if text == size:
            return rows("query", 0, size), document
        query, other = rows("query", 0, text), rows("other", text, size)
        return (
            {i: torch.cat([query[i], v[text:]]) for i, v in document.items()},
            {i: torch.cat([v[:text], other[i]]) for i, v in document.items()},
        )

    def _exit_kd(self, logits: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        temperature, deepest = self.config.exit_kd_temperature, logits[-1]
        terms = [
            0.5 * forward_kl(own, target.detach(), temperature)
            for exit in logits[:-1]
            for own, target in zip(exit, deepest, strict=True)
        ]
        return torch.stack(terms).sum()

    def pretraining_losses(self, batch: Batch) -> Losses:
        """Terms ``mlm_<i>`` and ``icc_<i>`` for each exit.

        Args:
            batch: windows ``{"input_ids": (B, T), "attention_mask": (B, T)}`` whose last token is [CLS]; labels (B,) 1 where all
                parts are from one repository, else 0.

        Raises:
            InputError: the method was made without pre-training.
        """
        if self.pretraining is None:
            raise InputError("the method was made without pre-training heads: give pretrain_epochs > 0")
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        labels = self.labels(batch)
        seen, chosen = mask_tokens(ids, self.special, self._vocabulary(), self.config.mask_rate)
        out = Losses()
        for i, hidden in self.student.hidden(input_ids=seen, attention_mask=mask).items():
            words = self.pretraining["mlm"](hidden[chosen], i).float()
            # A short batch may have nothing masked; the mean over nothing is 0 here, with a gradient of 0.
            mlm = F.cross_entropy(words, ids[chosen], reduction="sum") / max(1, len(words))
            said = self.pretraining["icc"](pool(hidden, mask, "last"), i).float()
            out.add(f"mlm_{i}", mlm, self.weights[i])
            out.add(f"icc_{i}", F.cross_entropy(said, labels), self.weights[i])
            out.observe(icc_accuracy=(said.argmax(-1) == labels).float().mean())
        return out

    def _vocabulary(self) -> int:
        size = getattr(getattr(self.student.encoder, "config", None), "vocab_size", None)
        if not isinstance(size, int):
            raise InputError(
                f"pre-training predicts tokens, and a {type(self.student.encoder).__name__} does not say how many there are "
                "(config.vocab_size): set pretrain_epochs to 0"
            )
        return size

    def _pretraining_heads(self) -> nn.ModuleDict:
        width, depth, size = self.student.width, self.student.depth, self.config.conditional_size
        mlm = DepthConditionedHead(width, self._vocabulary(), depth, conditional_size=size)
        icc = DepthConditionedHead(width, 2, depth, mlm.layers)
        like = next(self.student.parameters())
        return nn.ModuleDict({"mlm": mlm, "icc": icc}).to(like.device, like.dtype)

    # ---- building by name --------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Task]:
        task = load_task(setup)
        cls._needs_pairs(task)
        assert isinstance(task, PairTask)
        tokenizer = HashTokenizer(task.num_classes, task.in_shape[0])
        preparation: dict[str, Any] = {"tokenizer": f"limbeck.tasks.tokens.{tokenizer!r}"}
        if setup.instruction:
            task = task.prefixed(tokenizer.tokens(QUERY_INSTRUCTION)[0], tokenizer.tokens(DOCUMENT_INSTRUCTION)[0])
            preparation |= {"query_instruction": QUERY_INSTRUCTION, "document_instruction": DOCUMENT_INSTRUCTION}
        made = cls.on_task(task, setup, config, seed=seed, progress=progress)
        made.preparation = preparation
        return made, task

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        cls._needs_pairs(task)
        encoder = make_network(setup.student or task.networks["student"], task, seed)
        with preserved_random_state():
            seed_everything(mix_seed(seed, 35))
            return cls(encoder, config)

    @staticmethod
    def _needs_pairs(task: Task) -> None:
        if not isinstance(task, PairTask):
            raise InputError(f"mose learns from pairs of texts, and the task '{task.name}' has none: use stdlib-code")

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        if teacher is not None:
            raise InputError(f"{cls.name} has no teacher: the deep exits teach the shallow ones; leave teacher out")
        return super().from_modules(student, None, config, sample=sample)

    # ---- running -----------------------------------------------------------------------------------------------------

    def optimisers(self, steps: int) -> Mapping[str, Optimised]:
        """One, over the encoder and its exits' heads; the heads of pre-training are done with."""
        return {"main": make_optimised(trainable(self.student), self.config, steps)}

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """``fine-tuning``, after ``pretraining`` where ``pretrain_epochs`` are asked for.

        Raises:
            InputError: pre-training on data that cannot make windows of several repositories.
        """
        main = self.stage("fine-tuning", train, val, seed=seed)
        if not self.config.pretrain_epochs:
            return [main]
        return [self._pretraining_stage(train, seed), main]

    def _pretraining_stage(self, train: Data, seed: int) -> Stage:
        config, make = self.config, getattr(train, "contexts", None)
        if make is None:
            raise InputError(
                "pre-training joins snippets of known repositories: give limbeck.tasks.pairs.TextPairs(…, repository=…), "
                "or set pretrain_epochs to 0"
            )
        own = getattr(getattr(self.student.encoder, "config", None), "max_position_embeddings", None)
        contexts = make(config.pretrain_window or own or 64, mix_seed(seed, 37))
        stage = self.stage("pretraining", contexts, None, seed=mix_seed(seed, 36), losses=self.pretraining_losses)
        assert stage.stream is not None and self.pretraining is not None
        steps = max(1, round(config.pretrain_epochs * stage.stream.steps_per_epoch))
        trained = [*trainable(self.student.encoder), *trainable(self.pretraining)]
        return replace(
            stage,
            steps=steps,
            optimisers=lambda: {"main": make_optimised(trained, config, steps, lr=config.pretrain_lr)},
        )

    @torch.no_grad()
    def check_outputs(self, batch: Batch) -> None:
        sides = sides_of(batch)
        size = getattr(getattr(self.student.encoder, "config", None), "vocab_size", None)
        for side, inputs in sides.items():
            ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
            if isinstance(ids, Tensor) and isinstance(size, int) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise InputError(
                    f"the {side} tokens go from {int(ids.min())} to {int(ids.max())}, but the encoder knows ids 0 to {size - 1}"
                )
        counts = {side: len(Batch(inputs)) for side, inputs in sides.items()}
        if len(set(counts.values())) > 1:
            raise InputError(
                f"the sides of a batch of pairs must be as many: {', '.join(f'{n} {s}' for s, n in counts.items())}"
            )
        if counts["document"] < 2:
            raise InputError("a contrastive loss needs at least two pairs in a batch")

    def quick_metrics(self, data: Data) -> dict[str, float]:
        """MRR@10 of every exit, in a pool of at most 500 documents."""
        found = search(self.student, data, code=False, most=500)
        return {f"mrr_exit_{i}": measures["mrr_at_10"] for i, measures in found.items()}

    # ---- judging and keeping the result ------------------------------------------------------------------------------

    def truncate(self, exit: int) -> ExitEncoder:
        """The first ``exit`` layers with their head: a stand-alone encoder that gives this exit's embeddings exactly.

        Raises:
            InputError: no such exit.
        """
        return self.student.truncate(exit)

    def contestants(self) -> dict[str, nn.Module]:
        """The truncated encoders, deepest first."""
        return {f"exit {i}": self.truncate(i) for i in reversed(self.student.exits)}

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """What every exit finds, and what it costs."""
        return judge_retrieval(self.contestants(), test)

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The encoder with its heads; ``limbeck.load(folder)``, or one exit of it with ``limbeck.load(folder, exit=…)``."""
        save_exits(self.student, folder, {**description, "preparation": self.preparation})

    def save_exit(self, exit: int, folder: str | Path) -> None:
        """One truncated encoder with its head as an artifact of its own.

        Raises:
            InputError: no such exit.
        """
        save_exits(self.truncate(exit), Path(folder), {"method": self.name, "preparation": self.preparation})
