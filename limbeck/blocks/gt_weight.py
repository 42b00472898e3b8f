"""The best weight between two predictors, where the prediction is affine in the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.core.errors import InputError


@dataclass(frozen=True)
class AffineWeight:
    """An estimated weight.

    Attributes:
        value: the weight to use.
        unconstrained: the minimiser over all real numbers; equal to ``value`` unless it was clipped or could not be told.
        told: False where the two predictors say the same, so that every weight is as good as any other.
    """

    value: float
    unconstrained: float
    told: bool


def affine_weight(
    target: Any, first: Any, pure: Any, *, clip: bool = True, otherwise: float = 1.0, eps: float = 1e-16
) -> AffineWeight:
    r"""The weight :math:`\alpha` for which :math:`\alpha f + (1-\alpha) g` is nearest to the target.

    .. math:: \alpha^* = \frac{\langle y - g,\; f - g\rangle}{\lVert f - g\rVert^2}

    with the sum going over samples and outputs. In self-distillation, f is the fit on ground truth alone and g the fit on the
    previous step's predictions alone: in kernel ridge regression the fit on a mixture of both targets is exactly this
    combination, so :math:`\alpha^*` is the best weight of the ground truth. For networks it is an approximation.

    Args:
        target: y, (N,) or (N, Q): ground truth of samples that neither predictor was fitted on.
        first: f, predictions of the fit on ground truth, same shape.
        pure: g, predictions of the fit on the previous predictions, same shape.
        clip: keep the weight in [0, 1]; otherwise it may extrapolate.
        otherwise: the weight where f and g agree.
        eps: f and g agree if :math:`\lVert f-g\rVert^2` is at most so much of the larger of :math:`\lVert f\rVert^2` and
            :math:`\lVert g\rVert^2`.

    Returns:
        the weight; computed in float64.

    Raises:
        InputError: shapes differ, no sample, or a value that is not finite.

    Source: "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation" (2021).
    """
    y, f, g = (np.asarray(v, dtype=np.float64) for v in (target, first, pure))
    if not y.shape == f.shape == g.shape or y.size == 0:
        raise InputError(
            f"target, first and pure predictions must have one shape and at least one sample (got {y.shape}, {f.shape}, {g.shape})"
        )
    if not all(np.isfinite(v).all() for v in (y, f, g)):
        raise InputError(
            "the weight cannot be estimated: targets or predictions on validation data hold NaN or infinity"
        )
    gap = f - g
    size = float(np.vdot(gap, gap))
    if size <= eps * max(float(np.vdot(f, f)), float(np.vdot(g, g))):
        return AffineWeight(otherwise, otherwise, False)
    best = float(np.vdot(y - g, gap)) / size
    return AffineWeight(min(1.0, max(0.0, best)) if clip else best, best, True)
