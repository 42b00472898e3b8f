from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.stats import wasserstein_distance

from limbeck.core.errors import InputError
from limbeck.metrics import generative
from limbeck.metrics.generative import (
    classes_covered,
    condition_agreement,
    density_coverage,
    frechet_distance,
    kernel_mmd,
    modes_covered,
    paired_mse,
    precision_recall,
    sliced_wasserstein,
    spread_ratio,
)

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whitened(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Samples whose mean is 0 and whose covariance is 1, exactly."""
    x = normal(n, d, seed=seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.atleast_2d(torch.cov(x.T)))).T


def test_frechet_of_gaussians_has_its_closed_form() -> None:
    x = whitened(50, 4)
    std = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    shift = torch.tensor([0.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    # commuting covariances: |shift|^2 + sum (std - 1)^2
    assert frechet_distance(x, whitened(80, 4, seed=3) * std + shift) == pytest.approx(10 + 0 + 1 + 0.25 + 1, abs=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    one = whitened(20, 1)
    assert frechet_distance(one[:, 0], 3 * one[:, 0] + 1) == pytest.approx(4 + 1)


def test_frechet_agrees_with_the_general_matrix_root() -> None:
    a, b = normal(60, 5) @ normal(5, 5, seed=1), normal(40, 5, seed=2) @ normal(5, 5, seed=3) + 0.3
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    expected = np.square(a.mean(0).numpy() - b.mean(0).numpy()).sum()
    expected += np.trace(ca + cb - 2 * linalg.sqrtm(ca @ cb).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_with_fewer_samples_than_dimensions_stays_exact() -> None:
    a, b = normal(6, 30), normal(7, 30, seed=1)
    rotation = torch.linalg.qr(normal(30, 30, seed=2)).Q
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_mmd_is_the_sum_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, widths = normal(7, 3), normal(5, 3, seed=1) + 1, (0.5, 2.0)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return sum(math.exp(-float((x - y).square().sum()) / (2 * h * h)) for h in widths) / 2

    expected = sum(kernel(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / 42
    expected += sum(kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j) / 20
    expected -= 2 * sum(kernel(x, y) for x in a for y in b) / 35
    assert kernel_mmd(a, b, widths) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(generative, "BLOCK_ELEMENTS", 11)
    assert kernel_mmd(a, b, widths) == pytest.approx(expected, rel=1e-10)


def test_mmd_is_unbiased() -> None:
    found = [kernel_mmd(normal(20, 2, seed=2 * s), normal(15, 2, seed=2 * s + 1), (1.0,)) for s in range(200)]
    mean, error = np.mean(found), np.std(found) / math.sqrt(len(found))
    assert abs(mean) < 4 * error and min(found) < 0
    assert kernel_mmd(normal(50, 2), normal(50, 2, seed=1) + 2, (1.0,)) > 0.3


def test_sliced_wasserstein_in_one_dimension_is_the_exact_distance() -> None:
    a, b = normal(12), 2 * normal(9, seed=1) + 1
    assert sliced_wasserstein(a, b, 3, order=1.0) == pytest.approx(wasserstein_distance(a.numpy(), b.numpy()))
    # 2 points against 3: the quantile functions differ by 1 on [1/3, 1/2] and by 2 on [2/3, 1]
    two, three = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0, 4.0])
    by_hand = math.sqrt((1 / 2 - 1 / 3) * 1 + (2 / 3 - 1 / 2) * 1 + (1 / 3) * 4)
    assert sliced_wasserstein(two, three, 5) == pytest.approx(by_hand)


def test_sliced_wasserstein_of_a_shift_and_its_directions() -> None:
    a = normal(30, 3)
    shift = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    # mean over directions of <shift, theta>^2 is |shift|^2 / D
    assert sliced_wasserstein(a, a + shift, 20000) == pytest.approx(2 / math.sqrt(3), rel=0.02)
    assert sliced_wasserstein(a, a) == 0
    assert sliced_wasserstein(a, a + shift) == sliced_wasserstein(a, a + shift)
    other = torch.Generator().manual_seed(4)
    assert sliced_wasserstein(a, a + shift, 8, other) != sliced_wasserstein(a, a + shift, 8)


def test_precision_and_recall_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.tensor([0.0, 1.0, 2.0, 10.0])  # radii for k=1: 1, 1, 1, 8
    fake = torch.tensor([0.5, 3.5, 3.6, 30.0, 31.0])  # radii: 3, .1, .1, 1, 1
    # fakes in a real ball: .5 (of 0), 3.5 and 3.6 (of 10: from 2 to 18); reals in a fake ball: 0, 1, 2 (of .5)
    for elements in (1 << 20, 5):
        monkeypatch.setattr(generative, "BLOCK_ELEMENTS", elements)
        assert precision_recall(real, fake, k=1) == {"precision": 3 / 5, "recall": 3 / 4}
        # hits of the balls: 0 -> .5; 1 -> .5; 2 -> none; 10 -> 3.5 and 3.6
        assert density_coverage(real, fake, k=1) == {"density": 4 / 5, "coverage": 3 / 4}


def test_quality_and_coverage_of_equal_collapsed_and_strange_sets() -> None:
    real, same = normal(300, 4), normal(300, 4, seed=1)
    equal = {**precision_recall(real, same), **density_coverage(real, same)}
    assert min(equal.values()) > 0.8 and equal["density"] == pytest.approx(1, abs=0.15)
    collapsed = {**precision_recall(real, 0.05 * same), **density_coverage(real, 0.05 * same)}
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.1 and collapsed["coverage"] < 0.5
    strange = {**precision_recall(real, same + 20), **density_coverage(real, same + 20)}
    assert set(strange.values()) == {0.0}
    assert precision_recall(real, real) == {"precision": 1, "recall": 1}


def test_modes_count_with_a_share_and_within_the_radius() -> None:
    means = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    samples = torch.cat([means[:1].expand(60, 2), means[1:2].expand(39, 2) + 0.4, torch.tensor([[0.0, 10.4]])])
    found = modes_covered(samples, means, 1.0)
    assert found == {"modes": 2, "near_modes": 1.0}  # one of a hundred is below a tenth of a quarter
    assert modes_covered(samples, means, 1.0, least=0.04)["modes"] == 3
    assert modes_covered(samples, means, 0.5) == {"modes": 1, "near_modes": 0.61}


def test_small_measures() -> None:
    assert classes_covered(torch.eye(4).repeat(3, 1)) == pytest.approx(4)
    assert classes_covered(torch.tensor([[1.0, 0, 0]])) == pytest.approx(1)
    assert classes_covered(torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])) == pytest.approx(math.exp(0.5623351446))
    logits = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]])
    assert condition_agreement(logits, torch.tensor([0, 1, 0, 0])) == 0.75
    assert paired_mse(torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [0, 0, 3]])) == 2
    x = torch.cat([normal(50, 3), torch.ones(50, 1, dtype=torch.float64)], 1)  # one constant pixel
    assert spread_ratio(0.5 * x + 7, x) == pytest.approx(0.5)


def test_wrong_input_is_named() -> None:
    a = normal(5, 3)
    for call, line in (
        (lambda: frechet_distance(a, a[:1]), "at least 2 sample"),
        (lambda: frechet_distance(a, a[:, :2]), "equally many dimensions .got 3 and 2"),
        (lambda: sliced_wasserstein(a, a * math.inf), "NaN or infinity"),
        (lambda: sliced_wasserstein(a, a, 0), "projections and order"),
        (lambda: kernel_mmd(a, a, (0.0,)), "bandwidths must be positive"),
        (lambda: precision_recall(a, a, 5), "below the number of samples, 5 .got 5"),
        (lambda: density_coverage(a, a, 0), "k must be at least 1"),
        (lambda: modes_covered(a, a, 0.0), "radius must be positive"),
        (lambda: classes_covered(a), "needs probabilities"),
        (lambda: condition_agreement(a, torch.zeros(4)), "do not fit"),
        (lambda: paired_mse(a, a[:2]), "one shape"),
        (lambda: spread_ratio(a, torch.ones(4, 3)), "all the same"),
    ):
        with pytest.raises(InputError, match=line):
            call()
