import numpy as np
import torch

from limbeck.losses.matching import class_means, mean_matching

REAL = torch.randn(9, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OWN = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
REAL_Y, OWN_Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0]), torch.tensor([2, 0, 1, 0])


def test_class_means_against_numpy():
    means = class_means(REAL, REAL_Y, 4).numpy()
    for c in range(3):
        assert np.allclose(means[c], REAL.numpy()[REAL_Y.numpy() == c].reshape(-1, 6).mean(0))
    assert np.all(means[3] == 0)


def test_distance_by_hand():
    expected = sum(
        float(((REAL[c == REAL_Y].flatten(1).mean(0) - OWN[c == OWN_Y].flatten(1).mean(0)) ** 2).sum())
        for c in range(3)
    )
    assert np.isclose(float(mean_matching(REAL, REAL_Y, OWN, OWN_Y, 3)), expected)


def test_order_does_not_matter_and_equal_sets_match():
    order = torch.randperm(9)
    assert torch.isclose(
        mean_matching(REAL, REAL_Y, OWN, OWN_Y, 3), mean_matching(REAL[order], REAL_Y[order], OWN, OWN_Y, 3)
    )
    assert float(mean_matching(REAL, REAL_Y, REAL, REAL_Y, 3)) < 1e-20


def test_a_part_of_the_classes_is_scaled_to_all():
    part = REAL_Y < 2
    own = OWN_Y < 2
    found = mean_matching(REAL[part], REAL_Y[part], OWN[own], OWN_Y[own], 3)
    whole = mean_matching(REAL[part], REAL_Y[part], OWN[own], OWN_Y[own], 2)
    assert torch.isclose(found, whole * 3 / 2)


def test_no_gradient_to_the_real_side():
    real, synthetic = REAL.clone().requires_grad_(), OWN.clone().requires_grad_()
    mean_matching(real, REAL_Y, synthetic, OWN_Y, 3).backward()
    assert real.grad is None and synthetic.grad is not None
