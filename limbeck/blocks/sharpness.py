r"""Sharpness of a loss at a point, and gradients that lead to flat regions.

:func:`gsam_gradient` is a step of stochastic gradient descent on :math:`L(\theta) + \alpha\,[\max_{\lVert e\rVert\le\rho}
L(\theta+e) - L(\theta)]` by the surrogate-gap method. With :math:`g = \nabla L(\theta)`,

.. math:: e = \rho\,\frac{\theta^2 \odot g}{\lVert\,|\theta| \odot g\,\rVert}\ \text{(adaptive; else } \rho\, g/\lVert g\rVert),
          \qquad g_p = \nabla L(\theta + e),
.. math:: g_\perp = g - \cos(g, g_p)\,\lVert g\rVert\,\frac{g_p}{\lVert g_p\rVert},\qquad \text{step along } g_p - \alpha\, g_\perp .

Sources: "Sharpness-Aware Minimization for Efficiently Improving Generalization" (2021), "ASAM: Adaptive Sharpness-Aware
Minimization for Scale-Invariant Learning of Deep Neural Networks" (2021), "Surrogate Gap Minimization Improves Sharpness-Aware
Training" (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.core.errors import InputError

TINY = 1e-12
Gradients = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(K, P) parameters of K networks -> their losses (K,) and gradients (K, P); the same batch at every call."""


class FlatGradient(NamedTuple):
    """What :func:`gsam_gradient` returns.

    Attributes:
        gradient: (K, P), to step along.
        losses: (K,), at theta.
        gap: (K,), L(theta + e) - L(theta).
    """

    gradient: Tensor
    losses: Tensor
    gap: Tensor


def gsam_gradient(
    gradients: Gradients, theta: Tensor, *, rho: float, alpha: float, adaptive: bool = True
) -> FlatGradient:
    """The gradient of K networks towards flat regions, each network with norms and angles of its own.

    Args:
        gradients: evaluates losses and gradients on one batch and one augmentation.
        theta: (K, P).
        rho: radius; 0 gives the plain gradient, from one evaluation instead of two.
        alpha: weight of the gap; 0 gives the gradient at theta + e (sharpness-aware minimisation).
        adaptive: the radius is relative to each parameter's size.

    Raises:
        InputError: rho or alpha is negative.
    """
    if rho < 0 or alpha < 0:
        raise InputError(f"rho and alpha cannot be negative (got {rho:g} and {alpha:g})")
    losses, g = gradients(theta)
    if rho == 0:
        return FlatGradient(g, losses, torch.zeros_like(losses))
    direction = theta.square() * g if adaptive else g
    size = (theta.abs() * g if adaptive else g).norm(dim=1, keepdim=True)
    moved, g_p = gradients(theta + rho * direction / (size + TINY))
    if alpha == 0:
        return FlatGradient(g_p, losses, moved - losses)
    norm, norm_p = g.norm(dim=1, keepdim=True), g_p.norm(dim=1, keepdim=True)
    cosine = (g * g_p).sum(1, keepdim=True) / (norm * norm_p + TINY)
    perpendicular = g - cosine * norm * g_p / (norm_p + TINY)
    return FlatGradient(g_p - alpha * perpendicular, losses, moved - losses)


def sharpness(gradients: Gradients, theta: Tensor, rho: float = 0.5) -> Tensor:
    r"""(K,) how much the loss rises within a radius: :math:`L(\theta + \rho\,g/\lVert g\rVert) - L(\theta)`.

    Args:
        gradients: see :func:`gsam_gradient`.
        theta: (K, P).
        rho: radius, in the norm of the parameters, above 0.

    Raises:
        InputError: rho is not above 0.
    """
    if not rho > 0:
        raise InputError(f"the radius must be above 0 (got {rho:g})")
    losses, g = gradients(theta)
    moved, _ = gradients(theta + rho * g / (g.norm(dim=1, keepdim=True) + TINY))
    return moved - losses
