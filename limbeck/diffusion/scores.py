r"""Score distillation: the difference of two scores as a gradient on samples, in one interface.

A generator's samples :math:`x` are noised to :math:`x_t`; the *real* network knows the score of the data there, the *fake* one that of the
generator's own samples. Moving x along :math:`-g` with :math:`g \propto \epsilon_{real} - \epsilon_{fake}` lowers a divergence between both laws.
SDS puts the drawn noise in the place of the fake network; VSD, DMD and SwiftBrush use both without gradients; SIM and SiD
differentiate through the inputs of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser, params_frozen
from limbeck.diffusion.schedules import expand, precise

ScoreWeight = str | Callable[[Tensor], Tensor]


def inject_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    r"""A scalar whose gradient with respect to x (B, ...) is ``gradient / B``: :math:`\frac{1}{2B}\|x - sg(x - g)\|^2`.

    Summed over dimensions, averaged over the batch. The value itself is half the mean squared norm of the gradient. The gradient is exact:
    it is not found as a difference of x and x - g, in which a small one would be lost.
    """
    gradient = gradient.detach()
    linear = (x * gradient).sum() / len(x)
    return linear - linear.detach() + 0.5 * precise(gradient).square().sum() / len(x)


@torch.no_grad()
def score_difference(
    fake: Denoiser,
    real: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Condition = None,
    *,
    guidance: float = 1.0,
    fake_guidance: float = 1.0,
    target: str = "eps",
) -> Tensor:
    """``real - fake`` in the space ``target``, without gradients; x moves along minus this in ``eps``, along plus this in ``x0``.

    Args:
        fake, real: the networks, of any prediction and schedule ``t`` and ``x_t`` fit to.
        x_t: (B, ...), t: (B,).
        guidance, fake_guidance: w of each.
    """
    return real.predict(x_t, t, cond, target, guidance) - fake.predict(x_t, t, cond, target, fake_guidance)


def sds_gradient(
    real: Denoiser,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    cond: Condition = None,
    *,
    guidance: float = 1.0,
    weight: ScoreWeight = "sigma2",
) -> Tensor:
    r"""Score distillation sampling: :math:`\omega(t)(\epsilon_{real} - \epsilon)`, (B, ...).

    Source: "DreamFusion: Text-to-3D using 2D Diffusion" (2022).
    """
    with torch.no_grad():
        difference = real.predict(x_t, t, cond, "eps", guidance) - noise
    return _weighted(difference, weight, t, real)


def vsd_gradient(
    fake: Denoiser,
    real: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Condition = None,
    *,
    guidance: float = 1.0,
    fake_guidance: float = 1.0,
    weight: ScoreWeight = "sigma2",
) -> Tensor:
    r"""Variational score distillation: :math:`\omega(t)(\epsilon_{real} - \epsilon_{fake})`, (B, ...).

    Args:
        weight: ``sigma2``: :math:`\omega = \sigma_t^2`; ``uniform``: 1; or a function of the times (B,) -> (B,).

    Source: "ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation" (2023).
    """
    difference = score_difference(fake, real, x_t, t, cond, guidance=guidance, fake_guidance=fake_guidance)
    return _weighted(difference, weight, t, real)


def dmd_gradient(
    fake: Denoiser,
    real: Denoiser,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    cond: Condition = None,
    *,
    guidance: float = 1.0,
    fake_guidance: float = 1.0,
) -> Tensor:
    r"""Distribution matching: :math:`(\hat x_0^{fake} - \hat x_0^{real}) / \mathrm{mean}|x - \hat x_0^{real}|`, (B, ...); the mean is that of each sample.

    Source: "One-step Diffusion with Distribution Matching Distillation" (2024).
    """
    with torch.no_grad():
        clean = real.predict(x_t, t, cond, "x0", guidance)
        difference = fake.predict(x_t, t, cond, "x0", fake_guidance) - clean
        return difference / expand(l1_size(x0, clean), x_t)


def l1_size(x0: Tensor, clean: Tensor, least: float = 1e-5) -> Tensor:
    """Mean absolute difference of each sample (B,), kept above ``least``; no gradient."""
    return (x0.detach() - clean).abs().flatten(1).mean(1).clamp_min(least)


def _weighted(difference: Tensor, weight: ScoreWeight, t: Tensor, real: Denoiser) -> Tensor:
    if callable(weight):
        return expand(weight(t), difference) * difference
    if weight == "sigma2":
        return expand(real.schedule.sigma(t) ** 2, difference) * difference
    if weight == "uniform":
        return difference
    raise UnknownNameError("weight of a score difference", weight, ("sigma2", "uniform"))


# ---- score implicit matching ---------------------------------------------------------------------------------------------


class Distance(Protocol):
    """A distance of score differences with d(0) = 0; both functions are per sample, over all dimensions."""

    def value(self, y: Tensor) -> Tensor:
        """(B, ...) -> (B,)."""

    def derivative(self, y: Tensor) -> Tensor:
        """(B, ...) -> (B, ...), the gradient of ``value``."""


def _squares(y: Tensor) -> Tensor:
    return y.flatten(1).square().sum(1)


@dataclass(frozen=True)
class PseudoHuber:
    r""":math:`d = \sqrt{\|y\|^2 + c^2} - c`, :math:`d' = y/\sqrt{\|y\|^2 + c^2}`: the size of the gradient is bounded by 1."""

    c: float

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise InputError(f"pseudo-Huber's c must be above 0 (got {self.c})")

    def value(self, y: Tensor) -> Tensor:
        return torch.sqrt(_squares(y) + self.c**2) - self.c

    def derivative(self, y: Tensor) -> Tensor:
        return y / expand(torch.sqrt(_squares(y) + self.c**2), y)


@dataclass(frozen=True)
class SquaredL2:
    r""":math:`d = \|y\|^2`, :math:`d' = 2y`."""

    def value(self, y: Tensor) -> Tensor:
        return _squares(y)

    def derivative(self, y: Tensor) -> Tensor:
        return 2 * y


@dataclass(frozen=True)
class Lp:
    r""":math:`d = \frac1p\sum|y_i|^p`, :math:`d' = \mathrm{sign}(y)|y|^{p-1}`, p >= 1."""

    p: float

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise InputError(f"the exponent of an L^p distance must be 1 or more (got {self.p})")

    def value(self, y: Tensor) -> Tensor:
        return y.flatten(1).abs().pow(self.p).sum(1) / self.p

    def derivative(self, y: Tensor) -> Tensor:
        return y.sign() * y.abs().pow(self.p - 1)


@dataclass(frozen=True)
class Huber:
    r"""Quadratic below ``delta`` (of the norm), linear above: :math:`d' = y` or :math:`\delta y/\|y\|`."""

    delta: float

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise InputError(f"Huber's delta must be above 0 (got {self.delta})")

    def value(self, y: Tensor) -> Tensor:
        size = torch.sqrt(_squares(y))
        return torch.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))

    def derivative(self, y: Tensor) -> Tensor:
        size = torch.sqrt(_squares(y)).clamp_min(1e-12)
        return y * expand((self.delta / size).clamp(max=1), y)


def sim_loss(
    fake: Denoiser,
    real: Denoiser,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    cond: Condition = None,
    *,
    distance: Distance,
    guidance: float = 1.0,
    weight: Callable[[Tensor], Tensor] | None = None,
    space: str = "x0",
) -> Tensor:
    r"""The generator's loss of score implicit matching, per sample (B,).

    .. math:: L = -w(t)\; d'(Y)^T (D_\psi(x_t) - x_0), \qquad Y = D_\psi(x_t) - D_q(x_t), \qquad x_t = \alpha x_0 + \sigma\epsilon

    The parameters of both networks are frozen, but the gradient goes through x0, x_t, the inputs of both networks and d'. Without
    that (``detach`` or ``no_grad``) it is another, biased loss.

    Args:
        fake, real: :math:`D_\psi` (knows the generator's law) and :math:`D_q` (the teacher).
        x0: (B, ...) the generator's samples, with gradient.
        t: (B,). noise: (B, ...).
        distance: d.
        guidance: of the teacher.
        weight: w, a function of the times; None: 1.
        space: ``x0``: as above; ``score``: the theorem's own form with :math:`s_\psi - s_q` and :math:`s_\psi - \nabla\log q(x_t|x_0)`.

    Source: "One-Step Diffusion Distillation through Score Implicit Matching" (2024).
    """
    x_t = real.schedule.add_noise(x0, noise, t)
    with params_frozen(fake, real):
        of_fake = precise(fake.predict(x_t, t, cond, space))
        of_real = precise(real.predict(x_t, t, cond, space, guidance))
    # -(x_t - alpha x0)/sigma^2, which does not depend on the generator, as x0 moves x_t along
    kernel = x0 if space == "x0" else -noise / expand(real.schedule.sigma(t), x_t)
    product = (distance.derivative(of_fake - of_real) * (of_fake - kernel)).flatten(1).sum(1)
    return -product if weight is None else -weight(t) * product


def sid_loss(
    fake: Denoiser,
    real: Denoiser,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    cond: Condition = None,
    *,
    alpha: float = 1.2,
    guidance: float = 1.0,
) -> Tensor:
    r"""The generator's loss of score identity distillation, per sample (B,).

    .. math:: L = \frac{(D_q - D_\psi)^T\big((D_q - x_0) - a\,(D_q - D_\psi)\big)}{\mathrm{mean}|x_0 - D_q|}

    With a = 1 and without the normaliser it is :func:`sim_loss` with half the squared L2 distance.

    Source: "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for One-Step Generation" (2024).
    """
    x_t = real.schedule.add_noise(x0, noise, t)
    with params_frozen(fake, real):
        of_fake = precise(fake.predict(x_t, t, cond, "x0"))
        of_real = precise(real.predict(x_t, t, cond, "x0", guidance))
    gap = of_real - of_fake
    product = (gap * ((of_real - x0) - alpha * gap)).flatten(1).sum(1)
    return product / l1_size(x0, of_real.detach())
