from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import (
    Cameras,
    RandomOrbit,
    check_poses,
    focal_from_fov,
    from_colmap,
    from_ngp,
    from_opencv,
    look_at,
    normalised,
    orbit,
    to_ngp,
    to_opencv,
)

torch.set_num_threads(1)


def random_poses(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, 3, 3, generator=g, dtype=torch.float64))
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[:, None]
    q = q * torch.linalg.det(q).sign()[:, None, None] ** torch.tensor([0, 0, 1.0], dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    pose[:, :3, :3], pose[:, :3, 3] = q, torch.randn(n, 3, generator=g, dtype=torch.float64)
    return pose


def lens_cameras(n: int = 3, lens: bool = True) -> Cameras:
    k = torch.tensor([0.06, -0.08, 0.01, -0.001, 0.002], dtype=torch.float64).expand(n, 5) if lens else None
    number = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    return Cameras(random_poses(n), number(50.0), number(55.0), number(30.5), number(21.0), 64, 48, distortion=k)


def test_orbit_by_hand():
    """From +X at no elevation: right is +Y, up is +Z, backwards is +X."""
    camera = orbit([0.0, 90.0], 0.0, 2.0, 90.0, 8, 8)
    expected = torch.tensor([[0.0, 0, 1, 2], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(camera.c2w[0], expected)
    torch.testing.assert_close(camera.positions[1], torch.tensor([0.0, 2.0, 0.0]), atol=1e-6, rtol=0)
    assert float(camera.fy[0]) == pytest.approx(4.0)
    up = orbit([30.0], 40.0, 3.0)
    e, a = math.radians(40), math.radians(30)
    hand = 3 * np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    np.testing.assert_allclose(up.positions[0].numpy(), hand, rtol=1e-6)
    torch.testing.assert_close(-up.c2w[0, :3, 2] * 3, -up.positions[0])


def test_central_and_corner_rays():
    camera = orbit([0.0], 0.0, 2.0, 90.0, 2, 2)
    o, d = camera.rays(0)
    torch.testing.assert_close(o, torch.tensor([2.0, 0, 0]).expand(4, 3), atol=1e-6, rtol=0)
    # pixel (0, 0): left is -Y and top is +Z, half a pixel from the centre of a focal length of 1
    corner = torch.tensor([-1.0, -0.5, 0.5]) / math.sqrt(1.5)
    torch.testing.assert_close(d[0], corner)
    torch.testing.assert_close(d[1], corner * torch.tensor([1.0, -1, 1]))
    torch.testing.assert_close(d[2], corner * torch.tensor([1.0, 1, -1]))
    torch.testing.assert_close(d.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize("lens", [False, True])
def test_a_projected_point_lies_on_the_ray_of_its_pixel(lens: bool):
    cameras = lens_cameras(lens=lens)
    pixels = torch.rand(60, 2, dtype=torch.float64) * torch.tensor([64.0, 48.0]) - 0.5
    ids = torch.arange(60) % 3
    o, d = cameras.rays(ids, pixels)
    points = o + d * (1 + torch.rand(60, 1, dtype=torch.float64))
    uv, depth = cameras.project(points)
    own = uv[ids, torch.arange(60)]
    torch.testing.assert_close(own, pixels + 0.5, atol=1e-6, rtol=0)
    assert bool((depth[ids, torch.arange(60)] > 0).all())
    if not lens:  # and by the textbook: K [R|t] x
        homogeneous = torch.cat([points, torch.ones(60, 1, dtype=torch.float64)], 1)
        flip = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
        view = torch.linalg.inv(cameras.c2w @ flip)
        local = (cameras.intrinsics @ view[:, :3])[ids] @ homogeneous[..., None]
        torch.testing.assert_close(local[:, :2, 0] / local[:, 2:, 0], own, atol=1e-9, rtol=0)


def test_opencv_colmap_and_ngp_round_trips():
    poses = random_poses(5)
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
    torch.testing.assert_close(to_opencv(poses), torch.linalg.inv(poses @ flip))
    torch.testing.assert_close(from_opencv(to_opencv(poses)), poses)
    torch.testing.assert_close(from_ngp(to_ngp(poses, 0.8, 0.5), 0.8, 0.5), poses)
    hand = to_ngp(poses, 2.0)[0]
    torch.testing.assert_close(hand[0], poses[0, 1] * torch.tensor([1.0, -1, -1, 2], dtype=torch.float64))
    torch.testing.assert_close(hand[2], poses[0, 0] * torch.tensor([1.0, -1, -1, 2], dtype=torch.float64))
    # COLMAP: the identity quaternion at z = 2 looks along world +z from (0, 0, -2), its picture's down being world +y
    pose = from_colmap(torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 0, 2]))
    torch.testing.assert_close(pose[:3, 3], torch.tensor([0.0, 0, -2]))
    torch.testing.assert_close(pose[:3, :3], torch.diag(torch.tensor([1.0, -1, -1])))
    # a quarter turn about z takes x to y
    half = math.sqrt(0.5)
    turned = to_opencv(from_colmap(torch.tensor([half, 0, 0, half]), torch.zeros(3)))[:3, :3]
    torch.testing.assert_close(turned @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)


def test_random_orbit_keeps_its_ranges_and_strata():
    draw = RandomOrbit(elevation=(-10, 45), jitter_position=0.0, jitter_centre=0.0, jitter_up=0.0)
    found = draw.sample(400, torch.Generator().manual_seed(0))
    assert found.azimuth is not None and found.elevation is not None and found.radius is not None
    width = 360 / 400
    assert torch.equal(((found.azimuth + 180) / width).floor().long(), torch.arange(400))
    assert -10 <= float(found.elevation.min()) < -5 and 40 < float(found.elevation.max()) <= 45
    assert float(found.radius.min()) >= 1 and float(found.radius.max()) <= 1.5
    low, high = (float(focal_from_fov(a, 64)) for a in (70, 40))
    assert low <= float(found.fy.min()) and float(found.fy.max()) <= high
    torch.testing.assert_close(found.positions.norm(dim=-1), found.radius)
    again = draw.sample(400, torch.Generator().manual_seed(0))
    assert torch.equal(again.c2w, found.c2w)


def test_random_elevations_mix_two_laws():
    draw = RandomOrbit(elevation=(0.0, 89.0), jitter_position=0.0)
    elevation = draw.sample(20000, torch.Generator().manual_seed(1)).elevation
    assert elevation is not None
    by_sine = math.sin(math.radians(30)) / math.sin(math.radians(89))
    expected = 0.5 * (30 / 89) + 0.5 * by_sine
    assert float((elevation < 30).float().mean()) == pytest.approx(expected, abs=0.01)


def test_random_orbit_opens_from_the_evaluation_pose():
    draw = RandomOrbit(open_steps=9, jitter_position=0.0, jitter_centre=0.0, jitter_up=0.0)
    start = draw.sample(3, step=0)
    torch.testing.assert_close(start.c2w, orbit([0.0] * 3, 15.0, 1.5).c2w)
    half = draw.sample(500, torch.Generator().manual_seed(0), step=5)
    assert half.azimuth is not None and half.elevation is not None
    assert 85 < float(half.azimuth.max()) <= 90 and 2.5 <= float(half.elevation.min()) < 5
    wide = draw.sample(500, torch.Generator().manual_seed(0), step=10).azimuth
    assert wide is not None and float(wide.max()) > 170


def test_jitters_move_the_camera_but_not_its_record():
    draw = RandomOrbit(radius=(1.5, 1.5), jitter_position=0.1, jitter_centre=0.0, jitter_up=0.0)
    found = draw.sample(100, torch.Generator().manual_seed(0))
    assert found.radius is not None and float((found.radius - 1.5).abs().max()) == 0
    off = found.positions.norm(dim=-1) - 1.5
    assert float(off.abs().max()) > 0.05 and float(off.abs().max()) < 0.1 * math.sqrt(3) + 1e-6


def test_selection_resizing_and_dtype():
    cameras = lens_cameras()
    one = cameras[1]
    assert len(one) == 1 and torch.equal(one.c2w[0], cameras.c2w[1])
    assert len(cameras[torch.tensor([True, False, True])]) == 2
    half = cameras.resized(32, 24)
    uv, _ = cameras.project(torch.zeros(1, 3, dtype=torch.float64))
    small, _ = half.project(torch.zeros(1, 3, dtype=torch.float64))
    torch.testing.assert_close(small * 2, uv)
    assert cameras.to(torch.float32).fx.dtype == torch.float32


def test_normalised_scenes_keep_the_pictures():
    cameras = orbit([0.0, 80, 200], 20.0, 3.0)
    shift = torch.eye(4).repeat(3, 1, 1)
    shift[:, :3, 3] = torch.tensor([5.0, -2, 1])
    moved = Cameras(shift @ cameras.c2w, cameras.fx, cameras.fy, cameras.cx, cameras.cy, 64, 64)
    unit, transform = normalised(moved, 1.0)
    torch.testing.assert_close(unit.positions, cameras.positions / 3, atol=1e-5, rtol=0)
    points = torch.tensor([[5.1, -2.2, 1.3], [5.0, -2, 1]])
    inside = points @ transform[:3, :3].T + transform[:3, 3]
    torch.testing.assert_close(inside[1], torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(unit.project(inside)[0], moved.project(points)[0], atol=1e-3, rtol=0)
    same = Cameras(
        cameras.c2w[:1].repeat(2, 1, 1), torch.tensor(9.0), torch.tensor(9.0), *[torch.tensor(4.0)] * 2, 8, 8
    )
    with pytest.raises(InputError, match="parallel"):
        normalised(same)


def test_bad_poses_are_named():
    good = random_poses(3).float()

    def broken(i: int, change: Tensor) -> Tensor:
        bad = good.clone()
        bad[i] = change
        return bad

    for bad, words in (
        (broken(1, good[1] * torch.tensor([2.0, 2, 2, 1])), "pose 1 is no rotation"),
        (broken(2, good[2] * torch.tensor([1.0, 1, -1, 1])), "pose 2 is a mirror image"),
        (broken(0, good[0].T), "pose 0 does not end with the row"),
        (broken(1, good[1] * float("nan")), "pose 1 has entries that are not finite"),
        (good[:, :3], "camera-to-world matrices"),
    ):
        with pytest.raises(InputError, match=words):
            Cameras(bad, *[torch.tensor(8.0)] * 4, 16, 16)
    with pytest.raises(InputError, match=r"the pose of b.png is no rotation"):
        check_poses(broken(1, good[1] * torch.tensor([2.0, 2, 2, 1])), ["a.png", "b.png", "c.png"])
    check_poses(
        good + 1e-5 * torch.tensor([1.0, 1, 1, 0])[:, None] * torch.randn(4)
    )  # a file's few digits are no error


def test_bad_cameras_are_named():
    pose, four = random_poses(2).float(), [torch.tensor(8.0)] * 4
    with pytest.raises(InputError, match="near < far"):
        Cameras(pose, *four, 16, 16, near=2.0, far=1.0)
    with pytest.raises(InputError, match="focal lengths"):
        Cameras(pose, torch.tensor(0.0), *four[1:], 16, 16)
    with pytest.raises(InputError, match=r"distortion of 2 cameras is \(2, 5\)"):
        Cameras(pose, *four, 16, 16, distortion=torch.zeros(2, 4))
    with pytest.raises(InputError, match="1 pixel or more"):
        Cameras(pose, *four, 0, 16)
    with pytest.raises(InputError, match="number is below 2"):
        Cameras(pose, *four, 16, 16).rays(2)
    with pytest.raises(InputError, match="inside the near plane"):
        orbit([0.0], 0.0, 0.04)
    with pytest.raises(InputError, match="inside the near plane"):
        RandomOrbit(radius=(0.2, 1.0))
    with pytest.raises(InputError, match="leaves its roll open"):
        look_at(torch.tensor([[0.0, 0, 2]]), torch.zeros(3))
    with pytest.raises(InputError, match="should look at"):
        look_at(torch.zeros(1, 3), torch.zeros(3))
    with pytest.raises(InputError, match="field of view"):
        focal_from_fov(180.0, 8)


def test_a_box_within_the_near_plane_is_named():
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    orbit([0.0, 90.0], 0.0, 3.0).check_sees(box)
    orbit([0.0], 0.0, 0.5, near=0.1).check_sees(box)  # a camera within the box is fine
    orbit([0.0, 90.0], 0.0, torch.tensor([8.0, 6.0]), near=5.0).check_sees(box / 10)
    with pytest.raises(InputError, match=r"camera 1 is inside the near plane"):
        orbit([0.0, 90.0], 0.0, torch.tensor([8.0, 5.5]), near=5.4).check_sees(box / 100 + torch.tensor([0.0, 0.5, 0]))
    with pytest.raises(InputError, match="raise far"):
        orbit([0.0], 0.0, 8.0, far=5.0).check_sees(box)
