r"""Training losses of denoisers, each with its space and weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.predictions import convert
from limbeck.diffusion.schedules import expand, precise

Weight = Callable[[Tensor], Tensor]


def edm_weight(sigma_data: float) -> Weight:
    r""":math:`\lambda(\sigma) = (\sigma^2 + \sigma_d^2)/(\sigma\sigma_d)^2`, for squared errors of x0."""
    return lambda sigma: (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over dimensions, per sample: (B, ...) -> (B,)."""
    return precise(prediction - target).square().flatten(1).mean(1)


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    cond: Condition = None,
    *,
    noise: Tensor | None = None,
    space: str = "eps",
    weight: Weight | Tensor | None = None,
) -> Tensor:
    r"""Denoising score matching: :math:`E\,w(t)\,\|\hat p(x_t, t) - p\|^2`, averaged over dimensions and the batch.

    Args:
        denoiser: the network with its conventions.
        x0: (B, ...) clean samples.
        t: (B,) times.
        cond: (B, ...) conditions.
        noise: (B, ...) unit noise; drawn if None.
        space: in which the error is measured: ``x0``, ``eps``, ``v``, ``flow`` or ``score``.
        weight: (B,) or a function of the times; None: 1.

    Source: "Denoising Diffusion Probabilistic Models" (2020); equivalences of spaces in "Progressive Distillation for Fast Sampling of Diffusion
    Models" (2022) and "Elucidating the Design Space of Diffusion-Based Generative Models" (2022).
    """
    eps = torch.randn_like(x0) if noise is None else noise
    x_t = denoiser.schedule.add_noise(x0, eps, t)
    target = x0 if space == "x0" else eps if space == "eps" else convert(eps, "eps", space, x_t, t, denoiser.schedule)
    if space in ("v", "flow"):  # exact from both, without a division
        alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
        a, b = (-sigma, alpha) if space == "v" else (denoiser.schedule.dalpha(t), denoiser.schedule.dsigma(t))
        target = expand(a, x0) * x0 + expand(b, x0) * eps
    errors = squared_errors(denoiser.predict(x_t, t, cond, space), target)
    if weight is not None:
        errors = errors * (weight(t) if callable(weight) else weight)
    return errors.mean()


def flow_matching_loss(
    denoiser: Denoiser, x0: Tensor, z: Tensor, t: Tensor, cond: Condition = None, *, per_sample: bool = False
) -> Tensor:
    r"""Flow matching on given pairs: :math:`E\,\|u(x_t, t) - (\alpha' x_0 + \sigma' z)\|^2` with :math:`x_t = \alpha x_0 + \sigma z`.

    In ``flow`` the target is z - x0. Mean over dimensions and the batch; per sample (B,) if asked.

    Args:
        x0, z: (B, ...) the two ends of each pair; independent ends give ordinary training, the ends of a teacher's ODE give reflow.

    Source: "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow" (2022).
    """
    schedule = denoiser.schedule
    x_t = schedule.add_noise(x0, z, t)
    target = expand(schedule.dalpha(t), x0) * x0 + expand(schedule.dsigma(t), x0) * z
    errors = squared_errors(denoiser.predict(x_t, t, cond, "flow"), target)
    return errors if per_sample else errors.mean()
