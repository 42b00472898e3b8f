r"""Kernel ridge regression that is distilled into itself: every step, its limit and its operators in closed form.

With the kernel matrix :math:`K` (n, n), targets :math:`y` (n, q), a ridge :math:`\lambda > 0` and weights
:math:`\alpha_\tau` of the ground truth, step :math:`\tau` fits the mixture of ground truth and the previous fitted values:

.. math::
    f^{(\tau)}(x) &= k_x (K + \lambda I)^{-1} \big[\alpha_\tau y + (1 - \alpha_\tau) y^{(\tau-1)}\big], \qquad y^{(0)} = y \\
    y^{(\tau)} &= K (K + \lambda I)^{-1} \big[\alpha_\tau y + (1 - \alpha_\tau) y^{(\tau-1)}\big]

Only the targets change, so one factorisation serves all steps, and no inverse is ever formed. Everything is float64.

Source: "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation" (2021);
the case without ground truth: "Self-Distillation Amplifies Regularization in Hilbert Space" (2020). A ridge of its own for
each step and low-rank features are extensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh

from limbeck.blocks.gt_weight import affine_weight
from limbeck.core.errors import InputError, UnknownNameError

Array = NDArray[np.float64]
GTWeight = float | Sequence[float] | Literal["optimal"]
SYMMETRIC = 1e-6  # largest asymmetry and negative eigenvalue of a kernel matrix, relative; a float32 one keeps below it


def gram(kernel: str | Callable[..., Any], x: Any, z: Any = None, **parameters: Any) -> Array:
    """The kernel matrix (n, m) of the rows of ``x`` (n, d) and ``z`` (m, d), or of ``x`` with itself.

    Args:
        kernel: a name that :func:`sklearn.metrics.pairwise.pairwise_kernels` knows, a function of two rows or a Gaussian-process
            kernel of scikit-learn; ``precomputed`` hands ``x`` back.
        parameters: of the kernel (``gamma`` …); by name only those that it has are used.

    Raises:
        UnknownNameError: no such kernel.
    """
    from sklearn.metrics.pairwise import kernel_metrics, pairwise_kernels

    if isinstance(kernel, str):
        if kernel == "precomputed":
            return np.asarray(x, dtype=np.float64)
        if kernel not in kernel_metrics():
            known = [*kernel_metrics(), "precomputed"]
            raise UnknownNameError("kernel", kernel, known, hint=f"Known: {', '.join(known)}.")
    found = pairwise_kernels(x, z, metric=kernel, filter_params=isinstance(kernel, str), **parameters)
    return np.asarray(found, dtype=np.float64)


class KernelRidge:
    r"""The ridge problem of a kernel matrix, factorised once.

    Coefficients c are dual: predictions are :math:`k_x c`.

    Args:
        kernel: K (n, n), symmetric and positive semi-definite.
        ridge: :math:`\lambda`; one value (Cholesky), or one per step (an eigendecomposition, which serves them all).

    Raises:
        InputError: a matrix that is not square, symmetric, finite or positive semi-definite; a ridge that is not above 0.
    """

    def __init__(self, kernel: ArrayLike, ridge: float | Sequence[float]) -> None:
        self.features = checked_kernel(kernel)
        self.ridges = checked_ridges(ridge)
        self._factorise(self.features)

    def coefficients(self, targets: Array, step: int = 0) -> Array:
        """Coefficients (n, q) of the fit to targets (n, q), under the ridge of a step (from 0)."""
        return self._solve(targets, step)

    def fitted(self, coefficients: Array) -> Array:
        """Predictions (n, q) for the training samples."""
        return np.asarray(self.features @ coefficients)

    def with_ridge(self, ridge: float) -> KernelRidge:
        """The same problem under another ridge."""
        return type(self)(self.features, ridge)

    @property
    def kernel(self) -> Array:
        """K (n, n)."""
        return self.features

    def _factorise(self, matrix: Array) -> None:
        if len(self.ridges) == 1:
            shifted = matrix.copy()
            shifted[np.diag_indices_from(shifted)] += self.ridges[0]
            try:
                self._cholesky = cho_factor(shifted, lower=True, overwrite_a=True)
            except LinAlgError:
                raise InputError(
                    f"the kernel matrix plus ridge {self.ridges[0]:g} is not positive definite: take a larger ridge, or a "
                    "kernel that is positive semi-definite (rbf, laplacian, linear …)"
                ) from None
        else:
            self._eigenvalues, self._eigenvectors = spectrum(matrix)

    def _solve(self, right: Array, step: int) -> Array:
        if len(self.ridges) == 1:
            return np.asarray(cho_solve(self._cholesky, right))
        shifted = self._eigenvalues + self.ridges[step]
        return np.asarray(self._eigenvectors @ ((self._eigenvectors.T @ right) / shifted[:, None]))


class FeatureRidge(KernelRidge):
    r"""The same problem for the kernel :math:`K = Z Z^\top` of explicit features, in their own dimension.

    Coefficients are the m primal weights :math:`(Z^\top Z + \lambda I)^{-1} Z^\top t`, and predictions :math:`z(x)^\top c`; fitted
    values are those of :class:`KernelRidge` on :math:`Z Z^\top`. For many samples and few features, such as a Nyström map's.

    Args:
        features: Z (n, m).
        ridge: as there.

    Raises:
        InputError: as there.
    """

    def __init__(self, features: ArrayLike, ridge: float | Sequence[float]) -> None:
        self.features = np.asarray(features, dtype=np.float64)
        if self.features.ndim != 2 or self.features.size == 0 or not np.isfinite(self.features).all():
            raise InputError(f"features must be a finite (n, m) array (got shape {self.features.shape})")
        self.ridges = checked_ridges(ridge)
        self._factorise(self.features.T @ self.features)

    def coefficients(self, targets: Array, step: int = 0) -> Array:
        """Weights (m, q) of the fit to targets (n, q), under the ridge of a step (from 0)."""
        return self._solve(self.features.T @ targets, step)

    @property
    def kernel(self) -> Array:
        return np.asarray(self.features @ self.features.T)


@dataclass(frozen=True)
class Steps:
    """All steps of a self-distillation.

    Attributes:
        coefficients: (T, n, q), or (T, m, q) for features; the last axis as the targets have it.
        weights: (T,) weights of the ground truth; 1 for the first step, which no weight can change.
        unconstrained: (T,) the weights before clipping; NaN where none was estimated.
        validation_losses: (T,) mean squared errors on validation data, or None without any.
    """

    coefficients: Array
    weights: Array
    unconstrained: Array
    validation_losses: Array | None


def self_distil(
    problem: KernelRidge,
    targets: Array,
    *,
    steps: int,
    gt_weight: GTWeight,
    validation: tuple[Array, Array] | None = None,
    clip: bool = True,
) -> Steps:
    r"""Run the recursion.

    The fit is linear in its targets, so each step costs one solve: :math:`c^{(\tau)} = \alpha_\tau c_y + (1-\alpha_\tau) c_\tau` with
    the coefficients :math:`c_y` of the fit to the ground truth and :math:`c_\tau` of the fit to the previous fitted values.
    ``optimal`` takes in each step the weight that makes the error on validation data least
    (:func:`~limbeck.blocks.gt_weight.affine_weight`); where both predict the same, the previous weight is kept.

    Args:
        problem: factorised.
        targets: y (n, q).
        steps: T, at least 1.
        gt_weight: one weight in [0, 1], T of them (the first has no effect), or ``optimal``.
        validation: kernel rows (N, n) or features (N, m) of validation samples, and their targets (N, q).
        clip: keep optimal weights in [0, 1].

    Raises:
        InputError: weights or steps out of range, a list of the wrong length, ``optimal`` without validation data.
    """
    if not isinstance(steps, int | np.integer) or steps < 1:
        raise InputError(f"steps must be an integer of at least 1 (got {steps!r})")
    if len(problem.ridges) not in (1, steps):
        raise InputError(f"{len(problem.ridges)} ridges for {steps} steps: give one, or one for each step")
    given = checked_weights(gt_weight, steps)
    if given is None and validation is None:
        raise InputError("gt_weight='optimal' needs validation data: give it, or constant weights")
    first = problem.coefficients(targets, 0)
    coefficients, weights, unconstrained = [first], [1.0], [np.nan]
    for step in range(1, steps):
        truth = first if len(problem.ridges) == 1 else problem.coefficients(targets, step)
        pure = problem.coefficients(problem.fitted(coefficients[-1]), step)
        if given is None:
            assert validation is not None
            rows, wanted = validation
            found = affine_weight(wanted, rows @ truth, rows @ pure, clip=clip, otherwise=weights[-1])
            weight = found.value
            unconstrained.append(found.unconstrained)
        else:
            weight = float(given[step])
            unconstrained.append(np.nan)
        weights.append(weight)
        coefficients.append(weight * truth + (1 - weight) * pure)
    stacked = np.stack(coefficients)
    return Steps(stacked, np.array(weights), np.array(unconstrained), _losses(stacked, validation))


def self_distilled_limit(
    problem: KernelRidge, targets: Array, gt_weight: float, *, validation: tuple[Array, Array] | None = None
) -> Steps:
    r"""What infinitely many steps under one weight come to: ridge regression with :math:`\lambda / \alpha`.

    Without ground truth (weight 0) that is the zero function.

    Args:
        problem: with one ridge.
        targets: y (n, q).
        gt_weight: in [0, 1].
        validation: as in :func:`self_distil`.

    Returns:
        one step, with that weight.

    Raises:
        InputError: a weight outside [0, 1], several weights or ridges.
    """
    if isinstance(gt_weight, str) or np.ndim(gt_weight) != 0 or len(problem.ridges) != 1:
        raise InputError("infinitely many steps have a limit only for one constant weight and one ridge: give numbers")
    checked_weights(gt_weight, 1)
    if gt_weight == 0:
        coefficients = np.zeros_like(problem.coefficients(targets))
    elif gt_weight == 1:
        coefficients = problem.coefficients(targets)
    else:
        coefficients = problem.with_ridge(problem.ridges[0] / gt_weight).coefficients(targets)
    stacked = coefficients[None]
    return Steps(stacked, np.array([float(gt_weight)]), np.array([np.nan]), _losses(stacked, validation))


def _losses(coefficients: Array, validation: tuple[Array, Array] | None) -> Array | None:
    if validation is None:
        return None
    rows, wanted = validation
    return np.asarray(((rows @ coefficients - wanted) ** 2).mean((1, 2)))


# ---- the spectral form -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpectralOperators:
    r"""The steps as operators on the targets, diagonal in the kernel's eigenvectors: :math:`y^{(\tau)} = V B^{(\tau)} V^\top y`.

    .. math::
        K = V D V^\top, \qquad A = D (D + \lambda I)^{-1}, \qquad B^{(0)} = I, \qquad
        B^{(\tau)} = A\,[\alpha_\tau I + (1 - \alpha_\tau) B^{(\tau-1)}]

    Self-distillation shrinks :math:`B` fastest where eigenvalues are small, so the solution becomes sparser in this basis; with
    :math:`\alpha > 0` the shrinking stops at :math:`D (D + (\lambda/\alpha) I)^{-1}`.

    Attributes:
        eigenvalues: D (n,), descending.
        eigenvectors: V (n, n), in columns.
        diagonals: (T + 1, n), row :math:`\tau` is the diagonal of :math:`B^{(\tau)}`.
        solved: (T, n), row :math:`\tau - 1` is :math:`D^{-1} B^{(\tau)}`, computed without dividing by D.
    """

    eigenvalues: Array
    eigenvectors: Array
    diagonals: Array
    solved: Array

    def matrix(self, step: int) -> Array:
        r"""The operator (n, n) itself, :math:`V B^{(\tau)} V^\top`; step 0 is the identity."""
        return np.asarray((self.eigenvectors * self.diagonals[step]) @ self.eigenvectors.T)

    def fitted(self, targets: Array, step: int) -> Array:
        """Fitted values (n, q) after a step."""
        return np.asarray(self.eigenvectors @ (self.diagonals[step][:, None] * (self.eigenvectors.T @ targets)))

    def predict(self, rows: Array, targets: Array, step: int) -> Array:
        """Predictions (N, q) after a step (from 1) for samples whose kernel values with the training samples are ``rows`` (N, n)."""
        if step < 1:
            raise InputError(
                f"step 0 is the targets themselves and predicts nothing: give a step of at least 1 (got {step})"
            )
        return np.asarray(
            rows @ (self.eigenvectors @ (self.solved[step - 1][:, None] * (self.eigenvectors.T @ targets)))
        )


def spectral_operators(
    kernel: ArrayLike, ridge: float | Sequence[float], weights: Sequence[float] | Array
) -> SpectralOperators:
    """The operators of as many steps as there are weights (the first has no effect).

    Args:
        kernel: K (n, n).
        ridge: one, or one per step.
        weights: of the ground truth, (T,); any finite numbers, as unclipped optimal ones.
    """
    eigenvalues, eigenvectors = spectrum(checked_kernel(kernel))
    ridges = checked_ridges(ridge)
    if len(ridges) not in (1, len(weights)):
        raise InputError(f"{len(ridges)} ridges for {len(weights)} steps: give one, or one for each step")
    diagonals, solved = [np.ones_like(eigenvalues)], []
    for step, weight in enumerate(weights):
        shifted = eigenvalues + ridges[step % len(ridges)]  # one ridge, or one for each step
        solved.append((weight + (1 - weight) * diagonals[-1]) / shifted)
        diagonals.append(eigenvalues * solved[-1])
    return SpectralOperators(eigenvalues, eigenvectors, np.stack(diagonals), np.stack(solved))


def limit_operators(kernel: ArrayLike, ridge: float, weight: float) -> SpectralOperators:
    """The operator of infinitely many steps under one weight, as step 1; zero for weight 0."""
    checked_weights(weight, 1)
    if weight > 0:
        return spectral_operators(kernel, ridge / weight, [1.0])
    eigenvalues, eigenvectors = spectrum(checked_kernel(kernel))
    zero = np.zeros_like(eigenvalues)
    return SpectralOperators(eigenvalues, eigenvectors, np.stack([np.ones_like(zero), zero]), zero[None])


def spectrum(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues (n,), descending and not below 0, and eigenvectors (n, n) of a positive semi-definite matrix.

    Raises:
        InputError: an eigenvalue is negative beyond rounding.
    """
    values, vectors = eigh(matrix)
    if values[0] < -SYMMETRIC * max(values[-1], 0.0):
        raise InputError(
            f"the kernel matrix is not positive semi-definite (an eigenvalue is {values[0]:.3g}): take another kernel, such as rbf"
        )
    return np.maximum(values[::-1], 0.0), np.ascontiguousarray(vectors[:, ::-1])


# ---- checks ----------------------------------------------------------------------------------------------------------


def checked_kernel(kernel: ArrayLike) -> Array:
    """The kernel matrix as float64.

    Raises:
        InputError: not square, not finite or not symmetric.
    """
    matrix = np.asarray(kernel, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise InputError(f"the kernel matrix of the training samples must be square (got shape {matrix.shape})")
    if not np.isfinite(matrix).all():
        raise InputError("the kernel matrix holds NaN or infinity: check the samples and the kernel's parameters")
    uneven = np.abs(matrix - matrix.T).max()
    if uneven > SYMMETRIC * np.abs(matrix).max():
        raise InputError("the kernel matrix is not symmetric: compute it between the training samples and themselves")
    return matrix if uneven == 0 else (matrix + matrix.T) / 2


def checked_ridges(ridge: float | Sequence[float]) -> Array:
    """The ridges (1,) or (T,).

    Raises:
        InputError: not numbers above 0.
    """
    try:
        found = np.atleast_1d(np.asarray(ridge, dtype=np.float64))
    except (TypeError, ValueError):
        found = np.array([np.nan])
    if found.ndim != 1 or found.size == 0 or not (np.isfinite(found) & (found > 0)).all():
        raise InputError(f"ridge must be a number above 0, or one for each step (got {ridge!r})")
    return found


def checked_weights(gt_weight: GTWeight, steps: int) -> Array | None:
    """The weights (T,) of all steps, or None where they are to be optimal.

    Raises:
        InputError: neither ``optimal`` nor numbers in [0, 1], or not as many as steps.
    """
    if isinstance(gt_weight, str):
        if gt_weight == "optimal":
            return None
        raise InputError(f"gt_weight must be 'optimal', a number in [0, 1], or one for each step (got {gt_weight!r})")
    try:
        found = np.asarray(gt_weight, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.array(np.nan)
    if found.ndim > 1 or found.size == 0 or not ((found >= 0) & (found <= 1)).all():
        raise InputError(f"gt_weight must be 'optimal', a number in [0, 1], or one for each step (got {gt_weight!r})")
    if found.ndim == 1 and len(found) != steps:
        raise InputError(
            f"gt_weight has {len(found)} weights for {steps} steps: give one for each step (the first has no effect)"
        )
    return np.broadcast_to(found, (steps,))
