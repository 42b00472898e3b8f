from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.losses import relations as L

LOSSES = {
    "rkd_distance": L.rkd_distance,
    "rkd_angle": L.rkd_angle,
    "similarity_preserving": L.similarity_preserving,
    "correlation_congruence": L.correlation_congruence,
    "correlation_congruence_exact": partial(L.correlation_congruence, order=None),
    "pkt": L.pkt,
}


def pair(batch: int = 5, student: int = 3, teacher: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(batch, d, generator=g, dtype=torch.float64) for d in (student, teacher))
    return s.requires_grad_(), t.requires_grad_()


def smooth_l1(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    d = np.abs(a - b)
    return np.where(d < 1, d**2 / 2, d - 0.5)


def rotation(size: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]


@pytest.mark.parametrize("name", LOSSES)
def test_equal_features_have_no_distance_and_no_gradient(name: str):
    s = pair()[0]
    t = s.detach().clone().requires_grad_()
    loss = LOSSES[name](s, t)
    loss.backward()
    assert loss.item() == 0
    # pkt's eps inside the logarithm leaves a gradient of its own size
    bound = 1e-6 if name == "pkt" else 1e-14
    assert s.grad.abs().max() < bound and t.grad.abs().max() < bound


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right_for_both_and_widths_may_differ(name: str):
    assert LOSSES[name](*pair()).item() > 0
    assert torch.autograd.gradcheck(LOSSES[name], pair())


@pytest.mark.parametrize("name", LOSSES)
def test_rotation_of_the_features_and_order_of_the_samples_do_not_matter(name: str):
    s, t = (x.detach() for x in pair())
    value = LOSSES[name](s, t)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(LOSSES[name](s @ rotation(3), t @ rotation(4)), value)
    assert torch.allclose(LOSSES[name](s[order], t[order]), value)


@pytest.mark.parametrize("name", LOSSES)
def test_scale_does_not_matter(name: str):
    s, t = (x.detach() for x in pair())
    assert torch.allclose(LOSSES[name](s, 9 * s), torch.zeros((), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(LOSSES[name](0.2 * s, t), LOSSES[name](s, t))


def test_rkd_distance_against_numpy():
    s, t = pair()
    relative = []
    for x in (s.detach().numpy(), t.detach().numpy()):
        d = np.linalg.norm(x[:, None] - x[None], axis=2)
        relative.append(d / d[d > 0].mean())
    assert L.rkd_distance(s, t).item() == pytest.approx(smooth_l1(*relative).mean())


def test_rkd_angle_against_numpy():
    s, t = pair()
    cosines = []
    for x in (s.detach().numpy(), t.detach().numpy()):
        c = np.zeros((5, 5, 5))
        for i in range(5):
            for j in range(5):
                for k in range(5):
                    if i not in (j, k):
                        a, b = x[j] - x[i], x[k] - x[i]
                        c[i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        cosines.append(c)
    assert L.rkd_angle(s, t).item() == pytest.approx(smooth_l1(*cosines).mean())


def test_similarity_preserving_against_numpy():
    s, t = pair()
    rows = []
    for x in (s.detach().numpy(), t.detach().numpy()):
        g = x @ x.T
        rows.append(g / np.linalg.norm(g, axis=1, keepdims=True))
    assert L.similarity_preserving(s, t).item() == pytest.approx(np.sum((rows[0] - rows[1]) ** 2) / 25)


def test_correlation_congruence_against_numpy():
    s, t = pair()
    exact, series = [], []
    for x in (s.detach().numpy(), t.detach().numpy()):
        u = x / np.linalg.norm(x, axis=1, keepdims=True)
        exact.append(np.exp(-0.4 * np.square(u[:, None] - u[None]).sum(2)))
        a = 0.8 * (u @ u.T)
        series.append(np.exp(-0.8) * (1 + a + a**2 / 2))
    assert L.correlation_congruence(s, t).item() == pytest.approx(np.square(series[0] - series[1]).mean())
    expected = np.square(exact[0] - exact[1]).mean()
    assert L.correlation_congruence(s, t, order=None).item() == pytest.approx(expected)
    assert L.correlation_congruence(s, t, order=12).item() == pytest.approx(expected, rel=1e-6)


def test_pkt_against_numpy():
    s, t = pair()
    p = []
    for x in (s.detach().numpy(), t.detach().numpy()):
        u = x / np.linalg.norm(x, axis=1, keepdims=True)
        similarity = (1 + u @ u.T) / 2
        p.append(similarity / similarity.sum(1, keepdims=True))
    expected = (p[1] * np.log(p[1] / p[0])).sum(1).mean()
    assert L.pkt(s, t).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_batches_give_finite_gradients(name: str):
    t = pair()[1].detach()
    twins = pair()[0].detach()
    twins[1] = twins[0]
    for s in (twins, torch.zeros(5, 3), torch.ones(5, 3)):
        x = s.clone().requires_grad_()
        LOSSES[name](x, t.to(x.dtype)).backward()
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() < 10


@pytest.mark.parametrize("name", LOSSES)
def test_one_sample_has_no_relations(name: str):
    s, t = (x.detach()[:1].requires_grad_() for x in pair())
    loss = LOSSES[name](s, t)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and s.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_maps_are_flattened_and_half_precision_is_safe(name: str):
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(LOSSES[name](x, x + 1), LOSSES[name](x.flatten(1), x.flatten(1) + 1))
    big = (300 * x).half()
    assert LOSSES[name](big, big.flip(0)).isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_different_batches(name: str):
    with pytest.raises(InputError, match=r"\(4, 3\).*\(5, 3\)"):
        LOSSES[name](torch.zeros(4, 3), torch.zeros(5, 3))


def test_bad_kernel():
    for bad in ({"gamma": 0.0}, {"order": 0}):
        with pytest.raises(InputError, match="gamma > 0 and order >= 1"):
            L.correlation_congruence(torch.zeros(4, 3), torch.zeros(4, 3), **bad)
