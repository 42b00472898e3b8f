from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.rays import (
    Rays,
    camera_directions,
    distort,
    edges_of,
    hierarchical,
    intersect_box,
    pixel_grid,
    stratified,
    undistort,
)

torch.set_num_threads(1)

LENS = torch.tensor([0.0578421, -0.0805099, 0.01, -0.000980296, 0.00015575], dtype=torch.float64)
BOX = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])


def test_pixels_in_reading_order():
    assert pixel_grid(3, 2).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]


def test_the_lens_by_hand():
    x, y, (k1, k2, k3, p1, p2) = 0.3, -0.2, LENS.tolist()
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    hand = [x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y]
    np.testing.assert_allclose(distort(torch.tensor([x, y], dtype=torch.float64), LENS).numpy(), hand, rtol=1e-12)


def test_undistortion_inverts_the_lens():
    points = torch.rand(500, 2, dtype=torch.float64) * 1.6 - 0.8
    bent = distort(points, LENS.expand(500, 5))
    assert float((bent - points).abs().max()) > 1e-3
    torch.testing.assert_close(undistort(bent, LENS.expand(500, 5), 5), points, atol=1e-10, rtol=0)
    single = undistort(bent.float(), LENS.float().expand(500, 5))
    torch.testing.assert_close(single.double(), points, atol=1e-5, rtol=0)
    strong = torch.tensor([-0.9, 0.0, 0.0, 0.0, 0.0]).expand(2, 5)  # folds at r = 0.61: no answer, but a finite one
    assert bool(undistort(torch.tensor([[2.0, 0.0], [0.1, 0.0]]), strong).isfinite().all())


def test_the_newton_step_converges_quadratically():
    """Two steps are far better than one squared would allow by a wrong Jacobian."""
    points = torch.rand(200, 2, dtype=torch.float64) - 0.5
    lens = torch.tensor([0.2, -0.1, 0.05, 0.02, -0.03], dtype=torch.float64).expand(200, 5)
    bent = distort(points, lens)
    errors = [float((undistort(bent, lens, n) - points).abs().max()) for n in (1, 2, 3)]
    assert errors[1] < 2 * errors[0] ** 1.8 and errors[2] < 1e-9


def test_directions_of_a_pinhole():
    ones = torch.ones(1)
    d = camera_directions(torch.tensor([[3, 1]]), 2 * ones, 4 * ones, 2 * ones, 2 * ones)
    torch.testing.assert_close(d, torch.tensor([[(3.5 - 2) / 2, -(1.5 - 2) / 4, -1.0]]))


def test_box_by_hand():
    rays = Rays(
        torch.tensor([[-3.0, 0, 0], [0, 0, 0], [-3, 2, 0], [3, 0, 0], [-3, 0.5, 0]]),
        torch.tensor([[1.0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]]),
    )
    entry, leave, hit = intersect_box(rays, BOX, near=0.1)
    assert hit.tolist() == [True, True, False, False, True]
    torch.testing.assert_close(entry, torch.tensor([2.0, 0.1, 0.1, 0.1, 2.0]))
    torch.testing.assert_close(leave, torch.tensor([4.0, 1.0, 0.1, 0.1, 4.0]))
    entry, leave, hit = intersect_box(rays, BOX, near=2.5, far=3.0)
    assert hit.tolist() == [True, False, False, False, True] and float(entry[0]) == 2.5 and float(leave[0]) == 3.0


def test_box_against_dense_marching():
    g = torch.Generator().manual_seed(0)
    box = torch.tensor([[-1.0, -0.5, -0.2], [0.7, 1, 0.9]])
    o = torch.randn(200, 3, generator=g) * 2
    d = torch.nn.functional.normalize(torch.randn(200, 3, generator=g) - o, dim=-1)
    entry, leave, hit = intersect_box(Rays(o, d), box)
    t = torch.linspace(0, 12, 6001)
    x = o[:, None] + d[:, None] * t[None, :, None]
    inside = ((x >= box[0]) & (x <= box[1])).all(-1)
    clear = (leave - entry > 0.01) | ~hit  # grazes fall between marching steps
    assert torch.equal(inside.any(1)[clear], hit[clear]) and 20 < int(hit.sum()) < 190
    first = t[inside.float().argmax(1)]
    both = hit & inside.any(1)
    torch.testing.assert_close(first[both], entry[both], atol=3e-3, rtol=0)
    torch.testing.assert_close(inside.sum(1)[both] * t[1], (leave - entry)[both], atol=5e-3, rtol=0)
    with pytest.raises(InputError, match="lower corner"):
        intersect_box(Rays(o, d), box.flip(0))


def test_strata():
    entry, leave = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0])
    t, delta = stratified(entry, leave, 4)
    torch.testing.assert_close(t[0], torch.tensor([1.125, 1.375, 1.625, 1.875]))
    torch.testing.assert_close(delta, torch.tensor([[0.25] * 4, [0.0] * 4]))
    t, _ = stratified(torch.zeros(2000), torch.ones(2000), 5, True, torch.Generator().manual_seed(0))
    assert torch.equal((t * 5).floor().long(), torch.arange(5).expand(2000, 5))
    torch.testing.assert_close((t * 5 % 1).mean(0), torch.full((5,), 0.5), atol=0.03, rtol=0)
    with pytest.raises(InputError, match="1 sample or more"):
        stratified(entry, leave, 0)


def test_hierarchical_samples_follow_the_weights():
    edges = torch.tensor([[0.0, 1.0, 2.0, 4.0]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    t = hierarchical(edges, weights, 8)
    assert not t.requires_grad
    # quantiles 1/16, 3/16 fall into the first bin (share 1/4), the other six into the last one
    hand = [0.25, 0.75, *(2 + 2 * ((2 * k + 1) / 16 - 0.25) / 0.75 for k in range(2, 8))]
    torch.testing.assert_close(t[0], torch.tensor(hand, dtype=torch.float64), atol=1e-3, rtol=0)
    many = hierarchical(edges.expand(500, 4), weights.expand(500, 3), 16, True, torch.Generator().manual_seed(0))
    assert bool((many[:, 1:] >= many[:, :-1]).all())
    share = torch.stack([(many < 1).double().mean(), ((many >= 1) & (many < 2)).double().mean()])
    torch.testing.assert_close(share, torch.tensor([0.25, 0.0], dtype=torch.float64), atol=0.01, rtol=0)
    nothing = hierarchical(edges, torch.zeros(1, 3, dtype=torch.float64), 6)  # no weights: uniform over bins
    assert [int(((nothing >= a) & (nothing < b)).sum()) for a, b in ((0, 1), (1, 2), (2, 4))] == [2, 2, 2]
    with pytest.raises(InputError, match="3 bins have 4 edges"):
        hierarchical(edges[:, :3], weights, 4)


def test_edges():
    found = edges_of(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([0.5]), torch.tensor([5.0]))
    assert found.tolist() == [[0.5, 1.5, 3.0, 5.0]]
