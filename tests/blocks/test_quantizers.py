"""Buckets, levels, rounding and gradients against hand-computed values, numpy and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.blocks.quantizers import (
    encode,
    from_buckets,
    quantile_levels,
    quantise,
    scaled,
    to_buckets,
    uniform_levels,
)
from limbeck.core.errors import InputError


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_last_bucket_is_filled_with_its_last_number() -> None:
    w = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 6.0], [9.0, 8.0, 7.0]])
    rows = to_buckets(w, 4)
    assert rows.tolist() == [[3, 1, 2, 5], [4, 6, 9, 8], [7, 7, 7, 7]]
    assert torch.equal(from_buckets(rows, w.shape), w)
    assert to_buckets(w, 100).shape == (1, 9)  # smaller than a bucket: one of its own size
    assert to_buckets(w, None).shape == (1, 9)


def test_two_bits_by_hand() -> None:
    """0 … 9 in one bucket, four levels: 0, 3, 6, 9."""
    w = torch.arange(10.0)
    assert quantise(w, 4).tolist() == [0, 0, 3, 3, 3, 6, 6, 6, 9, 9]


@pytest.mark.parametrize("bucket", [None, 7, 16])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_uniform_levels_equal_numpy(bits: int, bucket: int | None) -> None:
    w, s = weights(5, 9), 2**bits
    found = quantise(w, s, bucket).numpy().reshape(-1)
    flat, length = w.numpy().reshape(-1), bucket or 45
    for start in range(0, 45, length):
        part = flat[start : start + length]
        low, width = part.min(), part.max() - part.min()
        width = width if width >= 1e-10 else np.float32(1)
        expected = np.round((part - low) / width * (s - 1)) / (s - 1) * width + low
        np.testing.assert_allclose(found[start : start + length], expected, atol=1e-6)
        assert len(np.unique(found[start : start + length])) <= s


def test_a_constant_tensor_stays() -> None:
    w = torch.full((3, 3), 0.25)
    assert torch.equal(quantise(w, 4, 4), w)


def test_quantising_twice_changes_nothing() -> None:
    once = quantise(weights(6, 11), 8, 16)
    torch.testing.assert_close(quantise(once, 8, 16), once, atol=1e-6, rtol=0)


def test_stored_form_gives_the_same_bits_back() -> None:
    w = weights(7, 13)
    for levels in (4, 5, 256, torch.tensor([0.0, 0.2, 0.7, 1.1])):
        assert torch.equal(encode(w, levels, 16).restored(), quantise(w, levels, 16))


def test_nearest_of_learned_levels_by_brute_force_and_in_any_order() -> None:
    w, table = weights(40), torch.tensor([0.9, 0.05, 0.4, 0.55])
    v, scaling = scaled(w[None])
    nearest = table[(v[0, :, None] - table).abs().argmin(1)]
    expected = nearest * scaling.width[0] + scaling.offset[0]
    torch.testing.assert_close(quantise(w, table), expected)


def test_random_rounding_has_no_bias_and_hits_neighbours_only() -> None:
    torch.manual_seed(0)
    w = torch.tensor([0.0, 0.1, 0.45, 0.8, 1.0])
    drawn = torch.stack([quantise(w, 4, stochastic=True) for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(0), w, atol=0.01, rtol=0)
    below = torch.floor(w * 3) / 3
    assert torch.isclose(drawn, below).logical_or(torch.isclose(drawn, (below + 1 / 3).clamp(max=1))).all()


def test_quantile_levels_equal_numpy() -> None:
    w = weights(50)
    v = ((w - w.min()) / (w.max() - w.min())).numpy()
    np.testing.assert_allclose(quantile_levels(w, 5, None), np.percentile(v, np.linspace(0, 100, 5)), atol=1e-6)


# ---- gradients -----------------------------------------------------------------------------------------------------------


def test_straight_through_is_the_identity() -> None:
    w, g = weights(3, 7).requires_grad_(), weights(3, 7, seed=1)
    quantise(w, 4, 5).backward(g)
    assert torch.equal(w.grad, g)


def test_gradient_through_the_scaling_equals_the_chain_rule() -> None:
    """w_q = alpha q + beta with q - v held: autograd of w + alpha (q - v) says the same."""
    w, g = weights(23).requires_grad_(), weights(23, seed=1)
    quantise(w, 4, 6, gradient="scaling").backward(g)
    other = w.detach().clone().requires_grad_()
    rows = to_buckets(other, 6)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    with torch.no_grad():
        v = (rows - low) / (high - low).clamp_min(1e-10)
        error = (v * 3).round() / 3 - v
    last = torch.ones_like(rows)
    last[-1, 5:] = 0  # 23 = 3 * 6 + 5: what fills the last bucket up is no output
    out = rows + (high - low) * error
    (from_buckets(out, w.shape) * g).sum().backward()
    torch.testing.assert_close(w.grad, other.grad)
    assert not torch.equal(w.grad, g)


def test_truncated_gradients() -> None:
    w = torch.tensor([-2.0, -0.5, 0.2, 1.5], requires_grad=True)
    out = quantise(w, 4, gradient="truncated")
    assert out.min() == -1
    assert out.max() == 1
    out.sum().backward()
    assert w.grad.tolist() == [0, 1, 1, 0]


def test_level_gradients_sum_over_the_codes_and_the_weights_get_theirs() -> None:
    w, g = weights(5, 9), weights(5, 9, seed=1)
    table = torch.tensor([0.1, 0.9, 0.4], requires_grad=True)  # not in order
    quantise(w, table, 8).backward(g)
    expected = np.zeros(3)
    flat, grads = w.numpy().reshape(-1), g.numpy().reshape(-1)
    for start in range(0, 45, 8):
        part = flat[start : start + 8]
        v = (part - part.min()) / (part.max() - part.min())
        for value, grad in zip(v, grads[start : start + 8], strict=True):
            expected[np.abs(table.detach().numpy() - value).argmin()] += (part.max() - part.min()) * grad
    np.testing.assert_allclose(table.grad, expected, rtol=1e-5)


def test_level_gradients_equal_finite_differences() -> None:
    w, g = weights(64).double(), weights(64, seed=1)
    table = torch.tensor([0.1, 0.45, 0.8], requires_grad=True)
    (quantise(w.float(), table, 16) * g).sum().backward()
    for j in range(3):
        step = torch.zeros(3)
        step[j] = 1e-4
        with torch.no_grad():
            up, down = ((quantise(w.float(), table + sign * step, 16) * g).sum() for sign in (1, -1))
        assert table.grad[j].item() == pytest.approx((up - down).item() / 2e-4, rel=0.02, abs=0.02)


def test_half_precision_weights_are_quantised_in_float32() -> None:
    w = weights(20).bfloat16()
    assert torch.equal(quantise(w, 4, 8), quantise(w.float(), 4, 8).bfloat16())


def test_levels_must_fit_a_byte() -> None:
    for count in (0, 1, 257):
        with pytest.raises(InputError, match=r"between 2 and 256 levels \(1 to 8 bits\)"):
            uniform_levels(count)
