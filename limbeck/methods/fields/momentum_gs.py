"""Momentum-GS: blocks of a large scene in turns, one shared decoder, and its slow average as a teacher of consistency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list
from pydantic import Field
from torch import Tensor

from limbeck.blocks.ema import EMA
from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.core.stage import Stage, Stepper
from limbeck.methods.fields.blocks_base import BlockScenes, Trainings, anchored, mean_of, pinholes, similarity
from limbeck.metrics.image_quality import psnr
from limbeck.rendering.anchors import AnchorRenderer, Anchors, AnchorScene, Drawn, draw_anchors
from limbeck.rendering.views import View, view_of
from limbeck.tasks.scenes import PosedImages

SHOWN_TO_WEIGH = 4
"""Views that a block is measured on at most."""


@dataclass(frozen=True)
class Turn:
    """Where a run is: which block, its own number of updates so far, and whether the decoder rests."""

    block: int
    iteration: int
    frozen: bool
    last: bool


class MomentumGS(BlockScenes):
    r"""Momentum Gaussian self-distillation.

    A scene that is too large is cut into B cells of the contracted space. Every block has anchors of its own, all share one decoder
    :math:`D_\theta`, and the blocks are trained in turns of I updates. A momentum decoder, moved before every update, bridges the turns:

    .. math:: \bar\theta \leftarrow m\,\bar\theta + (1 - m)\,\theta, \qquad
              L_{cons} = \mathrm{mse}(c, \bar c) + \mathrm{mse}(q, \bar q) + \mathrm{mse}(s, \bar s) + \mathrm{mse}(\alpha, \bar\alpha)

    Both decoders see the same features and directions. Colours c, unit quaternions q and scales s (world units) are compared where the
    online opacity is above 0, opacities everywhere. With the photometric terms and the mean volume of the drawn Gaussians,

    .. math:: L = w_b\,\big[(1-\gamma) L_1 + \gamma (1 - \mathrm{SSIM}) + 0.01\,\overline{\textstyle\prod s} + \lambda L_{cons}\big], \quad
              w_b = 2 - \exp\Big(-\frac{(P - p_b)^2 + (10 (Q - q_b))^2}{2 s^2}\Big)

    where p_b and q_b are running means of the block's PSNR and SSIM on held-out views, P and Q their largest over the blocks: blocks that
    lag weigh up to twice as much. In the last round the decoder rests after the round's first block (and so do L_cons and w), so all blocks
    end with the same one. Then every block keeps the anchors of its own cell, and the scene is their union.

    How the blocks, their views and the coarse model come about, and the arguments: :class:`BlockScenes`.

    Attributes:
        momentum: the slow average of ``decoder``. block: the number of the one that :meth:`losses` is about.
        scores: (B, 2) running PSNR and SSIM. measured: (B,) how often they were measured.

    Raises:
        InputError: blocks that cannot be divided among the processes.

    Several processes train a block each, side by side: the decoder's gradients are averaged, anchors stay with their process, and all
    exchange their blocks at the end of every turn. A checkpoint holds the blocks of the other processes as of the last exchange.

    The published weight of consistency, 50 to 100, is for tens of thousands of updates; over a thousand it holds the decoder still, so 1 is the default.

    Decided here, where the paper is silent: the running means keep 0.9 of the old value; blocks that are not measured yet weigh 1; the
    blocks start from the coarse model's anchors and decoder; one optimiser of the decoder lives through all turns.

    Source: "Momentum-GS: Momentum Gaussian Self-Distillation for High-Quality Large Scene Reconstruction".
    """

    name = "momentum-gs"

    class Config(BlockScenes.Config):
        steps: int = Field(960, ge=1, description="updates of the blocks, over all of them together on one device")
        interval: int = Field(60, ge=1, description="updates of a block before the next one's turn")
        decoder_momentum: float = Field(0.9, ge=0, le=1, description="decay of the momentum decoder, per update")
        consistency: float = Field(1.0, ge=0, description="weight of the distance to the momentum decoder")
        detach_teacher: bool = Field(
            True,
            description="let no gradient reach the anchors through the momentum decoder (the released code lets it)",
        )
        rest_decoder: bool = Field(True, description="in the last round the decoder rests after the first block")
        block_weighting: bool = Field(True, description="blocks that lag weigh more")
        weigh_every: int = Field(30, ge=1, description="updates of a block between its measurements")
        weight_scale: float = Field(10.0, gt=0, description="difference of quality that counts, in dB")

        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
            "paper": {
                "steps": 480_000,
                "coarse_steps": 30_000,
                "partition": (2, 1, 4),
                "interval": 500,
                "consistency": 100.0,
                "weigh_every": 1000,
                "features": 32,
                "offsets": 10,
                "decoder_rates": (0.5, 2.0, 1.0),
                "decoder_ends": (0.01, 0.00625, 1.0),
                "offset_end": 0.01,
                "grow_from": 300,
                "grow_until": 30_000,
                "most_anchors": 10_000_000,
                "lattice": 100_000,
            }
        }

    scores: Tensor
    measured: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.momentum = EMA(self.decoder, self.config.decoder_momentum)
        self.register_buffer("scores", torch.zeros(len(self.cells), 2))
        self.register_buffer("measured", torch.zeros(len(self.cells), dtype=torch.long))
        self.block = 0

    def divide(self, held: PosedImages | None = None) -> None:
        super().divide(held)
        self.momentum.module.load_state_dict(self.decoder.state_dict())

    # ---- losses ----------------------------------------------------------------------------------------------------------

    def distance(self, found: Drawn, anchors: Anchors, view: View) -> Tensor:
        """L_cons between the shared decoder's attributes of a picture and the momentum decoder's."""
        own, drawn = found.attributes, found.drawn
        slow = anchors.attributes(self.momentum.module, view.centre, found.which, detach=self.config.detach_teacher)
        terms = [
            mean_of((a[drawn] - b[drawn]).square())
            for a, b in ((own.colours, slow.colours), (own.quats, slow.quats), (own.scales, slow.scales))
        ]
        return sum(terms, mean_of((own.opacities - slow.opacities).square()))

    def block_losses(self, number: int, image: Tensor, frozen: bool = False) -> tuple[Losses, Drawn, View]:
        """All terms of one view for the current block."""
        config, anchors = self.config, self.blocks[self.block]
        assert isinstance(anchors, Anchors)
        view = view_of(self.views.cameras, number)
        found = draw_anchors(anchors, self.decoder, view, self.background)
        weight = float(self.weights()[self.block]) if config.block_weighting and not frozen else 1.0
        losses = self.photometric(found, image, weight)
        if frozen or not config.consistency:
            return losses.add("consistency", torch.zeros(()).to(image), 0.0), found, view
        return losses.add("consistency", self.distance(found, anchors, view), weight * config.consistency), found, view

    def losses(self, batch: Batch) -> Losses:
        """In a loop of one's own: the terms of views ``{"image", "number"}`` for block ``self.block``, on average.

        Call :meth:`divide` first, and ``momentum.update(decoder)`` before every update.
        """
        pairs = list(zip(batch.inputs["number"].tolist(), batch.inputs["image"], strict=True))
        if not len(self.assigned):
            raise InputError("the scene is not divided into blocks yet: call divide() first")
        losses = Losses()
        for number, image in pairs:
            found = self.block_losses(number, image)[0]
            for name, value in found.terms.items():
                before = losses.terms.get(name, torch.zeros_like(value))
                losses.add(name, before + value / len(pairs), found.weights[name])
        return losses

    @torch.no_grad()
    def weights(self) -> Tensor:
        """w_b (B,), in [1, 2); 1 for blocks that were not measured."""
        known = self.measured > 0
        if not bool(known.any()):
            return torch.ones_like(self.scores[:, 0])
        behind = self.scores[known].amax(0) - self.scores
        distance = behind[:, 0].square() + (10 * behind[:, 1]).square()
        return torch.where(known, 2 - torch.exp(-distance / (2 * self.config.weight_scale**2)), 1.0)

    @torch.no_grad()
    def measure(self, block: int, views: PosedImages) -> None:
        """Update a block's running quality on its held-out views."""
        known = self.held[:, block].nonzero()[:, 0]
        ids = known[torch.linspace(0, len(known) - 1, min(SHOWN_TO_WEIGH, len(known))).round().long()].tolist()
        scene = AnchorScene(self.blocks[block], self.decoder)  # type: ignore[arg-type]
        found = AnchorRenderer(scene, self.background)(views.cameras, ids)["rgb"].clamp(0, 1)
        wanted = views.images[ids].to(found)
        quality = [psnr(found, wanted).mean(), similarity(found, wanted).mean()]
        new = torch.stack(quality).to(self.scores)
        self.scores[block] = 0.9 * self.scores[block] + 0.1 * new if self.measured[block] else new
        self.measured[block] += 1

    # ---- stages ----------------------------------------------------------------------------------------------------------

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """The coarse model, then the blocks in turns."""
        if isinstance(train, PosedImages):
            self.views = pinholes(train)
        held = pinholes(val) if isinstance(val, PosedImages) and val.has_images else None
        coarse = [self.coarse_stage()] if self.config.coarse_steps else []
        if not coarse and self.config.assign == "visible":
            raise InputError(
                "views are assigned by a coarse model: give coarse_steps, or assign them by 'camera' or 'ground'"
            )
        return [*coarse, self._block_stage(held)]

    def turn(self, step: int, rank: int = 0, world: int = 1) -> Turn:
        """Whose turn it is at a step, for one of several processes."""
        per, rest = divmod(len(self.cells), world)
        if rest:
            raise InputError(f"{len(self.cells)} blocks cannot be divided among {world} processes: change partition")
        interval = max(1, min(self.config.interval, self.config.steps // per))
        round_, index = divmod(step // interval, per)
        rounds = -(-self.config.steps // (interval * per))
        final = round_ == rounds - 1 and per > 1
        return Turn(
            rank * per + index,
            round_ * interval + step % interval,
            self.config.rest_decoder and final and index > 0,
            (step + 1) % interval == 0 or step + 1 == self.config.steps,
        )

    def _block_stage(self, held: PosedImages | None) -> Stage:
        config = self.config
        per_block = -(-config.steps // len(self.cells))
        own = Trainings(lambda: [self.training_of(a, per_block) for a in self.blocks])  # type: ignore[arg-type]
        measured_on = self.views if held is None else held

        def update(_: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            rank, world = _processes()
            turn = self.turn(stepper.step, rank, world)
            self.block, training = turn.block, own.of[turn.block]
            for other in own.of:
                if other is not training:
                    other.to(torch.device("cpu"))
            training.to(self.device)
            self.decoder.requires_grad_(not turn.frozen)
            if not turn.frozen:
                self.momentum.update(self.decoder)
            ids = self.assigned[:, turn.block].nonzero()[:, 0]
            number = int(ids[torch.randint(len(ids), ())])
            training.zero()
            losses, found, view = self.block_losses(number, self.views.images[number].to(self.device), turn.frozen)
            if not turn.frozen:
                stepper.minimise(anchored(losses.total, self.decoder))
            elif losses.total.requires_grad:
                losses.total.backward()
            training.step(turn.iteration, found, view)
            if config.block_weighting and not turn.frozen and (turn.iteration + 1) % config.weigh_every == 0:
                self.measure(turn.block, measured_on)
            if turn.last and world > 1:
                self._exchange(own, turn.block % (len(self.cells) // world), world)
            count = sum(len(training.anchors) for training in own.of)
            return losses.logged() | {"weight": self.weights()[turn.block], "anchors": torch.tensor(float(count))}

        def end() -> None:
            self.decoder.requires_grad_(True)
            for training in own.of:
                training.to(self.device)

        return Stage(
            "blocks",
            config.steps,
            update=update,
            optimisers=lambda: own.made({"decoder": self.decoder_optimiser(self.decoder, config.steps)}),
            begin=lambda: self.divide(held),
            end=end,
            state={"blocks": own},
        )

    def _exchange(self, own: Trainings, index: int, world: int) -> None:
        """All processes get the block that each of them has just trained."""
        per = len(self.cells) // world
        for rank in range(world):
            block = rank * per + index
            anchors, training = self.blocks[block], own.of[block]
            sent: list[Any] = [(anchors.state_dict(), training.state_dict(), self.scores[block], self.measured[block])]
            broadcast_object_list(sent, from_process=rank)
            if rank != _processes()[0]:
                weights, progress, self.scores[block], self.measured[block] = sent[0]
                anchors.load_state_dict(weights)
                own.of[block] = self.training_of(anchors, -(-self.config.steps // len(self.cells)))  # type: ignore[arg-type]
                own.of[block].load_state_dict(progress)


def _processes() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
