"""Cross pseudo supervision, the usual semi-supervised baseline for segmenters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from pydantic import Field
from torch import nn

from limbeck.blocks.cross_pseudo import cross_pseudo_terms
from limbeck.blocks.cutmix_masks import MixedPair
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.optim import make_optimised
from limbeck.core.semi import SemiSupervisedData
from limbeck.core.stage import Stage
from limbeck.losses.segmentation import pixel_cross_entropy
from limbeck.methods.models.base import make_network
from limbeck.methods.models.segmentation_base import SegmentationDistiller, check_maps, fresh_copy
from limbeck.tasks.base import Task


class CPS(SegmentationDistiller):
    r"""Two segmenters of one architecture and different initial weights give each other hard labels for unlabelled images.

    With labelled images x and label maps y, unlabelled batches :math:`u_0, u_1` and a CutMix mask m,

    .. math::
        u &= (1 - m)\,u_0 + m\,u_1, \qquad
        \hat y_k = \arg\max_c \big[(1 - m)\,f_k(u_0) + m\,f_k(u_1)\big]_c \\
        L &= \mathrm{CE}(f_1(x), y) + \mathrm{CE}(f_2(x), y)
             + \lambda\,[\mathrm{CE}(f_1(u), \hat y_2) + \mathrm{CE}(f_2(u), \hat y_1)]

    Pseudo labels carry no gradient; cross-entropies are means over the pixels that count. No teacher, no threshold. The first
    network is the student and the result; the second is kept only while training. Networks that start from random weights learn
    from the labels alone at first (stage ``labels``, a quarter of the updates), or their pseudo labels would soon be background
    everywhere; the paper's encoders are pretrained. See
    :func:`~limbeck.blocks.cross_pseudo.cross_pseudo_terms`.

    Args:
        student: from images to logits at the images' size. It is trained in place.
        peer: the second network; None draws the student's weights anew.
        config: hyper-parameters; or give single ones as keyword arguments.

    Source: "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision" (2021). Our decision: the pseudo labels come
    from networks in training mode, in a pass of their own over the clean images.
    """

    name = "cps"

    class Config(SegmentationDistiller.Config):
        label_fraction: float = Field(
            0.25, ge=0, lt=1, description="fraction of the updates on labels alone, at first; 0 for pretrained networks"
        )
        cross_weight: float = Field(1.0, ge=0, description="weight of the two cross terms")
        cutmix: bool = Field(True, description="mix the unlabelled batches; else only the first of them is used")
        boxes: int = Field(3, ge=1, description="boxes of a CutMix mask")

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
                "cross_weight": 1.5,
                "label_fraction": 0.0,
            }
        }

    def __init__(
        self, student: nn.Module, peer: nn.Module | None = None, config: Config | None = None, **overrides: Any
    ) -> None:
        super().__init__(student, config, **overrides)
        if peer is student:
            raise InputError("student and peer are the same module: give a second one with other initial weights")
        self.peer = fresh_copy(student) if peer is None else peer

    def unlabelled_batches(self) -> int:
        return 2

    def losses(self, batch: Batch) -> Losses:
        config = self.config
        pair = MixedPair.draw(batch.unlabelled, boxes=config.boxes, mixed=config.cutmix)
        supervised, crossed = cross_pseudo_terms(self.student, self.peer, batch.inputs, self.labels(batch), pair)
        return Losses(supervised=supervised, cross=(config.cross_weight, crossed))

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """``cross``, after ``labels`` where ``label_fraction`` asks for it; together the budget that the settings give."""
        cross = self.stage("cross", train, val, seed=seed)
        first = round(self.config.label_fraction * cross.steps)
        if not first:
            return [cross]
        rest = cross.steps - first
        recipe = self.config.replace(schedule="constant")
        labelled = train.labelled if isinstance(train, SemiSupervisedData) else train
        labels = replace(
            cross,
            name="labels",
            steps=first,
            stream=Stream(labelled, self.config.batch_size, seed=mix_seed(seed, 47), views=self.config.views),
            losses=self.label_losses,
            optimisers=lambda: {"main": make_optimised(self.trainable_parameters(), recipe, first)},
        )
        return [labels, replace(cross, steps=rest, optimisers=lambda: self.optimisers(rest))]

    def label_losses(self, batch: Batch) -> Losses:
        """Cross-entropy of both networks on the labels."""
        labels = self.labels(batch)
        own, other = (
            pixel_cross_entropy(logits_of(call_model(m, batch.inputs)), labels) for m in (self.student, self.peer)
        )
        return Losses(supervised=own + other)

    @torch.no_grad()
    def check_outputs(self, batch: Batch) -> None:
        super().check_outputs(batch)
        check_maps("peer", logits_of(call_model(self.peer, batch.inputs)), batch)

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        name = setup.student or task.networks["student"]
        return cls(make_network(name, task, seed), make_network(name, task, mix_seed(seed, 35)), config)

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        """``teacher``, if given, is the second network."""
        if student is None:
            raise InputError(f"{cls.name} needs student=… (an nn.Module)")
        return cls(student, teacher, config)
