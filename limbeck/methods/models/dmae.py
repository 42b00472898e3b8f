"""DMAE: a small vision transformer is pre-trained as a masked autoencoder while it imitates a big one's middle layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.blocks.masking import TokenMask, patchify, unpatchify
from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage
from limbeck.losses.features import full_precision, normalized_l1, normalized_l2
from limbeck.methods.models.masked import MaskedDistiller

PICTURES = 6


class DMAE(MaskedDistiller):
    r"""Masked autoencoders as distillers: both networks see the same visible patches, and the teacher stops early.

    An image is cut into L patches, of which a random K = int(L (1 - r)) are visible, to teacher and student alike and in the same
    order. :math:`h_T^{j}` and :math:`h_S^{i}`, (B, 1 + K, D), are the tokens after block j of the teacher and block i of the student
    (before any final norm, class token included), P a projection of the student's width to the teacher's, and :math:`\hat x` the
    pixels that the student's own decoder predicts for the hidden patches:

    .. math::
        L_{pix} &= \mathrm{mean}_{hidden}\, \mathrm{mean}_c (\hat x - x)^2 \\
        L_{feat} &= \mathrm{mean}\,\big|\, h_T^{j}/\lVert h_T^{j}\rVert_2 - P(h_S^{i})/\lVert P(h_S^{i})\rVert_2 \,\big| \\
        L &= w_{pix} L_{pix} + \lambda \sum_{(i, j)} L_{feat}^{(i, j)}

    No label is used. The teacher's later blocks and its decoder are never run: with r = 0.75 and j at three quarters of its depth it
    costs about a fifth of a pass over the whole image. Afterwards the decoder and projections are thrown away, and the encoder is
    fine-tuned on labels: mean of the patch tokens, layer norm, linear head, learning rates that fall towards the input.

    Stages: ``teacher-pretraining`` (by name, where no pre-trained teacher is given), ``distillation``, ``finetuning``.

    ``projection="none"`` compares unnormalised features and needs equal widths. ``mask_ratio=0`` shows both networks everything; there
    is nothing to reconstruct then.

    Args:
        student, teacher, config, pretrained, teacher_decoder: see :class:`~limbeck.methods.models.masked.MaskedDistiller`. The teacher
            may be an encoder alone.

    Source: "Masked Autoencoders Enable Efficient Knowledge Distillers" (2023) and its published code. Our decisions: the default
    weight of the features is 10 (published: 1; the mean over D of normalised features shrinks with the width), pixels are normalised
    per patch with an epsilon that suits flat patches, and shifts stand for random crops. The position of the aligned pair (three
    quarters of both depths) is the paper's; that deeper pairs are worse is not verified here.
    """

    name = "dmae"
    reconstructions: Tensor

    class Config(MaskedDistiller.Config):
        feature_weight: float = Field(10.0, ge=0, description="lambda, weight of each aligned pair; published: 1")
        pixel_weight: float = Field(1.0, ge=0, description="weight of the reconstruction; published: 1")
        pairs: tuple[tuple[int, int], ...] | None = Field(
            None, description="aligned (student block, teacher block), from 0; none: three quarters of both depths"
        )
        projection: Literal["linear", "mlp1", "mlp2", "none"] = Field(
            "linear", description="student to teacher width; none compares unnormalised features of equal width"
        )
        feature_distance: Literal["l1", "l2"] = Field("l1", description="distance of the features")

        presets = {
            "paper": {
                "epochs": 100,
                "batch_size": 4096,
                "lr": 2.4e-3,
                "warmup": 0.2,
                "feature_weight": 1.0,
                "normalise_pixels": False,
                "decoder_width": 512,
                "decoder_depth": 8,
                "decoder_heads": 16,
                "finetune_lr": 2e-3,
                "finetune_batch_size": 1024,
                "finetune_steps": 125_000,
                "layer_decay": 0.75,
                "label_smoothing": 0.1,
                "mixup": 0.8,
                "cutmix": 1.0,
                "teacher_epochs": 0,
            }
        }

        @model_validator(mode="after")
        def _something_to_learn(self) -> Self:
            if not self.feature_weight and not self.pixel_weight:
                raise ValueError("feature_weight and pixel_weight are both 0: nothing would be learnt")
            if not self.feature_weight and self.mask_ratio == 0:
                raise ValueError("mask_ratio 0 leaves nothing to reconstruct, and feature_weight is 0")
            return self

    def __init__(self, student: nn.Module, teacher: nn.Module, config: Config | None = None, **options: Any) -> None:
        super().__init__(student, teacher, config, **options)
        ours, theirs = self.encoder, self.teacher_encoder
        pairs = self.config.pairs
        if pairs is None:
            pairs = ((three_quarters(len(ours.blocks)), three_quarters(len(theirs.blocks))),)
        if not pairs:
            raise InputError("pairs is empty: give at least one (student block, teacher block)")
        self.pairs = tuple((ours.block(i, "the student"), theirs.block(j, "the teacher")) for i, j in pairs)
        self.projections = nn.ModuleList(
            _projection(self.config.projection, ours.width, theirs.width) for _ in self.pairs
        )
        self.register_buffer("reconstructions", torch.zeros(3, PICTURES, *ours.in_shape))

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        c = self.config
        images = self.images(batch)
        mask = self.draw_mask(images)
        student = self.encoder(images, mask, taps=[i for i, _ in self.pairs])
        out = Losses()
        if c.pixel_weight and mask.visible < self.encoder.patches:
            decoder = self.student_decoder
            hidden = decoder.hidden(student.latent, mask)
            out.add("pixels", self.reconstruction(decoder, hidden, images, mask), c.pixel_weight)
        if c.feature_weight:
            teacher = self.teacher_features(images, mask)
            for number, (i, j) in enumerate(self.pairs):
                name = "features" if len(self.pairs) == 1 else f"features_{i}_{j}"
                distance = self.feature_distance(self.projections[number](student.hidden[i]), teacher[j])
                out.add(name, distance, c.feature_weight)
        return out

    @torch.no_grad()
    def teacher_features(self, images: Tensor, mask: TokenMask) -> dict[int, Tensor]:
        """Tokens (B, 1 + K, D_T) after the teacher's aligned blocks; no block behind the last of them is run."""
        wanted = [j for _, j in self.pairs]
        self.counters["teacher_forwards"] += len(images)
        return dict(self.teacher_encoder(images, mask, taps=wanted, stop=max(wanted)).hidden)

    def feature_distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distance of (B, N, D) tokens, a scalar; of their directions, unless there is no projection."""
        student, teacher = full_precision(student), full_precision(teacher.detach())
        if self.config.projection == "none":
            return (F.l1_loss if self.config.feature_distance == "l1" else F.mse_loss)(student, teacher)
        if self.config.feature_distance == "l1":
            return normalized_l1(student, teacher)
        return normalized_l2(student, teacher)

    # ---- judging -----------------------------------------------------------------------------------------------------

    def teacher_pass(self, images: Tensor) -> dict[int, Tensor]:
        return self.teacher_features(images, self.draw_mask(images))

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        found = super().stages(train, val, seed=seed)
        at = next(n for n, stage in enumerate(found) if stage.name == self.generic_name)
        found[at] = replace(found[at], end=lambda: self.remember_reconstructions(train if val is None else val))
        return found

    @torch.no_grad()
    def remember_reconstructions(self, data: Data) -> None:
        """Keep a few images, their visible patches, and what the student's decoder makes of them, before fine-tuning moves it."""
        encoder, decoder = self.encoder, self.student_decoder
        device = next(self.student.parameters()).device
        images = self.images(data.fetch(torch.arange(min(PICTURES, len(data))), None).to(device))
        with preserved_random_state():
            seed_everything(11)
            mask = self.draw_mask(images)
        true = patchify(images, encoder.patch)
        rows = decoder.pixels(decoder.hidden(encoder(images, mask).latent, mask))
        if self.config.normalise_pixels:  # bring predictions back to the scale of their patch
            rows = rows * (true.var(-1, keepdim=True) + self.config.pixel_eps).sqrt() + true.mean(-1, keepdim=True)
        hidden = mask.removed[:, :, None]
        low, high = images.amin(), images.amax()
        seen = unpatchify(torch.where(hidden, (low + high) / 2, true), encoder.patch, encoder.grid)
        made = unpatchify(torch.where(hidden, rows, true), encoder.patch, encoder.grid)
        shown = torch.stack([images, seen, made])
        self.reconstructions[:, : len(images)] = ((shown - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).mul(255)

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        result = super().evaluate(test, class_names)
        images = self.reconstructions.to(torch.uint8)
        shown = int(images.flatten(2).any(2).any(0).sum())
        if self.config.pixel_weight and shown and images.shape[2] in (1, 3):
            from limbeck.report.sheets import picture_sheet

            lines = [what for what in ("image", "visible", "filled in") for _ in range(shown)]
            result.setdefault("pictures", []).append(
                {
                    "title": "Masked images after distillation",
                    "caption": f"{self.config.mask_ratio:.0%} of the patches are hidden; the student's decoder fills them in.",
                    "png": picture_sheet(images[:, :shown].flatten(0, 1).cpu().numpy(), lines, columns=shown),
                }
            )
        return result


def three_quarters(depth: int) -> int:
    """The block (from 0) that ends the third quarter of a stack: 8 of 12, 17 of 24."""
    return max(0, round(0.75 * depth) - 1)


def _projection(kind: str, width: int, out: int) -> nn.Module:
    if kind == "none":
        if width != out:
            raise InputError(
                f"projection='none' compares features as they are, but the student is {width} wide and the teacher {out}: "
                "use projection='linear'"
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, out)

    def mlp(inner: int) -> list[nn.Module]:
        return [nn.Linear(inner, out), nn.GELU(), nn.Linear(out, out)]

    return nn.Sequential(*mlp(width), *(mlp(out) if kind == "mlp2" else []))
