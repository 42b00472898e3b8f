from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.methods.fields.momentum_gs import MomentumGS
from limbeck.rendering.anchors import Anchors, draw_anchors
from limbeck.rendering.cameras import Cameras, look_at
from limbeck.rendering.ply import load_ply
from limbeck.rendering.views import view_of
from limbeck.tasks.scenes import PosedImages
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
ROOT = Path(__file__).parents[3]
BOX = torch.tensor([[-2.0] * 3, [2.0] * 3])


def views(count: int = 8, size: int = 12, seed: int = 0) -> PosedImages:
    """Pictures of coloured ground, from above; the first looks at block 0 and so on in turn."""
    g = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[-1.0, -1, 0], [-1, 1, 0], [1, -1, 0], [1, 1, 0]])
    targets = corners[torch.arange(count) % 4]
    places = targets + torch.tensor([0.3, 0.2, 1.5]) + 0.1 * torch.randn(count, 3, generator=g)
    one = torch.tensor(float(size))
    cameras = Cameras(look_at(places, targets), one, one, one / 2, one / 2, size, size)
    return PosedImages(cameras, torch.rand(count, size, size, 3, generator=g))


def ground(side: int = 6) -> torch.Tensor:
    line = torch.linspace(-1.8, 1.8, side)
    return torch.cat([torch.cartesian_prod(line, line), torch.zeros(side * side, 1)], 1)


SMALL: dict[str, Any] = {
    "steps": 24, "coarse_steps": 0, "interval": 3, "features": 3, "offsets": 2, "hidden": 4, "assign": "ground", "grow_every": 0,
    "voxel": 0.01, "weigh_every": 2, "view_margin": 0.3, "turntable_frames": 0,
}  # fmt: skip


def make(seen: PosedImages | None = None, **settings: Any) -> MomentumGS:
    torch.manual_seed(3)
    return MomentumGS(seen or views(), ground(), BOX, MomentumGS.Config(**{**SMALL, **settings}), background=0.5)


def divided(**settings: Any) -> MomentumGS:
    method = make(**settings)
    method.divide()
    return method


def stir(method: MomentumGS, size: float = 0.3) -> None:
    with torch.no_grad():
        for p in method.decoder.parameters():
            p.add_(size * torch.randn_like(p))
        method.decoder.opacity[2].bias.copy_(torch.linspace(-0.5, 0.5, method.decoder.offsets))
        for block in method.blocks:
            block.features.add_(torch.randn_like(block.features))


# ---- losses --------------------------------------------------------------------------------------------------------------------


def test_consistency_is_nothing_at_first_and_the_papers_sum_later() -> None:
    method = divided()
    view = view_of(method.views.cameras, 0)
    anchors = method.blocks[0]
    assert isinstance(anchors, Anchors)
    found = draw_anchors(anchors, method.decoder, view)
    assert float(method.distance(found, anchors, view)) == 0.0
    stir(method)
    found = draw_anchors(anchors, method.decoder, view)
    assert 0 < int(found.drawn.sum()) < found.drawn.numel()
    own = anchors.attributes(method.decoder, view.centre, found.which)
    slow = anchors.attributes(method.momentum.module, view.centre, found.which)
    expected, above = 0.0, own.opacities > 0
    for name in ("colours", "quats", "scales"):
        gaps = [(getattr(own, name)[i, j] - getattr(slow, name)[i, j]) ** 2 for i, j in above.nonzero().tolist()]
        expected += float(torch.stack(gaps).mean())
    expected += float((own.opacities - slow.opacities).square().mean())
    torch.testing.assert_close(float(method.distance(found, anchors, view)), expected)


@pytest.mark.parametrize("detach", [True, False])
def test_where_the_gradient_of_the_consistency_goes(detach: bool) -> None:
    """The anchors' gradient is that of the online branch alone, or of both; the slow decoder never gets one."""
    method = divided(detach_teacher=detach)
    stir(method)
    anchors, view = method.blocks[0], view_of(method.views.cameras, 0)
    assert isinstance(anchors, Anchors)
    found = draw_anchors(anchors, method.decoder, view)
    method.distance(found, anchors, view).backward()
    got = anchors.features.grad.clone()
    assert all(p.grad is None for p in method.momentum.parameters())
    assert all(p.grad is not None for p in method.decoder.parameters())
    anchors.zero_grad()
    fixed = tuple(v.detach() for v in anchors.attributes(method.momentum.module, view.centre, found.which))
    own = anchors.attributes(method.decoder, view.centre, found.which)
    slow = fixed if detach else anchors.attributes(method.momentum.module, view.centre, found.which)
    pairs = list(zip(own, slow, strict=True))
    total = (pairs[0][0] - pairs[0][1]).square().mean()
    total = total + sum((a[found.drawn] - b[found.drawn]).square().mean() for a, b in pairs[1:])
    total.backward()
    torch.testing.assert_close(got, anchors.features.grad)
    assert float(got.abs().max()) > 0


def test_the_total_is_weighted_as_in_the_paper() -> None:
    method = divided(consistency=7.0, ssim_share=0.2)
    stir(method)
    method.scores = torch.tensor([[20.0, 0.5], [24.0, 0.7], [0.0, 0.0], [22.0, 0.8]])
    method.measured = torch.tensor([1, 2, 0, 1])
    weights = method.weights().tolist()
    for block, (psnr, ssim) in {0: (20.0, 0.5), 1: (24.0, 0.7), 3: (22.0, 0.8)}.items():
        away = (24 - psnr) ** 2 + (10 * (0.8 - ssim)) ** 2
        assert weights[block] == pytest.approx(2 - math.exp(-away / 200))
    assert weights[2] == 1 and all(1 <= w < 2 for w in weights) and weights[0] > weights[3] > weights[1]
    image = method.views.images[0]
    losses, found, view = method.block_losses(0, image)
    rgb = found.splat.rgb
    scales = found.attributes.scales[found.drawn]
    assert float(losses["l1"]) == pytest.approx(float((rgb - image).abs().mean()), abs=1e-6)
    assert float(losses["volume"]) == pytest.approx(
        float((scales[:, 0] * scales[:, 1] * scales[:, 2]).mean()), rel=1e-4
    )
    cons = method.distance(found, method.blocks[0], view)  # type: ignore[arg-type]
    inner = 0.8 * losses["l1"] + 0.2 * losses["dssim"] + 0.01 * losses["volume"] + 7 * cons
    torch.testing.assert_close(losses.total, weights[0] * inner)
    rested = method.block_losses(0, image, frozen=True)[0]
    torch.testing.assert_close(rested.total, inner - 7 * cons)


def test_nothing_drawn_is_no_accident() -> None:
    method = divided()
    method.decoder.opacity[2].bias.data.fill_(-9)
    losses = method.block_losses(0, method.views.images[0])[0]
    assert bool(torch.isfinite(losses.total)) and float(losses["volume"]) == 0


def test_a_loop_of_ones_own() -> None:
    method = divided(weight_decay=0.0)
    stir(method)
    batch = method.views.fetch(torch.tensor([0, 4]), None)
    expected = sum(method.block_losses(n, method.views.images[n])[0].total for n in (0, 4)) / 2
    torch.testing.assert_close(method(batch), expected)
    with pytest.raises(InputError, match="call divide"):
        make()(batch)


# ---- turns ---------------------------------------------------------------------------------------------------------------------


def test_blocks_take_turns_and_the_decoder_rests_at_the_end() -> None:
    method = make()
    turns = [method.turn(step) for step in range(24)]
    assert [t.block for t in turns] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [t.iteration for t in turns if t.block == 2] == list(range(6))
    assert [t.frozen for t in turns] == [False] * 15 + [True] * 9
    assert [i for i, t in enumerate(turns) if t.last] == list(range(2, 24, 3))
    assert not any(make(rest_decoder=False).turn(step).frozen for step in range(24))
    two = [[method.turn(step, rank, 2).block for step in range(0, 12, 3)] for rank in (0, 1)]
    assert two == [[0, 1, 0, 1], [2, 3, 2, 3]]
    with pytest.raises(InputError, match="cannot be divided among 3 processes"):
        method.turn(0, 0, 3)


def test_a_turn_moves_its_block_and_the_decoder_only_and_the_average_follows_before_it() -> None:
    method = make(weigh_every=100)
    states: list[dict[str, torch.Tensor]] = []
    averages: list[list[torch.Tensor]] = []
    moves = method.momentum.update

    def update(model: Any, decay: float | None = None) -> None:
        moves(model, decay)
        averages.append([p.clone() for p in method.momentum.module.parameters()])

    method.momentum.update = update  # type: ignore[method-assign]
    stages = method.stages(method.views)
    stages[0].after_step = lambda step: states.append({k: v.detach().clone() for k, v in method.state_dict().items()})
    Engine(None, EngineConfig(progress=False), seed=1).run(method, stages)
    decoder = [[v for k, v in s.items() if k.startswith("decoder.")] for s in states]
    assert len(averages) == 15  # none while the decoder rests
    for n in range(2, 15):  # before update n the average moves to what update n - 1 left
        for slow, before, fast in zip(averages[n], averages[n - 1], decoder[n - 1], strict=True):
            torch.testing.assert_close(slow, 0.9 * before + 0.1 * fast)
    for n in range(1, 24):
        turn = method.turn(n)
        changed = {
            k.split(".")[1]
            for k in states[n]
            if k.startswith("blocks.") and not torch.equal(states[n][k], states[n - 1][k])
        }
        assert changed == {str(turn.block)}, n
        same = all(torch.equal(a, b) for a, b in zip(decoder[n], decoder[n - 1], strict=True))
        assert same == turn.frozen, n
    assert all(p.requires_grad for p in method.decoder.parameters())


def test_running_quality() -> None:
    method = divided()
    method.held = method.assigned
    method.measure(1, method.views)
    first = method.scores[1].clone()
    stir(method)
    method.measure(1, method.views)
    fresh = divided()
    fresh.blocks, fresh.decoder = method.blocks, method.decoder
    fresh.measure(1, method.views)
    torch.testing.assert_close(method.scores[1], 0.9 * first + 0.1 * fresh.scores[1])
    assert method.measured.tolist() == [0, 2, 0, 0]


# ---- partition -----------------------------------------------------------------------------------------------------------------


def test_views_and_anchors_of_blocks() -> None:
    method = divided()
    assert method.assigned.tolist() == [[n % 4 == b for b in range(4)] for n in range(8)]
    for block, anchors in enumerate(method.blocks):
        assert isinstance(anchors, Anchors)
        seen = torch.zeros(36, dtype=torch.bool)
        for number in (block, block + 4):
            seen |= method.coarse.anchors.visible(view_of(method.views.cameras, number))
        assert torch.equal(anchors.positions, method.coarse.anchors.positions[seen])
    near = divided(content_margin=0.4)
    assert [len(a) for a in near.blocks] == [16] * 4  # type: ignore[arg-type]
    few = divided(content_margin=0.0, view_margin=3.0)
    assert bool(few.assigned.all()) and [len(a) for a in few.blocks] == [9] * 4  # type: ignore[arg-type]


def test_views_by_what_their_pictures_lose() -> None:
    method = make(assign="visible", coarse_steps=2, visibility=0.05, partition=(2, 2, 1))
    method.coarse.decoder.opacity[2].bias.data.fill_(2.0)
    method.divide()
    assert bool((method.assigned.diagonal() & method.assigned[4:].diagonal()).all())
    assert not bool(method.assigned.all())
    strict = make(assign="visible", coarse_steps=2, visibility=0.99)
    strict.divide()
    by_place = make(assign="camera")
    by_place.divide()
    assert torch.equal(strict.assigned, by_place.assigned)
    with pytest.raises(InputError, match="give coarse_steps"):
        make(assign="visible").stages(views())


def test_the_union_has_every_anchor_once() -> None:
    method = divided(content_margin=0.4)
    positions = method.merged().anchors.positions
    assert len(positions) == 36 and len(torch.unique(positions, dim=0)) == 36
    with torch.no_grad():
        for block, anchors in enumerate(method.blocks):
            anchors.features.fill_(block)
    merged = method.merged()
    assert torch.equal(merged.anchors.features[:, 0].long(), method.cells.of(merged.anchors.positions))


# ---- runs ----------------------------------------------------------------------------------------------------------------------


def test_resume_is_exact_with_anchors_that_come_and_go(tmp_path: Path) -> None:
    settings = {
        "steps": 32, "coarse_steps": 12, "grow_every": 3, "grow_from": 2, "grow_until": 100, "grow_success": 0.1, "voxel": 0.1,
        "grow_gradient": 1e-6, "min_opacity": 0.02, "schedule": "cosine", "offset_end": 0.1, "decoder_ends": (0.5, 0.2, 1.0),
    }  # fmt: skip
    seen = views()
    method = resumed_equals_uninterrupted(lambda: make(seen, **settings), seen, tmp_path, stops=(7, 13, 25))
    counts = [len(a) for a in method.blocks]  # type: ignore[arg-type]
    assert len(set(counts)) > 1 and len(method.coarse.anchors) != 36  # type: ignore[arg-type]
    assert bool((method.measured > 0).all())


@pytest.mark.slow
def test_two_processes_share_the_decoder_and_exchange_their_blocks(tmp_path: Path) -> None:
    """Both end with the same decoder, though each has trained other blocks, and with each other's blocks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["-m", "tests.methods.fields.blocks_run", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True)["after"] for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    alone = make(views(), steps=12)
    start = alone.decoder.state_dict()
    assert all(not torch.equal(first[f"decoder.{name}"], value) for name, value in start.items())
    for block in range(4):
        assert bool(first[f"blocks.{block}.features"].any())


def test_a_run_by_name(tmp_path: Path) -> None:
    settings = {**SMALL, "steps": 8, "coarse_steps": 3, "interval": 2, "lattice": 40, "voxel": 0.0, "assign": "visible"}
    run = limbeck.fit(
        "momentum-gs", task="terrain", views=6, test_views=2, view_size=12, out=tmp_path / "run", engine={"progress": False}, **settings
    )  # fmt: skip
    rows = {row["who"]: row for row in run.result["rows"]}
    assert list(rows) == ["student", "student as plain Gaussians", "coarse model"]
    assert all(0 < row["psnr"] < 60 for row in rows.values())
    artifact = limbeck.load(tmp_path / "run")
    assert artifact.kind == "anchors"
    assert torch.equal(artifact.content.anchors.positions, run.method.result.anchors.positions)
    assert len(load_ply(tmp_path / "run" / "artifact" / "gaussians.ply")) > 0


def test_a_lens_is_taken_out_of_all_pictures(tmp_path: Path) -> None:
    seen = views()
    bent = PosedImages(replace(seen.cameras, distortion=torch.tensor([[0.1, 0, 0, 0, 0.0]]).repeat(8, 1)), seen.images)
    method = make(bent, steps=4, interval=1)
    assert method.views.cameras.distortion is None and not torch.equal(method.views.images, seen.images)
    Engine(None, EngineConfig(progress=False), seed=1).run(method, method.stages(bent, bent))
    assert len(method.evaluate(bent)["rows"]) == 2
    assert method.held.shape == (8, 4)


def test_published_settings() -> None:
    config = MomentumGS.Config.make("paper")
    assert (config.interval, config.decoder_momentum, config.consistency) == (500, 0.9, 100.0)
    rates = [config.lr * r for r in config.decoder_rates]
    assert rates == pytest.approx([2e-3, 8e-3, 4e-3])
    ends = [r * e for r, e in zip(rates, config.decoder_ends, strict=True)]
    assert ends == pytest.approx([2e-5, 5e-5, 4e-3])


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="has no anchors"):
        divided(partition=(1, 1, 4), content_margin=0.0)
    with pytest.raises(InputError, match="give PosedImages"):
        MomentumGS.from_data(object(), None, None, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="consistency"):
        MomentumGS.Config.make(consistency=-1.0)
    lone = replace(views().cameras, distortion=torch.ones(8, 5))
    with pytest.raises(InputError, match="distortion cannot be drawn"):
        make(PosedImages(lone))
