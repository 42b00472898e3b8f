"""Do blocks that are trained in turns fit together better with a momentum teacher for their shared decoder?

A terrain of 6,400 small Gaussians, seen by 64 cameras of 32x32 pixels that look down at random ground points. 22 x 22 anchors, four blocks in the quadrants
(with a margin of 0.7), views by the ground they look at (margin 0.5). Judged are views whose middle lies on a border between blocks, of which no
arm has seen any; others of that kind choose among settings. All arms make 960 updates by the same photometric terms (L1) from the same anchors.

Arms: *shared*: one decoder, blocks in turns; *momentum*: with the consistency of this method; both rest the decoder after the first block of the last round;
*joint*: the blocks change at every update, as if there were a device for each; *indep*: a decoder for each block. *Drift* is how much the decoded colours,
opacities and shapes of the first block's Gaussians change while the other blocks have their turns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.claims.fields import common
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine
from limbeck.core.seeding import seed_everything
from limbeck.methods.fields.momentum_gs import MomentumGS
from limbeck.metrics.image_quality import psnr
from limbeck.rendering.anchors import Anchors
from limbeck.rendering.cameras import Cameras, look_at
from limbeck.rendering.gaussians import SH_C0, Gaussians
from limbeck.rendering.scenes import scene
from limbeck.rendering.splatting import splat, splat_tensors
from limbeck.rendering.views import view_of
from limbeck.tasks.scenes import PosedImages

STEPS, INTERVAL, SIZE = 960, 60, 32
BOX = torch.tensor([[-2.0, -2.0, -2.0], [2.0, 2.0, 2.0]])
BASE: dict[str, Any] = {
    "steps": STEPS,
    "interval": INTERVAL,
    "coarse_steps": 0,
    "assign": "ground",
    "view_margin": 0.5,
    "content_margin": 0.7,
    "grow_every": 0,
    "ssim_share": 0.0,
    "voxel": 1e-3,
}
SHARED: dict[str, Any] = {"consistency": 0.0, "block_weighting": False}
RATES = ({"lr": 4e-3}, {"lr": 1e-2})
WEIGHTS = ({"consistency": 50.0}, {"consistency": 1.0})


def height(ground: Tensor) -> Tensor:
    return 0.15 * torch.sin(3 * ground[:, 0]) * torch.cos(2 * ground[:, 1])


def lattice(side: int) -> Tensor:
    """Points (side^2, 3) on the terrain."""
    axis = (torch.arange(side) + 0.5) / side * 4 - 2
    ground = torch.cartesian_prod(axis, axis)
    return torch.cat([ground, height(ground)[:, None]], 1)


@functools.cache
def truth() -> Gaussians:
    points = lattice(80)
    colours = scene("terrain").texture(points).clamp(0, 1)
    count = len(points)
    quats = torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1)
    return Gaussians(
        points, torch.full((count, 3), -3.2), quats, torch.full((count,), 3.0), ((colours - 0.5) / SH_C0)[:, None]
    )


@torch.no_grad()
def seen(targets: Tensor, generator: torch.Generator) -> PosedImages:
    """Pictures of the terrain from obliquely above ground points (N, 3)."""
    count = len(targets)
    angle = 2 * torch.pi * torch.rand(count, generator=generator)
    away = torch.stack([0.7 * angle.cos(), 0.7 * angle.sin(), torch.full((count,), 1.5)], 1)
    focal, middle = torch.full((count,), float(SIZE)), torch.tensor(SIZE / 2)
    cameras = Cameras(look_at(targets + away, targets), focal, focal, middle, middle, SIZE, SIZE)
    images = [splat(truth(), cameras, 1.0, index=i).rgb for i in range(count)]
    return PosedImages(cameras, torch.stack(images).clamp(0, 1))


@functools.cache
def views() -> tuple[PosedImages, PosedImages, PosedImages, Tensor]:
    """Training views, border views to choose by and to judge by, and where the anchors begin."""
    g = torch.Generator().manual_seed(7)

    def ground() -> Tensor:
        return torch.cat([3.2 * torch.rand(64, 2, generator=g) - 1.6, torch.zeros(64, 1)], 1)

    def border() -> Tensor:
        along = 3.2 * torch.rand(12, generator=g) - 1.6
        targets = torch.zeros(12, 3)
        targets[:6, 0], targets[6:, 1] = along[:6], along[6:]
        return targets

    train, val, test = seen(ground(), g), seen(border(), g), seen(border(), g)
    points = lattice(22) + 0.02 * torch.randn(22 * 22, 3, generator=g)
    return train, val, test, points


def judged(draw: Callable[[Cameras, int], Tensor], part: PosedImages) -> float:
    with torch.no_grad():
        images = torch.stack([draw(part.cameras, i) for i in range(len(part))]).clamp(0, 1)
    return float(psnr(images, part.images).mean())


def together(blocks: list[tuple[Anchors, Any]]) -> Callable[[Cameras, int], Tensor]:
    """Draws several sets of anchors, each with a decoder of its own, as one scene."""

    def draw(cameras: Cameras, number: int) -> Tensor:
        view = view_of(cameras, number)
        parts: list[tuple[Tensor, ...]] = []
        for anchors, decoder in blocks:
            which = anchors.visible(view).nonzero()[:, 0]
            found = anchors.attributes(decoder, view.centre, which)
            shown = found.opacities > 0
            parts.append(
                (
                    anchors.points(which)[shown],
                    *(v[shown] for v in (found.quats, found.scales, found.opacities, found.colours)),
                )
            )
        means, quats, scales, opacities, colours = (torch.cat(p) for p in zip(*parts, strict=True))
        return splat_tensors(means, quats, scales, opacities, colours, view, 1.0).rgb

    return draw


def blocks_in_turns(seed: int, **settings: Any) -> dict[str, dict[str, float]]:
    """One decoder for all blocks; also how much it drifts during the third round."""
    train, val, test, points = views()
    seed_everything(mix_seed(seed, 3))
    made = MomentumGS(train, points, BOX, background=1.0, **{**BASE, **settings})
    stages = made.stages(train, val, seed=seed)
    kept: dict[str, Any] = {}
    interval = settings.get("interval", INTERVAL)

    def after(step: int) -> None:
        if step in (9 * interval, 12 * interval):
            kept[str(step)] = {k: v.clone() for k, v in made.decoder.state_dict().items()}

    stages[-1].after_step = after
    Engine(None, common.QUIET, seed=mix_seed(seed, 2)).run(made, stages)
    made.eval()
    scene_ = made.merged()
    draw = together([(scene_.anchors, scene_.decoder)])
    found = {"val": {"psnr": judged(draw, val)}, "test": {"psnr": judged(draw, test)}}
    found["test"]["decoder_parameters"] = float(sum(p.numel() for p in made.decoder.parameters()))
    if interval == INTERVAL:
        found["test"]["drift"] = drift(made, kept, test)
    return found


@torch.no_grad()
def drift(made: Any, kept: Mapping[str, Any], part: PosedImages) -> float:
    """Mean squared change of the first block's decoded attributes between two states of the decoder."""
    anchors, decoder, now = made.blocks[0], made.decoder, {k: v.clone() for k, v in made.decoder.state_dict().items()}
    total = 0.0
    for number in range(len(part)):
        view = view_of(part.cameras, number)
        which = torch.arange(len(anchors))
        found = []
        for state in kept.values():
            decoder.load_state_dict(state)
            found.append(anchors.attributes(decoder, view.centre, which))
        before, after = found
        pairs = ((before.colours, after.colours), (before.quats, after.quats), (before.opacities, after.opacities))
        total += sum(float((a - b).square().mean()) for a, b in pairs) / len(part)
    decoder.load_state_dict(now)
    return total


def own_decoders(seed: int, **settings: Any) -> dict[str, dict[str, float]]:
    """Each block by itself, with as many updates as it gets in turns."""
    train, val, test, points = views()
    seed_everything(mix_seed(seed, 3))
    plan = MomentumGS(train, points, BOX, background=1.0, **BASE)
    own, near = plan.views_of_blocks(train.cameras), plan.cells.near(points, BASE["content_margin"])
    parts, size = [], 0
    for block in range(len(plan.cells)):
        some = train.subset(own[:, block].nonzero()[:, 0])
        single = {**BASE, **SHARED, "partition": (1, 1, 1), "steps": STEPS // len(plan.cells), **settings}
        made = MomentumGS(some, points[near[:, block]], BOX, background=1.0, **single)
        Engine(None, common.QUIET, seed=mix_seed(seed, 2, block)).run(made, made.stages(some, None, seed=seed))
        anchors: Any = made.eval().blocks[0]
        parts.append((anchors.subset(plan.cells.of(anchors.positions) == block), made.decoder))
        size += sum(p.numel() for p in made.decoder.parameters())
    draw = together(parts)
    return {
        "val": {"psnr": judged(draw, val)},
        "test": {"psnr": judged(draw, test), "decoder_parameters": float(size)},
    }


def claim(data_root: str | None = None) -> Claim:
    """64 training views, 12 border views to choose by and 12 to judge by."""

    def arm(
        how: Callable[..., dict[str, dict[str, float]]], **settings: Any
    ) -> Callable[[Mapping[str, Any], int], Outcome]:
        def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
            parts = how(seed, **{**settings, **chosen})
            return Outcome(parts["val"], parts["test"])

        return train

    return Claim(
        name="momentum-gs",
        arms={
            "momentum": Arm(
                "method", "one decoder with a momentum teacher, blocks in turns", arm(blocks_in_turns), WEIGHTS
            ),
            "shared": Arm("baseline", "one decoder, blocks in turns", arm(blocks_in_turns, **SHARED), RATES),
            "joint": Arm(
                "control",
                "one decoder, another block at every update",
                arm(blocks_in_turns, **SHARED, interval=1, rest_decoder=False),
            ),
            "indep": Arm("control", "a decoder for each block", arm(own_decoders)),
        },
        checks=[
            Check(
                "views of borders are 0.3 dB better than with the shared decoder alone",
                "momentum",
                "shared",
                "psnr",
                0.3,
            ),
            Check("and no better than with all blocks at once", "joint", "momentum", "psnr", headline=False),
            Check(
                "the decoder drifts less while other blocks have their turns",
                "momentum",
                "shared",
                "drift",
                higher_is_better=False,
            ),
            Check(
                "no worse than a decoder for each block, up to 0.5 dB",
                "momentum",
                "indep",
                "psnr",
                -0.5,
                headline=False,
            ),
        ],
        data={
            "name": "terrain",
            "source": "6,400 Gaussians on an analytic terrain",
            "train": 64,
            "val": 12,
            "test": 12,
        },
        seeds=5,
        select="psnr",
        note=(
            "One small terrain; the city scenes of the paper were not run. All five seeds favour the method, by 0.8 dB on average; the interval "
            "reaches below the 0.3 dB asked for. The published weight of consistency (50 to 100) lost to a weight of 1 on validation views: over "
            "so few updates it holds the decoder still."
        ),
        settings={**BASE, "rates": [r["lr"] for r in RATES], "weights": [w["consistency"] for w in WEIGHTS]},
    )
