"""Views: against plain cropping and interpolation, gradients, distributions, schedules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from limbeck.blocks.views import FLIP, HEIGHT, LEFT, TOP, WIDTH, CropCurriculum, RandomView
from limbeck.core.errors import InputError

torch.set_num_threads(1)


def images(n: int = 3, h: int = 12, w: int = 16) -> torch.Tensor:
    return torch.randn(n, 2, h, w, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def row(top=0.0, left=0.0, height=1.0, width=1.0, flip=0.0, down=0.0, right=0.0) -> torch.Tensor:
    return torch.tensor([[top, left, height, width, flip, down, right]], dtype=torch.float64)


def test_the_whole_image_is_the_image():
    x = images()
    assert torch.equal(RandomView().apply(x, row()), x)
    drawn = RandomView(flip=0).draw(9, torch.Generator().manual_seed(0), scale=(1.0, 1.0))
    assert torch.equal(drawn[:, :4], torch.tensor([[0.0, 0, 1, 1]]).expand(9, 4))


def test_whole_pixel_boxes_equal_crop_and_interpolate():
    x = images()
    got = RandomView().apply(x, row(3 / 12, 4 / 16, 6 / 12, 5 / 16))
    expected = F.interpolate(x[:, :, 3:9, 4:9], (12, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("antialias", [True, False])
def test_smaller_views_filter_as_asked(antialias):
    x = images()
    got = RandomView(size=(4, 5), antialias=antialias).apply(x, row(1 / 12, 2 / 16, 10 / 12, 13 / 16))
    expected = F.interpolate(x[:, :, 1:11, 2:15], (4, 5), mode="bilinear", align_corners=False, antialias=antialias)
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-6)


def test_flip_then_roll():
    x = images()
    torch.testing.assert_close(RandomView().apply(x, row(flip=1.0)), x.flip(3))
    got = RandomView(jitter=5).apply(x, row(flip=1.0, down=3, right=5))
    torch.testing.assert_close(got, torch.roll(x.flip(3), (3, 5), (2, 3)))


def test_each_image_has_its_own_view_and_one_view_serves_all():
    x = images()
    view = RandomView((0.3, 1.0), jitter=2)
    parameters = view.draw(3, torch.Generator().manual_seed(1)).double()
    together = view.apply(x, parameters)
    apart = torch.cat([view.apply(x[i : i + 1], parameters[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, apart)
    shared = view.draw(3, torch.Generator().manual_seed(1), shared=True)
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[0], shared[2])
    torch.testing.assert_close(view.apply(x, shared), view.apply(x, shared[:1]))


def test_gradient_is_the_transpose():
    x = images(1, 4, 4).requires_grad_()
    view = RandomView((0.3, 0.8), jitter=1)
    parameters = view.draw(1, torch.Generator().manual_seed(3)).double()
    assert torch.autograd.gradcheck(lambda v: view.apply(v, parameters), (x,))


def test_drawn_boxes_have_the_shares_and_aspects_asked_for():
    view = RandomView((0.2, 0.6), ratio=(0.5, 2.0), flip=0.3, jitter=4)
    drawn = view.draw(4000, torch.Generator().manual_seed(0))
    area, aspect = drawn[:, HEIGHT] * drawn[:, WIDTH], drawn[:, WIDTH] / drawn[:, HEIGHT]
    assert area.min() >= 0.2 - 1e-5 and area.max() <= 0.6 + 1e-5
    assert aspect.min() >= 0.5 - 1e-4 and aspect.max() <= 2.0 + 1e-4
    assert (drawn[:, :4] >= 0).all()
    assert (drawn[:, TOP] + drawn[:, HEIGHT] <= 1 + 1e-6).all() and (drawn[:, LEFT] + drawn[:, WIDTH] <= 1 + 1e-6).all()
    assert drawn[:, FLIP].mean().item() == pytest.approx(0.3, abs=0.03)
    assert drawn[:, 5:].unique().tolist() == [0, 1, 2, 3, 4]
    # Small boxes always fit, so their area keeps the uniform distribution that was asked for.
    small = RandomView((0.1, 0.3)).draw(4000, torch.Generator().manual_seed(0))
    assert (small[:, HEIGHT] * small[:, WIDTH]).mean().item() == pytest.approx(0.2, abs=0.005)


def test_draws_replay():
    view = RandomView()
    assert torch.equal(*(view.draw(5, torch.Generator().manual_seed(4)) for _ in range(2)))


def test_schedules():
    total = 100
    cosine, linear = CropCurriculum("cosine"), CropCurriculum("linear")
    assert [cosine.bound(i, total) for i in (0, 50, 100)] == pytest.approx([1.0, 0.54, 0.08])
    assert [linear.bound(i, total) for i in (0, 50, 100)] == pytest.approx([1.0, 0.54, 0.08])
    assert cosine.bound(25, total) == pytest.approx(0.08 + 0.92 * (1 + math.cos(math.pi / 4)) / 2)
    step = CropCurriculum("step", milestone=0.5)
    assert [step.bound(i, total) for i in (0, 49, 50, 99)] == [1.0, 1.0, 0.08, 0.08]
    early = CropCurriculum("cosine", lowest=0.35, milestone=0.2)
    assert [early.bound(i, total) for i in (0, 10, 20, 99)] == pytest.approx([1.0, 0.675, 0.35, 0.35])
    back = CropCurriculum("reversed")
    assert [back.bound(i, total) for i in (0, 50, 100)] == pytest.approx([0.08, 0.54, 1.0])
    assert {CropCurriculum("none").bound(i, total) for i in range(101)} == {0.08}
    assert {CropCurriculum("whole").bound(i, total) for i in range(101)} == {1.0}
    assert cosine.scale(50, total) == (pytest.approx(0.54), 1.0)
    bounds = [cosine.bound(i, total) for i in range(101)]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: RandomView((0.5, 0.2)), "area of crops"),
        (lambda: RandomView(ratio=(0, 1)), "aspect of crops"),
        (lambda: RandomView(flip=2), "probability of a flip"),
        (lambda: RandomView(jitter=-1), "jitter must be 0 or more"),
        (lambda: RandomView(size=(0, 3)), "at least one pixel"),
        (lambda: RandomView().apply(torch.zeros(2, 3, 4), torch.zeros(2, 7)), "images of shape"),
        (lambda: RandomView().apply(torch.zeros(2, 1, 4, 4), torch.zeros(3, 7)), r"shape \(2, 7\), not \(3, 7\)"),
        (lambda: CropCurriculum(lowest=0), "lowest crop bound"),
        (lambda: CropCurriculum(milestone=0), "milestone"),
        (lambda: CropCurriculum("fast"), "unknown curriculum 'fast'"),
        (lambda: CropCurriculum().bound(5, 4), "iteration 5 is not one of 0"),
    ],
)
def test_what_is_wrong_is_said(make, line):
    with pytest.raises(InputError, match=line):
        make()
