"""SquareHead: sparse fine-tuning with the dense model as the teacher of every block."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limbeck.blocks.held_masks import HeldMasks
from limbeck.blocks.layer_pruning import LayerPruner, packed_layers, reshapers
from limbeck.blocks.one_shot_pruning import Pattern, check_prunable, prunable
from limbeck.blocks.pruning_config import PruningConfig
from limbeck.blocks.sparse_containers import Packed, fill_from_packed, own_tensors, save_packed
from limbeck.blocks.sparse_linear import Backend, sparse_execution
from limbeck.blocks.storage import Storage, chosen_layers
from limbeck.blocks.taps import Taps
from limbeck.blocks.teachers import Teachers
from limbeck.blocks.transformer_blocks import (
    find_blocks,
    inside,
    is_encoder_decoder,
    predicts_next,
    valid_tokens,
    with_decoder_inputs,
)
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.stage import Stage
from limbeck.losses.logits import hinton
from limbeck.losses.tokens import block_error, check_token_labels, labelled_rows, token_cross_entropy, token_rows
from limbeck.methods.compression.base import Compressor
from limbeck.methods.models.base import make_network
from limbeck.tasks.base import Task
from limbeck.tasks.judging_language import check_token_teacher, token_measures
from limbeck.tasks.judging_sparse import judge_sparse, of_tokens
from limbeck.tasks.language_teachers import dense_teacher

COMPACT = "sparse.safetensors"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class SquareHead(Compressor):
    r"""SquareHead: a pruned transformer is fine-tuned while each of its blocks follows the same block of the dense model.

    The student is a copy of the dense fine-tuned teacher, of whose layers a share (or all but n of every m weights) is set to zero and stays so. With
    outputs :math:`f^l_s, f^l_t` (B, N, D) of block :math:`l`, the teacher's without gradient, and means over valid tokens and channels of the whole batch,

    .. math::
        L = c_{ce} L_{task} + c_{kd} L_{logit} + c_{sq} \sum_l
            \frac{\mathrm{mean}\,(f^l_s - f^l_t)^2}{\mathrm{mean}\,(f^l_t)^2 + \epsilon}

    :math:`L_{task}` is the cross entropy of the labels, :math:`L_{logit}` the divergence of softened probabilities times :math:`T^2`, mean over the tokens
    with a label. Valid are the tokens of the attention mask, in the decoder of a network of two halves those with a label. ``feature_weight = 0`` is plain
    sparse fine-tuning, with ``kd_weight = 1`` that with standard distillation; ``feature_loss = "l2"`` leaves out the denominator.

    Weights go by size, or by the fast OBC solver on calibration data, block after block, each seeing what is left of those before it. They go at once
    (``one-shot``), in cycles of pruning and fine-tuning whose learning rate starts anew (``staged``), or little by little under one course of the learning
    rate (``linear``, ``cubic``). Gradients of pruned weights are masked, and the weights after every step.

    Models of 🤗 transformers of all three kinds go in as they are, and so does any other module with blocks: causal (labels are the tokens themselves, the
    loss shifts), encoders (labels (B, N) for tokens or (B,) for texts), encoder-decoders (labels (B, N) of the decoder, whose inputs are made from them
    if they are missing). A block that is applied several times in a pass (ALBERT) counts with its last output.

    In a loop of one's own::

        method = SquareHead(student, teacher, sparsity=0.8)
        method.prune(batches)  # without batches: by magnitude
        method.hold(optimizer)
        for batch in loader:
            method(batch).backward()
            ...

    Args:
        student: the dense model, pruned and trained in place. Zeros that it comes with stay zero if they are more than is asked for.
        teacher: the dense model (a copy of the student before it is pruned), or another one with the same blocks.
        config: hyper-parameters.

    Source: "Sparse Finetuning for Inference Acceleration of Large Language Models" (2023) and its released code. ``paper`` is MPT at 80 % on GSM8K, ``t5``
    and ``whisper`` the gradual recipes. Ours: in cycles, ``epochs`` (or ``steps``) is for all of them together; the relative damping of MPT's solver is not
    published, 1.0 is that of T5 and Whisper; layers outside the blocks (heads, embeddings) are not pruned unless ``layers`` names them.
    """

    name = "squarehead"

    class Config(PruningConfig, Compressor.Config):
        layers: tuple[str, ...] = Field(
            (), description="regular expressions of layer names to prune; none: all linear and convolutional in blocks"
        )
        epochs: float = Field(13, gt=0, description="passes over the training data, of all cycles together")
        batch_size: int = Field(16, ge=1, description="samples per update, over all processes together")
        weight_decay: float = Field(0.0, ge=0, description="weight decay (decoupled for adamw)")
        schedule: Literal["constant", "cosine", "linear", "poly", "step"] = Field(
            "linear", description="course of the learning rate after warm-up, in each cycle"
        )
        warmup: float = Field(0.067, ge=0, lt=1, description="fraction of each cycle with a linearly rising rate")
        ce_weight: float = Field(1.0, ge=0, description="weight of the labels")
        kd_weight: float = Field(0.0, ge=0, description="weight of the teacher's logits")
        feature_weight: float = Field(1.0, ge=0, description="weight of the blocks' outputs")
        feature_loss: Literal["squarehead", "l2"] = Field(
            "squarehead", description="relative to the teacher's power, or not"
        )
        temperature: float = Field(1.0, gt=0, description="softens the logits of student and teacher")
        eps: float = Field(1e-8, gt=0, description="added to the teacher's power")
        blocks: tuple[str, ...] = Field((), description="regular expressions of the blocks' whole paths; none: found")
        container: Literal["auto", "bitmask", "csr", "nm"] = Field("auto", description="how sparse weights are stored")
        values: Literal["float32", "float16", "bfloat16"] = Field("float32", description="type of the stored weights")

        presets = {
            "paper": {"pruner": "obc", "epochs": 4, "batch_size": 32, "lr": 1e-4, "warmup": 0.021, "eps": 7.8e-3},
            "t5": {"pruner": "obc", "growth": "staged", "sparsity": 0.9, "epochs": 24, "batch_size": 128, "lr": 2e-3}
            | {"weight_decay": 1e-4, "warmup": 0.003},
            "whisper": {"pruner": "obc", "growth": "staged", "sparsity": 0.9, "epochs": 48, "batch_size": 32}
            | {"lr": 2e-4, "warmup": 0.02, "ce_weight": 0.5},
        }

        @model_validator(mode="after")
        def _stores(self) -> Self:
            if self.container == "nm" and self.pattern is None:
                raise ValueError("container nm stores n:m sparsity: give a pattern")
            return self

    class Setup(Compressor.Setup):
        """What a run by name builds."""

        task: str = Field("stdlib-text", description=Compressor.Setup.model_fields["task"].description)

    level: Tensor
    history: Tensor

    def __init__(self, student: nn.Module, teacher: Any, config: Config | None = None, **overrides: Any) -> None:
        config = type(self).Config.make(**overrides) if config is None else config
        own = find_blocks(student, config.blocks)
        taught: Any = (
            (teacher.models[0] if isinstance(teacher, Teachers) else teacher) if config.feature_weight else None
        )
        blocks = [] if taught is None else find_blocks(taught, config.blocks)
        if taught is not None and len(blocks) != len(own):
            raise InputError(
                f"the student has {len(own)} blocks and the teacher {len(blocks)}: features are compared block by block"
            )
        super().__init__(student, teacher, config, teacher_taps=[b.path for b in blocks])
        self.blocks = own
        self._pairs = list(zip(own, blocks, strict=False))
        self._taps = Taps(student, [b.path for b, _ in self._pairs])
        self.pattern = self.config.cut()
        self.layers = self.chosen()
        check_prunable(self.layers, self.pattern, student.named_modules())
        self.held = HeldMasks(student, [f"{name}.weight" for name in self.layers])
        self.pruner = LayerPruner(
            student,
            self.layers,
            self.held,
            own,
            solver=self.config.pruner,
            columns=self.config.columns,
            damp=self.config.damp,
        )
        self.register_buffer("level", torch.tensor(-1.0))
        self.register_buffer("history", torch.full((len(self.config.cycles()), 3), -1.0))
        self._ready = False

    def chosen(self) -> dict[str, nn.Module]:
        """The layers that are pruned: those within blocks, or those that ``layers`` names."""
        found = chosen_layers(self.student, prunable, self.config.layers, self.config.keep)
        if self.config.layers:
            return found
        found = {name: layer for name, layer in found.items() if inside(name, self.blocks)}
        if not found:
            raise InputError("there is no linear or convolutional layer in the blocks: name layers with layers=…")
        return found

    @property
    def shifts(self) -> bool:
        """Whether labels are the input's own tokens, so that logits are about the next one."""
        return predicts_next(self.student)

    @property
    def writes(self) -> bool:
        """Whether the student says tokens, so that perplexity means something."""
        return self.shifts or is_encoder_decoder(self.student)

    # ---- pruning -----------------------------------------------------------------------------------------------------

    def prune(self, calibration: Iterable[Any] = (), sparsity: float | None = None) -> None:
        """Set weights to zero, for good.

        Args:
            calibration: batches for the solver; unused by magnitude.
            sparsity: to this share; None: to what the config asks for.

        Raises:
            InputError: the solver without batches, or a layer that it cannot prune.
        """
        pattern = self.pattern if sparsity is None or self.pattern.structured else Pattern(sparsity)
        self.pruner.prune(pattern, [self.completed(Batch.of(b)) for b in calibration])
        self.level.fill_(pattern.sparsity)

    def hold(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Keep pruned weights at zero in a loop of one's own; a handle whose ``remove()`` ends it."""
        return self.pruner.hold(optimizer)

    def completed(self, batch: Batch) -> Batch:
        """The batch with decoder inputs, where the student takes them."""
        return with_decoder_inputs(self.student, batch)

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        config = self.config
        self._must_be_pruned()
        batch = self.completed(batch)
        with self._taps as own:
            logits = logits_of(call_model(self.student, batch.inputs))
        out = Losses()
        if config.ce_weight:
            out.add("ce", token_cross_entropy(logits, self.labels(batch), self.shifts), config.ce_weight)
        if config.kd_weight or config.feature_weight:
            taught = self.teach(batch)
        if config.kd_weight:
            rows = [z.flatten(0, -2) for z in (logits, taught.logits)]
            if batch.labels is not None:
                rows = [token_rows(z, batch.labels, self.shifts)[0] for z in (logits, taught.logits)]
            out.add("kd", hinton(rows[0], rows[1], config.temperature), config.kd_weight)
        if config.feature_weight:
            errors = self.block_errors(own, taught.features, batch)
            out.add("features", errors.sum(), config.feature_weight)
            out.observe(worst_block=errors.max())
        return out

    def _must_be_pruned(self) -> None:
        if self._ready or not self.training or self.pattern.sparsity == 0:
            return
        if self.level < 0:
            raise InputError("the student is still dense: call method.prune() before the first step")
        self._ready = True  # looked up once: on an accelerator it costs a wait

    def block_errors(self, own: Mapping[str, Tensor], taught: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """(L,) what each block's outputs differ by; outputs of student and teacher by path."""
        eps = None if self.config.feature_loss == "l2" else self.config.eps
        pairs = [(own[b.path], taught[t.path], valid_tokens(b, batch)) for b, t in self._pairs]
        return torch.stack([block_error(s, t, mask, eps) for s, t, mask in pairs])

    def normalisers(self, batch: Batch) -> dict[str, float]:  # type: ignore[override]
        """Over how many tokens the means go; that of the features is a ratio, of which micro-batches give an approximation."""
        rows = None if batch.labels is None else labelled_rows(batch.labels, self.shifts)
        return {} if rows is None else {"": float(rows.sum())}

    # ---- running -----------------------------------------------------------------------------------------------------

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One stage for each cycle; the updates are divided among them equally."""
        cycles, config = self.config.cycles(), self.config
        stream = Stream(train, config.batch_size, views=config.views)
        total = config.total_steps(stream.steps_per_epoch)
        if total < len(cycles):
            raise InputError(f"{total} steps are too few for {len(cycles)} cycles of pruning and fine-tuning")
        bounds = [total * n // len(cycles) for n in range(len(cycles) + 1)]
        return [self._cycle(n, bounds[n + 1] - bounds[n], train, val, seed) for n in range(len(cycles))]

    def _cycle(self, number: int, steps: int, train: Data, val: Data | None, seed: int) -> Stage:
        config, target = self.config, self.config.cycles()[number]
        events = config.events(target, steps)

        def prune(step: int) -> None:
            chosen = torch.randperm(
                len(train), generator=torch.Generator().manual_seed(mix_seed(seed, 41, number, step))
            )
            parts = chosen[: config.calibration].split(config.batch_size) if config.pruner == "obc" else ()
            self.prune([train.fetch(part, None) for part in parts], events[step])

        def note(column: int) -> None:
            if val is not None:
                self.history[number, 0] = self.held.sparsity
                self.history[number, column] = self.quick_metrics(val)["nll"]

        def begin() -> None:
            prune(0)
            note(1)

        def end() -> None:
            note(2)
            self.held.release()

        def after(step: int) -> None:
            if step in events:
                prune(step)
            self.pruner.mask()

        return self.stage(
            "fine-tuning" if len(self.config.cycles()) == 1 else f"fine-tuning at {target:g}",
            train,
            val,
            seed=seed,
            recipe=config.replace(steps=steps),
            stream=Stream(
                train, config.batch_size, seed=mix_seed(seed, 5, *[number] * bool(number)), views=config.views
            ),
            prepare=lambda: self.held.stop_gradients(self.student),
            begin=begin,
            end=end,
            after_step=after,
        )

    def check(self, batch: Batch) -> None:
        before, self._ready = self._ready, True  # it will be pruned when training begins
        try:
            super().check(self.completed(batch))
        finally:
            self._ready = before

    def check_outputs(self, batch: Batch) -> None:
        labels = batch.labels
        if labels is None or labels.ndim < 2 or labels.is_floating_point():
            super().check_outputs(batch)
        else:
            check_token_labels(self.student_logits(batch), labels, self.shifts)

    def check_teacher(self, data: Data) -> list[float]:
        if not of_tokens(data):
            return super().check_teacher(data)
        return [check_token_teacher(self.teachers.models[0], data, shift=self.shifts, complete=self.completed)]

    def quick_metrics(self, data: Data) -> dict[str, float]:
        """Likelihood and accuracy of the student for each token, and its sparsity."""
        if not of_tokens(data):
            return {**super().quick_metrics(data), "sparsity": self.held.sparsity}
        found = token_measures(self.student, data, shift=self.shifts, complete=self.completed, perplexity=False)
        return {**found, "sparsity": self.held.sparsity}

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        names = setup.teacher or ((setup.student,) if setup.student else (task.networks["teacher"],))
        if setup.student and setup.student != names[0]:
            raise InputError(f"the student is a copy of the teacher, {names[0]}: leave out student '{setup.student}'")
        if len(names) > 1:
            raise InputError("sparse fine-tuning has one teacher, the dense model: name one")
        networks = [make_network(names[0], task, seed) for _ in range(2)]
        cls(networks[0], networks[1], config)  # settings that do not fit should fail before a teacher is trained
        if ":" in names[0]:
            teacher = make_network(names[0], task, seed)
        else:
            teacher = dense_teacher(task, names[0], seed=seed, epochs=setup.teacher_epochs, progress=progress)
        return cls(copy.deepcopy(teacher).requires_grad_(True), teacher, config)

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        cls.require(student=student)
        return cls(student, copy.deepcopy(student) if teacher is None else teacher, config)

    # ---- what comes out ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compressed(self) -> nn.Module:
        made = copy.deepcopy(self.student).eval().requires_grad_(False)
        for name in self.held.names:
            weight = made.get_parameter(name)
            weight.copy_((weight * self.held[name]).to(_DTYPES[self.config.values]))
        return made

    def sparse(self, backend: Backend = "auto") -> nn.Module:
        """A copy for inference whose linear layers skip their zeros, see :class:`limbeck.blocks.sparse_linear.SparseLinear`."""
        return sparse_execution(self.compressed(), self.layers, backend)

    def packed(self) -> dict[str, Packed]:
        """The pruned weights in the form in which they are stored, by parameter name."""
        made, dtype = self.compressed(), _DTYPES[self.config.values]
        return packed_layers(made, list(self.layers), self.config.container, dtype, self.pattern)

    def storage(self) -> Storage:
        return Storage.of(self.student, {name: p.stored() for name, p in self.packed().items()})

    def save_compact(self, folder: Path) -> None:
        """``sparse.safetensors``: pruned weights packed, all others as they are."""
        packed = self.packed()
        plain = {name: t for name, t in own_tensors(self.student).items() if name not in packed}
        save_packed(folder / COMPACT, packed, plain)

    def load_compact(self, folder: Path) -> nn.Module:
        """A copy of the student filled from what :meth:`save_compact` wrote."""
        made = copy.deepcopy(self.student)
        return fill_from_packed(made, folder / COMPACT, reshapers(self.layers)).eval()

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Likelihood, accuracy and agreement for each token (of classifiers: their measures), what is stored, how fast it runs, and pictures."""
        told = {"shift": self.shifts, "complete": self.completed, "perplexity": self.writes}
        models, shares = self.contestants(), self.held.by_name()
        history = self.history.cpu()
        result = judge_sparse(models, self.sparse(), shares, self.held.sparsity, history, test, class_names, told)
        return self.with_storage(result)
