r"""What a network predicts, and how one prediction becomes another.

``x0`` the clean sample; ``eps`` the noise; ``v`` :math:`= \alpha\epsilon - \sigma x_0` (variance-preserving schedules only); ``flow``
:math:`= dx_t/dt = \alpha' x_0 + \sigma'\epsilon`; ``score`` :math:`= \nabla \log p_t = -\epsilon/\sigma`. All are affine in each other at a
given :math:`(x_t, t)`, so averages with weights that sum to 1 (guidance, ensembles) may be taken in any of them.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.schedules import Schedule, expand, precise

Prediction = Literal["x0", "eps", "v", "flow", "score"]
PREDICTIONS: tuple[Prediction, ...] = ("x0", "eps", "v", "flow", "score")
LEAST = 1e-6
"""Denominators are kept this far from 0: alpha near pure noise, sigma near clean data."""


def check_prediction(prediction: str, schedule: Schedule) -> None:
    """Raises an InputError if there is no such prediction, or none with this schedule."""
    if prediction not in PREDICTIONS:
        raise UnknownNameError("prediction", prediction, PREDICTIONS)
    if prediction == "v" and not schedule.variance_preserving:
        raise InputError(
            f"the prediction 'v' needs alpha^2 + sigma^2 = 1, which '{schedule.name}' has not: a velocity there is 'flow'"
        )


def convert(value: Tensor, source: str, target: str, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """A prediction (B, ...) in another form.

    Args:
        value: the prediction, of the form ``source``.
        source, target: names in :data:`PREDICTIONS`.
        x_t: (B, ...) where it was made.
        t: (B,) or () when.
        schedule: of ``t``.

    Raises:
        InputError: ``v`` with a schedule that does not preserve variance; an unknown name.
    """
    check_prediction(source, schedule)
    check_prediction(target, schedule)
    if source == target:
        return value
    dtype = value.dtype
    value, x_t = precise(value), precise(x_t)
    alpha, sigma = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)
    x0, eps = _pair(value, source, x_t, t, alpha, sigma, schedule)
    if target == "x0":
        found = x0
    elif target == "eps":
        found = eps
    elif target == "v":
        found = alpha * eps - sigma * x0
    elif target == "flow":
        found = expand(schedule.dalpha(t), x_t) * x0 + expand(schedule.dsigma(t), x_t) * eps
    else:
        found = -eps / sigma.clamp_min(LEAST)
    return found.to(dtype)


def _pair(
    value: Tensor, source: str, x_t: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise that a prediction means; the direct form where there is one, for precision."""
    if source == "x0":
        return value, (x_t - alpha * value) / sigma.clamp_min(LEAST)
    if source == "eps":
        return (x_t - sigma * value) / alpha.clamp_min(LEAST), value
    if source == "v":
        return alpha * x_t - sigma * value, sigma * x_t + alpha * value
    if source == "score":
        return (x_t + sigma**2 * value) / alpha.clamp_min(LEAST), -sigma * value
    dalpha, dsigma = expand(schedule.dalpha(t), x_t), expand(schedule.dsigma(t), x_t)
    # Solve alpha x0 + sigma eps = x_t, alpha' x0 + sigma' eps = u; the determinant is positive as nsr grows with t.
    determinant = (dsigma * alpha - sigma * dalpha).clamp_min(LEAST)
    return (dsigma * x_t - sigma * value) / determinant, (alpha * value - dalpha * x_t) / determinant


def error_weight(space: str, t: Tensor, schedule: Schedule) -> Tensor:
    """The factor between a squared error in ``space`` and the squared error in x0, at the same x_t: e_space = factor * e_x0."""
    check_prediction(space, schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if space == "x0":
        return alpha * 0 + 1
    if space == "eps":
        return (alpha / sigma.clamp_min(LEAST)) ** 2
    if space == "v":
        return 1 / sigma.clamp_min(LEAST) ** 2
    if space == "score":
        return (alpha / sigma.clamp_min(LEAST) ** 2) ** 2
    return ((schedule.dsigma(t) * alpha - sigma * schedule.dalpha(t)) / sigma.clamp_min(LEAST)) ** 2
