from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.losses.perceptual import feature_distance
from limbeck.metrics.image_quality import image_quality, perceptual_distance, psnr, ssim

torch.set_num_threads(1)


def pair(h: int = 24, w: int = 31, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.linspace(0, 6, h), torch.linspace(0, 9, w), indexing="ij")
    a = torch.stack([torch.stack([(s * rows + c * columns).sin() * 0.5 + 0.5 for c in range(3)], -1) for s in (1, 2)])
    return a.double(), (a + noise * torch.randn(a.shape, generator=made)).clamp(0, 1).double()


def test_psnr_by_hand():
    a, b = torch.zeros(3, 2, 2, 3), torch.zeros(3, 2, 2, 3)
    a[0] += 0.1
    a[1, 0, 0, 0] = 1.0
    found = psnr(a, b)
    assert float(found[0]) == pytest.approx(20, rel=1e-5)
    assert float(found[1]) == pytest.approx(10 * math.log10(12), rel=1e-5)
    assert float(found[2]) == math.inf


def test_ssim_against_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pair()
    for i in range(2):
        wanted = metrics.structural_similarity(
            a[i].numpy(),
            b[i].numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=-1,
        )
        assert float(ssim(a, b)[i]) == pytest.approx(wanted, abs=1e-9)


def test_ssim_of_one_window_by_numpy():
    a, b = pair(11, 11)
    steps = np.arange(11) - 5
    window = np.exp(-(steps[:, None] ** 2 + steps**2) / 4.5)
    window /= window.sum()
    found = []
    for c in range(3):
        x, y = a[0, ..., c].numpy(), b[0, ..., c].numpy()
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
        both = (window * (x - mx) * (y - my)).sum()
        found.append((2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert float(ssim(a, b)[0]) == pytest.approx(np.mean(found), abs=1e-10)


def test_what_better_means():
    a, slight = pair(noise=0.03)
    _, strong = pair(noise=0.2)
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(ssim(a, slight), ssim(slight, a))
    assert bool((ssim(a, slight) > ssim(a, strong) + 0.05).all()) and bool(
        (psnr(a, slight) > psnr(a, strong) + 6).all()
    )
    for function in (psnr, ssim):
        x = strong.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x, a).sum(), x)
        better = (strong + 1e-3 * gradient / gradient.abs().max()).clamp(0, 1)
        assert bool((function(better, a) > function(strong, a)).all())


def test_feature_distance():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double().eval()

    def read(x: Tensor) -> list[Tensor]:
        return [network[:2](x), network(x)]

    a, b = pair()
    found = perceptual_distance(a, b, read, [1.0, 0.5])
    assert found.shape == (2,) and bool((found > 0).all())
    x, y = a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2)
    torch.testing.assert_close(found, feature_distance(read(x), read(y), [1.0, 0.5]))
    signed = perceptual_distance(a, b, read, signed=True)
    torch.testing.assert_close(signed, feature_distance(read(2 * x - 1), read(2 * y - 1)))
    assert float(perceptual_distance(a, a, read).abs().max()) == 0


def test_the_summary():
    a, b = pair()
    found = image_quality(a, b, lambda x: x)
    assert set(found) == {"psnr", "ssim", "feature_distance"}
    assert found["psnr"] == pytest.approx(float(psnr(a, b).mean())) and found["ssim"] == pytest.approx(
        float(ssim(a, b).mean())
    )
    assert set(image_quality(a[:, :8], b[:, :8])) == {"psnr"}
    assert image_quality(a.half(), b.half())["psnr"] == pytest.approx(found["psnr"], rel=1e-2)


def test_bad_input_is_named():
    a, b = pair()
    for images, wanted, told in (
        (a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2), "channels last"),
        (a[0], b[0], "channels last"),
        (a[:0], b[:0], "channels last"),
        (a, b[:, :20], "one shape"),
        ((a * 255).byte(), b, "divide by 255"),
        (a, b * 255, r"wanted images must lie in \[0, 1\]"),
        (a - 0.5, b, "clamp or rescale"),
        (torch.full_like(a, torch.nan), b, "the images have values that are NaN"),
    ):
        for function in (psnr, ssim):
            with pytest.raises(InputError, match=told) as caught:
                function(images, wanted)
            assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="at least 11 x 11 pixels .got 10 x 31"):
        ssim(a[:, :10], b[:, :10])
