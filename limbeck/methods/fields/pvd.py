"""PVD: a trained radiance field into one of any other architecture, block by block, without images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, lr_factor, make_optimised
from limbeck.core.stage import Stage, Stepper
from limbeck.methods.fields.base import FieldDistiller
from limbeck.rendering.backgrounds import random_per_ray
from limbeck.rendering.camera_pools import PoseLaw, camera_pool
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.contraction import ContractedField
from limbeck.rendering.fields import VMField, VolumeField
from limbeck.rendering.fields.foreign import as_field
from limbeck.rendering.fields.occupied import OccupiedField
from limbeck.rendering.inheritance import Inherit, core, heir, inherit, is_head, occupancy_of, seen_box
from limbeck.rendering.occupancy import OccupancyGrid
from limbeck.rendering.ray_sampler import RaySampler
from limbeck.rendering.rays import Rays, Spacing
from limbeck.rendering.renderers import Renderer, VolumeRenderer
from limbeck.rendering.shared_points import Points, march
from limbeck.tasks.field_teachers import FieldPairSetup, field_teacher, read_options
from limbeck.tasks.reference_fields import field_groups
from limbeck.tasks.scenes import PosedImages, load_scene

Found = Mapping[str, Tensor | None]

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normL2": lambda a, b: torch.linalg.vector_norm(a - b),
    "L2": lambda a, b: F.mse_loss(a, b),
    "normL1": lambda a, b: (a - b).abs().sum(),
    "smoothL1": lambda a, b: F.smooth_l1_loss(a, b),
}
"""Between two tensors of one shape: the norms are of the whole tensor (not squared, not averaged), the others are means."""


class PVD(FieldDistiller):
    r"""Progressive volume distillation: field into field of any other architecture.

    A field is an *encoding* :math:`x \mapsto h = [l, geo]`, a log density and 15 geometry channels, and a *decoder* of it,
    :math:`\sigma = e^l,\; c = \mathrm{colour}(geo, d)`. The student begins with every weight of the teacher that has a namesake of the same shape,
    and with the teacher's occupancy grid, which is never updated. Each step takes one random pose, R random pixels of it, and samples on
    their rays in the occupied cells. **Both fields are asked at the same points**; the teacher once and without gradient. With
    :math:`\|\cdot\|` the Euclidean norm of the whole tensor, neither squared nor averaged, and [low, high] the clamp,

    .. math::
        L_h = \|h_S - h_T\|,\quad L_\sigma = \|\mathrm{clamp}(l_S) - \mathrm{clamp}(l_T)\|,\quad L_c = \|c_S - c_T\|,\quad
        L_{rgb} = \|C_S - C_T\|

    (C: the rays' colours), and, with k the step, N the number of steps,

    .. math::
        k < n_1 N:\;& w_h \gamma^k L_h \qquad\text{(no decoder, no rendering)} \\
        n_1 N \le k < n_2 N:\;& w_c L_c + w_\sigma L_\sigma + w_h \gamma^k L_h \qquad\text{(no compositing)} \\
        k \ge n_2 N:\;& w_{rgb} L_{rgb} + w_c L_c + w_\sigma L_\sigma + w_h \gamma^k L_h + w_{reg} L_{reg}

    under one optimiser and one course of the rate. In :math:`L_h` the log density is clamped, of low-rank tensors (``vm``) the geometry
    channels too. :math:`L_{reg}` is the mean absolute value of the density's factors of ``vm`` students. Where one of the fields has no feature (voxels,
    foreign fields) there is no :math:`L_h`, and the first stage's steps belong to the second. ``feature_until=0, volume_until=0`` is
    direct distillation, all terms from the start.

    Norms are compared, not mean squares: their gradient has unit length whatever the number of points, so the weights do not carry over to
    ``distance="L2"``. Log densities are compared and not densities, since what :math:`e^l` does beyond the clamp cannot be seen.

    In a loop of your own, with no data at all::

        pvd = PVD(load_field("teacher"), "mlp", cameras)
        optimiser = torch.optim.Adam(pvd.trainable_parameters(), 2e-3)
        for step in range(pvd.config.steps):
            loss = pvd.losses_at(step).total
            ...

    or ``pvd({"origins": …, "directions": …})`` with rays of your own, (R, 3) each; calls in training mode count the steps.

    Args:
        teacher: a field, or any callable (x, d) -> (sigma, rgb); frozen.
        student: a field with the teacher's box, or a family's name for one of the usual size. It inherits weights in place.
        cameras: where the teacher's scene was seen from; needed for the poses ``fitted``, ``forward-facing`` and ``given``.
        config: hyper-parameters; or give single ones as keyword arguments.
        background: grey value behind renders that are judged.
        seed: of the poses and of the occupancy grid.

    Attributes:
        inherited: names of the weights that were copied.
        grid: the teacher's occupancy, or None.
        result: the student, within the grid if there is one.

    Raises:
        InputError: boxes that differ, a clamp beyond what the student's density can reach, heads to be kept that were not inherited, a teacher
            in which there is nothing.

    Source: "One is All: Bridging the Gap Between Neural Radiance Fields Architectures with Progressive Volume Distillation" (2023). Our decisions:
    stages are shares of all steps, as their published lengths depend on the number of steps; the rate ends at 0.7 % of its peak, which is
    the published 7e-5 of 1e-2; the published rate of a hash student's heads, 1e-2, is not in the preset, as they are inherited.
    """

    name = "pvd"

    class Config(FieldDistiller.Config):
        steps: int = Field(600, ge=1, description="updates of the student")
        rays: int = Field(256, ge=1, description="rays per update, all of one pose")
        samples: int = Field(32, ge=1, description="samples on each ray")
        spacing: Spacing = Field("linear", description="of samples along rays; disparity for scenes without bounds")
        lr: float | None = Field(None, gt=0, description="peak rate of the encoding; none: the family's usual one")  # type: ignore[assignment]
        decoder_lr: float | None = Field(
            None, gt=0, description="peak rate of networks (all of an mlp, the heads of others); none: the usual share"
        )
        lr_end: float = Field(0.007, ge=0, le=1, description="share of the peak rate that is left at the end")
        feature_until: float = Field(0.12, ge=0, le=1, description="share of steps in which features alone are matched")
        volume_until: float = Field(0.35, ge=0, le=1, description="share of steps after which pixels are matched too")
        distance: Literal["normL2", "L2", "normL1", "smoothL1"] = Field("normL2", description="how values are compared")
        pixel_weight: float = Field(1.0, ge=0, description="weight of rendered pixels")
        colour_weight: float = Field(2e-3, ge=0, description="weight of the colours of points")
        density_weight: float = Field(2e-3, ge=0, description="weight of the log densities of points")
        feature_weight: float = Field(2e-3, ge=0, description="weight of the features of points, at the first step")
        feature_decay: float = Field(0.995, ge=0, le=1, description="factor of the features' weight at each step")
        sparsity_weight: float = Field(1e-4, ge=0, description="weight of the size of vm students' density factors")
        clamp_low: float = Field(
            -2.0, description="log densities below count as this; -100 for teachers with holes cut"
        )
        clamp_high: float = Field(7.0, description="log densities above count as this")
        inherit: Inherit = Field("all", description="weights taken over from the teacher: all that fit, heads, or none")
        keep_heads: bool = Field(False, description="leave inherited heads as they are and train the encoding alone")
        poses: PoseLaw = Field("fitted", description="where virtual cameras stand; see limbeck.rendering.camera_pools")
        epoch_poses: int | None = Field(48, ge=1, description="poses drawn afresh for each epoch; none: the law's own")
        virtual_size: int | None = Field(
            None, ge=1, description="longer side of virtual pictures; none: as the cameras'"
        )
        random_background: bool = Field(True, description="a random colour behind each ray; off: the task's own")
        occupancy: int = Field(32, ge=0, description="cells a side of the grid that skips empty space; 0: none")
        occupancy_threshold: float = Field(
            0.3, gt=0, description="a cell is occupied above this density, or above the mean if that is lower"
        )

        presets = {"paper": {
            "steps": 30_000, "rays": 4096, "samples": 1024, "virtual_size": 800, "poses": "orbit", "epoch_poses": None,
            "optimizer": "adamw", "weight_decay": 0.01, "betas": (0.9, 0.99), "adam_eps": 1e-15,
            "lr": 1e-2, "decoder_lr": 1e-3, "lr_end": 7e-3, "feature_until": 2 / 30, "volume_until": 5 / 30,
            "occupancy": 128, "occupancy_threshold": 10.0,
        }}  # fmt: skip

    class Setup(FieldPairSetup):
        """What a run by name builds."""

    def __init__(
        self,
        teacher: Any,
        student: VolumeField | str = "mlp",
        cameras: Cameras | None = None,
        config: Any = None,
        *,
        background: float = 1.0,
        seed: int = 0,
        **overrides: Any,
    ) -> None:
        super().__init__(config, **overrides)
        config = self.config
        self.teacher: Any
        self.add_frozen("teacher", as_field(teacher))
        self.student = heir(self.teacher, student, low=config.clamp_low) if isinstance(student, str) else student
        self.cameras, self.background, self.seed = cameras, background, seed
        check_pair(self.student, self.teacher, config)
        self.inherited = inherit(core(self.student), core(self.teacher), config.inherit)
        if config.keep_heads:
            self._keep_heads()
        self.with_features = all(getattr(f, "feature_width", None) for f in (self.student, self.teacher))
        self.grid: OccupancyGrid | None
        if config.occupancy and not isinstance(self.teacher, ContractedField):
            self.add_frozen("grid", occupancy_of(self.teacher, config.occupancy, config.occupancy_threshold, seed))
        else:
            self.grid = None
        box = seen_box(self.teacher)
        self.pool = camera_pool(config.poses, box, cameras, count=config.epoch_poses, size=config.virtual_size)
        first = self.pool.epoch(0, seed)
        self.epoch_length, self._epoch = len(first), -1
        self.sampler = RaySampler(first, rays=config.rays)

    def _keep_heads(self) -> None:
        kept = [p for name, p in core(self.student).named_parameters() if is_head(name) and name in self.inherited]
        if not kept:
            raise InputError(
                f"no head of the {core(self.student).family} student has a counterpart in the teacher: leave keep_heads off"
            )
        for parameter in kept:
            parameter.requires_grad_(False)

    # ---- the algorithm ---------------------------------------------------------------------------------------------------

    def phase(self, step: int) -> int:
        """Which stage a step belongs to: 1 features, 2 colours and densities of points too, 3 everything."""
        config = self.config
        if self.with_features and step < round(config.feature_until * config.steps):
            return 1
        return 2 if step < round(config.volume_until * config.steps) else 3

    def rays_at(self, step: int) -> Rays:
        """Random pixels of one pose: the epoch's poses follow each other, and every epoch has new ones."""
        epoch, place = divmod(step, self.epoch_length)
        if epoch != self._epoch:
            self.sampler.use(self.pool.epoch(epoch, self.seed).to(self.device))
            self._epoch = epoch
        return self.sampler.draw(place).rays

    def march(self, rays: Rays) -> Points:
        """Jittered samples in occupied cells of the box: what both fields are asked at."""
        lens, config = self.pool.lens, self.config
        return march(
            rays, self.teacher.aabb, config.samples, near=lens.near, far=lens.far, occupancy=self.grid, spacing=config.spacing
        )  # fmt: skip

    def losses_at(self, step: int, rays: Rays | None = None) -> Losses:
        """The terms of the loss at a step.

        Args:
            step: from 0; it decides on the stage and on the weight of features.
            rays: R of them; None: random pixels of the step's pose.
        """
        config, phase = self.config, self.phase(step)
        rays = self.rays_at(step) if rays is None else rays
        points = self.march(rays)
        self.counters["teacher_points"] += len(points.x)
        losses = Losses()
        student: Found
        with torch.no_grad():
            teacher: Found = self.teacher.density(points.x) if phase == 1 else self.teacher(points.x, points.d)
        student = self.student.density(points.x) if phase == 1 else self.student(points.x, points.d)
        if phase == 3:
            behind = self._behind(rays)
            pixels = [points.render(found, behind)["rgb"] for found in (student, teacher)]
            losses.add("pixels", self.gap(*pixels), config.pixel_weight)
        if phase > 1:
            losses.add("colour", self.gap(student["rgb"], teacher["rgb"]), config.colour_weight)
            levels = [self.clamped(found["log_sigma"]) for found in (student, teacher)]
            losses.add("density", self.gap(*levels), config.density_weight)
        if self.with_features:
            features = [self.feature(self.student, student), self.feature(self.teacher, teacher)]
            losses.add("feature", self.gap(*features), config.feature_weight * config.feature_decay**step)
        if phase == 3 and config.sparsity_weight and isinstance(inner := core(self.student), VMField):
            losses.add("sparsity", inner.sparsity(), config.sparsity_weight)
        return losses

    def losses(self, batch: Batch) -> Losses:
        step = self.counters["steps"]
        if self.training:
            self.counters["steps"] += 1
        given = batch.inputs
        if not isinstance(given, Mapping) or not {"origins", "directions"} <= set(given):
            raise InputError("PVD takes rays {'origins': (R, 3), 'directions': (R, 3)}; losses_at(step) draws its own")
        return self.losses_at(step, Rays(given["origins"], F.normalize(given["directions"], dim=-1)))

    def gap(self, a: Tensor | None, b: Tensor | None) -> Tensor:
        """The configured distance of two tensors; 0 where there is nothing to compare."""
        assert a is not None and b is not None
        return DISTANCES[self.config.distance](a, b) if a.numel() else a.sum()

    def clamped(self, levels: Tensor | None) -> Tensor:
        assert levels is not None
        return levels.clamp(self.config.clamp_low, self.config.clamp_high)

    def feature(self, field: nn.Module, found: Found) -> Tensor:
        """The volume-aligned feature (M, 16), clamped as its family's is: the log density, and of ``vm`` everything."""
        feature = found["feature"]
        assert feature is not None
        if isinstance(core(field), VMField):
            return self.clamped(feature)
        return torch.cat([self.clamped(feature[:, :1]), feature[:, 1:]], 1)

    def _behind(self, rays: Rays) -> Tensor:
        """The colour (R, 3) behind each ray, the same for both fields."""
        if self.config.random_background:
            return random_per_ray(len(rays.origins), rays.origins.device)
        return torch.full_like(rays.origins, self.background)

    # ---- running ---------------------------------------------------------------------------------------------------------

    def optimised(self) -> Mapping[str, Optimised]:
        """One optimiser and one course of the rate over all stages."""
        config = self.config
        groups = field_groups(core(self.student), config.lr)
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
            if group["name"] == "decoder" and config.decoder_lr is not None:
                group["lr"] = config.decoder_lr
        made = make_optimised([g for g in groups if g["params"]], config, config.steps, lr=config.lr or 1e-2)
        made.scheduler = LambdaLR(
            made.optimizer, Floored(config.schedule, config.steps, config.warmup, config.milestones, config.lr_end)
        )
        return {"student": made}

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One loop: the three stages share the optimiser."""

        def update(_: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            losses = self.losses_at(stepper.step)
            stepper.minimise(losses, "student")
            return losses.logged()

        return [
            Stage(
                "distillation",
                self.config.steps,
                update=update,
                optimisers=self.optimised,
                state={"rays": self.sampler},
            )
        ]

    # ---- the result ------------------------------------------------------------------------------------------------------

    @property
    def result(self) -> VolumeField:
        if self.grid is None:
            return self.student
        return OccupiedField(self.student, self.grid.occupied).train(self.training)

    def renderers(self) -> dict[str, Renderer]:
        config = self.config
        options: Any = {"samples": 2 * config.samples, "background": self.background, "spacing": config.spacing}
        return {
            name: VolumeRenderer(f.eval(), **options)
            for name, f in (("student", self.result), ("teacher", self.teacher))
        }

    def seen_from(self, views: Any) -> Cameras:
        return super().seen_from(views) or self.cameras or self.pool.epoch(0, self.seed)

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        super().save_artifact(folder, {**description, "inherited": self.inherited})

    # ---- building --------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Any]:
        task = load_scene(setup)
        teacher = field_teacher(setup, task, progress)
        student = heir(teacher, setup.student, read_options(setup.student_options), config.clamp_low)
        made = cls(teacher, student, task.train.cameras, config, background=task.background, seed=seed)
        made.on = task
        return made, task

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        if not isinstance(data, PosedImages):
            raise InputError("pvd needs cameras: give PosedImages(cameras), pictures are not needed")
        if teacher is None:
            raise InputError("pvd needs teacher=…: a field, or a callable (x, d) -> (sigma, rgb)")
        return cls(teacher, "mlp" if student is None else student, data.cameras, config, seed=seed)


class Floored(lr_factor):
    """The course of the rate, but ending at a share ``floor`` of the peak instead of 0."""

    def __init__(self, schedule: Any, steps: int, warmup: float, milestones: tuple[float, ...], floor: float) -> None:
        super().__init__(schedule, steps, warmup, milestones)
        self.floor = floor

    def __call__(self, step: int) -> float:
        return self.floor + (1 - self.floor) * super().__call__(step)


def check_pair(student: nn.Module, teacher: Any, config: Any) -> None:
    """Raise an :class:`InputError` unless both fields fill one box and the student's densities reach over the clamp."""
    if not config.clamp_low < config.clamp_high:
        raise InputError(f"the clamp needs clamp_low < clamp_high (got {config.clamp_low} and {config.clamp_high})")
    if not isinstance(student, VolumeField):
        raise InputError(f"a student is a field or a family's name, not {type(student).__name__}")
    if student is teacher:
        raise InputError("teacher and student are one field: give a student of its own")
    if not torch.allclose(student.aabb.cpu(), teacher.aabb.cpu()):
        raise InputError(f"the student fills the box {student.aabb.tolist()}, the teacher {teacher.aabb.tolist()}")
    low, high = student.density_law.low, student.density_law.high
    if (low is not None and low > config.clamp_low) or (high is not None and high < config.clamp_high):
        raise InputError(
            f"the student's log density is limited to [{low}, {high}], within the clamp [{config.clamp_low}, {config.clamp_high}]: "
            "widen its Density, or narrow clamp_low and clamp_high"
        )
