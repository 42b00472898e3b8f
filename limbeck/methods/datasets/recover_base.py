"""What methods share that recover images from the classifier that the data was squeezed into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.bn_statistics import StatisticsDistance, record_moments
from limbeck.blocks.inversion import ClassBatch, Inversion, block_rows, blocks_of, class_batches
from limbeck.blocks.views import CropCurriculum, RandomView
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data, mix_seed
from limbeck.core.distilled import DistilledDataset
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised
from limbeck.core.stage import Stage, Stepper
from limbeck.methods.datasets.relabel_base import RelabelDistiller
from limbeck.tasks.judging_datasets import everything

SMALL_SIDE = 32
LOWEST_CROP, LOWEST_CROP_SMALL = 0.08, 0.35
"""Smallest area share of a crop, as published and for images below 32 pixels, where 8 % would be a handful of pixels."""


class RecoverDistiller(RelabelDistiller):
    r"""Base of the decoupled methods: squeeze, recover, relabel.

    **Squeeze.** A classifier f with batch normalisation is trained on the real data, or given; from here on it is frozen and
    in evaluation mode, and the real images are not looked at again.

    **Recover.** Class batches x of one image of each of B classes start as noise and are optimised for I iterations,

    .. math:: \mathrm{CE}(f(v(x)), y) + r_{bn} \sum_l w_l \big(\lVert m_l - \mu_l \rVert_2 + \lVert s_l - \sigma^2_l \rVert_2\big),

    where v is a resized crop, a flip where the data's own augmentation has one, and a cyclic shift (one draw for the whole
    class batch), and m, s are the statistics of that batch at the inputs of f's BatchNorm layers. Adam, rate
    :math:`\eta(1+\cos(\pi\,it/I))/2`, pixels clamped to the valid range after each step; the last iterate is kept, not the
    best. Several class batches run side by side, each with draws and statistics of its own, so the result does not depend on
    how many (but for rounding).

    **Relabel.** See :class:`~limbeck.methods.datasets.relabel_base.RelabelDistiller`.

    Without the engine::

        method = SRe2L((x, y), student_factory, teacher, ipc=10)
        made = method.optimisers()["images"]
        for step in range(method.total_steps):
            method.begin(step)
            made.optimizer.zero_grad()
            method.losses_at(step).total.backward()
            made.optimizer.step()
            made.scheduler.step()
            method.finish(step)
        method.distilled()

    Args:
        data, network, config, seed, class_names: see the family.
        teacher: the classifier, with BatchNorm layers, or with others whose inputs are then recorded on the real data.

    Attributes:
        images: (C * ipc, channels, H, W), sorted by class; as good as they are at the moment.
        pixels: those of the class batches that are being optimised.
        lowest_crop: the lowest bound of a crop's area share that was used.
    """

    class Config(RelabelDistiller.Config):
        iterations: int = Field(200, ge=1, description="updates of every image")
        lr: float = Field(0.1, gt=0, description="peak learning rate of the images (Adam, cosine to 0)")
        betas: tuple[float, float] = Field((0.5, 0.9), description="decay of Adam's two running means")
        r_bn: float = Field(0.1, ge=0, description="weight of the distance of feature statistics")
        first_weight: float = Field(10.0, ge=0, description="weight of the first layer's distance; all others have 1")
        jitter: int = Field(2, ge=0, description="largest cyclic shift of a view, pixels")
        lowest_crop: float | None = Field(
            None,
            gt=0,
            le=1,
            description="smallest area share of a crop; none: 0.08, or 0.35 for images below 32 pixels",
        )
        class_batch: int = Field(
            100, ge=2, description="different classes whose images share their statistics; all if there are fewer"
        )
        images_together: int = Field(512, ge=1, description="images optimised at the same time; memory, not result")
        statistics: Literal["auto", "running", "recorded"] = Field(
            "auto",
            description="running: of the teacher's BatchNorm layers; recorded: of its other normalisation layers on real data",
        )

    images: Tensor
    labels: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        data: Any,
        network: Any,
        teacher: nn.Module | None = None,
        config: Any = None,
        *,
        seed: int = 0,
        class_names: Sequence[str] = (),
        **overrides: Any,
    ) -> None:
        super().__init__(data, network, teacher, config, seed=seed, class_names=class_names, **overrides)
        config = self.config
        self.lowest_crop = lowest_crop(config.lowest_crop, self.shape)
        self.curriculum = self.make_curriculum()
        self.view = RandomView(flip=self.flip, jitter=config.jitter)
        batches = class_batches(self.num_classes, config.ipc, min(config.class_batch, self.num_classes))
        self.blocks: list[list[ClassBatch]] = blocks_of(batches, config.images_together)
        most = max(sum(map(len, block)) for block in self.blocks)
        count = self.num_classes * config.ipc
        self.pixels = nn.Parameter(torch.zeros(most, *self.shape))
        self.register_buffer("images", torch.zeros(count, *self.shape))
        self.register_buffer("labels", torch.arange(self.num_classes).repeat_interleave(config.ipc))
        low, high = self.pixel_range()
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self._inversion: Inversion | None = None
        self._adam: torch.optim.Adam | None = None

    def make_curriculum(self) -> CropCurriculum:
        """What methods of this kind differ in: the crops at each iteration."""
        raise NotImplementedError(f"{type(self).__name__} defines no curriculum")

    def pixel_range(self) -> tuple[Tensor, Tensor]:
        """Black and white (1, channels, 1, 1) in the space of the images; the range of the real ones if no normalisation is known."""
        mean, std = getattr(self.real, "mean", None), getattr(self.real, "std", None)
        if mean is not None and std is not None:
            centre, scale = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
            return -centre / scale, (1 - centre) / scale
        real = everything(self.real)[0]
        return real.amin((0, 2, 3), keepdim=True), real.amax((0, 2, 3), keepdim=True)

    def check(self, batch: Batch) -> None:
        """One step on noise: the teacher's classes, finite terms, a gradient to the images.

        Raises:
            InputError: something does not fit.
        """
        with torch.no_grad():
            said = logits_of(call_model(self.teacher, self.images[:1]))
        if said.shape != (1, self.num_classes):
            raise InputError(f"the teacher's logits have shape {tuple(said.shape)}; expected (1, {self.num_classes})")
        group = self.blocks[0][0]
        probe = self.noise(group).requires_grad_()
        labels = torch.arange(group.first, group.last, device=probe.device)
        ce, distance = self.inversion()(probe, labels, self.draw(group, 0)[None])
        for name, value in (("ce", ce), ("bn", distance)):
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"loss term '{name}' is {value.item()} on noise: check the teacher")
        (gradient,) = torch.autograd.grad((ce + distance).sum(), probe, allow_unused=True)
        self._inversion = None  # the run may take place on another device
        if gradient is None:
            raise InputError("no gradient reaches the images: does the teacher's forward detach?")

    # ---- recover -----------------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Iterations over all blocks."""
        return len(self.blocks) * self.config.iterations

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One stage, whose steps are the iterations of one block after the other."""
        return [Stage("recover", self.total_steps, update=self.update, optimisers=self.optimisers)]

    def optimisers(self) -> dict[str, Optimised]:
        """Adam over the pixels of a block, with a cosine rate that begins anew with every block."""
        c = self.config
        self._adam = torch.optim.Adam([self.pixels], lr=c.lr, betas=c.betas, eps=1e-8)

        def rate(step: int) -> float:
            return (1 + math.cos(math.pi * (step % c.iterations) / c.iterations)) / 2

        return {"images": Optimised(self._adam, torch.optim.lr_scheduler.LambdaLR(self._adam, rate))}

    def update(self, batch: Batch | None, stepper: Stepper) -> dict[str, Tensor]:
        step = stepper.step
        self.begin(step)
        losses = self.losses_at(step)
        stepper.minimise(losses)
        self.finish(step)
        return losses.logged()

    def begin(self, step: int) -> None:
        """Start a block at its first iteration: noise, and an optimiser without memory."""
        block, iteration = divmod(step, self.config.iterations)
        if iteration:
            return
        groups = self.blocks[block]
        with torch.no_grad():
            self.pixels[: sum(map(len, groups))] = torch.cat([self.noise(group) for group in groups])
        if self._adam is not None:
            self._adam.state.clear()

    def losses_at(self, step: int) -> Losses:
        """The terms at a step, means over the class batches; their total is the sum over them, since they are separate problems."""
        block, iteration = divmod(step, self.config.iterations)
        groups = self.blocks[block]
        mine, scale = share_of_groups(len(groups))
        size = len(groups[0])
        pixels = self.pixels[mine.start * size : mine.stop * size]
        if not len(pixels):  # more processes than class batches
            nothing = self.pixels.sum() * 0
            return Losses(ce=nothing, bn=nothing).observe(crop=self.crops(iteration)[0])
        _, labels = block_rows(groups[mine], self.config.ipc)
        parameters = torch.stack([self.draw(group, iteration) for group in groups[mine]])
        ce, distance = self.inversion()(pixels, labels.to(pixels.device), parameters)
        weight = float(len(ce) * scale)
        losses = Losses(ce=(weight, ce.mean()), bn=(weight * self.config.r_bn, distance.mean()))
        return losses.observe(crop=self.crops(iteration)[0])

    @torch.no_grad()
    def finish(self, step: int) -> None:
        """After the optimiser's step: clamp to valid pixels, and keep the images as they are."""
        groups = self.blocks[step // self.config.iterations]
        rows, _ = block_rows(groups, self.config.ipc)
        part = self.pixels[: len(rows)]
        part.clamp_(self.low, self.high)
        self.images[rows.to(self.images.device)] = part
        self.counters["teacher_forwards"] += len(rows)

    def noise(self, group: ClassBatch) -> Tensor:
        """What a class batch starts from: standard normal, a function of seed, id and classes."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, group.id, group.first, 23))
        return torch.randn(len(group), *self.shape, generator=generator).to(self.device)

    def crops(self, iteration: int) -> tuple[float, float]:
        return self.curriculum.scale(iteration, self.config.iterations)

    def draw(self, group: ClassBatch, iteration: int) -> Tensor:
        """(7,) the view of a class batch at an iteration."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, group.id, group.first, iteration, 29))
        return self.view.draw(1, generator, scale=self.crops(iteration))[0]

    def inversion(self) -> Inversion:
        """The loss; made when first asked for, since moments may have to be recorded."""
        if self._inversion is None:
            self._inversion = Inversion(self.teacher, self._statistics(), self.view)
        return self._inversion

    def _statistics(self) -> StatisticsDistance:
        kind = self.config.statistics
        norms = [m for m in self.teacher.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        if kind == "recorded" or (kind == "auto" and not norms):
            batches = (batch.to(self.device) for batch in self.real.batches())
            statistics = StatisticsDistance(self.teacher, recorded=record_moments(self.teacher, batches))
        else:
            statistics = StatisticsDistance(self.teacher)
        statistics.weights = (self.config.first_weight, *statistics.weights[1:])
        return statistics

    @torch.no_grad()
    def distance_of(self, images: Tensor) -> float:
        """R of whole images (n, C, H, W) as one batch: how far their global structure is from that of real data."""
        statistics = self._statistics()
        with statistics:
            call_model(self.teacher, images.to(self.device))
        return float(statistics.distance())

    def made(self) -> DistilledDataset:
        c = self.curriculum
        crops = {"curriculum": c.shape, "lowest_crop": c.lowest, "milestone": c.milestone}
        dataset = self.as_dataset(self.images.detach().cpu().clone(), self.labels.cpu(), recipe={"recovered": crops})
        return dataset.stored()


def share_of_groups(count: int) -> tuple[slice, int]:
    """Which of ``count`` class batches this process computes, and what its loss is multiplied by.

    Gradients are averaged over processes afterwards, so that the product is the gradient of the sum over all class batches.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return slice(0, count), 1
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return slice(rank * count // world, (rank + 1) * count // world), world


def lowest_crop(asked: float | None, shape: Sequence[int]) -> float:
    """The smallest area share of a crop for images of this shape."""
    if asked is not None:
        return asked
    return LOWEST_CROP if min(shape[-2:]) >= SMALL_SIDE else LOWEST_CROP_SMALL
