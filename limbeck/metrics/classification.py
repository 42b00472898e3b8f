"""How classifiers are judged: accuracy, likelihood, calibration, agreement with a teacher.

Inputs are torch tensors on any device; everything is computed in float64 on the CPU.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.losses.logits import forward_kl


def classification_metrics(
    logits: Tensor, labels: Tensor, num_classes: int | None = None, n_bins: int = 15
) -> dict[str, float]:
    """All figures of one evaluation.

    Args:
        logits: (N, C), finite.
        labels: (N,) class indices in [0, C).
        num_classes: C, to be checked against the logits; None: whatever the logits have.
        n_bins: bins of the two calibration errors.

    Returns:
        ``accuracy``, ``top5`` (only if C >= 10), ``macro_f1`` (mean over the classes that occur among labels or predictions),
        all in [0, 1]; ``nll`` (mean negative log-likelihood, nats); ``brier`` (sum over classes of the squared error, mean over
        samples, in [0, 2]); ``ece`` (:func:`expected_calibration_error`) and ``adaptive_ece``
        (:func:`adaptive_calibration_error`), in [0, 1].

    Raises:
        InputError: no samples, NaN or infinite logits, labels outside [0, C), shapes that do not fit.
    """
    from sklearn.metrics import f1_score

    logits, labels = _checked(logits, labels, "logits")
    classes = logits.shape[1]
    if num_classes is not None and num_classes != classes:
        raise InputError(f"the logits have {classes} classes, but num_classes is {num_classes}")
    log_p = torch.log_softmax(logits, dim=1)
    p = log_p.exp()
    predicted = logits.argmax(1)
    metrics = {"accuracy": float((predicted == labels).double().mean())}
    if classes >= 10:
        metrics["top5"] = float((logits.topk(5, dim=1).indices == labels.unsqueeze(1)).any(1).double().mean())
    return metrics | {
        "nll": float(F.nll_loss(log_p, labels)),
        "brier": float((p - F.one_hot(labels, classes)).square().sum(1).mean()),
        "ece": expected_calibration_error(p, labels, n_bins),
        "adaptive_ece": adaptive_calibration_error(p, labels, n_bins),
        "macro_f1": float(f1_score(labels.numpy(), predicted.numpy(), average="macro", zero_division=0)),
    }


def expected_calibration_error(probabilities: Tensor, labels: Tensor, n_bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over ``n_bins`` equally wide bins of confidence, weighted by their size.

    The confidence is the largest probability; bin k is (k/n, (k+1)/n].

    Args:
        probabilities: (N, C), rows summing to 1.
        labels: (N,) class indices.
        n_bins: at least 1.

    Source: "On Calibration of Modern Neural Networks".

    Raises:
        InputError: as in :func:`reliability_table`.
    """
    confidence, correct = _confidence(probabilities, labels)
    return _binned_error(confidence, correct, _equal_width(confidence, n_bins), n_bins)


def adaptive_calibration_error(probabilities: Tensor, labels: Tensor, n_bins: int = 15) -> float:
    """As :func:`expected_calibration_error`, with bins that hold equally many samples.

    The edges are quantiles of the confidence, so equal confidences share a bin and the order of the samples does not matter;
    where many are equal (a saturated classifier) there are fewer, larger bins.

    Raises:
        InputError: as in :func:`reliability_table`.
    """
    confidence, correct = _confidence(probabilities, labels)
    _check_bins(n_bins)
    edges = np.quantile(confidence, np.arange(1, n_bins) / n_bins)
    return _binned_error(confidence, correct, np.searchsorted(edges, confidence, side="left"), n_bins)


def reliability_table(probabilities: Tensor, labels: Tensor, n_bins: int = 15) -> list[dict[str, float | None]]:
    """The reliability diagram as rows, one per bin of confidence.

    Args:
        probabilities: (N, C), rows summing to 1.
        labels: (N,) class indices.
        n_bins: number of equally wide bins, at least 1.

    Returns:
        Per bin ``lower``, ``upper``, ``count``, mean ``confidence`` and ``accuracy`` (both None in an empty bin).

    Raises:
        InputError: no samples, rows that are not probabilities, labels outside [0, C), ``n_bins`` below 1.
    """
    confidence, correct = _confidence(probabilities, labels)
    bins = _equal_width(confidence, n_bins)
    count = np.bincount(bins, minlength=n_bins)
    sums = [np.bincount(bins, weights=w, minlength=n_bins) for w in (confidence, correct)]
    table: list[dict[str, float | None]] = []
    for k in range(n_bins):
        confidence_k, accuracy_k = (float(s[k] / count[k]) if count[k] else None for s in sums)
        table.append(
            {
                "lower": k / n_bins,
                "upper": (k + 1) / n_bins,
                "count": int(count[k]),
                "confidence": confidence_k,
                "accuracy": accuracy_k,
            }
        )
    return table


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> NDArray[np.int64]:
    """Counts (C, C): row = true class, column = predicted class.

    Args:
        predicted: (N,) class indices, or (N, C) logits or probabilities.
        labels: (N,) class indices.
        num_classes: C.

    Raises:
        InputError: no samples, shapes that do not fit, class indices outside [0, C).
    """
    from sklearn import metrics

    if predicted.ndim == 2:
        scores, labels = _checked(predicted, labels, "logits")
        if scores.shape[1] != num_classes:
            raise InputError(f"the logits have {scores.shape[1]} classes, but num_classes is {num_classes}")
        predicted = scores.argmax(1)
    else:
        labels = _checked_classes(labels, labels.numel(), num_classes, "labels")
        predicted = _checked_classes(predicted, len(labels), num_classes, "predictions")
    return metrics.confusion_matrix(labels.numpy(), predicted.numpy(), labels=np.arange(num_classes))


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, float]:
    """How closely a student follows its teacher, without labels.

    Args:
        student_logits, teacher_logits: (N, C) of the same samples.

    Returns:
        ``top1_agreement``: share of samples with the same predicted class, in [0, 1]; ``kl``: mean KL(p_t || p_s) in nats.

    Raises:
        InputError: no samples, NaN or infinite logits, shapes that differ.
    """
    student, teacher = (
        _checked_scores(student_logits, "student logits"),
        _checked_scores(teacher_logits, "teacher logits"),
    )
    kl = forward_kl(student, teacher)  # first: it names the shapes that differ
    return {"top1_agreement": float((student.argmax(1) == teacher.argmax(1)).double().mean()), "kl": float(kl)}


def _checked_scores(scores: Tensor, name: str) -> Tensor:
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise InputError(f"{name} must be (N, C) with C >= 2, not {tuple(scores.shape)}")
    if not len(scores):
        raise InputError(f"there are no {name}: the evaluation has no samples")
    scores = scores.detach().cpu().double()
    bad = int((~scores.isfinite()).any(1).sum())
    if bad:
        raise InputError(f"{bad} of {len(scores)} rows of the {name} hold NaN or infinity; the model has diverged")
    return scores


def _checked_classes(values: Tensor, count: int, num_classes: int, name: str) -> Tensor:
    if values.ndim != 1 or len(values) != count or values.is_floating_point() or values.dtype == torch.bool:
        raise InputError(
            f"{name} must be {count} class indices, not a tensor of shape {tuple(values.shape)} and type {values.dtype}"
        )
    if not count:
        raise InputError(f"there are no {name}: the evaluation has no samples")
    values = values.detach().cpu().long()
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= num_classes:
        raise InputError(
            f"{name} run from {low} to {high}, but there are {num_classes} classes (0 to {num_classes - 1})"
        )
    return values


def _checked(scores: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    scores = _checked_scores(scores, name)
    return scores, _checked_classes(labels, len(scores), scores.shape[1], "labels")


def _check_bins(n_bins: int) -> None:
    if n_bins < 1:
        raise InputError(f"n_bins must be at least 1, not {n_bins}")


def _confidence(probabilities: Tensor, labels: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each sample's largest probability, and 1 where its class is the label, else 0."""
    p, labels = _checked(probabilities, labels, "probabilities")
    # half-precision softmaxes miss 1 by some 1e-3; logits miss it by far
    if bool((p < 0).any()) or bool(((p.sum(1) - 1).abs() > 1e-2).any()):
        raise InputError(
            "the rows of the probabilities must be non-negative and sum to 1; apply a softmax to logits first"
        )
    confidence, predicted = p.max(1)
    return confidence.numpy(), (predicted == labels).double().numpy()


def _equal_width(confidence: NDArray[np.float64], n_bins: int) -> NDArray[np.int64]:
    _check_bins(n_bins)
    return np.clip(np.ceil(confidence * n_bins).astype(np.int64) - 1, 0, n_bins - 1)


def _binned_error(
    confidence: NDArray[np.float64], correct: NDArray[np.float64], bins: NDArray[np.int64], n_bins: int
) -> float:
    gaps = np.bincount(bins, weights=confidence - correct, minlength=n_bins)  # count · (confidence - accuracy)
    return float(np.abs(gaps).sum() / len(confidence))
