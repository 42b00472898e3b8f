from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import InputError
from limbeck.losses import features as L

DISTANCES = {
    "hint": L.hint,
    "normalized_l1": L.normalized_l1,
    "normalized_l2": L.normalized_l2,
    "cosine_distance": L.cosine_distance,
    "attention_transfer": L.attention_transfer,
    "squarehead": L.squarehead,
}
SCALE_FREE = ["normalized_l1", "normalized_l2", "cosine_distance", "attention_transfer"]


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2))
    return s.requires_grad_(), t.requires_grad_()


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 5, 2, 2)])
@pytest.mark.parametrize("name", DISTANCES)
def test_equal_features_have_no_distance_and_no_gradient(name: str, shape: tuple[int, ...]):
    s = pair(*shape)[0]
    t = s.detach().clone().requires_grad_()
    loss = DISTANCES[name](s, t)
    loss.backward()
    assert loss.item() == 0
    assert s.grad.abs().max() < 1e-15 and t.grad.abs().max() < 1e-15


def test_whitened_distance_vanishes_at_the_whitened_target():
    t = pair(3, 5, 4)[1].detach()
    s = L.whiten(t).requires_grad_()
    loss = L.smooth_l1_whitened(s, t)
    loss.backward()
    assert loss.item() == 0 and (s.grad == 0).all()


@pytest.mark.parametrize("name", [*DISTANCES, "smooth_l1_whitened"])
def test_gradients_are_right_for_both(name: str):
    loss = getattr(L, name)
    assert loss(*pair(2, 3, 4)).item() > 0
    assert torch.autograd.gradcheck(loss, pair(2, 3, 4))


@pytest.mark.parametrize("name", SCALE_FREE)
def test_scale_does_not_matter(name: str):
    s, t = pair(2, 3, 4)
    assert torch.allclose(DISTANCES[name](s, t), DISTANCES[name](5 * s, 0.1 * t))


def test_by_hand():
    s = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    t = torch.tensor([[1.0, 0.0], [0.0, -7.0]])
    assert L.hint(s, t).item() == pytest.approx((4 + 16 + 0 + 81) / 4)
    assert L.normalized_l1(s, t).item() == pytest.approx((0.4 + 0.8 + 0 + 2) / 4)
    assert L.normalized_l2(s, t).item() == pytest.approx((0.16 + 0.64 + 0 + 4) / 4)
    assert L.cosine_distance(s, t).item() == pytest.approx((0.4 + 2) / 2)
    assert L.squarehead(s, t).item() == pytest.approx(101 / 50)


def test_channels_are_axis_one_of_maps_and_the_last_of_tokens():
    s, t = pair(2, 3, 4, 5)
    tokens = [x.flatten(2).transpose(1, 2) for x in (s, t)]
    for name in ("normalized_l1", "normalized_l2", "cosine_distance", "smooth_l1_whitened", "attention_transfer"):
        loss = getattr(L, name)
        assert torch.allclose(loss(s, t), loss(*tokens)), name
        assert torch.allclose(loss(s.flatten(2), t.flatten(2), axis=1), loss(*tokens)), name
    assert torch.allclose(L.cosine_distance(s, t), 1 - F.cosine_similarity(s, t, dim=1).mean())


def test_zero_vectors_have_no_direction():
    s = torch.zeros(1, 3, requires_grad=True)
    t = torch.tensor([[1.0, 2.0, 3.0]])
    loss = L.cosine_distance(s, t)
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and (s.grad == 0).all()
    assert L.cosine_distance(s, s).item() == 0
    assert L.cosine_distance(1e-5 * t, t).item() == pytest.approx(0, abs=1e-6)


def test_whiten_is_a_layer_norm_without_affine():
    x = pair(2, 3, 4)[0]
    assert torch.allclose(L.whiten(x), F.layer_norm(x, (4,), eps=1e-6))


def test_smooth_l1_whitened_is_quadratic_below_beta():
    t = torch.tensor([[1.0, -1.0]], dtype=torch.float64)  # whitened: itself, but for eps
    target = L.whiten(t)
    s = target + torch.tensor([[1.0, 3.0]])
    assert L.smooth_l1_whitened(s, t).item() == pytest.approx((1 / 4 + (3 - 1)) / 2)
    assert L.smooth_l1_whitened(s, t, beta=1.0).item() == pytest.approx((0.5 + 2.5) / 2)


def test_attention_transfer_against_numpy_with_other_channel_counts():
    s, t = pair(2, 3, 4, 4)[0], pair(2, 7, 4, 4, seed=1)[0]
    maps = []
    for x in (s.detach().numpy(), t.detach().numpy()):
        a = (x**2).mean(1).reshape(2, -1)
        maps.append(a / np.linalg.norm(a, axis=1, keepdims=True))
    assert L.attention_transfer(s, t).item() == pytest.approx(((maps[0] - maps[1]) ** 2).mean())


def test_squarehead_mask_ignores_padding():
    s, t = pair(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    keep = mask.bool()
    assert torch.allclose(L.squarehead(s, t, mask), L.squarehead(s[keep], t[keep]))
    assert L.squarehead(s, t, torch.zeros(2, 3)).item() == 0
    assert torch.allclose(L.squarehead(3 * s, 3 * t), L.squarehead(s, t), atol=1e-7)


@pytest.mark.parametrize("name", [*DISTANCES, "smooth_l1_whitened"])
def test_half_precision_does_not_overflow(name: str):
    s, t = (300 * x.detach().half().requires_grad_() for x in pair(2, 3, 4))
    value = getattr(L, name)(s, t)
    assert value.dtype == torch.float32 and value.isfinite()


@pytest.mark.parametrize("name", [n for n in [*DISTANCES, "smooth_l1_whitened"] if n != "attention_transfer"])
def test_different_shapes_name_both_and_the_remedy(name: str):
    with pytest.raises(InputError, match=r"\(2, 8, 4, 4\).*\(2, 16, 4, 4\).*make_projector"):
        getattr(L, name)(torch.zeros(2, 8, 4, 4), torch.zeros(2, 16, 4, 4))


def test_other_bad_arguments():
    with pytest.raises(InputError, match=r"\(2, 8, 4, 4\).*\(2, 8, 2, 2\)"):
        L.attention_transfer(torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 2))
    with pytest.raises(InputError, match="positions"):
        L.attention_transfer(torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(InputError, match="at least 1"):
        L.attention_transfer(torch.zeros(2, 8, 4), torch.zeros(2, 8, 4), power=0.5)
    with pytest.raises(InputError, match="beta"):
        L.smooth_l1_whitened(torch.zeros(2, 8), torch.zeros(2, 8), beta=0)
    with pytest.raises(InputError, match="mask has shape"):
        L.squarehead(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2))
    with pytest.raises(InputError, match="no channel axis"):
        L.cosine_distance(torch.zeros(3), torch.zeros(3))
