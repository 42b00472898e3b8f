from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.blocks import Cells, border, contract, fill_empty, ground_points, seen_blocks
from limbeck.rendering.cameras import Cameras, look_at, orbit
from limbeck.rendering.lattices import consistent_points
from limbeck.rendering.rays import distort
from limbeck.rendering.scenes import scene, shots
from limbeck.rendering.undistortion import undistorted

torch.set_num_threads(1)
BOX = torch.tensor([[-1.0, -2, 0], [3.0, 2, 1]])


def test_the_box_becomes_the_middle_half_and_space_the_cube():
    corners = torch.tensor([[-1.0, -2, 0], [3, 2, 1], [1, 0, 0.5], [3, 0, 0.5]])
    expected = torch.tensor([[0.25] * 3, [0.75] * 3, [0.5] * 3, [0.75, 0.5, 0.5]])
    torch.testing.assert_close(contract(corners, BOX), expected)
    u = torch.tensor([[4.0, -1.0, 2.0]])  # in half boxes from the middle
    x = torch.tensor([1.0, 0, 0.5]) + u * torch.tensor([2.0, 2.0, 0.5])
    torch.testing.assert_close(contract(x, BOX), (2 - 1 / 4) * u / 4 / 4 + 0.5)
    far = contract(1e7 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), BOX)
    assert bool(((far >= 0) & (far <= 1)).all()) and bool(((far - 0.5).abs().amax(1) > 0.49).all())


def test_borders_invert_the_contraction_along_an_axis():
    planes = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.95, 1.0])
    x = border(planes, BOX[0, 0], BOX[1, 0])
    assert float(x[0]) == -math.inf and float(x[-1]) == math.inf
    points = torch.stack([x[1:-1], torch.zeros(6), torch.full((6,), 0.5)], 1)
    torch.testing.assert_close(contract(points, BOX)[:, 0], planes[1:-1])


def test_every_point_has_one_cell_and_neighbours_overlap_by_the_margin():
    cells = Cells(torch.tensor([[-2.0] * 3, [2.0] * 3]), (2, 2, 1))
    points = torch.tensor([[-1.0, -1, 0], [-1, 1, 0], [1, -1, 0], [1, 1, 0], [0.3, -0.6, 0], [90, -90, 5]])
    assert cells.of(points).tolist() == [0, 1, 2, 3, 2, 2] and len(cells) == 4
    near = cells.near(points, 0.5)
    assert near.sum(1).tolist() == [1, 1, 1, 1, 2, 1] and bool(near[4, 0])
    generator = torch.Generator().manual_seed(1)
    many = 6 * torch.randn(500, 3, generator=generator)
    fine = Cells(BOX, (3, 4, 2))
    assert len(fine.of(many).unique()) > 12
    assert bool(fine.near(many).gather(1, fine.of(many)[:, None]).all())
    inside = BOX[0] + torch.rand(200, 3, generator=generator) * (BOX[1] - BOX[0])
    assert bool((fine.near(inside).sum(1) == 1).all())  # in the box the borders are exact


def test_where_cameras_look_at_the_ground():
    places, targets = (
        torch.tensor([[1.0, 0, 2], [0, 3, 1], [0, 0, 1]]),
        torch.tensor([[0.5, 0.5, 0], [0, 3.5, 0.5], [2.0, 0, 1.5]]),
    )
    one = torch.tensor(20.0)
    cameras = Cameras(look_at(places, targets), one, one, one / 2, one / 2, 20, 20)
    found = ground_points(cameras)
    torch.testing.assert_close(found[:2], torch.tensor([[0.5, 0.5, 0], [0, 4, 0]]), atol=1e-5, rtol=0)
    assert torch.equal(found[2], places[2])  # looks up
    torch.testing.assert_close(ground_points(cameras, 0.5)[1], targets[1], atol=1e-5, rtol=0)


def test_a_view_needs_the_blocks_whose_removal_changes_it():
    blocks = torch.tensor([0, 0, 1, 2])
    shown = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0.1]])  # how much each view shows of each part

    def draw(kept: torch.Tensor, number: int) -> torch.Tensor:
        return (shown[number] * kept).sum() * torch.ones(2, 2, 3)

    found = seen_blocks(draw, blocks, 3, 3, lambda a, b: (a - b).abs().mean()[None], threshold=0.2)
    assert found.tolist() == [[True, False, False], [True, True, False], [False, False, False]]
    away = torch.tensor([[0.0, 3, 5], [0, 1, 2], [4, 4, 0.5]])
    filled = fill_empty(found, away)
    assert filled[:, 2].tolist() == [False, False, True] and torch.equal(filled[:, :2], found[:, :2])


def test_cells_that_are_none():
    with pytest.raises(InputError, match="lower corner below"):
        Cells(BOX.flip(0), (1, 1, 1))
    with pytest.raises(InputError, match="1 or more cells"):
        Cells(BOX, (1, 0, 1))


# ---- without a point cloud -----------------------------------------------------------------------------------------------------


def test_lattice_points_lie_near_the_surface():
    truth = scene("three_blobs")
    seen = shots(truth, 12, 24)
    points = consistent_points(seen.images, seen.cameras, truth.aabb, 200, background=1.0)
    assert 100 < len(points) <= 200
    assert float(truth.distance(points).abs().median()) < 0.1
    everywhere = truth.distance(torch.rand(2000, 3) * 2 - 1).abs().median()
    assert float(everywhere) > 0.25
    with pytest.raises(InputError, match="seen by two pictures"):
        consistent_points(seen.images, seen.cameras, torch.tensor([[50.0] * 3, [51.0] * 3]), 20)


# ---- lenses --------------------------------------------------------------------------------------------------------------------


def test_undistorted_pictures_are_those_of_a_pinhole():
    """A smooth function of the direction, taken through a lens and brought back."""
    lens = torch.tensor([[0.08, -0.05, 0.01, 0.004, -0.006], [-0.1, 0.02, 0.0, 0.0, 0.01]])
    straight = orbit([0.0, 40.0], 10.0, 3.0, 60.0, 48, 36)
    bent = replace(straight, distortion=lens)

    def picture(cameras: Cameras) -> torch.Tensor:
        d = torch.stack([cameras.rays(i).directions for i in range(2)])
        return (0.5 + 0.4 * torch.sin(3 * d)).view(2, 36, 48, 3)

    found = undistorted(picture(bent), bent)
    assert found.cameras.distortion is None and torch.equal(found.cameras.fx, straight.fx)
    wanted, before = picture(straight), picture(bent)
    inner = slice(2, -2)  # within half a pixel of the photograph's edge its last value is repeated
    error = (found.images - wanted).abs()[:, inner, inner][found.valid[:, inner, inner]]
    assert float(error.max()) < 2e-3 and float((before - wanted).abs()[:, inner, inner].max()) > 0.03
    assert 0.8 < float(found.valid.float().mean()) < 1.0
    plain = undistorted(before, straight)
    assert torch.equal(plain.images, before) and bool(plain.valid.all())
    with pytest.raises(InputError, match="pictures for these cameras"):
        undistorted(before[:, :20], bent)


def test_a_pixel_beyond_the_photograph_is_not_valid():
    camera = orbit([0.0], 0.0, 3.0, 60.0, 10, 10)
    lens = torch.tensor([[0.5, 0, 0, 0, 0]])
    found = undistorted(torch.rand(1, 10, 10, 3), replace(camera, distortion=lens))
    corner = torch.tensor([[0.5 - 5.0, 0.5 - 5.0]]) / camera.fx[0]
    outside = distort(corner, lens) * camera.fx[0] + 5
    assert bool((outside < 0).any()) and not bool(found.valid[0, 0, 0]) and bool(found.valid[0, 5, 5])
