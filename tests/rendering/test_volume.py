from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.rendering import nerfacc_backend, volume
from limbeck.rendering.cameras import orbit
from limbeck.rendering.fields import FAMILIES, build_field
from limbeck.rendering.nerfacc_backend import use_nerfacc
from limbeck.rendering.rays import Rays
from limbeck.rendering.volume import OccupancyGrid, composite, packed_weights, render_image, render_rays, weights_of

torch.set_num_threads(1)


class Fog(nn.Module):
    """Density falling off a ball; colour by position."""

    def __init__(self, sigma: float = 3.0, radius: float | None = None) -> None:
        super().__init__()
        self.sigma = nn.Parameter(torch.tensor(sigma))
        self.radius = radius
        self.register_buffer("aabb", torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))

    def density(self, x: Tensor) -> dict[str, Tensor]:
        full = self.sigma.expand(len(x))
        if self.radius is not None:
            full = full * torch.sigmoid(40 * (self.radius - x.norm(dim=-1)))
        return {"sigma": full}

    def forward(self, x: Tensor, d: Tensor) -> dict[str, Tensor]:
        ids = (x[:, :1] > 0).float()
        return {**self.density(x), "rgb": 0.5 + 0.4 * torch.sin(3 * x), "feature": None, "ids": ids, "side": ids[:, 0]}


def across() -> Rays:
    return Rays(torch.tensor([[-3.0, 0, 0], [-3, 5, 0]]), torch.tensor([[1.0, 0, 0], [1, 0, 0]]))


def test_the_rule_against_a_loop():
    g = torch.Generator().manual_seed(0)
    sigma, delta, rgb, t, n = (
        torch.rand(s, generator=g, dtype=torch.float64) for s in ((4, 6), (4, 6), (4, 6, 3), (4, 6), (4, 6, 3))
    )
    t, bg = t.sort(-1).values, torch.rand(4, 3, dtype=torch.float64)
    found = composite(5 * sigma, rgb, t, delta, bg, n)
    for r in range(4):
        left, colour, depth, normal, ws = 1.0, np.zeros(3), 0.0, np.zeros(3), []
        for i in range(6):
            alpha = 1 - math.exp(-5 * float(sigma[r, i] * delta[r, i]))
            ws.append(left * alpha)
            colour, depth = colour + ws[-1] * rgb[r, i].numpy(), depth + ws[-1] * float(t[r, i])
            normal, left = normal + ws[-1] * n[r, i].numpy(), left * (1 - alpha)
        opacity = sum(ws)
        variance = sum(w / opacity * (float(t[r, i]) - depth / opacity) ** 2 for i, w in enumerate(ws))
        np.testing.assert_allclose(found["rgb"][r].numpy(), colour + (1 - opacity) * bg[r].numpy(), atol=1e-8)
        np.testing.assert_allclose(found["normal"][r].numpy(), normal, atol=1e-8)
        assert float(found["depth"][r]) == pytest.approx(depth, abs=1e-8)
        assert float(found["z_variance"][r]) == pytest.approx(variance if opacity > 0.5 else 0.0, abs=1e-8)


def test_weights_and_packing():
    sigma, delta = torch.rand(50, 8) * 20, torch.rand(50, 8)
    weights, left = weights_of(sigma, delta)
    torch.testing.assert_close(weights.sum(-1) + left, torch.ones(50), atol=1e-5, rtol=0)
    keep = torch.rand(50, 8) > 0.5
    dense, _ = weights_of(sigma * keep, delta)
    packed = packed_weights(sigma[keep], delta[keep], keep.nonzero()[:, 0])
    torch.testing.assert_close(packed, dense[keep], atol=1e-6, rtol=1e-4)
    assert packed_weights(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    a = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    b = torch.rand(2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: weights_of(s, b), (a,))


def test_a_slab_of_fog():
    """Opacity 1 - exp(-sigma L); the colour of a ray that misses is the background."""
    found = render_rays(Fog(0.7), across(), samples=64, background=(0.1, 0.2, 0.3))
    assert float(found["opacity"][0].detach()) == pytest.approx(1 - math.exp(-1.4), abs=1e-4)
    assert float(found["opacity"][1]) == 0
    torch.testing.assert_close(found["rgb"][1], torch.tensor([0.1, 0.2, 0.3]))
    assert int(found["evaluated"]) == 64
    fine = render_rays(Fog(0.7), across(), samples=16, fine=16, perturb=True)
    assert float(fine["opacity"][0]) == pytest.approx(1 - math.exp(-1.4), abs=1e-4) and fine["t"].shape == (2, 32)


def test_hierarchical_samples_sharpen_a_surface():
    """The coarse samples straddle the ball's rim; the fine ones find it."""
    ball, exact = Fog(200.0, 0.503), render_rays(Fog(200.0, 0.503), across(), samples=4000)["depth"][0]
    coarse = (render_rays(ball, across(), samples=24)["depth"][0] - exact).abs()
    fine = (render_rays(ball, across(), samples=24, fine=48)["depth"][0] - exact).abs()
    assert float(fine) < 0.5 * float(coarse)


def test_skipping_gives_the_dense_picture():
    field, camera = Fog(50.0, 0.4), orbit([20.0], 25.0, 3.0, 45.0, 24, 24)
    grid = OccupancyGrid(field.aabb, 32)
    grid.refresh(field, points=2, generator=torch.Generator().manual_seed(0))
    share = float(grid.occupied.float().mean())
    assert 0.03 < share < 0.4
    dense = render_image(field, camera, samples=64)
    skipped = render_image(field, camera, samples=64, occupancy=grid)
    bound = 1 - math.exp(-0.01 * 2 * math.sqrt(3))
    assert float((dense["rgb"] - skipped["rgb"]).abs().max()) < bound
    rays = camera.rays(0)
    few = int(render_rays(field, rays, samples=64, occupancy=grid)["evaluated"])
    assert few < 0.5 * int(render_rays(field, rays, samples=64)["evaluated"])


def test_the_grid_warms_up_and_forgets():
    field, grid = Fog(5.0, 0.4), OccupancyGrid(torch.tensor([[-1.0, -1, -1], [1, 1, 1]]), 16, warmup=32)
    assert not grid.update(field, 3)
    assert grid.update(field, 16) and bool(grid.occupied.all())
    assert grid.update(field, 32) and not bool(grid.occupied.all())
    assert bool(grid(torch.zeros(1, 3))) and not bool(grid(torch.tensor([[0.95, 0.95, 0.95]])))
    assert not bool(grid(torch.tensor([[1.5, 0.0, 0.0]])))
    old = grid.values.clone()
    with torch.no_grad():
        field.sigma.zero_()
    grid.refresh(field)
    torch.testing.assert_close(grid.values, 0.95 * old)


def test_normals_of_a_ball():
    ball = Fog(50.0, 0.4).eval()
    x = torch.nn.functional.normalize(torch.randn(50, 3), dim=-1)
    torch.testing.assert_close(volume.normals_of(ball, 0.4 * x), x, atol=1e-4, rtol=0)
    torch.testing.assert_close(volume.normals_of(ball, 0.4 * x, 1e-2), x, atol=2e-2, rtol=0)
    found = render_rays(ball, across(), samples=200, normals=True)["normal"][0]
    torch.testing.assert_close(found, torch.tensor([-1.0, 0, 0]), atol=1e-2, rtol=0)


def test_images_do_not_depend_on_chunks_and_carry_gradients():
    field, cameras = Fog(3.0, 0.5), orbit([0.0, 90.0, 200.0], 10.0, 3.0, 45.0, 7, 5)
    a, b = render_image(field, cameras, samples=16), render_image(field, cameras, samples=16, chunk=13)
    torch.testing.assert_close(a["rgb"], b["rgb"])
    assert a["rgb"].shape == (3, 5, 7, 3) and a["depth"].shape == (3, 5, 7)
    torch.testing.assert_close(render_image(field, cameras, [2], samples=16)["rgb"][0], a["rgb"][2])
    a["opacity"].sum().backward()
    assert field.sigma.grad is not None and float(field.sigma.grad) > 0
    sky = render_rays(field, across(), background=lambda d: d.abs())["rgb"][1]
    torch.testing.assert_close(sky, torch.tensor([1.0, 0, 0]))


def test_features_are_blended_with_the_weights_of_the_colours():
    """A name of what the field gives, a function of points and directions, or the field's own feature; over zeros."""
    field, cameras = Fog(3.0, 0.5), orbit([0.0, 90.0], 10.0, 3.0, 45.0, 6, 5)
    rays = cameras.rays(0)
    colours = render_rays(field, rays, samples=16, background=0.0, features=lambda x, d: field(x, d)["rgb"])
    torch.testing.assert_close(colours["features"], colours["rgb"])
    assert "features" not in render_rays(field, rays, samples=16)
    halves = render_rays(field, rays, samples=16, features="ids")
    front = (halves["weights"] * (halves["points"][..., 0] > 0)).sum(-1, keepdim=True)
    torch.testing.assert_close(halves["features"], front)
    torch.testing.assert_close(render_rays(field, rays, samples=16, features="side")["features"], front)
    picture = render_image(field, cameras, samples=16, features="ids", chunk=7)["features"]
    assert picture.shape == (2, 5, 6, 1)
    torch.testing.assert_close(picture[0].flatten(), front.flatten())
    learned = build_field("hash", {"levels": 2, "log2_size": 8, "finest": 16, "hidden": 8})
    found = render_rays(learned, rays, samples=16, features=True)
    asked = found["points"].abs().amax(-1) <= 1
    own = learned.density(found["points"][asked])["feature"]
    dense = torch.zeros(*asked.shape, 16).masked_scatter(asked[..., None], own)
    torch.testing.assert_close(found["features"], (found["weights"][..., None] * dense).sum(1))
    found["features"].sum().backward()
    assert learned.encoding.table.grad is not None and bool(learned.encoding.table.grad.any())
    for wrong, told in (
        (True, "Fog gives no 'feature' to render: it gives sigma, rgb, ids, side"),
        ("nothing", "no 'nothing'"),
        (lambda x, d: x[:3], r"the features of \d+ points must be"),
        (lambda x, d: x * float("nan"), "Fog gives NaN"),
    ):
        with pytest.raises(InputError, match=told):
            render_rays(field, rays, features=wrong)


def test_given_weights_and_backends():
    g = torch.Generator().manual_seed(0)
    sigma, delta, rgb, t = (torch.rand(s, generator=g) for s in ((4, 6), (4, 6), (4, 6, 3), (4, 6)))
    own = composite(sigma, rgb, t, delta, torch.ones(4, 3))
    given = composite(sigma, rgb, t, delta, torch.ones(4, 3), weights=weights_of(sigma, delta)[0])
    for name, value in own.items():
        torch.testing.assert_close(given[name], value)
    field = Fog(3.0, 0.5)
    for backend in ("auto", "torch"):
        assert render_rays(field, across(), backend=backend)["rgb"].equal(render_rays(field, across())["rgb"])
    assert not use_nerfacc("auto", torch.device("cpu"))
    with pytest.raises(InputError, match="auto, torch or nerfacc, not 'cuda'"):
        render_rays(field, across(), backend="cuda")


def test_nerfacc_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nerfacc", None)
    nerfacc_backend._obstacle.cache_clear()
    with pytest.raises(
        InputError, match="backend='nerfacc' needs nerfacc: pip install nerfacc, or use backend='torch'"
    ):
        render_rays(Fog(), across(), backend="nerfacc")
    nerfacc_backend._obstacle.cache_clear()


def test_nerfacc_follows_the_same_rule():
    """Its own batched form on any machine; its packed kernels where there is a GPU."""
    nerfacc = pytest.importorskip("nerfacc")
    sigma, delta = torch.rand(50, 8) * 20, torch.rand(50, 8)
    theirs, _, _ = nerfacc.render_weight_from_density(torch.zeros_like(delta), delta, sigma)
    torch.testing.assert_close(weights_of(sigma, delta)[0], theirs, atol=1e-5, rtol=0)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="needs rays on a GPU"):
            render_rays(Fog(), across(), backend="nerfacc")
        return
    field, rays = Fog(30.0, 0.5).cuda(), Rays(*(part.cuda() for part in orbit([20.0], 25.0, 3.0, 45.0, 24, 24).rays(0)))
    grid = OccupancyGrid(field.aabb, 32).cuda()
    grid.refresh(field)
    both = {}
    for backend in ("torch", "nerfacc"):
        found = render_rays(field, rays, occupancy=grid, backend=backend)
        (slope,) = torch.autograd.grad(found["rgb"].sum(), field.sigma)
        both[backend] = (found["rgb"], found["depth"], found["weights"], slope)
    for ours, kernels in zip(both["torch"], both["nerfacc"], strict=True):
        torch.testing.assert_close(kernels, ours, atol=1e-3, rtol=1e-3)


def test_regularisers_by_hand():
    o = torch.tensor([0.0, 0.5, 1.0])
    assert float(volume.sparsity(o)) == pytest.approx((0.1 + math.sqrt(0.26) + math.sqrt(1.01)) / 3)
    edge = -(0.001 * math.log(0.001) + 0.999 * math.log(0.999))
    assert float(volume.opaqueness(o)) == pytest.approx((2 * edge + math.log(2)) / 3, rel=1e-4)
    assert float(volume.alpha_entropy(torch.tensor([0.5]))) == pytest.approx(1.0)
    n = torch.tensor([[[1.0, 0, 0], [-1, 0, 0]]])
    assert float(volume.orientation(torch.tensor([[0.3, 0.7]]), n, torch.tensor([[1.0, 0, 0]]))) == pytest.approx(0.3)
    ramp = torch.arange(4.0).expand(1, 3, 3, 4)
    assert float(volume.total_variation(ramp)) == pytest.approx(1.0)
    w, e = torch.rand(3, 6, dtype=torch.float64), torch.rand(3, 7, dtype=torch.float64).cumsum(-1)
    m = (e[:, 1:] + e[:, :-1]) / 2
    direct = (w[:, :, None] * w[:, None] * (m[:, :, None] - m[:, None]).abs()).sum((1, 2)) + (w**2 * e.diff()).sum(
        1
    ) / 3
    torch.testing.assert_close(volume.distortion(w, e), direct.mean())


def test_bad_input_is_named():
    with pytest.raises(InputError, match="Fog gives NaN"):
        render_rays(Fog(float("nan")), across())
    with pytest.raises(InputError, match="inside the near plane"):
        render_image(Fog(), replace(orbit([0.0], 0.0, 2.0, width=4, height=4), near=9.0))
    with pytest.raises(InputError, match="a background is"):
        render_rays(Fog(), across(), background=torch.zeros(5))
    with pytest.raises(InputError, match="occupancy grid"):
        OccupancyGrid(torch.zeros(2, 3), 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_rendering_a_damaged_field_says_so_in_one_line(family: str, training: bool):
    field = build_field(family).train(training)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.fill_(torch.nan)
    named = f"{type(field).__name__} gives NaN or infinity" if training else "weight '.*' has .* values that are NaN"
    for call in (
        lambda: render_rays(field, across()),
        lambda: render_image(field, orbit([0.0], 0.0, 3.0, width=4, height=4)),
    ):
        with pytest.raises(InputError, match=named) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="NaN"):
        OccupancyGrid(field.aabb, 4).refresh(field)
