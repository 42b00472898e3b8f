"""G2SD: masked autoencoders distilled in two stages, generic (what the decoder knows) and then specific (the task)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.blocks.masking import TokenMask
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.stage import Stage
from limbeck.losses.features import hint, smooth_l1_whitened
from limbeck.losses.logits import nkd, soft_cross_entropy
from limbeck.losses.segmentation import channel_divergence
from limbeck.methods.models.masked import MaskedDistiller


class G2SD(MaskedDistiller):
    r"""Generic-to-specific distillation.

    **Generic stage**, without labels. Teacher and student are masked autoencoders that see the same visible patches. The teacher's
    decoder runs up to block j and stops; :math:`h_T` (B, 1 + L, d_T) are its tokens there, before any norm: of visible *and* hidden
    patches, and the class token. :math:`h_S` (B, 1 + L, d_S) come out of the last block of the student's smaller decoder, and P is a
    linear-GELU-linear predictor:

    .. math:: L_{GD} = \mathrm{mean}\ \mathrm{SmoothL1}_{\beta=2}\big(P(h_S),\ \mathrm{LN}(h_T)\big)

    with a layer norm without affine part (epsilon 1e-6) on the target. No pixel is reconstructed. ``supervise`` restricts the mean to
    hidden or visible patches; ``encoder_weight`` adds the same loss on the encoders' tokens (0 in the published recipe).

    **Specific stage**, with labels. A fine-tuned teacher :math:`z_T` and the (mixed) image x with its soft label y:

    - ``specific="token"``: the student has a distillation token and two heads,
      :math:`L_{SD} = \tfrac12 \mathrm{CE}(z_{cls}, y) + \tfrac12 \mathrm{CE}(z_{dist}, \arg\max z_T(x))`, and answers with their mean.
    - ``specific="nkd"``: one head and the normalised loss :func:`limbeck.losses.logits.nkd` instead of both terms.
    - ``specific="none"``: labels alone (ablation).

    For segmentation and detection the specific stage is a loss on outputs of your own networks: :func:`segmentation_losses`,
    :func:`pyramid_loss`.

    Stages: ``teacher-pretraining`` and ``teacher-finetuning`` (by name, where no trained teachers are given), ``generic``, ``specific``.

    Args:
        student: see :class:`~limbeck.methods.models.masked.MaskedDistiller`; for ``token`` a module with ``both(x)`` such as
            :class:`limbeck.networks.mae.DistilledViT`.
        teacher: a masked autoencoder with its decoder (``ViTMAEForPreTraining``), or an encoder and ``teacher_decoder``.
        config, pretrained, teacher_decoder: see there.
        task_teacher: the fine-tuned teacher, from images to logits. Needed for the specific stage with a teacher of your own.

    Source: "Generic-to-Specific Distillation of Masked Autoencoders" (2023) and its published code. Images are mixed in the specific stage, as
    published; without it a teacher that fits the labels of its training images only repeats them. Our decisions: the teacher is fine-tuned in place after the generic stage; for detection the features of a
    pyramid are compared by their mean squared error, since the published details are not known to us.
    """

    name = "g2sd"

    class Config(MaskedDistiller.Config):
        mixup: float = Field(0.8, ge=0, description="alpha of mixup in the specific stage; 0: off")
        cutmix: float = Field(1.0, ge=0, description="alpha of CutMix in the specific stage; 0: off")
        decoder_width: int = Field(16, ge=4, description="width of the student's decoder")
        clip_grad: float | None = Field(3.0, gt=0, description="largest gradient norm; none: no clipping")
        teacher_block: int | None = Field(
            None, ge=0, description="the teacher's decoder stops after this block (from 0); none: the middle"
        )
        supervise: Literal["all", "hidden", "visible"] = Field(
            "all", description="tokens that the generic loss goes over; all includes the class token"
        )
        beta: float = Field(2.0, gt=0, description="where the smooth L1 loss turns from quadratic to linear")
        encoder_weight: float = Field(0.0, ge=0, description="weight of the same loss on the encoders' tokens")
        specific: Literal["token", "nkd", "none"] = Field(
            "token", description="second stage: distillation token, normalised loss, or labels alone"
        )
        nkd_alpha: float = Field(1.0, ge=0, description="weight of the wrong classes' part of the normalised loss")
        nkd_temperature: float = Field(1.0, gt=0, description="temperature of that part")

        presets = {
            "paper": {
                "epochs": 300,
                "batch_size": 4096,
                "lr": 2.4e-3,
                "warmup": 1 / 30,
                "decoder_width": 256,
                "decoder_depth": 4,
                "decoder_heads": 8,
                "teacher_block": 3,
                "finetune_lr": 4e-3,
                "finetune_batch_size": 1024,
                "finetune_steps": 250_000,
                "layer_decay": 0.75,
                "label_smoothing": 0.1,
                "teacher_epochs": 0,
            }
        }

        @model_validator(mode="after")
        def _something_hidden(self) -> Self:
            if self.supervise == "hidden" and self.mask_ratio == 0:
                raise ValueError("supervise='hidden' needs hidden patches, and mask_ratio is 0")
            return self

    task_teacher: nn.Module | None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: Config | None = None,
        *,
        task_teacher: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__(student, teacher, config, **options)
        theirs = self.teachers_decoder()
        block = self.config.teacher_block
        self.teacher_block = (len(theirs.blocks) - 1) // 2 if block is None else block
        if self.teacher_block >= len(theirs.blocks):
            raise InputError(
                f"the teacher's decoder has blocks 0 to {len(theirs.blocks) - 1}, and no block {self.teacher_block}: "
                "set teacher_block"
            )
        self.predictor = _predictor(self.student_decoder.width, theirs.width)
        self.encoder_predictor = (
            _predictor(self.encoder.width, self.teacher_encoder.width) if self.config.encoder_weight else None
        )
        if task_teacher is None:
            self.task_teacher = None
        else:
            self.add_frozen("task_teacher", task_teacher)
        if self.config.finetune_steps and self.config.specific != "none" and self.specific_teacher() is None:
            raise InputError(
                "the specific stage needs a fine-tuned teacher: give task_teacher=… (images to logits), specific='none', or "
                "finetune_steps=0 for the generic stage alone"
            )
        if self.config.finetune_steps and self.config.specific == "token" and not hasattr(student, "both"):
            raise InputError(
                f"specific='token' needs a student with a distillation token (a method both(x), as limbeck's DistilledViT), and "
                f"{type(student).__name__} has none: use specific='nkd'"
            )

    def specific_teacher(self) -> nn.Module | None:
        """Who teaches the second stage: the fine-tuned teacher that was given, or the one that this run fine-tunes."""
        if self.task_teacher is not None:
            return self.task_teacher
        return None if self.pretrained else self.teacher

    # ---- the generic loss --------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        c = self.config
        images = self.images(batch)
        mask = self.draw_mask(images)
        encoded = self.encoder(images, mask)
        hidden = self.student_decoder.hidden(encoded.latent, mask)
        target, tokens = self.teacher_tokens(images, mask)
        chosen = self.supervised(mask, hidden.shape[1])
        predicted = self.predictor(hidden)
        out = Losses(generic=smooth_l1_whitened(predicted[chosen], target[chosen], c.beta))
        if self.encoder_predictor is not None:
            out.add(
                "encoder",
                smooth_l1_whitened(self.encoder_predictor(encoded.tokens), tokens, c.beta),
                c.encoder_weight,
            )
        return out

    @torch.no_grad()
    def teacher_tokens(self, images: Tensor, mask: TokenMask) -> tuple[Tensor, Tensor]:
        """The teacher's decoder tokens (B, 1 + L, d_T) after the block where it stops, and its encoder's (B, 1 + K, D_T)."""
        self.counters["teacher_forwards"] += len(images)
        encoded = self.teacher_encoder(images, mask)
        return self.teachers_decoder().hidden(encoded.latent, mask, self.teacher_block), encoded.tokens

    def supervised(self, mask: TokenMask, tokens: int) -> Tensor:
        """(B, 1 + L) bool: the tokens that the loss goes over, the class token first."""
        if self.config.supervise == "all":
            return torch.ones(len(mask.keep), tokens, dtype=torch.bool, device=mask.keep.device)
        chosen = mask.removed if self.config.supervise == "hidden" else ~mask.removed
        return F.pad(chosen, (1, 0), value=False)

    # ---- the specific loss ---------------------------------------------------------------------------------------------

    def finetuning_losses(self, batch: Batch) -> Losses:
        """The specific stage on one labelled batch."""
        c = self.config
        images, target = self.mixed(batch)
        student: Any = self.student
        if c.specific == "none":
            if not hasattr(student, "both"):
                return Losses(ce=soft_cross_entropy(logits_of(call_model(student, images)), target))
            own, distilled = student.both(images)  # the same network, and labels for both heads
            return Losses(
                ce=(0.5, soft_cross_entropy(own, target)), ce_distillation=(0.5, soft_cross_entropy(distilled, target))
            )
        teacher = self.specific_logits(images)
        if c.specific == "nkd":
            logits = logits_of(call_model(student, images))
            return Losses(nkd=nkd(logits, teacher, target.argmax(1), c.nkd_alpha, c.nkd_temperature))
        own, distilled = student.both(images)
        return Losses(
            ce=(0.5, soft_cross_entropy(own, target)), token=(0.5, F.cross_entropy(distilled, teacher.argmax(1)))
        )

    @torch.no_grad()
    def specific_logits(self, images: Tensor) -> Tensor:
        """(B, C) logits of the fine-tuned teacher, in evaluation mode."""
        teacher = self.specific_teacher()
        assert teacher is not None
        was_training = teacher.training
        teacher.eval()
        found = logits_of(call_model(teacher, images))
        teacher.train(was_training)
        self.counters["teacher_forwards"] += len(images)
        return found

    def teacher_losses(self, batch: Batch) -> Losses:
        """Fine-tuning of the teacher on labels."""
        images, target = self.mixed(batch)
        return Losses(ce=soft_cross_entropy(logits_of(call_model(self.teacher, images)), target))

    # ---- stages ----------------------------------------------------------------------------------------------------------

    @classmethod
    def student_network(cls, sizes: str, config: Any) -> str:
        return f"{'distvit' if config.specific == 'token' else 'maevit'}-{sizes}"

    generic_name = "generic"

    def finetuning_stages(self, train: Data, val: Data | None, seed: int) -> list[Stage]:
        stages = []
        if self.config.specific != "none" and self.task_teacher is None:
            stages.append(
                self.labelled_stage(
                    "teacher-finetuning", self.teacher, self.teacher_losses, train, None, mix_seed(seed, 71)
                )
            )
        stages.append(self.labelled_stage("specific", self.student, self.finetuning_losses, train, val, seed))
        return stages

    # ---- judging -----------------------------------------------------------------------------------------------------------

    def contestants(self) -> dict[str, nn.Module]:
        teacher = self.specific_teacher() if self.config.specific != "none" else None
        return {"student": self.student, **({} if teacher is None else {"teacher": teacher})}

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """The classifiers' measures, how much of the teacher's accuracy the student keeps, and what the teacher's part costs."""
        result = super().evaluate(test, class_names)
        rows: Sequence[Mapping[str, Any]] = result.get("rows", [])
        if len(rows) == 2:
            result["retained_accuracy"] = rows[0]["accuracy"] / max(rows[1]["accuracy"], 1e-9)
        return result

    def teacher_pass(self, images: Tensor) -> Tensor:
        return self.teacher_tokens(images, self.draw_mask(images))[0]


def segmentation_losses(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    auxiliary: Tensor | None = None,
    *,
    weight: float = 3.0,
    temperature: float = 1.0,
    auxiliary_weight: float = 0.4,
) -> Losses:
    """The specific stage for segmentation: cross-entropy, an auxiliary head's, and channel-wise divergence from the teacher's logits.

    Args:
        student, teacher: (B, C, H, W) logits.
        labels: (B, H, W) class indices, -100 where there is none.
        auxiliary: (B, C, H, W) logits of an auxiliary head of the student.
        weight: of the divergence; published: 3 for ViT-S, 10 for ViT-Ti.
        temperature: of its softmax over positions.
        auxiliary_weight: of the auxiliary head.
    """
    out = Losses(ce=F.cross_entropy(student, labels))
    if auxiliary is not None:
        out.add("auxiliary", F.cross_entropy(auxiliary, labels), auxiliary_weight)
    return out.add("channels", channel_divergence(student, teacher.detach(), temperature), weight)


def pyramid_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """The specific stage for detection: mean squared error of the features of each level of a pyramid, summed over levels; a scalar.

    Args:
        student, teacher: (B, C, H, W) features by level, of equal shapes.

    Raises:
        InputError: the levels differ.
    """
    if student.keys() != teacher.keys() or not student:
        raise InputError(f"levels differ: the student has {', '.join(student)}, the teacher {', '.join(teacher)}")
    return torch.stack([hint(student[level], teacher[level].detach()) for level in student]).sum()


def _predictor(width: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
