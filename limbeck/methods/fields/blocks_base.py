"""What methods share that train anchored Gaussians block by block: the coarse model, the partition, the union."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
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
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.stage import Stage, Stepper
from limbeck.methods.fields.base import FieldDistiller
from limbeck.metrics.image_quality import WINDOW, ssim
from limbeck.rendering.anchor_baking import baked
from limbeck.rendering.anchor_growing import GrowingRule
from limbeck.rendering.anchor_training import AnchorRates, AnchorTraining, decayed
from limbeck.rendering.anchors import AnchorDecoder, AnchorRenderer, Anchors, AnchorScene, Drawn, draw_anchors
from limbeck.rendering.blocks import Cells, fill_empty, ground_points, seen_blocks
from limbeck.rendering.cameras import Cameras, normalised
from limbeck.rendering.lattices import consistent_points
from limbeck.rendering.ply import save_ply
from limbeck.rendering.renderers import Renderer, SplatRenderer
from limbeck.rendering.rows import any_count
from limbeck.rendering.undistortion import undistorted
from limbeck.rendering.views import view_of
from limbeck.tasks.scenes import PosedImages, load_scene


class BlockScenes(FieldDistiller):
    r"""Base of the methods that train one large scene in blocks.

    A first stage trains a coarse model of the whole scene: anchors with a decoder, by L = (1 - g) L1 + g (1 - SSIM) + 0.01 mean(prod s). The
    contracted space is divided into regular cells. A view belongs to the blocks whose removal from the coarse model changes its picture, and
    to the block that its camera stands in. A block gets the coarse model's anchors that its views can see, so neighbours overlap; in the end it
    keeps those of its own cell.

    Args:
        views: posed pictures; a lens's distortion is taken out of them once.
        points: (P, 3) to put anchors on, as structure from motion gives them. None: points of a lattice in the box whose colours agree over the
            pictures (:func:`~limbeck.rendering.lattices.consistent_points`), ``lattice`` of them.
        aabb: (2, 3) the box that the cells divide. None: that of the points, or a cube around what the cameras look at.
        background: grey value behind the scene.
        anchors: begin with these instead of with points.

    Attributes:
        coarse: the whole scene as the first stage leaves it. blocks: every block's anchors. decoder: the shared one.
        assigned: (V, B) which views belong to which block. held: the same of the views that blocks are measured on.

    Raises:
        InputError: no pictures, a block without anchors.
    """

    class Config(FieldDistiller.Config):
        coarse_steps: int = Field(240, ge=0, description="updates of the coarse model of the whole scene; 0: none")
        partition: tuple[int, int, int] = Field((2, 2, 1), description="cells along x, y and z")
        ssim_share: float = Field(
            0.2, ge=0, le=1, description="share of 1 - SSIM in the photometric term (0 below 11 pixels)"
        )
        volume: float = Field(0.01, ge=0, description="weight of the mean volume of the drawn Gaussians")
        assign: Literal["visible", "camera", "ground"] = Field(
            "visible",
            description="a block's views: those that its removal changes, those taken inside it, or those that look at its ground",
        )
        visibility: float = Field(0.05, ge=0, lt=1, description="change of a view, in 1 - SSIM, for 'visible'")
        ground_height: float = Field(0.0, description="height z of the ground, for 'ground'")
        view_margin: float = Field(
            0.5, ge=0, description="how far beyond its cell a block's ground reaches, for 'ground'"
        )
        content_margin: float | None = Field(
            None, ge=0, description="a block has the anchors so near to its cell; none: all that its views can see"
        )
        features: int = Field(16, ge=1, description="numbers per anchor")
        offsets: int = Field(4, ge=1, description="Gaussians per anchor")
        hidden: int = Field(32, ge=1, description="hidden units of the decoder's three perceptrons")
        see_distance: bool = Field(False, description="the decoder also sees the distance to the camera")
        voxel: float = Field(
            0.0, ge=0, description="side of an anchor's voxel, world units; 0: median distance of the points"
        )
        lattice: int = Field(600, ge=1, description="points to begin with where there is no point cloud")
        lr: float = Field(4e-3, gt=0, description="peak rate of the decoder")
        decoder_rates: tuple[float, float, float] = Field(
            (1.0, 1.0, 1.0), description="of opacity, colour and shape, as multiples of lr"
        )
        decoder_ends: tuple[float, float, float] = Field(
            (1.0, 1.0, 1.0), description="what fraction of these rates is left at the end, exponentially"
        )
        feature_lr: float = Field(7.5e-3, gt=0, description="rate of the anchors' features")
        offset_lr: float = Field(1e-2, gt=0, description="rate of the offsets")
        offset_end: float = Field(0.1, gt=0, le=1, description="what fraction of it is left at the end, exponentially")
        scale_lr: float = Field(7e-3, gt=0, description="rate of the log-scales")
        schedule: Literal["constant", "cosine", "linear", "poly", "step"] = Field(
            "constant", description="course of all rates, besides the exponentials"
        )
        betas: tuple[float, float] = Field((0.9, 0.999), description="decay of adam's and adamw's two running means")
        adam_eps: float = Field(1e-15, gt=0, description="added to the denominator of adam's and adamw's steps")
        grow_every: int = Field(25, ge=0, description="updates between changes of a block's anchors; 0: none")
        grow_from: int = Field(50, ge=0, description="a block's update from which its anchors change")
        grow_until: int = Field(150, ge=0, description="a block's update up to which its anchors change")
        grow_gradient: float = Field(2e-4, ge=0, description="pull on a centre (half pictures) that asks for an anchor")
        grow_success: float = Field(0.8, ge=0, le=1, description="fraction of the updates an anchor must be seen in")
        min_opacity: float = Field(0.005, ge=0, description="mean opacity below which an anchor is removed")
        most_anchors: int = Field(20_000, ge=1, description="no block grows beyond so many")

    assigned: Tensor
    held: Tensor

    def __init__(
        self,
        views: PosedImages,
        points: Tensor | None = None,
        aabb: Tensor | None = None,
        config: Any = None,
        *,
        background: float = 1.0,
        anchors: Anchors | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(config, **overrides)
        config = self.config
        self.views, self.background = pinholes(views), background
        cameras = self.views.cameras
        if aabb is None:
            given = anchors.positions if anchors is not None else points
            aabb = box_of(cameras) if given is None else torch.stack([given.amin(0) - 1e-3, given.amax(0) + 1e-3])
        self.cells = Cells(aabb.detach().cpu(), tuple(config.partition))
        if anchors is None:
            if points is None:
                points = consistent_points(self.views.images, cameras, aabb, config.lattice, background)
            anchors = Anchors.from_points(points, config.features, config.offsets, config.voxel)
        self.voxel = config.voxel or float(anchors.scales[:, 0].median())
        self.decoder = AnchorDecoder(config.features, config.offsets, config.hidden, config.see_distance)
        self.coarse = AnchorScene(anchors, deepcopy(self.decoder))
        self.blocks = nn.ModuleList(anchors.subset(torch.arange(0)) for _ in range(len(self.cells)))
        count = len(self.cells)
        self.register_buffer("assigned", torch.zeros(0, count, dtype=torch.bool))
        self.register_buffer("held", torch.zeros(0, count, dtype=torch.bool))
        any_count(self)

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Any]:
        """The method on a scene, with anchors on its cloud of points, or on a lattice in its box where there is none."""
        task = load_scene(setup)
        made = cls(task.train, task.points, task.aabb, config, background=task.background)
        made.on = task
        return made, task

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        """The method on a user's own views."""
        if not isinstance(data, PosedImages):
            raise InputError(f"{cls.name} learns from posed pictures: give PosedImages(cameras, images)")
        return cls(data, None, None, config)

    # ---- the coarse model ------------------------------------------------------------------------------------------------

    def photometric(self, found: Drawn, image: Tensor, weight: float = 1.0) -> Losses:
        """The terms that one picture (H, W, 3) gives, times ``weight``."""
        config, rgb = self.config, found.splat.rgb.clamp(0, 1)
        share = config.ssim_share if min(image.shape[:2]) >= WINDOW else 0.0
        losses = Losses(l1=(weight * (1 - share), (rgb - image).abs().mean()))
        if share:
            losses.add("dssim", 1 - ssim(rgb[None], image[None])[0], weight * share)
        return losses.add("volume", mean_of(found.attributes.scales[found.drawn].prod(-1)), weight * config.volume)

    def training_of(self, anchors: Anchors, steps: int) -> AnchorTraining:
        config = self.config
        rule = None
        if config.grow_every:
            rule = GrowingRule(
                config.grow_every, self.voxel, config.grow_gradient, config.grow_success, config.min_opacity, config.most_anchors
            )  # fmt: skip
        rates = AnchorRates(config.feature_lr, config.offset_lr, config.scale_lr, config.offset_end)
        return AnchorTraining(anchors, config, rates, steps, rule, config.grow_from, config.grow_until)

    def decoder_optimiser(self, decoder: AnchorDecoder, steps: int) -> Optimised:
        config = self.config
        parts = (decoder.opacity, decoder.colour, decoder.covariance)
        groups = [
            {"params": list(part.parameters()), "lr": config.lr * rate}
            for part, rate in zip(parts, config.decoder_rates, strict=True)
        ]
        made = make_optimised(groups, config, steps)
        factors: list[Callable[[int], float]] = [decayed(config, steps, end) for end in config.decoder_ends]
        return Optimised(made.optimizer, LambdaLR(made.optimizer, factors), made.clip)

    def coarse_stage(self) -> Stage:
        steps, own = self.config.coarse_steps, Trainings(lambda: [self.training_of(self.coarse.anchors, steps)])

        def update(_: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            number = int(torch.randint(len(self.views), ()))
            view = view_of(self.views.cameras, number)
            own.of[0].zero()
            found = draw_anchors(self.coarse.anchors, self.coarse.decoder, view, self.background)
            losses = self.photometric(found, self.views.images[number].to(self.device))
            stepper.minimise(anchored(losses.total, self.coarse.decoder))
            own.of[0].step(stepper.step, found, view)
            return losses.logged() | {"anchors": torch.tensor(float(len(self.coarse.anchors)))}

        return Stage(
            "coarse",
            steps,
            update=update,
            optimisers=lambda: own.made({"decoder": self.decoder_optimiser(self.coarse.decoder, steps)}),
            state={"anchors": own},
        )

    # ---- partition -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def divide(self, held: PosedImages | None = None) -> None:
        """Cut the coarse model into blocks and find every block's views.

        Args:
            held: views that blocks are measured on; None: their training views.

        Raises:
            InputError: a block without anchors.
        """
        self.assigned = self.views_of_blocks(self.views.cameras)
        self.held = self.assigned if held is None else self.views_of_blocks(held.cameras)
        scene, margin = self.coarse.anchors, self.config.content_margin
        near = None if margin is None else self.cells.near(scene.positions, margin)
        for block in range(len(self.cells)):
            if near is None:
                content = torch.zeros(len(scene), dtype=torch.bool, device=scene.positions.device)
                for number in self.assigned[:, block].nonzero()[:, 0].tolist():
                    content |= scene.visible(view_of(self.views.cameras, number))
            else:
                content = near[:, block]
            if not bool(content.any()):
                raise InputError(f"block {block} has no anchors: take fewer cells (partition) or a smaller box")
            self.blocks[block] = scene.subset(content)
        self.decoder.load_state_dict(self.coarse.decoder.state_dict())

    @torch.no_grad()
    def views_of_blocks(self, cameras: Cameras) -> Tensor:
        """(V, B) which cameras belong to which blocks; every block gets one at least."""
        config, cells = self.config, self.cells
        if config.assign == "ground":
            places = ground_points(cameras, config.ground_height)
            found = cells.near(places, config.view_margin)
        else:
            places = cameras.positions
            found = F.one_hot(cells.of(places), len(cells)).bool()
        if config.assign == "visible":
            scene, blocks = self.coarse, cells.of(self.coarse.anchors.positions)

            def draw(kept: Tensor, number: int) -> Tensor:
                return draw_anchors(
                    scene.anchors.subset(kept), scene.decoder, cameras, self.background, index=number
                ).splat.rgb.clamp(0, 1)

            changed = seen_blocks(
                draw, blocks, len(cells), len(cameras), lambda a, b: 1 - similarity(a, b), config.visibility
            )
            found = found | changed.to(found.device)
        boxes = cells.boxes().to(places)
        away = (places[:, None] - places[:, None].clamp(boxes[:, 0], boxes[:, 1])).norm(dim=-1)
        return fill_empty(found, away)

    def merged(self) -> AnchorScene:
        """The anchors that are in their own block's cell, with the shared decoder."""
        parts = [
            anchors.subset(self.cells.of(anchors.positions) == block)  # type: ignore[operator, arg-type]
            for block, anchors in enumerate(self.blocks)
        ]
        return AnchorScene(Anchors.joined(parts), self.decoder)

    # ---- the result ------------------------------------------------------------------------------------------------------

    @property
    def result(self) -> AnchorScene:
        """The merged scene; before the blocks are trained, the coarse model."""
        return self.merged() if len(self.assigned) else self.coarse

    def renderers(self) -> dict[str, Renderer]:
        found: dict[str, Renderer] = {"student": AnchorRenderer(self.result, self.background)}
        if len(self.assigned):
            found["student as plain Gaussians"] = SplatRenderer(self.baked(), self.background)
            if self.config.coarse_steps:
                found["coarse model"] = AnchorRenderer(self.coarse, self.background)
        return found

    def baked(self) -> Any:
        """The result as plain Gaussians, averaged over the training views."""
        return baked(self.result, self.views.cameras)

    def seen_from(self, views: Any) -> Cameras | None:
        return pinholes(views).cameras if isinstance(views, PosedImages) else self.views.cameras

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        return super().evaluate(pinholes(test) if isinstance(test, PosedImages) else test, class_names)

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The anchors with their decoder, plain Gaussians for viewers, and a turntable."""
        super().save_artifact(folder, description)
        save_ply(self.baked(), folder / "gaussians.ply")


class Trainings:
    """The states of several sets' trainings, made when a stage is entered, kept in its checkpoints."""

    def __init__(self, make: Any) -> None:
        self._make = make
        self.of: list[AnchorTraining] = []

    def made(self, optimisers: Mapping[str, Optimised]) -> Mapping[str, Optimised]:
        self.of = self._make()
        return optimisers

    def state_dict(self) -> list[Any]:
        return [training.state_dict() for training in self.of]

    def load_state_dict(self, states: Sequence[Any]) -> None:
        for training, state in zip(self.of, states, strict=True):
            training.load_state_dict(state)


def pinholes(views: PosedImages) -> PosedImages:
    """The same views without their lens's distortion."""
    if views.cameras.distortion is None:
        return views
    if not views.has_images:
        raise InputError(
            "cameras with distortion cannot be drawn by splatting: give pictures too, or drop the distortion"
        )
    images, cameras, _ = undistorted(views.images, views.cameras)
    return PosedImages(cameras, images.clamp(0, 1))


def box_of(cameras: Cameras) -> Tensor:
    """A cube (2, 3) around what cameras look at, that reaches to the farthest of them.

    Raises:
        InputError: parallel axes, which determine no such point.
    """
    _, move = normalised(cameras, 1.0)
    reach = 1 / float(move[0, 0])
    centre = -move[:3, 3] * reach
    return torch.stack([centre - reach, centre + reach])


def mean_of(values: Tensor) -> Tensor:
    """0 of nothing."""
    return values.sum() / max(1, values.numel())


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM (B,); of pictures below its window, 1 - the mean absolute difference."""
    return ssim(a, b) if min(a.shape[1:3]) >= WINDOW else 1 - (a - b).abs().flatten(1).mean(1)


def anchored(total: Tensor, decoder: nn.Module) -> Tensor:
    """A view in which nothing is drawn has no gradient; this gives it one of 0, so that all processes keep step."""
    return total if total.requires_grad else total + 0.0 * sum(p.sum() for p in decoder.parameters())
