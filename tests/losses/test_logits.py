from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.losses import logits as L

DIVERGENCES = {
    "forward_kl": L.forward_kl,
    "reverse_kl": L.reverse_kl,
    "symmetric_kl": L.symmetric_kl,
    "js": L.js_divergence,
    "js_skewed_scaled": lambda s, t, **k: L.js_divergence(s, t, beta=0.1, scaled=True, **k),
    "chunked_forward_kl": lambda s, t, **k: L.chunked_forward_kl(s, t, chunk_rows=2, **k),
}
LABELS = torch.tensor([0, 3, 1, 4, 4])
DISTANCES = DIVERGENCES | {
    "hinton": L.hinton,
    "dkd": lambda s, t, **k: L.dkd(s, t, LABELS, **k),
    "dist": L.dist_loss,
}


def pair(seed: int = 0, rows: int = 5, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(rows, classes, generator=g, dtype=torch.float64) for _ in range(2))
    return s.requires_grad_(), t.requires_grad_()


def probabilities(z: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    e = np.exp(z.detach().numpy() / temperature)
    return e / e.sum(-1, keepdims=True)


def np_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


def test_two_classes_by_hand():
    # at temperature 2: p_t = (3/4, 1/4) and (1/5, 4/5), p_s = (1/2, 1/2) and (1/2, 1/2)
    teacher = torch.tensor([[2 * math.log(3), 0.0], [0.0, 2 * math.log(4)]], dtype=torch.float64)
    student = torch.zeros(2, 2, dtype=torch.float64)
    forward = [0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.2 * math.log(0.4) + 0.8 * math.log(1.6)]
    reverse = [0.5 * math.log(2 / 3) + 0.5 * math.log(2), 0.5 * math.log(2.5) + 0.5 * math.log(0.625)]
    assert L.forward_kl(student, teacher, 2, "none").tolist() == pytest.approx(forward)
    assert L.reverse_kl(student, teacher, 2, "none").tolist() == pytest.approx(reverse)
    assert L.hinton(student, teacher, 2).item() == pytest.approx(4 * sum(forward) / 2)
    assert L.hinton(student, teacher, 2).item() == pytest.approx(0.647114, abs=1e-6)
    assert L.symmetric_kl(student, teacher, 2, "sum").item() == pytest.approx((sum(forward) + sum(reverse)) / 2)
    assert L.entropy(teacher, 2).tolist() == pytest.approx(
        [-0.75 * math.log(0.75) - 0.25 * math.log(0.25), -0.2 * math.log(0.2) - 0.8 * math.log(0.8)]
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_against_numpy(temperature: float):
    s, t = pair()
    ps, pt = probabilities(s, temperature), probabilities(t, temperature)
    assert L.forward_kl(s, t, temperature).item() == pytest.approx(np_kl(pt, ps).mean())
    assert L.reverse_kl(s, t, temperature).item() == pytest.approx(np_kl(ps, pt).mean())
    m = 0.3 * pt + 0.7 * ps
    jsd = 0.3 * np_kl(pt, m) + 0.7 * np_kl(ps, m)
    assert L.js_divergence(s, t, 0.3, temperature).item() == pytest.approx(jsd.mean())
    assert L.js_divergence(s, t, 0.3, temperature, scaled=True).item() == pytest.approx(jsd.mean() / 0.21)
    assert L.entropy(t, temperature, "batchmean").item() == pytest.approx(-(pt * np.log(pt)).sum(1).mean())
    assert L.soft_cross_entropy(s, torch.from_numpy(pt), temperature).item() == pytest.approx(
        -(pt * np.log(ps)).sum(1).mean()
    )


def test_forward_kl_agrees_with_torch():
    s, t = pair()
    expected = F.kl_div(F.log_softmax(s, 1), F.log_softmax(t, 1), log_target=True, reduction="batchmean")
    assert torch.allclose(L.forward_kl(s, t), expected)


def test_js_limits_are_the_two_kl():
    s, t = pair()
    forward, reverse = L.forward_kl(s, t).item(), L.reverse_kl(s, t).item()
    assert L.js_divergence(s, t, 0.0).item() == forward
    assert L.js_divergence(s, t, 1.0).item() == reverse
    assert L.js_divergence(s, t, 1e-6).item() / 1e-6 == pytest.approx(forward, rel=1e-3)
    assert L.js_divergence(s, t, 1 - 1e-6).item() / 1e-6 == pytest.approx(reverse, rel=1e-3)
    assert L.js_divergence(s, t, 1e-6, scaled=True).item() == pytest.approx(forward, rel=1e-3)
    assert L.js_divergence(s, t, 1 - 1e-6, scaled=True).item() == pytest.approx(reverse, rel=1e-3)


def test_js_is_symmetric_and_bounded_by_log_two():
    s, t = torch.tensor([[40.0, 0.0, -3.0]]), torch.tensor([[0.0, 40.0, 5.0]])
    assert L.js_divergence(s, t).item() == pytest.approx(math.log(2), rel=1e-5)
    assert L.js_divergence(s, t).item() == pytest.approx(L.js_divergence(t, s).item())


@pytest.mark.parametrize("name", DISTANCES)
def test_equal_networks_have_no_distance_and_no_gradient(name: str):
    s = pair()[0].detach().clone().requires_grad_()
    t = s.detach().clone().requires_grad_()
    loss = DISTANCES[name](s, t)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert s.grad.abs().max() < 1e-12
    assert t.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", DISTANCES)
def test_distance_is_positive_and_gradients_are_right_for_both(name: str):
    s, t = pair()
    assert DISTANCES[name](s, t).item() > 0.01
    assert torch.autograd.gradcheck(DISTANCES[name], (s, t))


@pytest.mark.parametrize("name", DISTANCES)
def test_detaching_one_network_frees_it(name: str):
    s, t = pair()
    DISTANCES[name](s, t.detach()).backward()
    assert t.grad is None and s.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [*DIVERGENCES, "dkd"])
def test_mask_and_reductions(name: str):
    s, t = pair()
    mask = torch.tensor([1, 0, 1, 1, 0])
    rows = DISTANCES[name](s, t, reduction="none")
    assert rows.shape == (5,)
    kept = rows[mask.bool()]
    assert torch.allclose(DISTANCES[name](s, t), rows.mean())
    assert torch.allclose(DISTANCES[name](s, t, reduction="sum"), rows.sum())
    assert torch.allclose(DISTANCES[name](s, t, mask=mask), kept.mean())
    assert torch.allclose(DISTANCES[name](s, t, mask=mask.bool(), reduction="sum"), kept.sum())
    assert torch.equal(DISTANCES[name](s, t, mask=mask, reduction="none"), rows * mask)


def test_masked_rows_have_no_influence():
    s, t = pair()
    mask = torch.tensor([1, 0, 1, 1, 0])
    keep = mask.bool()
    assert torch.allclose(L.dist_loss(s, t, mask=mask), L.dist_loss(s[keep], t[keep]))
    assert torch.allclose(L.hinton(s, t, mask=mask), L.hinton(s[keep], t[keep]))
    L.forward_kl(s, t, mask=mask).backward()
    assert (s.grad[~keep] == 0).all() and (s.grad[keep] != 0).all()


def test_without_a_valid_row_the_mean_is_zero():
    s, t = pair()
    loss = L.forward_kl(s, t, mask=torch.zeros(5))
    loss.backward()
    assert loss.item() == 0 and (s.grad == 0).all()


def test_token_logits_are_rows():
    s, t = (x.detach()[:4].reshape(2, 2, 6) for x in pair())
    for loss in (*DIVERGENCES.values(), L.dist_loss, L.hinton):
        assert torch.allclose(loss(s, t), loss(s.flatten(0, 1), t.flatten(0, 1)))
    assert L.forward_kl(s, t, reduction="none").shape == (2, 2)
    labels = torch.tensor([[0, 1], [5, 2]])
    assert torch.allclose(L.dkd(s, t, labels), L.dkd(s.flatten(0, 1), t.flatten(0, 1), labels.flatten()))


def test_reverse_kl_floor_bounds_impossible_classes():
    teacher, student = torch.tensor([[0.0, -1000.0]]), torch.zeros(1, 2)
    log_half = math.log(0.5)
    assert L.reverse_kl(student, teacher).item() == pytest.approx(log_half - 0.5 * (0 - 20), rel=1e-5)
    assert L.reverse_kl(student, teacher, floor=-math.inf).item() == pytest.approx(log_half + 500, rel=1e-5)
    sharp = torch.linspace(0, -60, 2000, dtype=torch.float64).unsqueeze(0)
    assert -2000 * math.exp(-21) <= L.reverse_kl(sharp, sharp).item() <= 0


def test_extreme_and_half_precision_logits_stay_finite():
    s = torch.tensor([[200.0, -200.0, 0.0]], dtype=torch.float16, requires_grad=True)
    t = torch.tensor([[-200.0, 200.0, 0.0]], dtype=torch.float16)
    for loss in (*DIVERGENCES.values(), L.hinton, L.dist_loss):
        value = loss(s, t)
        assert value.dtype == torch.float32 and value.isfinite()
    value = L.dkd(s, t, torch.tensor([0]))
    (grad,) = torch.autograd.grad(value, s)
    assert value.isfinite() and grad.isfinite().all()


def dkd_reference(s: np.ndarray, t: np.ndarray, y: np.ndarray, alpha: float, beta: float, temperature: float) -> float:
    total = 0.0
    for zs, zt, c in zip(s / temperature, t / temperature, y, strict=True):
        ps, pt = np.exp(zs) / np.exp(zs).sum(), np.exp(zt) / np.exp(zt).sum()
        target = np_kl(np.array([pt[c], 1 - pt[c]]), np.array([ps[c], 1 - ps[c]]))
        qs, qt = np.delete(ps, c) / (1 - ps[c]), np.delete(pt, c) / (1 - pt[c])
        total += alpha * target + beta * np_kl(qt, qs)
    return temperature**2 * total / len(y)


def test_dkd_against_its_definition():
    s, t = pair()
    expected = dkd_reference(s.detach().numpy(), t.detach().numpy(), LABELS.numpy(), 0.7, 3.0, 2.0)
    assert L.dkd(s, t, LABELS, alpha=0.7, beta=3.0, temperature=2.0).item() == pytest.approx(expected)
    soft = torch.full((5, 6), 0.1).scatter_(1, LABELS.unsqueeze(1), 0.5)
    assert L.dkd(s, t, soft, alpha=0.7, beta=3.0, temperature=2.0).item() == pytest.approx(expected)


def test_dkd_contains_hinton():
    # KL = TCKD + (1 - p_t(y)) NCKD, row by row
    s, t = pair()
    temperature = 3.0
    target = L.dkd(s, t, LABELS, 1.0, 0.0, temperature, "none")
    others = L.dkd(s, t, LABELS, 0.0, 1.0, temperature, "none")
    rest = 1 - torch.softmax(t / temperature, 1).gather(1, LABELS.unsqueeze(1)).squeeze(1)
    assert torch.allclose((target + rest * others).mean(), L.hinton(s, t, temperature))


def test_nkd_against_its_definition():
    s, t = pair()
    ps, pt = probabilities(s), probabilities(t)
    qs, qt = probabilities(s, 2.0), probabilities(t, 2.0)
    total = 0.0
    for i, c in enumerate(LABELS.tolist()):
        rest_s, rest_t = np.delete(qs[i], c), np.delete(qt[i], c)
        rest_s, rest_t = rest_s / rest_s.sum(), rest_t / rest_t.sum()
        total += -pt[i, c] * np.log(ps[i, c]) - 1.5 * 4 * (rest_t * np.log(rest_s)).sum()
    assert L.nkd(s, t, LABELS, alpha=1.5, temperature=2.0).item() == pytest.approx(total / 5)
    assert torch.autograd.gradcheck(lambda a, b: L.nkd(a, b, LABELS, temperature=2.0), (s, t))


def test_nkd_pushes_the_target_up_even_where_networks_agree():
    s = pair()[0]
    L.nkd(s, s.detach(), LABELS).backward()
    assert (s.grad.gather(1, LABELS.unsqueeze(1)) < 0).all()


def test_dist_against_numpy():
    s, t = pair()
    ps, pt = probabilities(s, 2.0), probabilities(t, 2.0)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(ps, pt, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(ps.T, pt.T, strict=True)])
    assert L.dist_loss(s, t, 0.5, 2.0, 2.0).item() == pytest.approx(4 * (0.5 * inter + 2.0 * intra))


def test_dist_ignores_constant_predictions():
    s = torch.zeros(4, 3, requires_grad=True)
    t = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    loss = L.dist_loss(s, t)
    loss.backward()
    assert loss.item() == pytest.approx(1.0, rel=1e-5)
    assert (s.grad == 0).all()
    assert L.dist_loss(s, s).item() == 0


def test_standardise():
    z = pair()[0]
    out = L.standardise(z)
    assert torch.allclose(out.mean(1), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(out.std(1), torch.ones(5, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(out, L.standardise(3 * z + 7), atol=1e-6)
    # a softmax cannot tell it from division by the deviation alone
    assert torch.allclose(torch.softmax(out, 1), torch.softmax(z / z.std(1, keepdim=True), 1), atol=1e-6)
    assert torch.autograd.gradcheck(L.standardise, (z,))
    constant = torch.ones(1, 3, requires_grad=True)
    L.standardise(constant).square().sum().backward()
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100, None])
def test_chunked_equals_plain(chunk_rows: int | None):
    s, t = pair(rows=7, classes=11)
    mask = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 0.0, 0.5])
    plain, chunked = (
        L.forward_kl(s, t, 2.0, mask=mask),
        L.chunked_forward_kl(s, t, 2.0, mask=mask, chunk_rows=chunk_rows),
    )
    assert torch.allclose(plain, chunked, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(plain, (s, t)), torch.autograd.grad(chunked, (s, t)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


class LargestResult(TorchDispatchMode):
    """Sizes of the tensors that operations allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.sizes.append(out.numel())
        return out


def test_chunked_never_holds_a_full_softmax():
    rows, classes = 12, 50
    s = torch.randn(rows, classes, requires_grad=True)
    t = torch.randn(rows, classes)
    with LargestResult() as plain:
        L.forward_kl(s, t).backward()
    assert plain.sizes.count(rows * classes) > 4
    with LargestResult() as chunked:
        L.chunked_forward_kl(s, t, chunk_rows=3).backward()
    assert chunked.sizes.count(rows * classes) <= 1  # the student's gradient alone
    assert max(n for n in chunked.sizes if n != rows * classes) <= 3 * classes


def test_chunked_keeps_the_type_of_the_gradient_and_skips_a_detached_teacher():
    s = torch.randn(4, 9, dtype=torch.bfloat16, requires_grad=True)
    t = torch.randn(4, 9, dtype=torch.bfloat16)
    loss = L.chunked_forward_kl(s, t)
    loss.backward()
    assert loss.dtype == torch.float32 and s.grad.dtype == torch.bfloat16


def test_different_class_counts_name_both():
    for loss in (*DIVERGENCES.values(), L.hinton, L.dist_loss, L.soft_cross_entropy):
        with pytest.raises(InputError, match=r"10 classes .* 12"):
            loss(torch.zeros(2, 10), torch.zeros(2, 12))
    with pytest.raises(InputError, match=r"\(2, 10\) .* \(3, 10\)"):
        L.forward_kl(torch.zeros(2, 10), torch.zeros(3, 10))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("name", DISTANCES)
def test_bad_temperature(name: str, temperature: float):
    with pytest.raises(InputError, match="temperature must be positive"):
        DISTANCES[name](*pair(), temperature=temperature)


def test_other_bad_arguments():
    s, t = pair()
    with pytest.raises(UnknownNameError, match="did you mean batchmean"):
        L.forward_kl(s, t, reduction="batch_mean")
    with pytest.raises(InputError, match=r"mask has shape \(3,\)"):
        L.forward_kl(s, t, mask=torch.ones(3))
    with pytest.raises(InputError, match=r"in \[0, 1\]"):
        L.js_divergence(s, t, beta=1.5)
    with pytest.raises(InputError, match=r"0 to 9.* 6 classes"):
        L.dkd(s, t, torch.tensor([0, 1, 2, 3, 9]))
    with pytest.raises(InputError, match=r"-100 to 4"):
        L.nkd(s, t, torch.tensor([0, -100, 2, 3, 4]))
    with pytest.raises(InputError, match=r"class indices \(5,\) or soft labels \(5, 6\)"):
        L.dkd(s, t, torch.zeros(4, dtype=torch.long))
    with pytest.raises(InputError, match="at least 2 classes"):
        L.dkd(s[:, :1], t[:, :1], LABELS * 0)
    with pytest.raises(InputError, match="at least 2 classes"):
        L.standardise(s[:, :1])
    with pytest.raises(InputError, match="chunk_rows"):
        L.chunked_forward_kl(s, t, chunk_rows=0)
    with pytest.raises(InputError, match="single number"):
        L.forward_kl(torch.tensor(1.0), torch.tensor(1.0))
