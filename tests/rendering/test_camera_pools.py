from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.camera_pools import BandedOrbit, FittedOrbit, camera_pool
from limbeck.rendering.cameras import Cameras, orbit

torch.set_num_threads(1)
BOX = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])


def real(width: int = 20, height: int = 10) -> Cameras:
    return orbit(torch.arange(0, 360, 30.0), torch.linspace(0, 55, 12), torch.linspace(2, 3, 12), 40.0, width, height)


def looks_at(cameras: Cameras, centre: torch.Tensor) -> bool:
    to_centre = torch.nn.functional.normalize(centre - cameras.positions, dim=-1)
    return bool(((-cameras.c2w[:, :3, 2] * to_centre).sum(-1) > 1 - 1e-5).all())


def test_an_epoch_of_the_published_orbit():
    """int((90 - a) / 15) + 1 poses within (a - 5, a) for a = 0 .. 79, radius 4 times 0.8."""
    pool = camera_pool("orbit", BOX, real())
    assert isinstance(pool, BandedOrbit)
    wanted = [a for a in range(80) for _ in range(int((90 - a) / 15) + 1)]
    assert pool.tops().tolist() == wanted and len(wanted) == 311
    cameras = pool.epoch(0)
    assert len(cameras) == 311 and looks_at(cameras, torch.zeros(3))
    torch.testing.assert_close(cameras.positions.norm(dim=1), torch.full((311,), 3.2))
    found = torch.rad2deg(torch.asin(cameras.positions[:, 2] / 3.2))
    assert cameras.elevation is not None
    torch.testing.assert_close(found, cameras.elevation, atol=1e-3, rtol=0)
    ordered = found.sort().values  # every band has its own pose: sorted, they are within a band of the sorted tops
    assert bool((ordered <= torch.tensor(wanted) + 1e-3).all())
    assert bool((ordered >= torch.tensor(wanted) - 5 - 1e-3).all())
    assert float((found < 20).float().mean()) > 0.35  # more of them low


def test_another_number_keeps_the_shares_of_bands():
    cameras = camera_pool("orbit", BOX, real(), count=48).epoch(3)
    assert len(cameras) == 48
    assert float(cameras.elevation.median()) == pytest.approx(23, abs=6)


def test_outdoor_orbits_are_low_and_scale_with_the_box():
    cameras = camera_pool("outdoor", 2 * BOX + torch.tensor([1.0, 0, 0]), count=200).epoch(0)
    away = cameras.positions - torch.tensor([1.0, 0, 0])
    assert float(away.norm(dim=1).min()) >= 6 - 1e-4 and float(away.norm(dim=1).max()) <= 8 + 1e-4
    assert float(cameras.elevation.min()) >= 0 and float(cameras.elevation.max()) <= 19
    assert looks_at(cameras, torch.tensor([1.0, 0, 0]))


def test_a_fitted_orbit_has_the_cameras_percentiles():
    like = real()
    pool = camera_pool("fitted", BOX, like, count=4000)
    assert isinstance(pool, FittedOrbit)
    cameras = pool.epoch(0)
    radius = cameras.positions.norm(dim=1)
    assert float(radius.min()) == pytest.approx(1.99, abs=5e-3) and float(radius.max()) == pytest.approx(3.01, abs=5e-3)
    low, high = torch.quantile(like.elevation, torch.tensor([0.05, 0.95])).tolist()
    assert float(cameras.elevation.min()) == pytest.approx(low, abs=0.1)
    assert float(cameras.elevation.max()) == pytest.approx(high, abs=0.1)
    assert float(cameras.azimuth.max()) > 178 and float(cameras.azimuth.min()) < -178
    torch.testing.assert_close(cameras.fx[:2], like.fx[:2])
    assert (cameras.width, cameras.height) == (20, 10)


def test_a_side_that_no_camera_saw_is_left_out():
    like = orbit([150.0, 170.0, -160.0, -120.0], 10.0, 3.0)
    azimuth = camera_pool("fitted", BOX, like, count=2000).epoch(0).azimuth % 360
    assert float(azimuth.min()) == pytest.approx(150, abs=0.3) and float(azimuth.max()) == pytest.approx(240, abs=0.3)


def test_forward_facing_poses_fill_the_cameras_box():
    like = orbit(torch.linspace(-20, 20, 9), torch.linspace(-10, 10, 9), 3.0)
    low, high = like.positions.amin(0), like.positions.amax(0)
    cameras = camera_pool("forward-facing", BOX, like, count=3000).epoch(0)
    assert bool((cameras.positions >= low - 1e-4).all()) and bool((cameras.positions <= high + 1e-4).all())
    torch.testing.assert_close(cameras.positions.std(0), (high - low) / math.sqrt(12), rtol=0.05, atol=1e-3)
    assert looks_at(cameras, torch.zeros(3))


def test_given_cameras_come_all_in_an_order_of_their_own():
    like = real()
    cameras = camera_pool("given", BOX, like).epoch(0)
    distances = torch.cdist(cameras.c2w.flatten(1), like.c2w.flatten(1))
    assert sorted(distances.argmin(1).tolist()) == list(range(12)) and float(distances.min(1).values.max()) == 0
    assert distances.argmin(1).tolist() != list(range(12))
    assert len(camera_pool("given", BOX, like, count=30).epoch(0)) == 30


@pytest.mark.parametrize("law", ["orbit", "outdoor", "fitted", "forward-facing", "given"])
def test_epochs_are_fresh_and_repeatable(law: str):
    pool = camera_pool(law, BOX, real(), count=5)
    torch.manual_seed(0)
    first = pool.epoch(1, seed=2)
    torch.manual_seed(1)
    assert torch.equal(first.c2w, pool.epoch(1, seed=2).c2w)
    assert not torch.equal(first.c2w, pool.epoch(2, seed=2).c2w)
    assert not torch.equal(first.c2w, pool.epoch(1, seed=3).c2w)


def test_sizes():
    lens = camera_pool("orbit", BOX, real(200, 100), size=50).lens
    assert (lens.width, lens.height) == (50, 25) and float(lens.fx) == pytest.approx(float(real(200, 100).fx[0]) / 4)
    assert camera_pool("orbit", BOX).lens.width == 64


def test_bad_input_is_named():
    for arguments, told in (
        (("fitted", BOX), "poses 'fitted' need cameras"),
        (("sideways", BOX), "not 'sideways'"),
        (("orbit", BOX, None, 0), "1 pose or more"),
    ):
        law, box, *rest = arguments
        with pytest.raises(InputError, match=told):
            camera_pool(law, box, *rest[:1], count=rest[1] if len(rest) > 1 else None)
    with pytest.raises(InputError, match="radius is a range"):
        camera_pool("orbit", BOX, radius=(3.0, 2.0))
    with pytest.raises(InputError, match="bands is a range"):
        camera_pool("orbit", BOX, bands=(0, 95))
