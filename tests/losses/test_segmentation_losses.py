"""Losses on pixels, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import InputError
from limbeck.losses.segmentation import (
    channel_divergence,
    ohem_cross_entropy,
    pixel_cross_entropy,
    pooled_logit_l1,
    self_similarity,
    self_similarity_loss,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(b: int = 2, h: int = 4, w: int = 5, classes: int = 3) -> torch.Tensor:
    labels = torch.randint(0, classes, (b, h, w), generator=torch.Generator().manual_seed(1))
    labels[0, 0, :3] = -100
    return labels


def log_softmax(z: np.ndarray, axis: int) -> np.ndarray:
    z = z - z.max(axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis, keepdims=True))


def true_log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    lp = log_softmax(logits.numpy(), 1)
    counted = labels.numpy() != -100
    picked = np.take_along_axis(lp, np.where(counted, labels.numpy(), 0)[:, None], 1)[:, 0]
    return picked[counted]


def test_cross_entropy_counts_the_pixels_with_a_label() -> None:
    logits, labels = draw(2, 3, 4, 5), maps()
    expected = -true_log_probabilities(logits, labels).mean()
    assert pixel_cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-12)


def test_a_loss_of_no_pixel_is_zero_with_a_graph() -> None:
    logits = draw(1, 3, 2, 2).requires_grad_()
    for loss in (pixel_cross_entropy, ohem_cross_entropy):
        value = loss(logits, torch.full((1, 2, 2), -100))
        value.backward()
        assert value.item() == 0 and bool((logits.grad == 0).all())


def test_hard_pixels_are_those_below_the_threshold() -> None:
    logits, labels = 3 * draw(2, 3, 4, 5), maps()
    lp = true_log_probabilities(logits, labels)
    hard = np.exp(lp) <= 0.7
    assert 0 < hard.sum() < len(hard)
    assert ohem_cross_entropy(logits, labels).item() == pytest.approx(-lp[hard].mean(), rel=1e-12)
    many = int(hard.sum()) + 5
    hardest = np.sort(lp)[:many]
    assert ohem_cross_entropy(logits, labels, min_kept=many).item() == pytest.approx(-hardest.mean(), rel=1e-12)
    everything = ohem_cross_entropy(logits, labels, min_kept=10_000)
    torch.testing.assert_close(everything, pixel_cross_entropy(logits, labels))
    torch.testing.assert_close(ohem_cross_entropy(logits, labels, threshold=1.0), pixel_cross_entropy(logits, labels))


def test_region_similarities_are_cosines_of_averages() -> None:
    features = draw(2, 5, 6, 8)
    regions = features.numpy().reshape(2, 5, 2, 3, 2, 4).mean((3, 5)).reshape(2, 5, 4)
    unit = regions / np.linalg.norm(regions, axis=1, keepdims=True)
    expected = np.einsum("bci,bcj->bij", unit, unit)
    np.testing.assert_allclose(self_similarity(features, 2).numpy(), expected, rtol=1e-12)
    other = draw(2, 9, 4, 4, seed=3)
    difference = expected - self_similarity(other, 2).numpy()
    assert self_similarity_loss(features, other, 2).item() == pytest.approx((difference**2).mean(), rel=1e-12)


def test_region_loss_knows_neither_width_nor_scale_nor_size() -> None:
    features = draw(2, 4, 14, 14)
    rotation = torch.linalg.qr(draw(7, 7, seed=4)).Q[:, :4]
    wider = torch.einsum("dc,bchw->bdhw", rotation, features) * 3.5  # 7 channels, the same angles
    assert self_similarity_loss(features, wider).item() < 1e-20
    twice = F.interpolate(features, scale_factor=2, mode="nearest")
    assert self_similarity_loss(features, twice).item() < 1e-20


def test_empty_regions_give_no_nan() -> None:
    features = torch.zeros(1, 4, 14, 14, requires_grad=True)
    loss = self_similarity_loss(features, draw(1, 4, 14, 14).float())
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool((features.grad == 0).all())


def test_half_precision_regions_are_compared_in_single() -> None:
    features = (1000 * draw(1, 64, 14, 14)).to(torch.bfloat16)
    assert self_similarity(features).dtype == torch.float32
    assert bool(torch.isfinite(self_similarity(features.half())).all())


def test_pooled_logits_are_summed_over_batch_and_classes() -> None:
    student, teacher = draw(2, 3, 4, 4), draw(2, 3, 6, 2, seed=1)
    each = np.abs(student.numpy().mean((2, 3)) - teacher.numpy().mean((2, 3)))
    assert pooled_logit_l1(student, teacher).item() == pytest.approx(each.sum(), rel=1e-12)
    assert pooled_logit_l1(student, teacher, "mean").item() == pytest.approx(each.mean(), rel=1e-12)


def test_channel_divergence_is_over_positions() -> None:
    student, teacher = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    s, t = (log_softmax(x.numpy().reshape(2, 3, 16) / 2.5, 2) for x in (student, teacher))
    expected = 2.5**2 * (np.exp(t) * (t - s)).sum() / 6
    assert channel_divergence(student, teacher, 2.5).item() == pytest.approx(expected, rel=1e-10)
    shifted = teacher + torch.arange(3.0)[:, None, None]  # a constant for each channel changes no distribution
    assert channel_divergence(shifted, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: pixel_cross_entropy(draw(2, 3, 2, 2), maps()), "logits of 2x2 pixels for label maps of 4x5"),
        (lambda: pixel_cross_entropy(draw(2, 3), maps()), r"expected \(B, C, H, W\) and \(B, H, W\)"),
        (lambda: pixel_cross_entropy(draw(2, 3, 4, 5), maps().double()), "class indices must be integers"),
        (lambda: ohem_cross_entropy(draw(2, 3, 4, 5), maps(), threshold=0.0), r"must be in \(0, 1\]"),
        (lambda: self_similarity(draw(2, 3)), "regions need features of shape"),
        (lambda: self_similarity_loss(draw(2, 3, 4, 4), draw(3, 3, 4, 4)), "of 2 and 3 images"),
        (lambda: pooled_logit_l1(draw(2, 3, 4, 4), draw(2, 4, 4, 4)), "same B and C"),
        (lambda: channel_divergence(draw(2, 3, 4, 4), draw(2, 3, 4, 5)), "they must be"),
        (lambda: channel_divergence(draw(2, 3, 4, 4), draw(2, 3, 4, 4), 0.0), "temperature must be above 0"),
    ],
)
def test_mistakes_are_one_line(call, line) -> None:
    with pytest.raises(InputError, match=line) as error:
        call()
    assert "\n" not in str(error.value)
