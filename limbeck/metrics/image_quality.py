r"""How close images are to the wanted ones: PSNR, SSIM, and a distance in a network's features.

Images are (B, H, W, C) with values in [0, 1] (renders as they come, not 8-bit numbers); results are one number per image, (B,), with
gradients. Values are taken as they are stored: sRGB images are compared in sRGB.

Sources: "Image quality assessment: from error visibility to structural similarity" (SSIM, its window and constants).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.losses.perceptual import Layers, feature_distance

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
SLACK = 1e-4  # rounding of a compositing sum; anything beyond is a mistake


def psnr(images: Tensor, wanted: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio ``-10 log10 mean((a - b)^2)``, (B,), in dB; infinite for equal images.

    The mean of several images' PSNR is not the PSNR of their mean error; papers report the former.

    Raises:
        InputError: different shapes, not (B, H, W, C), values outside [0, 1] or not finite.
    """
    a, b = _checked(images, wanted)
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def ssim(images: Tensor, wanted: Tensor) -> Tensor:
    r"""Structural similarity, (B,), at most 1; 1 for equal images.

    .. math:: \frac{(2\mu_a\mu_b + c_1)(2\sigma_{ab} + c_2)}{(\mu_a^2 + \mu_b^2 + c_1)(\sigma_a^2 + \sigma_b^2 + c_2)},
              \qquad c_1 = 0.01^2,\; c_2 = 0.03^2

    of every channel under a Gaussian window of 11 x 11 pixels and standard deviation 1.5, averaged over the channels and over the places where the
    window fits into the image. As a loss: ``1 - ssim``.

    Raises:
        InputError: as :func:`psnr`; images smaller than the window.
    """
    a, b = _checked(images, wanted)
    if min(a.shape[1:3]) < WINDOW:
        raise InputError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels (got {a.shape[1]} x {a.shape[2]})")
    x, y = a.movedim(3, 1).flatten(0, 1)[:, None], b.movedim(3, 1).flatten(0, 1)[:, None]  # (B C, 1, H, W)
    steps = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    line = torch.exp(-steps.square() / (2 * SIGMA**2))
    line = line / line.sum()
    stacked = torch.cat([x, y, x * x, y * y, x * y])
    means = F.conv2d(F.conv2d(stacked, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
    mx, my, xx, yy, xy = means.chunk(5)
    vx, vy, both = xx - mx * mx, yy - my * my, xy - mx * my
    c1, c2 = K1**2, K2**2
    found = (2 * mx * my + c1) * (2 * both + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return found.view(len(a), -1).mean(1)


def perceptual_distance(
    images: Tensor,
    wanted: Tensor,
    features: Callable[[Tensor], Layers],
    weights: Sequence[float] | None = None,
    signed: bool = False,
) -> Tensor:
    """Distance in the features of a network, (B,); see :func:`limbeck.losses.perceptual.feature_distance`.

    It has LPIPS's form without its learned weights, so its numbers compare within one network only: always say which one.

    Args:
        images, wanted: (B, H, W, C) in [0, 1].
        features: images (B, C, H, W) to features by layer, e.g. :class:`limbeck.blocks.taps.Taps` of a classifier in evaluation mode.
        weights: of the layers; None: 1.
        signed: give the network 2 x - 1 instead of x.

    Raises:
        InputError: as :func:`psnr`; layers that do not fit.
    """
    a, b = (x.movedim(3, 1) for x in _checked(images, wanted))
    if signed:
        a, b = 2 * a - 1, 2 * b - 1
    return feature_distance(features(a), features(b), weights)


@torch.no_grad()
def image_quality(
    images: Tensor, wanted: Tensor, features: Callable[[Tensor], Layers] | None = None
) -> dict[str, float]:
    """Means over the images: ``psnr`` (dB), ``ssim`` and, with features, ``feature_distance``.

    ``ssim`` is left out for images smaller than its window.

    Raises:
        InputError: as :func:`psnr`.
    """
    found = {"psnr": psnr(images, wanted)}
    if min(images.shape[1:3]) >= WINDOW:
        found["ssim"] = ssim(images, wanted)
    if features is not None:
        found["feature_distance"] = perceptual_distance(images, wanted, features)
    return {name: float(values.mean()) for name, values in found.items()}


def _checked(images: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or images.shape[3] not in (1, 3, 4) or not images.numel():
        raise InputError(f"images are (B, H, W, C) with 1, 3 or 4 channels last (got {tuple(images.shape)})")
    if images.shape != wanted.shape:
        raise InputError(f"both sets of images need one shape (got {tuple(images.shape)} and {tuple(wanted.shape)})")
    pair = []
    for name, x in (("images", images), ("wanted images", wanted)):
        if not x.is_floating_point():
            raise InputError(f"the {name} hold {x.dtype} numbers: divide by 255 to bring them to [0, 1]")
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        low, high = x.detach().amin(), x.detach().amax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise InputError(f"the {name} have values that are NaN or infinite")
        if low < -SLACK or high > 1 + SLACK:
            raise InputError(
                f"the {name} must lie in [0, 1] but span {float(low):.4g} to {float(high):.4g}: clamp or rescale them"
            )
        pair.append(x)
    return pair[0], pair[1]
