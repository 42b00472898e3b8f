"""Ground-truth-guided self-distillation of kernel ridge regression, as scikit-learn estimators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.kernel_approximation import Nystroem
from sklearn.utils import check_array, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from limbeck.blocks import kernel_ridge
from limbeck.blocks.kernel_ridge import Array, FeatureRidge, GTWeight, KernelRidge, SpectralOperators
from limbeck.core.errors import InputError


class _KernelSelfDistilled(BaseEstimator):
    """What the regressor and the classifier share."""

    def __init__(
        self,
        kernel: str | Callable[..., Any] = "rbf",
        *,
        ridge: float | Sequence[float] = 1.0,
        gt_weight: GTWeight = "optimal",
        steps: float = 8,
        clip: bool = True,
        validation_fraction: float | None = 0.2,
        gamma: float | None = None,
        degree: float = 3,
        coef0: float = 1,
        kernel_params: Mapping[str, Any] | None = None,
        landmarks: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.kernel = kernel
        self.ridge = ridge
        self.gt_weight = gt_weight
        self.steps = steps
        self.clip = clip
        self.validation_fraction = validation_fraction
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.kernel_params = kernel_params
        self.landmarks = landmarks
        self.random_state = random_state

    # ---- fitting -----------------------------------------------------------------------------------------------------

    def _fit(self, X: Array, Y: Array, X_val: Any, Y_val: Array | None) -> Self:
        """Fit to targets Y (n, q); both parts are checked already."""
        optimal = self._check_parameters()
        if optimal and Y_val is None:
            X, Y, X_val, Y_val = self._split(X, Y)
        problem = self._problem(X)
        validation = None if Y_val is None else (self._rows(X_val), Y_val)
        if math.isinf(self.steps):
            found = kernel_ridge.self_distilled_limit(problem, Y, self.gt_weight, validation=validation)  # type: ignore[arg-type]
        else:
            found = kernel_ridge.self_distil(
                problem, Y, steps=int(self.steps), gt_weight=self.gt_weight, validation=validation, clip=self.clip
            )
        self.coefficients_ = found.coefficients
        self.gt_weights_ = found.weights
        self.unconstrained_gt_weights_ = found.unconstrained
        self.validation_losses_ = found.validation_losses
        self.targets_ = Y
        return self

    def _check_parameters(self) -> bool:
        """Whether weights are to be optimal.

        Raises:
            InputError: parameters that do not fit each other; the values themselves are checked where they are used.
        """
        steps = self.steps
        endless = isinstance(steps, int | float) and math.isinf(steps) and steps > 0
        if not endless and (isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1):
            raise InputError(f"steps must be an integer of at least 1, or infinity (got {steps!r})")
        optimal = isinstance(self.gt_weight, str) and self.gt_weight == "optimal"
        if endless and (optimal or np.ndim(self.gt_weight) or np.ndim(self.ridge)):
            raise InputError(
                "infinitely many steps have a limit only for one constant gt_weight and one ridge: give numbers, or finitely many steps"
            )
        kernel_ridge.checked_weights(self.gt_weight, 1 if endless else int(steps))
        kernel_ridge.checked_ridges(self.ridge)
        if self.landmarks is not None:
            if self.kernel == "precomputed":
                raise InputError(
                    "landmarks are samples, and a precomputed kernel comes without any: leave one of the two out"
                )
            if not isinstance(self.landmarks, int | np.integer) or self.landmarks < 1:
                raise InputError(f"landmarks must be an integer of at least 1 (got {self.landmarks!r})")
        return optimal

    def _split(self, X: Array, Y: Array) -> tuple[Array, Array, Array, Array]:
        """Training and validation parts, drawn at random."""
        share = self.validation_fraction
        if share is None:
            raise InputError(
                "gt_weight='optimal' needs validation data: fit(X, y, X_val, y_val), a validation_fraction, or constant weights"
            )
        if not isinstance(share, int | float) or not 0 < share < 1:
            raise InputError(f"validation_fraction must be a number between 0 and 1, or None (got {share!r})")
        n = len(X)
        held = max(1, round(share * n))
        if n - held < 1:
            raise InputError(
                f"n_samples={n} cannot be split into training and validation data: give more samples, or constant weights"
            )
        order = check_random_state(self.random_state).permutation(n)
        val, train = np.sort(order[:held]), np.sort(order[held:])
        if self.kernel == "precomputed":
            self.train_indices_ = train
            return X[np.ix_(train, train)], Y[train], X[np.ix_(val, train)], Y[val]
        return X[train], Y[train], X[val], Y[val]

    def _problem(self, X: Array) -> KernelRidge:
        """The factorised problem of the training samples."""
        self.X_fit_ = X
        if self.landmarks is None:
            return KernelRidge(self._gram(X), self.ridge)
        self.nystroem_ = Nystroem(
            kernel=self.kernel,
            n_components=min(self.landmarks, len(X)),
            random_state=check_random_state(self.random_state),
            **self._nystroem_parameters(),
        ).fit(X)
        return FeatureRidge(self.nystroem_.transform(X), self.ridge)

    def _gram(self, X: Array, Z: Array | None = None) -> Array:
        parameters: dict[str, Any] = dict(self.kernel_params or {})
        if isinstance(self.kernel, str):
            parameters = {"gamma": self.gamma, "degree": self.degree, "coef0": self.coef0, **parameters}
        return kernel_ridge.gram(self.kernel, X, Z, **parameters)

    def _nystroem_parameters(self) -> dict[str, Any]:
        kernel_ridge.gram(self.kernel, self.X_fit_[:1])  # an unknown kernel's error is ours
        given: dict[str, Any] = {"kernel_params": None if self.kernel_params is None else dict(self.kernel_params)}
        if not isinstance(self.kernel, str):
            return given
        wanted = {"gamma": self.gamma}
        if self.kernel in ("poly", "polynomial"):
            wanted["degree"] = self.degree
        if self.kernel in ("poly", "polynomial", "sigmoid"):
            wanted["coef0"] = self.coef0
        return {**given, **wanted}

    def _rows(self, X: Array) -> Array:
        """What coefficients are multiplied with: kernel values with the training samples, or features."""
        if self.landmarks is not None:
            return np.asarray(self.nystroem_.transform(X), dtype=np.float64)
        if self.kernel == "precomputed":
            return X
        return self._gram(X, self.X_fit_)

    # ---- predicting --------------------------------------------------------------------------------------------------

    def _checked_rows(self, X: Any) -> Array:
        check_is_fitted(self)
        with _one_line():
            X = validate_data(self, X, reset=False, dtype=np.float64)
        if self.kernel == "precomputed" and hasattr(self, "train_indices_"):
            X = X[:, self.train_indices_]
        return self._rows(X)

    def _scores(self, X: Any) -> Array:
        """(N, q) outputs after the last step."""
        return np.asarray(self._checked_rows(X) @ self.coefficients_[-1])

    def _staged_scores(self, X: Any) -> Iterator[Array]:
        rows = self._checked_rows(X)
        return (rows @ coefficients for coefficients in self.coefficients_)

    def operators(self) -> SpectralOperators:
        r"""The steps as operators :math:`B^{(\tau)}` on the targets of the training samples (an eigendecomposition, O(n³)).

        With infinitely many steps there is one, the limit. Where validation data was split off, the training samples are the
        rest, whose targets are ``targets_``; with ``landmarks`` they belong to the approximated kernel.
        """
        check_is_fitted(self)
        kernel = self.X_fit_ if self.kernel == "precomputed" else self._gram(self.X_fit_)
        if self.landmarks is not None:
            kernel = FeatureRidge(self.nystroem_.transform(self.X_fit_), self.ridge).kernel
        if math.isinf(self.steps):
            return kernel_ridge.limit_operators(kernel, self.ridge, float(self.gt_weights_[0]))  # type: ignore[arg-type]
        return kernel_ridge.spectral_operators(kernel, self.ridge, self.gt_weights_)

    def _check_validation(self, X_val: Any, y_val: Any) -> Array | None:
        """Validation inputs as an array with as many columns as the training data."""
        if (X_val is None) != (y_val is None):
            raise InputError("give both X_val and y_val, or neither")
        if X_val is None:
            return None
        with _one_line():
            found = check_array(X_val, dtype=np.float64, input_name="X_val")
        if found.shape[1] != self.n_features_in_:
            raise InputError(f"X_val has {found.shape[1]} features, but X has {self.n_features_in_}")
        return np.asarray(found)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.kernel == "precomputed"
        return tags


class KernelSelfDistillation(MultiOutputMixin, RegressorMixin, _KernelSelfDistilled):
    r"""Kernel ridge regression, distilled into itself under the guidance of ground-truth targets.

    With the kernel matrix :math:`K` (n, n) of the training samples, targets :math:`y` (n, q), :math:`y^{(0)} = y` and weights
    :math:`\alpha_\tau` of the *ground truth* (elsewhere such weights are often the teacher's), step :math:`\tau` solves

    .. math::
        \min_\beta\; \tfrac{\alpha_\tau}{2} \lVert \Phi\beta - y \rVert^2
        + \tfrac{1-\alpha_\tau}{2} \lVert \Phi\beta - y^{(\tau-1)} \rVert^2 + \tfrac{\lambda}{2} \lVert \beta \rVert^2

    in closed form: :math:`f^{(\tau)}(x) = k_x (K+\lambda I)^{-1} [\alpha_\tau y + (1-\alpha_\tau) y^{(\tau-1)}]`. The first step is the
    ordinary fit whatever its weight. One factorisation serves all steps.

    What to expect. Each step without ground truth (:math:`\alpha = 0`) regularises more, and in the end the solution is the zero
    function (so centre the targets); with a constant :math:`\alpha > 0` the steps converge, linearly, to ridge regression with
    :math:`\lambda / \alpha`. Where :math:`\lambda` is too small, distillation therefore helps; where it is large, ground truth keeps it
    from doing harm. The optimal weight of each step follows from validation data in closed form, because predictions are affine in
    it (:func:`limbeck.blocks.gt_weight.affine_weight`).

    Args:
        kernel: a name of scikit-learn's pairwise kernels, a function of two rows, a Gaussian-process kernel, or ``precomputed``
            (X is then the kernel matrix, and X_val has a column for each training sample).
        ridge: :math:`\lambda > 0` (scikit-learn's ``KernelRidge`` calls it alpha), or a list of one for each step.
        gt_weight: :math:`\alpha`: a number in [0, 1], a list of one for each step, or ``optimal``.
        steps: T, at least 1; ``math.inf`` for the limit, which needs one constant weight and one ridge.
        clip: keep optimal weights in [0, 1]; without it they may extrapolate.
        validation_fraction: of the training data, held out for optimal weights where ``fit`` gets no validation data. The
            estimator is then fitted on the rest. Not used with constant weights.
        gamma, degree, coef0: of the kernel, as far as it has them; ``gamma=None`` is the kernel's own default (1 / features).
        kernel_params: further parameters of the kernel.
        landmarks: number of them in a Nyström approximation, for more samples than a kernel matrix (n, n) has room for; costs
            O(n m²) instead of O(n³). None: exact.
        random_state: draws the validation samples and the landmarks.

    Attributes:
        coefficients_: (T, n, q) dual coefficients after each step; with ``landmarks``, (T, m, q) weights of the features.
        gt_weights_: (T,) weights used; 1 for the first step. With infinitely many steps the constant one.
        unconstrained_gt_weights_: (T,) optimal weights before clipping, NaN where none was estimated.
        validation_losses_: (T,) mean squared errors on validation data, or None.
        X_fit_, targets_: the samples (n, d) and targets (n, q) that the steps were fitted to.
        n_features_in_: number of features.

    Examples:
        >>> from sklearn.datasets import load_diabetes
        >>> from sklearn.preprocessing import scale
        >>> X, y = (scale(v) for v in load_diabetes(return_X_y=True))
        >>> model = KernelSelfDistillation(gamma=0.02, ridge=0.01, random_state=0).fit(X, y)
        >>> first, *later = model.staged_predict(X)

    Source: "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation" (2021).
    Our decisions: optimal weights are clipped unless asked otherwise; where both candidate predictions agree, the previous weight
    is kept; a ridge for each step and the Nyström approximation are extensions.
    """

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit all steps.

        Args:
            X: (n, d), or the kernel matrix (n, n).
            y: (n,) or (n, q).
            X_val, y_val: samples for optimal weights and the validation losses; (N, d), or kernel values (N, n).

        Raises:
            InputError, UnknownNameError: a wrong parameter or array, in one line that says which.
        """
        with _one_line():
            X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        X_val = self._check_validation(X_val, y_val)
        wanted = None
        if X_val is not None:
            with _one_line():
                wanted = check_array(y_val, dtype=np.float64, ensure_2d=False, input_name="y_val")
            if wanted.shape != (len(X_val), *y.shape[1:]):
                raise InputError(f"y_val has shape {wanted.shape}; expected {(len(X_val), *y.shape[1:])}")
            wanted = wanted.reshape(len(wanted), -1)
        self._flat = y.ndim == 1
        return self._fit(X, y.reshape(len(y), -1).astype(np.float64), X_val, wanted)

    def predict(self, X: Any) -> Array:
        """Predictions after the last step, (N,) or (N, q) as y was."""
        return self._shaped(self._scores(X))

    def staged_predict(self, X: Any) -> Iterator[Array]:
        """Predictions after each step, the first fit first."""
        return map(self._shaped, self._staged_scores(X))

    def _shaped(self, scores: Array) -> Array:
        return scores[:, 0] if self._flat else scores


class KernelSelfDistillationClassifier(ClassifierMixin, _KernelSelfDistilled):
    """Classification by regression on one-hot targets with :class:`KernelSelfDistillation`, whose parameters it shares.

    The class with the largest output is predicted; outputs are no probabilities. Optimal weights minimise the squared error of
    the outputs on validation data.

    Attributes:
        classes_: (C,) labels, in the outputs' order.
        coefficients_, gt_weights_, …: see there, with q = C.
    """

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit all steps to labels y (n,); ``X_val`` and ``y_val`` as for the regressor.

        Raises:
            InputError, UnknownNameError: a wrong parameter or array, or validation labels that training has not.
        """
        with _one_line():
            X, y = validate_data(self, X, y, dtype=np.float64)
            check_classification_targets(y)
        X_val = self._check_validation(X_val, y_val)
        self.classes_, codes = np.unique(y, return_inverse=True)
        one_hot = np.eye(len(self.classes_))
        wanted = None
        if X_val is not None:
            labels = np.asarray(y_val)
            if labels.shape != (len(X_val),) or not np.isin(labels, self.classes_).all():
                raise InputError("y_val must hold one label for each row of X_val, of the classes that y has")
            wanted = one_hot[np.searchsorted(self.classes_, labels)]
        return self._fit(X, one_hot[codes], X_val, wanted)

    def decision_function(self, X: Any) -> Array:
        """Outputs (N, C) after the last step; for two classes (N,), the second's minus the first's."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> Any:
        """Labels (N,) after the last step."""
        return self._labelled(self._scores(X))

    def staged_predict(self, X: Any) -> Iterator[Any]:
        """Labels after each step, the first fit first."""
        return map(self._labelled, self._staged_scores(X))

    def _labelled(self, scores: Array) -> Any:
        return self.classes_[scores.argmax(1)]


@contextmanager
def _one_line() -> Iterator[None]:
    """scikit-learn's complaints about arrays as ours, in one line."""
    try:
        yield
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error
