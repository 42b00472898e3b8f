"""What scikit-learn estimators of a graph share: checked input, prediction, a score on new data, networkx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from limbeck.blocks.acyclicity import FloatArray
from limbeck.blocks.dags import to_networkx
from limbeck.core.errors import InputError

if TYPE_CHECKING:
    import networkx


class DAGEstimator(BaseEstimator):
    """Base of the estimators whose :meth:`fit` finds ``weights_``, ``adjacency_`` and ``center_``.

    Attributes:
        weights_: (d, d), entry (i, j) for the edge i → j.
        adjacency_: (d, d), the weights above the threshold: a DAG.
        center_: (d,) what is subtracted from the columns.
    """

    weights_: FloatArray
    adjacency_: FloatArray
    center_: FloatArray
    n_features_in_: int

    def predict(self, X: Any) -> FloatArray:
        """Each variable as its parents explain it (n, d), by ``weights_``."""
        check_is_fitted(self)
        return self._explained(self._checked(X, reset=False))

    def score(self, X: Any, y: Any = None) -> float:
        r"""Minus :math:`\frac{1}{2n}\|X - \hat X\|_F^2` on any samples: higher is better."""
        check_is_fitted(self)
        checked = self._checked(X, reset=False)
        return -0.5 * float(((checked - self._explained(checked)) ** 2).sum()) / len(checked)

    def to_networkx(self) -> networkx.DiGraph:
        """The graph of ``adjacency_``; nodes are column names where the data had any, else numbers; edges have a ``weight``."""
        check_is_fitted(self)
        names = getattr(self, "feature_names_in_", None)
        return to_networkx(self.adjacency_, None if names is None else [str(n) for n in names])

    def _explained(self, checked: FloatArray) -> FloatArray:
        found: FloatArray = self.center_ + (checked - self.center_) @ self.weights_
        return found

    def _checked(self, X: Any, *, reset: bool) -> FloatArray:
        """Samples as float64, checked by scikit-learn; what it objects to is said in one line."""
        least = 2 if reset else 1
        try:
            found: FloatArray = validate_data(self, X, dtype=np.float64, reset=reset, ensure_min_samples=least)
        except ValueError as error:
            raise InputError(" ".join(str(error).split())) from error
        return found

    def _generator(self) -> np.random.Generator:
        """From ``random_state``, as scikit-learn takes it."""
        drawn = check_random_state(getattr(self, "random_state", None)).randint(2**31 - 1)
        return np.random.default_rng(int(drawn))


def at_least(name: str, value: Any, least: float, *, strict: bool = False) -> None:
    """Check a numeric setting.

    Raises:
        InputError: no number, or too small a one.
    """
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not (value > least if strict else value >= least):
        raise InputError(f"{name} must be {'>' if strict else '>='} {least:g} (got {value!r})")


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Check a setting that is one of several words.

    Raises:
        InputError: another one.
    """
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)} (got {value!r})")
