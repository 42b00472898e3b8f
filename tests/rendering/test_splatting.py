from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import orbit
from limbeck.rendering.gaussians import Gaussians
from limbeck.rendering.splatting import Splat, View, project, splat, splat_cameras, splat_tensors, view_of

torch.set_num_threads(1)


def scene(count: int = 30, spread: float = 0.6, dtype: torch.dtype = torch.float64) -> Gaussians:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    sh = 0.3 * draw(count, 16, 3)
    return Gaussians(spread * draw(count, 3), -2 + 0.5 * draw(count, 3), draw(count, 4), 1 + draw(count), sh)


def camera(width: int = 21, height: int = 18, dtype: torch.dtype = torch.float64) -> View:
    turn = torch.linalg.qr(torch.tensor([[1.0, 0.2, 0.1], [-0.1, 1, 0.3], [0, -0.2, 1]], dtype=dtype)).Q
    turn = turn * torch.linalg.det(turn)
    viewmat = torch.eye(4, dtype=dtype)
    viewmat[:3, :3], viewmat[:3, 3] = turn, torch.tensor([0.1, -0.05, 2.5])
    if float((turn @ torch.tensor([0.0, 0, 1], dtype=dtype))[2]) < 0:
        viewmat[:3, :3] = torch.diag(torch.tensor([1.0, -1, -1], dtype=dtype)) @ turn
    return View(viewmat, 22.0, 24.0, width / 2 + 0.7, height / 2 - 0.4, width, height, near=0.2, far=100.0)


def one(opacity: float, colour: tuple[float, float, float], depth: float, scale: float = 0.1) -> list[torch.Tensor]:
    c0 = 0.28209479177387814
    return [
        torch.tensor([[0.0, 0, depth]], dtype=torch.float64),
        torch.full((1, 3), math.log(scale), dtype=torch.float64),
        torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64),
        torch.tensor([math.log(opacity / (1 - opacity))], dtype=torch.float64),
        (torch.tensor([[colour]], dtype=torch.float64) - 0.5) / c0,
    ]


STRAIGHT = View(torch.eye(4, dtype=torch.float64), 20.0, 20.0, 4.5, 4.5, 9, 9)
"""The centre of pixel (4, 4) is its principal point."""


def by_hand(gaussians: Gaussians, view: View, background: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The picture pixel by pixel and Gaussian by Gaussian, from the equations, in numpy."""
    with torch.no_grad():
        mu, cov = gaussians.means.numpy(), gaussians.covariances().numpy()
        o, c = gaussians.opacities.numpy(), gaussians.colours(view.centre).numpy()
    w = view.viewmat.numpy()
    r, t = w[:3, :3], w[:3, 3]
    camera_space = mu @ r.T + t
    rgb, alpha_map = np.zeros((view.height, view.width, 3)), np.zeros((view.height, view.width))
    depth = np.zeros((view.height, view.width))
    order = [k for k in np.argsort(camera_space[:, 2], kind="stable") if view.near < camera_space[k, 2] < view.far]
    flat = {}
    for k in order:
        x, y, z = camera_space[k]
        u = np.array([view.fx * x / z + view.cx, view.fy * y / z + view.cy])
        wide, tall = 0.15 * view.width / view.fx, 0.15 * view.height / view.fy
        hx = np.clip(x / z, -view.cx / view.fx - wide, (view.width - view.cx) / view.fx + wide)
        hy = np.clip(y / z, -view.cy / view.fy - tall, (view.height - view.cy) / view.fy + tall)
        jac = np.array([[view.fx / z, 0, -view.fx * hx / z], [0, view.fy / z, -view.fy * hy / z]])
        flat[k] = u, np.linalg.inv(jac @ r @ cov[k] @ r.T @ jac.T + 0.3 * np.eye(2))
    for j in range(view.height):
        for i in range(view.width):
            left = 1.0
            for k in order:
                d = np.array([i + 0.5, j + 0.5]) - flat[k][0]
                a = min(0.99, o[k] * np.exp(-0.5 * d @ flat[k][1] @ d))
                if a < 1 / 255:
                    continue
                rgb[j, i] += left * a * c[k]
                depth[j, i] += left * a * camera_space[k, 2]
                left *= 1 - a
            rgb[j, i] += left * background
            alpha_map[j, i] = 1 - left
    return rgb, alpha_map, depth


@pytest.mark.parametrize("spread", [0.6, 3.0])  # all in front, or many outside, beside and behind
@pytest.mark.parametrize(("tile", "budget"), [(8, 4_000_000), (4, 2000), (16, 1)])
def test_the_image_equals_the_plain_loop(spread: float, tile: int, budget: int):
    gaussians, view = scene(40, spread), camera()
    background = torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64)
    found = splat(gaussians, view, background, tile=tile, budget=budget)
    rgb, alpha, depth = by_hand(gaussians, view, background.numpy())
    assert alpha.max() > 0.5
    np.testing.assert_allclose(found.rgb.detach().numpy(), rgb, atol=1e-9)
    np.testing.assert_allclose(found.alpha.detach().numpy(), alpha, atol=1e-9)
    np.testing.assert_allclose(found.depth.detach().numpy(), depth, atol=1e-9)


@pytest.mark.parametrize("budget", [4_000_000, 1500])
def test_gradients_by_finite_differences(budget: int):
    gaussians, view = scene(12), camera()
    weights = torch.randn(view.height, view.width, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        found = splat(gaussians, view, 0.3, budget=budget)
        return (torch.cat([found.rgb, found.alpha[..., None], found.depth[..., None]], -1) * weights).sum()

    value = loss()
    value.backward()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in gaussians.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name
        for _ in range(3):
            step = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            with torch.no_grad():
                parameter += 1e-6 * step
                above = loss()
                parameter -= 2e-6 * step
                below = loss()
                parameter += 1e-6 * step
            slope = float((above - below) / 2e-6)
            assert slope == pytest.approx(float((parameter.grad * step).sum()), rel=1e-4, abs=1e-5), name


def test_the_centres_keep_their_gradient():
    gaussians, view = scene(12), camera()
    found = splat(gaussians, view)
    found.rgb.sum().backward()
    grad = found.means2d.grad
    assert grad is not None and grad.shape == (12, 2)
    assert bool((grad[found.radii == 0] == 0).all()) and float(grad.abs().max()) > 0


def test_one_gaussian_by_hand():
    found = splat(Gaussians(*one(0.6, (0.9, 0.1, 0.3), 2.0)), STRAIGHT, 1.0)
    assert float(found.alpha[4, 4]) == pytest.approx(0.6)
    torch.testing.assert_close(
        found.rgb[4, 4], 0.6 * torch.tensor([0.9, 0.1, 0.3]).double() + 0.4, rtol=1e-6, atol=1e-6
    )
    variance = (20 * 0.1 / 2) ** 2 + 0.3
    assert float(found.alpha[4, 6]) == pytest.approx(0.6 * math.exp(-0.5 * 4 / variance))
    assert float(found.depth[4, 4]) == pytest.approx(1.2) and float(found.expected_depth[4, 4]) == pytest.approx(2.0)
    assert float(found.radii[0]) == pytest.approx(math.sqrt(2 * math.log(0.6 * 255) * variance), rel=2e-3)
    assert float(found.means2d[0, 0]) == pytest.approx(4.5)
    assert float(splat(Gaussians(*one(0.9999, (1, 1, 1), 2.0)), STRAIGHT).alpha[4, 4]) == pytest.approx(0.99)


@pytest.mark.parametrize("swap", [False, True])
def test_front_to_back_whatever_the_order_stored(swap: bool):
    near, far = one(0.7, (1, 0, 0), 2.0), one(0.8, (0, 1, 0), 3.0)
    pairs = [(b, a) if swap else (a, b) for a, b in zip(near, far, strict=True)]
    found = splat(Gaussians(*(torch.cat(p) for p in pairs)), STRAIGHT, torch.tensor([0.0, 0, 1]).double())
    torch.testing.assert_close(
        found.rgb[4, 4], torch.tensor([0.7, 0.3 * 0.8, 0.3 * 0.2]).double(), rtol=1e-6, atol=1e-6
    )


def test_what_is_not_drawn():
    """Behind the camera, before near, beyond far, beside the image, too faint: the background, and gradients that are finite."""
    parts = [one(0.5, (1, 1, 1), z) for z in (-2.0, 0.0, 0.005, 500.0, 2.0, 2.0)]
    parts[4][0][0, 0], parts[5][3][0] = 9.0, -9.0
    gaussians = Gaussians(*(torch.cat(p) for p in zip(*parts, strict=True)))
    found = splat(gaussians, replace(STRAIGHT, far=100.0), 0.25)
    assert float(found.radii.abs().max()) == 0 and bool((found.rgb == 0.25).all()) and float(found.alpha.max()) == 0
    kept = torch.cat([p.detach() for p in (gaussians.means, gaussians.means.new_tensor([[0.0, 0, 2]]))])
    more = Gaussians(
        kept, *(torch.cat(p) for p in zip(*[q[1:] for q in (*parts, one(0.5, (1, 0, 0), 2.0))], strict=True))
    )
    splat(more, STRAIGHT).rgb.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in more.parameters() if p.grad is not None and p.numel())


def test_features_are_blended_like_colours():
    gaussians, view = scene(20), camera()
    colours = gaussians.colours(view.centre)
    found = splat(gaussians, view, 0.0, features=torch.cat([colours, torch.ones(20, 1)], 1))
    assert found.features is not None
    torch.testing.assert_close(found.features[..., :3], found.rgb)
    torch.testing.assert_close(found.features[..., 3], found.alpha)


def test_a_picture_can_be_fitted():
    target_scene, view = scene(15, dtype=torch.float32), camera(dtype=torch.float32)
    target = splat(target_scene, view).rgb.detach()
    fitted = Gaussians.from_points(
        target_scene.means + 0.05 * torch.randn(15, 3, generator=torch.Generator().manual_seed(0))
    )
    optimizer = torch.optim.Adam(fitted.parameters(), 0.03)
    losses = []
    for _ in range(60):
        loss = (splat(fitted, view).rgb - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_cameras_with_opengl_axes():
    """At (0, -4, 0) and looking along +y with z up, what is higher lands in an upper row, what has larger x further right."""
    c2w = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, -4], [0, 1, 0, 0], [0, 0, 0, 1]])[None].repeat(2, 1, 1)
    size = torch.full((2,), 20.0)
    many = SimpleNamespace(c2w=c2w, fx=size, fy=size, cx=size / 2, cy=size / 2, width=20, height=20, near=0.1, far=50.0)
    view = view_of(many, 1)
    torch.testing.assert_close(view.centre, torch.tensor([0.0, -4, 0]))
    point = torch.tensor([[0.4, 0, 1.0]])
    ones = torch.ones(1)
    found = project(point, torch.ones(1, 4), 0.1 * torch.ones(1, 3), ones, view)
    torch.testing.assert_close(found.means2d[0], torch.tensor([10 + 20 * 0.4 / 4, 10 - 20 * 1.0 / 4]))
    assert float(found.depths[0]) == pytest.approx(4.0)
    with pytest.raises(InputError, match="say which with index="):
        view_of(many)
    with pytest.raises(InputError, match="no camera 2 among 2"):
        view_of(many, 2)
    many.distortion = torch.tensor([0.1, 0, 0, 0, 0])
    with pytest.raises(InputError, match="undistort"):
        view_of(many, 0)


def test_real_cameras_agree_with_their_own_projection():
    """Depths and places by ``Cameras.project`` (OpenGL poses) and by the view that splatting draws."""
    cameras = orbit([20.0, 150.0, -80.0], [10.0, -20.0, 60.0], 2.5, 40.0, 30, 22, near=0.1, far=9.0)
    points = 0.3 * torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    place, depth = cameras.project(points)
    for index in range(3):
        view = view_of(cameras, index)
        found = project(points, torch.ones(7, 4), 0.1 * torch.ones(7, 3), torch.ones(7), view)
        torch.testing.assert_close(found.means2d, place[index], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.depths, depth[index])
        torch.testing.assert_close(view.centre, cameras.positions[index])
        assert (view.width, view.height) == (30, 22) and (view.near, view.far) == pytest.approx((0.1, 9.0))


def test_several_cameras_at_once():
    gaussians = scene(6, dtype=torch.float32)
    cameras = orbit([20.0, 150.0, -80.0], 10.0, 2.5, 40.0, 10, 8)
    extra = torch.rand(6, 2)
    found = splat_cameras(gaussians, cameras, [2, 0], 0.3, features=extra)
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        "rgb": (2, 8, 10, 3), "opacity": (2, 8, 10), "depth": (2, 8, 10), "features": (2, 8, 10, 2)
    }  # fmt: skip
    torch.testing.assert_close(found["rgb"][0], splat(gaussians, cameras, 0.3, index=2).rgb)
    assert len(splat_cameras(gaussians, cameras)["rgb"]) == 3 and "features" not in splat_cameras(gaussians, cameras)
    with pytest.raises(InputError, match="no camera was chosen"):
        splat_cameras(gaussians, cameras, [])


def test_activated_tensors_give_the_same_picture_and_none_give_the_background():
    gaussians, view = scene(9), camera()
    colours = gaussians.colours(view.centre)
    parts = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities)
    torch.testing.assert_close(splat_tensors(*parts, colours, view, 0.2).rgb, splat(gaussians, view, 0.2).rgb)
    nothing = splat_tensors(*(value[:0] for value in parts), colours[:0], view, 0.2)
    assert nothing.features is None and bool((nothing.rgb == 0.2).all()) and not bool(nothing.alpha.any())
    with pytest.raises(InputError, match="scales of 9 Gaussians must be"):
        splat_tensors(parts[0], parts[1], parts[2][:3], parts[3], colours, view)
    with pytest.raises(InputError, match="channels of the Gaussians contain NaN"):
        splat_tensors(*parts, colours * float("nan"), view)


def test_gsplat_gets_activated_parameters(monkeypatch: pytest.MonkeyPatch):
    """A stand-in with gsplat's signature that draws by our own code: the picture must be the same."""
    gaussians, view = scene(10), camera()

    def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options):
        k = Ks[0].tolist()
        seen = View(
            viewmats[0], k[0][0], k[1][1], k[0][2], k[1][2], width, height, options["near_plane"], options["far_plane"]
        )
        again = Gaussians(means, scales.log(), quats, torch.logit(opacities), torch.zeros(len(means), 1, 3).double())
        drawn: Splat = splat(again, seen, features=colors, backend="torch")
        assert drawn.features is not None and options["render_mode"] == "RGB+D"
        image = torch.cat([drawn.features, drawn.depth[..., None]], -1)
        radii = drawn.radii[None, :, None].expand(1, -1, 2).int()
        return image[None], drawn.alpha[None, ..., None], {"means2d": drawn.means2d[None], "radii": radii}

    monkeypatch.setitem(sys.modules, "gsplat", SimpleNamespace(rasterization=rasterization))
    ours, theirs = splat(gaussians, view, 0.7), splat(gaussians, view, 0.7, backend="gsplat")
    for name in ("rgb", "alpha", "depth"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name))
    assert theirs.radii.shape == ours.radii.shape
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(InputError, match="pip install gsplat"):
        splat(gaussians, view, backend="gsplat")


def test_bad_input_is_named():
    gaussians, view = scene(3), camera()
    for wrong, message in (
        ({"viewmat": 2 * view.viewmat}, "no rotation"),
        ({"viewmat": torch.diag(torch.tensor([1.0, 1, -1, 1]))}, "no rotation"),
        ({"viewmat": torch.eye(3)}, r"\(4, 4\)"),
        ({"viewmat": view.viewmat * float("nan")}, "NaN"),
        ({"near": 0.0}, "0 < near < far"),
        ({"fx": 0.0}, "focal lengths above 0"),
    ):
        with pytest.raises(InputError, match=message):
            replace(view, **wrong)
    with pytest.raises(InputError, match="a background is"):
        splat(gaussians, view, torch.zeros(4))
    with pytest.raises(InputError, match="features must be"):
        splat(gaussians, view, features=torch.zeros(2, 3))
    with pytest.raises(InputError, match="a backend of splatting"):
        splat(gaussians, view, backend="cuda")
    gaussians.log_scales.data[1, 2] = float("nan")
    with pytest.raises(InputError, match="log_scales of the Gaussians contain NaN"):
        splat(gaussians, view)
