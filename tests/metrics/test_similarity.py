from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.metrics.similarity import MinibatchCKA, hsic_unbiased, linear_cka, rbf_cka

VARIANTS = {
    "linear": linear_cka,
    "linear_unbiased": partial(linear_cka, unbiased=True),
    "rbf": rbf_cka,
    "rbf_unbiased": partial(rbf_cka, unbiased=True),
}


def features(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(n: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    x = features(n, 6, 0)
    return x, torch.relu(x @ features(6, 4, 1)) + 0.5 * features(n, 4, 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_invariances(name: str):
    cka, (x, y) = VARIANTS[name], related()
    value = cka(x, y)
    rotation = torch.linalg.qr(features(6, 6, 3))[0]
    assert 0.05 < value < 0.95
    assert cka(y, x) == pytest.approx(value)
    assert cka(x @ rotation, y) == pytest.approx(value)
    assert cka(100 * x, 0.01 * y) == pytest.approx(value)
    assert cka(x + 50, y) == pytest.approx(value)
    assert cka(x, 3 * x @ rotation) == pytest.approx(1)
    assert cka(x * torch.tensor([10.0, 1, 1, 1, 1, 1]), y) != pytest.approx(value, rel=0.01)  # not to every linear map
    assert cka(x.reshape(30, 2, 3), y) == pytest.approx(value)


def test_linear_cka_against_numpy_in_both_forms():
    for n in (5, 30):  # fewer and more samples than channels
        x, y = (t[:n].numpy() for t in related())
        xc, yc = x - x.mean(0), y - y.mean(0)
        expected = np.linalg.norm(yc.T @ xc) ** 2 / np.linalg.norm(xc.T @ xc) / np.linalg.norm(yc.T @ yc)
        assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected)


def test_rbf_cka_against_numpy():
    x, y = related()
    kernels = []
    for f in (x.numpy(), y.numpy()):
        d = np.linalg.norm(f[:, None] - f[None], axis=2)
        pairs = np.sort(d[np.triu_indices(30, 1)])
        sigma = 0.7 * pairs[(len(pairs) - 1) // 2]
        k = np.exp(-(d**2) / (2 * sigma**2))
        h = np.eye(30) - 1 / 30
        kernels.append(h @ k @ h)
    k, l = kernels  # noqa: E741
    assert rbf_cka(x, y, 0.7) == pytest.approx((k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l))


def test_unbiased_hsic_is_the_average_over_distinct_quadruples():
    x, y = (t[:6] for t in related())
    k, l = x @ x.T, y @ y.T  # noqa: E741
    total = [float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])) for i, j, q, r in itertools.permutations(range(6), 4)]
    assert hsic_unbiased(k, l).item() == pytest.approx(np.mean(total))


def test_unbiased_hsic_ignores_diagonals_and_stacks():
    x, y = related()
    k, l = x @ x.T, y @ y.T  # noqa: E741
    assert torch.allclose(hsic_unbiased(k + 7 * torch.eye(30), l), hsic_unbiased(k, l))
    grid = hsic_unbiased(torch.stack([k, l, k @ k]), torch.stack([l, k]))
    assert grid.shape == (3, 2)
    assert torch.allclose(grid[0, 0], hsic_unbiased(k, l))
    assert torch.allclose(grid[2, 1], hsic_unbiased(k @ k, k))


def test_unrelated_features_average_to_zero_only_without_bias():
    plain, unbiased = [], []
    for seed in range(100):
        x, y = features(12, 20, 2 * seed), features(12, 20, 2 * seed + 1)
        plain.append(linear_cka(x, y))
        unbiased.append(linear_cka(x, y, unbiased=True))
    assert np.mean(plain) > 0.4
    assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / 10 < 0.1
    assert min(unbiased) < 0


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_one_batch_equals_the_direct_value(kernel: str):
    x, y = related()
    cka = MinibatchCKA(kernel)
    cka.update([x, x.square(), y], [y, x])
    direct = {"linear": linear_cka, "rbf": rbf_cka}[kernel]
    matrix = cka.compute()
    assert matrix.shape == (3, 2) and matrix.dtype == torch.float64
    for i, a in enumerate((x, x.square(), y)):
        for j, b in enumerate((y, x)):
            assert matrix[i, j].item() == pytest.approx(direct(a, b, unbiased=True))


def test_minibatches_average_the_hsic():
    x, y = related()
    cka = MinibatchCKA()
    means = np.zeros(3)
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        cka.update([x[part]], [y[part]])
        k, l = x[part] @ x[part].T, y[part] @ y[part].T  # noqa: E741
        means += [hsic_unbiased(a, b).item() / 3 for a, b in ((k, l), (k, k), (l, l))]
    assert cka.batches == 3
    assert cka.compute().item() == pytest.approx(means[0] / np.sqrt(means[1] * means[2]))
    cka.reset()
    with pytest.raises(InputError, match="call update first"):
        cka.compute()


def test_minibatches_converge_to_the_whole():
    x = features(4000, 6, 0)
    y = torch.relu(x @ features(6, 4, 1)) + 0.5 * features(4000, 4, 2)
    cka = MinibatchCKA()
    for a, b in zip(x.split(16), y.split(16), strict=True):
        cka.update([a], [b])
    assert cka.compute().item() == pytest.approx(linear_cka(x, y), abs=0.02)


def test_a_constant_layer_is_nan_and_harms_no_other():
    x, y = related()
    cka = MinibatchCKA()
    cka.update([x, torch.full((30, 2), 3.0)], [y])
    matrix = cka.compute()
    assert matrix[0, 0].isfinite() and matrix[1, 0].isnan()


def test_bad_input():
    x, y = related()
    with pytest.raises(InputError, match="30 and the other 20"):
        linear_cka(x, y[:20])
    with pytest.raises(InputError, match="constant"):
        linear_cka(torch.ones(30, 3), y)
    with pytest.raises(InputError, match="no width"):
        rbf_cka(torch.ones(30, 3), y)
    with pytest.raises(InputError, match="bandwidth"):
        rbf_cka(x, y, bandwidth=0)
    with pytest.raises(InputError, match="at least 4 samples, not 3"):
        MinibatchCKA().update([x[:3]], [y[:3]])
    with pytest.raises(InputError, match="at least one layer"):
        MinibatchCKA().update([], [y])
    with pytest.raises(InputError, match="NaN"):
        linear_cka(x * torch.nan, y)
    cka = MinibatchCKA()
    cka.update([x], [y])
    with pytest.raises(InputError, match="same layers"):
        cka.update([x, x], [y])
    with pytest.raises(UnknownNameError, match="linear"):
        MinibatchCKA("linaer")
    with pytest.raises(InputError, match="square"):
        hsic_unbiased(torch.zeros(4, 4), torch.zeros(5, 5))
