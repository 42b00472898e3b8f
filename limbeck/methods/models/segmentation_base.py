"""What methods for segmenters share: models from images to a logit for every pixel and class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.fresh import redraw
from limbeck.core.batch import Batch
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.optim import TrainingConfig
from limbeck.core.semi import SemiSupervisedData, SemiSupervisedStream
from limbeck.core.stage import Stage
from limbeck.losses.segmentation import IGNORED
from limbeck.methods.models.base import ModelDistiller
from limbeck.tasks.judging_segmentation import judge_segmenters, segmenter_metrics


class SegmentationDistiller(ModelDistiller):
    """Base of the methods that train a segmenter, on labelled images and, where they ask for them, unlabelled ones.

    Label maps are (B, H, W) int64, -100 where a pixel does not count; logits are (B, C, H, W) at the images' size.

    Args:
        student: any module from images to logits (see :func:`limbeck.core.batch.logits_of`). It is trained in place.
        config: hyper-parameters; or give single ones as keyword arguments.
    """

    class Config(ModelDistiller.Config):
        epochs: float = Field(
            13, gt=0, description="passes over the data (labelled or unlabelled, whichever has more batches)"
        )
        batch_size: int = Field(4, ge=1, description="labelled images per update, over all processes together")
        unlabelled_batch_size: int = Field(8, ge=1, description="images in each unlabelled batch")
        lr: float = Field(5e-3, gt=0, description="peak learning rate")
        warmup: float = Field(0.05, ge=0, lt=1, description="fraction of training with a linearly rising rate")

    class Setup(ModelDistiller.Setup):
        """What a run by name builds."""

        task: str = Field("shapes", description="shapes, topomortar, or any task with a class for every pixel")
        labelled: int | None = Field(
            24, ge=1, description="so many training images keep their labels, the rest is unlabelled; none: all"
        )

    def unlabelled_batches(self) -> int:
        """How many unlabelled batches a step takes."""
        return 0

    # ---- running -----------------------------------------------------------------------------------------------------

    def stage(
        self,
        name: str,
        train: Data,
        val: Data | None,
        *,
        seed: int,
        recipe: TrainingConfig | None = None,
        stream: Stream | None = None,
        **changes: Any,
    ) -> Stage:
        """The family's usual stage on batches that bring unlabelled ones along.

        Raises:
            InputError: unlabelled images are needed and the data has none.
        """
        config: Any = self.config if recipe is None else recipe
        copies = self.unlabelled_batches()
        if stream is None and copies:
            order: dict[str, Any] = {"seed": mix_seed(seed, 5), "views": self.config.views}
            stream = SemiSupervisedStream(train, config.batch_size, config.unlabelled_batch_size, copies, **order)
        labelled = train.labelled if isinstance(train, SemiSupervisedData) else train
        return super().stage(name, labelled, val, seed=seed, recipe=recipe, stream=stream, **changes)

    def check(self, batch: Batch) -> None:
        if batch.unlabelled is None and self.unlabelled_batches():  # the labelled images stand in for the dry run
            batch = batch.with_unlabelled((batch.inputs,) * self.unlabelled_batches())
        super().check(batch)

    @torch.no_grad()
    def check_outputs(self, batch: Batch) -> None:
        check_maps("student", self.student_logits(batch), batch)

    def quick_metrics(self, data: Data) -> dict[str, float]:
        """Mean IoU and pixel accuracy of the student."""
        return segmenter_metrics(self.student, data)

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Overlap with the labels, agreement with the teachers, size and speed, pictures."""
        return judge_segmenters(self.contestants(), test, class_names)


def check_maps(who: str, logits: Tensor, batch: Batch) -> None:
    """That logits are one for every pixel and class, and that label maps fit them.

    Raises:
        InputError: they do not.
    """
    images = batch.inputs
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise InputError("segmenters take images as one tensor (B, channels, height, width)")
    size = tuple(images.shape[2:])
    if logits.ndim != 4 or len(logits) != len(images):
        raise InputError(
            f"the {who} gives logits of shape {tuple(logits.shape)}; expected ({len(images)}, classes, {size[0]}, {size[1]})"
        )
    if tuple(logits.shape[2:]) != size:
        raise InputError(
            f"the {who} gives logits of {logits.shape[2]}x{logits.shape[3]} pixels for images of {size[0]}x{size[1]}: "
            "resize them to the input's size in its forward"
        )
    labels = batch.labels
    if labels is None:
        return
    if labels.is_floating_point() or tuple(labels.shape) != (len(images), *size):
        raise InputError(
            f"label maps must be integers of shape ({len(images)}, {size[0]}, {size[1]}), "
            f"not {labels.dtype} of {tuple(labels.shape)}"
        )
    counted = labels[labels != IGNORED]
    if counted.numel() == 0:
        raise InputError("every pixel of the first batch is ignored (-100): nothing could be learnt from it")
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= logits.shape[1]:
        hint = "; if 255 marks pixels that do not count, write -100 there" if high == 255 else ""
        raise InputError(
            f"label maps go from {low} to {high}, but the {who} has classes 0 to {logits.shape[1] - 1}{hint}"
        )


def fresh_copy(module: nn.Module) -> nn.Module:
    """A copy with new random weights, from torch's random state.

    Raises:
        InputError: see :func:`limbeck.blocks.fresh.check_redrawable`.
    """
    made = copy.deepcopy(module)
    redraw(made, "give the second network yourself")
    return made
