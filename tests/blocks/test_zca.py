import pytest
import torch

from limbeck.blocks.zca import ZCA
from limbeck.core.errors import InputError


def correlated(n=400):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator)
    return (torch.randn(n, 12, generator=generator) @ mix).view(n, 3, 2, 2) + 1


def test_whitened_pixels_are_uncorrelated():
    x = correlated()
    white = ZCA.fit(x, eps=0)(x).flatten(1)
    covariance = (white - white.mean(0)).T @ (white - white.mean(0)) / (len(x) - 1)
    assert torch.allclose(covariance, torch.eye(12), atol=1e-3)
    assert torch.allclose(white.mean(0), torch.zeros(12), atol=1e-4)


def test_the_matrix_is_symmetric_and_the_map_invertible():
    x = correlated()
    zca = ZCA.fit(x)
    assert torch.allclose(zca.matrix, zca.matrix.T, atol=1e-5)
    assert torch.allclose(zca.inverse(zca(x)), x, atol=1e-3)


def test_a_constant_direction_is_not_blown_up():
    x = correlated()
    x[:, 0, 0, 0] = 1.0
    assert float(ZCA.fit(x)(x).abs().max()) < 20


def test_one_image_cannot_be_whitened():
    with pytest.raises(InputError, match="at least two"):
        ZCA.fit(torch.zeros(1, 1, 2, 2))
