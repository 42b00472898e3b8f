from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.metrics.classification import (
    adaptive_calibration_error,
    agreement,
    classification_metrics,
    confusion_matrix,
    expected_calibration_error,
    reliability_table,
)


def sample(n: int = 200, classes: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=g)
    return logits, torch.multinomial(torch.softmax(logits / 2, 1), 1, generator=g).squeeze(1)


def test_against_plain_numpy():
    logits, labels = sample()
    m = classification_metrics(logits, labels, 12)
    z, y = logits.double().numpy(), labels.numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert m["accuracy"] == pytest.approx((p.argmax(1) == y).mean())
    assert m["top5"] == pytest.approx(np.mean([c in np.argsort(-row)[:5] for c, row in zip(y, p, strict=True)]))
    assert m["nll"] == pytest.approx(-np.log(p[np.arange(200), y]).mean())
    assert m["brier"] == pytest.approx(np.square(p - np.eye(12)[y]).sum(1).mean())

    confidence, correct = p.max(1), p.argmax(1) == y
    ece = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert m["ece"] == pytest.approx(ece)

    scores = []
    for c in range(12):
        hit = np.sum((p.argmax(1) == c) & (y == c))
        scores.append(2 * hit / (np.sum(p.argmax(1) == c) + np.sum(y == c)))
    assert m["macro_f1"] == pytest.approx(np.mean(scores))
    assert all(isinstance(v, float) for v in m.values())


def test_by_hand():
    # confidences 0.9 (right), 0.9 (wrong), 0.6 (right)
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1])
    m = classification_metrics(p.log(), labels, n_bins=5)
    assert set(m) == {"accuracy", "nll", "brier", "ece", "adaptive_ece", "macro_f1"}
    assert m["accuracy"] == pytest.approx(2 / 3)
    assert m["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.1) + math.log(0.6)) / 3)
    assert m["brier"] == pytest.approx((2 * 0.01 + 2 * 0.81 + 2 * 0.16) / 3)
    assert m["ece"] == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.4)
    assert m["macro_f1"] == pytest.approx(2 / 3)


def test_adaptive_bins_hold_equally_many():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1.0, 60)
    correct = rng.random(60) < 0.7
    p = torch.from_numpy(np.stack([confidence, 1 - confidence], 1))
    labels = torch.from_numpy((~correct).astype(np.int64))
    order = np.argsort(confidence)
    expected = sum(
        len(part) / 60 * abs(correct[part].mean() - confidence[part].mean()) for part in np.array_split(order, 6)
    )
    assert adaptive_calibration_error(p, labels, 6) == pytest.approx(expected)


def test_equal_confidences_share_an_adaptive_bin():
    p = torch.full((40, 2), 0.25, dtype=torch.float64)
    p[:, 0] = 0.75
    labels = torch.tensor([0] * 30 + [1] * 10)
    assert adaptive_calibration_error(p, labels) == pytest.approx(0, abs=1e-12)
    assert adaptive_calibration_error(p, labels.flip(0)) == pytest.approx(0, abs=1e-12)


def test_perfect_and_hopeless_classifiers():
    labels = torch.arange(10)
    logits = 60 * torch.eye(10)
    m = classification_metrics(logits, labels)
    assert (m["accuracy"], m["top5"], m["macro_f1"]) == (1, 1, 1)
    for name in ("nll", "brier", "ece", "adaptive_ece"):
        assert m[name] == pytest.approx(0, abs=1e-9)
    m = classification_metrics(logits, (labels + 1) % 10)
    assert (m["accuracy"], m["macro_f1"]) == (0, 0)
    assert m["nll"] == pytest.approx(60) and m["brier"] == pytest.approx(2) and m["ece"] == pytest.approx(1)


def test_calibration_improves_at_the_temperature_the_labels_came_from():
    logits, labels = sample(20_000, 5)
    sharp, right = (classification_metrics(z, labels) for z in (logits, logits / 2))
    for name in ("ece", "adaptive_ece", "nll", "brier"):
        assert right[name] < sharp[name]
    assert right["ece"] < 0.02 < 0.1 < sharp["ece"]
    assert right["accuracy"] == sharp["accuracy"]


def test_order_of_samples_does_not_matter():
    logits, labels = sample()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    assert classification_metrics(logits, labels) == pytest.approx(classification_metrics(logits[order], labels[order]))


def test_reliability_table_sums_to_the_ece():
    logits, labels = sample()
    p = torch.softmax(logits.double(), 1)
    table = reliability_table(p, labels, 20)
    assert len(table) == 20 and table[0]["lower"] == 0 and table[-1]["upper"] == 1
    assert sum(row["count"] for row in table) == 200
    ece = sum(r["count"] / 200 * abs(r["accuracy"] - r["confidence"]) for r in table if r["count"])
    assert ece == pytest.approx(expected_calibration_error(p, labels, 20))
    for row in table:
        if row["count"]:
            assert row["lower"] < row["confidence"] <= row["upper"]
        else:
            assert row["confidence"] is None and row["accuracy"] is None
    assert any(row["count"] == 0 for row in table)


def test_confusion_matrix_rows_are_true_classes():
    labels, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 1])
    expected = [[1, 0, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert confusion_matrix(predicted, labels, 4).tolist() == expected
    assert confusion_matrix(torch.eye(4)[predicted], labels, 4).tolist() == expected


def test_agreement():
    student = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 2.0]])
    a = agreement(student, teacher)
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    p = 1 / (1 + math.exp(2))
    second = p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)
    assert a["top1_agreement"] == 0.5
    assert a["kl"] == pytest.approx((first + second) / 2)
    assert agreement(teacher, teacher) == {"top1_agreement": 1.0, "kl": 0.0}


def test_half_precision_probabilities_are_accepted():
    logits, labels = sample()
    p = torch.softmax(logits, 1)
    assert expected_calibration_error(p.bfloat16(), labels) == pytest.approx(
        expected_calibration_error(p, labels), abs=0.02
    )


def test_bad_input():
    logits, labels = sample(6)
    with pytest.raises(InputError, match=r"0 to 12.*12 classes"):
        classification_metrics(logits, torch.tensor([0, 1, 2, 3, 4, 12]))
    with pytest.raises(InputError, match="-1 to"):
        confusion_matrix(torch.tensor([0, -1]), torch.tensor([0, 1]), 3)
    broken = logits.clone()
    broken[2, 3] = math.nan
    with pytest.raises(InputError, match=r"1 of 6 rows .* NaN"):
        classification_metrics(broken, labels)
    with pytest.raises(InputError, match="no samples"):
        classification_metrics(logits[:0], labels[:0])
    with pytest.raises(InputError, match="no samples"):
        agreement(logits[:0], logits[:0])
    with pytest.raises(InputError, match="num_classes is 10"):
        classification_metrics(logits, labels, 10)
    with pytest.raises(InputError, match="6 class indices"):
        classification_metrics(logits, labels[:5])
    with pytest.raises(InputError, match="class indices"):
        classification_metrics(logits, labels.float())
    with pytest.raises(InputError, match="softmax"):
        reliability_table(logits, labels)
    with pytest.raises(InputError, match="n_bins"):
        classification_metrics(logits, labels, n_bins=0)
    with pytest.raises(InputError, match=r"12 classes .* 11"):
        agreement(logits, logits[:, :11])
