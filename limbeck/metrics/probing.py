"""How good frozen features are: linear and nearest-neighbour classifiers on top of them.

Features are standardised per feature with the mean and deviation of the *training* features, always: a linear probe without it
under-reports features of small scale. The classifiers follow scikit-learn: ``fit``, ``predict``, ``score``.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from limbeck.blocks.encoders import Encoder, Pooling
from limbeck.core.batch import call_model
from limbeck.core.data import Data
from limbeck.core.errors import InputError


class Standardiser:
    """Features with mean 0 and deviation 1, by the statistics of the features it was fitted on.

    A deviation below ten times the machine epsilon (of a feature that is constant up to rounding) counts as 1.
    """

    mean: Tensor
    std: Tensor

    def fit(self, features: Tensor) -> Self:
        """Statistics of features (N, D)."""
        _check_features(features)
        x = features.double()
        self.mean, std = x.mean(0), x.std(0, correction=0)
        self.std = torch.where(std < 10 * torch.finfo(features.dtype).eps, torch.ones_like(std), std)
        return self

    def transform(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D), in the type of the input.

        Raises:
            InputError: not fitted, or another width.
        """
        if not hasattr(self, "mean"):
            raise InputError("the features' statistics are not known yet: call fit first")
        _check_features(features)
        if features.shape[1] != len(self.mean):
            raise InputError(f"features are {features.shape[1]} wide, but those fitted on were {len(self.mean)} wide")
        return ((features.double() - self.mean) / self.std).to(features.dtype)


class _Probe:
    """Standardise, then classify."""

    def __init__(self) -> None:
        self.standardiser = Standardiser()

    def fit(self, features: Tensor, labels: Tensor) -> Self:
        """Fit on features (N, D) and class indices (N,), on the CPU.

        Raises:
            InputError: shapes or types that do not fit, features that are not finite, fewer than two classes.
        """
        labels = _checked_labels(features, labels)
        if len(labels.unique()) < 2:
            raise InputError("a probe needs samples of at least two classes")
        self._fit(self.standardiser.fit(features).transform(features), labels)
        return self

    def predict(self, features: Tensor) -> Tensor:
        """Classes (N,), int64, of features (N, D)."""
        return self._predict(self.standardiser.transform(features))

    def score(self, features: Tensor, labels: Tensor) -> float:
        """Accuracy on features (N, D) with labels (N,)."""
        labels = _checked_labels(features, labels)
        return float((self.predict(features) == labels).double().mean())

    def _fit(self, features: Tensor, labels: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not say how to fit")

    def _predict(self, features: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say how to predict")


class LinearProbe(_Probe):
    """A linear classifier on frozen features.

    Args:
        solver: ``logistic``, multinomial logistic regression by scikit-learn, which is deterministic and converges; or ``adamw``,
            a linear layer trained by AdamW (learning rate 1e-3) in batches of 256, as "Random Teachers are Good Teachers" (2023) does
            on tens of thousands of samples (with few it ends before it has converged).
        c: inverse strength of the L2 penalty, of ``logistic`` only.
        epochs: passes over the features, of ``adamw`` only.
        seed: seeds initialisation and order, of ``adamw`` only.

    Raises:
        InputError: ``c`` not positive, or ``epochs`` below 1.
    """

    def __init__(
        self, solver: Literal["logistic", "adamw"] = "logistic", *, c: float = 0.1, epochs: int = 10, seed: int = 0
    ) -> None:
        super().__init__()
        if not c > 0:
            raise InputError(f"c of a linear probe must be positive (got {c})")
        if epochs < 1:
            raise InputError(f"epochs of a linear probe must be at least 1 (got {epochs})")
        self.solver, self.c, self.epochs, self.seed = solver, c, epochs, seed

    def _fit(self, features: Tensor, labels: Tensor) -> None:
        if self.solver == "adamw":
            self._train(features, labels)
            return
        from sklearn.linear_model import LogisticRegression

        self.model: Any = LogisticRegression(C=self.c, max_iter=1000).fit(_array(features), labels.numpy())

    def _train(self, features: Tensor, labels: Tensor, batch_size: int = 256) -> None:
        self.classes, targets = labels.unique(return_inverse=True)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            self.layer = nn.Linear(features.shape[1], len(self.classes)).to(features.dtype)
            optimizer = torch.optim.AdamW(self.layer.parameters())
            for _ in range(self.epochs):
                for index in torch.randperm(len(features)).split(batch_size):
                    optimizer.zero_grad()
                    F.cross_entropy(self.layer(features[index]), targets[index]).backward()
                    optimizer.step()

    @torch.no_grad()
    def _predict(self, features: Tensor) -> Tensor:
        if self.solver == "adamw":
            return self.classes[self.layer(features).argmax(1)]
        return torch.from_numpy(self.model.predict(_array(features)))


class KNNProbe(_Probe):
    """The majority among the ``k`` nearest training samples, by Euclidean distance of standardised features.

    Args:
        k: neighbours, all with the same weight; between classes with equally many votes the smaller index wins.

    Raises:
        InputError: ``k`` below 1, or more than there are training samples.
    """

    def __init__(self, k: int = 20) -> None:
        super().__init__()
        if k < 1:
            raise InputError(f"k of a nearest-neighbour probe must be at least 1 (got {k})")
        self.k = k

    def _fit(self, features: Tensor, labels: Tensor) -> None:
        from sklearn.neighbors import KNeighborsClassifier

        if self.k > len(features):
            raise InputError(
                f"k = {self.k} neighbours are more than the {len(features)} training samples: take a smaller k"
            )
        self.model: Any = KNeighborsClassifier(self.k).fit(_array(features), labels.numpy())

    def _predict(self, features: Tensor) -> Tensor:
        return torch.from_numpy(self.model.predict(_array(features)))


@torch.no_grad()
def extract_features(
    model: nn.Module, data: Data, *, pooling: Pooling = "mean", batch_size: int = 512
) -> tuple[Tensor, Tensor | None]:
    """Features (N, D) and labels (N,) of a whole data set, unaugmented, on the CPU.

    The model runs in evaluation mode; its training flags are as before afterwards.

    Args:
        model: see :class:`limbeck.blocks.encoders.Encoder`; ``RawInput()`` there gives the raw inputs.
        data: labels None where it has none.
        pooling: of maps and tokens.
        batch_size: samples at a time.
    """
    encoder = Encoder(model, pooling)
    flags = [(module, module.training) for module in model.modules()]
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    features, labels = [], []
    encoder.eval()
    try:
        for batch in data.batches(batch_size):
            inputs = (batch if device is None else batch.to(device)).inputs
            features.append(call_model(encoder, inputs).float().cpu())
            labels.append(batch.labels)
    finally:
        for module, training in flags:
            module.training = training
    known = [y for y in labels if y is not None]
    return torch.cat(features), torch.cat(known).cpu() if len(known) == len(labels) else None


def probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, linear: LinearProbe | None = None, k: int = 20
) -> dict[str, float]:
    """Accuracy of both probes: fitted on training features, measured on test features.

    Args:
        train, test: features (N, D) and labels (N,).
        linear: the linear probe; logistic regression if None.
        k: neighbours.

    Returns:
        ``linear_probe`` and ``knn_probe``, in [0, 1].
    """
    return {
        "linear_probe": (linear or LinearProbe()).fit(*train).score(*test),
        "knn_probe": KNNProbe(k).fit(*train).score(*test),
    }


def _array(features: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = np.ascontiguousarray(features.numpy())
    return found


def _check_features(features: Tensor) -> None:
    if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
        raise InputError(
            f"features must be a matrix (samples, features) of floats, not {features.dtype} {tuple(features.shape)}"
        )
    if not bool(torch.isfinite(features).all()):
        raise InputError("the features hold NaN or infinity: nothing can be fitted on them")


def _checked_labels(features: Tensor, labels: Tensor | None) -> Tensor:
    _check_features(features)
    if labels is None:
        raise InputError("a probe needs labels, and the data has none")
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(features):
        raise InputError(
            f"{len(features)} features need as many class indices, not labels {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return labels.long()
