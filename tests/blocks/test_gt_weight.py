"""The closed-form weight against a grid, its limits, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.blocks.gt_weight import affine_weight
from limbeck.core.errors import InputError


def three(seed: int = 0, shape: tuple[int, ...] = (30, 3)) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape) for _ in range(3)]


@pytest.mark.parametrize("shape", [(30,), (30, 3)])
def test_it_is_the_best_of_a_fine_grid(shape: tuple[int, ...]) -> None:
    noise, f, g = three(1, shape)
    y = 0.3 * f + 0.7 * g + 0.1 * noise
    grid = np.linspace(0, 1, 10_001)
    losses = [((y - a * f - (1 - a) * g) ** 2).sum() for a in grid]
    found = affine_weight(y, f, g)
    assert found.told and found.value == found.unconstrained
    assert found.value == pytest.approx(grid[np.argmin(losses)], abs=5.1e-5)


def test_exact_mixtures_are_found_and_clipped_only_if_asked() -> None:
    _, f, g = three()
    assert affine_weight(f, f, g).value == pytest.approx(1) and affine_weight(g, f, g).value == pytest.approx(0)
    outside = 1.5 * f - 0.5 * g
    assert affine_weight(outside, f, g).value == 1.0
    assert affine_weight(outside, f, g).unconstrained == pytest.approx(1.5)
    assert affine_weight(outside, f, g, clip=False).value == pytest.approx(1.5)
    assert affine_weight(-0.5 * f + 1.5 * g, f, g).value == 0.0


def test_predictors_that_agree_leave_the_weight_as_it_was() -> None:
    y, f, _ = three()
    for g in (f, f * (1 + 1e-12)):
        found = affine_weight(y, f, g, otherwise=0.7)
        assert found.value == 0.7 and not found.told
    assert affine_weight(y, 0 * f, 0 * f, otherwise=0.2).value == 0.2
    assert affine_weight(y, f, f * (1 + 1e-6)).told
    assert not affine_weight(y, f, f * (1 + 1e-6), eps=1e-10).told


def test_tensors_serve_as_well() -> None:
    arrays = three()
    assert affine_weight(*map(torch.from_numpy, arrays), clip=False) == affine_weight(*arrays, clip=False)


def test_bad_input_is_named() -> None:
    y, f, g = three()
    with pytest.raises(InputError, match=r"one shape.*\(30,\)"):
        affine_weight(y[:, 0], f, g)
    with pytest.raises(InputError, match="at least one sample"):
        affine_weight(y[:0], f[:0], g[:0])
    f[3, 0] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        affine_weight(y, f, g)
