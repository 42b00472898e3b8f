"""BD-KD: equations against numpy, gradient separation, limits, modes, tokens, several networks, resume."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.methods.models import BDKD
from tests.helpers import resumed_equals_uninterrupted

TAU = 2.0


class Fixed(nn.Module):
    """Logits that are parameters, so that gradients can be read per sample."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 5, generator=generator, dtype=torch.float64) * torch.tensor(
        [[0.2], [3], [1], [4], [0.5], [2]]
    )
    return student, torch.randn(6, 5, generator=generator, dtype=torch.float64) * 1.5


def make(logits: tuple[torch.Tensor, torch.Tensor], **settings: object) -> tuple[BDKD, Batch]:
    method = BDKD(Fixed(logits[0]), Fixed(logits[1]), temperature=TAU, **settings)
    return method, Batch(torch.zeros(6, 1), torch.tensor([0, 1, 2, 3, 4, 0]))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(zs: np.ndarray, zt: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ps, pt = softmax(zs / TAU), softmax(zt / TAU)
    gap = -(pt * np.log(pt)).sum(-1) + (ps * np.log(ps)).sum(-1)
    fkl, rkl = (pt * np.log(pt / ps)).sum(-1), (ps * np.log(ps / pt)).sum(-1)
    over = gap > 0
    return np.where(over, delta, 1) * fkl + np.where(over, 1, delta) * rkl, fkl, rkl


def test_losses_equal_the_equations(logits):
    method, batch = make(logits, delta=3.0, gamma_student=0.7, gamma_teacher=0.4)
    losses = method.losses(batch)
    rows, fkl, _ = reference(logits[0].numpy(), logits[1].numpy(), 3.0)
    assert losses["balance"].item() == pytest.approx(rows.mean(), rel=1e-9)
    # The teacher's term is KL(p_s || p_t): what numpy calls rkl above.
    _, _, rkl = reference(logits[0].numpy(), logits[1].numpy(), 3.0)
    assert losses["mutual_teacher"].item() == pytest.approx(rkl.mean(), rel=1e-9)
    expected = (
        F.cross_entropy(logits[0], batch.labels)
        + F.cross_entropy(logits[1], batch.labels)
        + 0.7 * TAU**2 * rows.mean()
        + 0.4 * TAU**2 * rkl.mean()
    )
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-9)
    assert 0 < losses.observed["overconfident"] < 1
    assert fkl.mean() != pytest.approx(rkl.mean())


def test_teacher_kl_can_be_turned_round(logits):
    method, batch = make(logits, teacher_kl="teacher_to_student")
    _, fkl, _ = reference(logits[0].numpy(), logits[1].numpy(), 2.0)
    assert method.losses(batch)["mutual_teacher"].item() == pytest.approx(fkl.mean(), rel=1e-9)


def test_gradients_of_the_two_losses_never_mix(logits):
    method, batch = make(logits)
    losses = method.losses(batch)
    student, teacher = method.student.logits, method.trained_teachers[0].logits
    for name in ("ce", "balance"):
        assert torch.autograd.grad(losses[name], teacher, retain_graph=True, allow_unused=True)[0] is None
        assert torch.autograd.grad(losses[name], student, retain_graph=True)[0].abs().sum() > 0
    for name in ("ce_teacher", "mutual_teacher"):
        assert torch.autograd.grad(losses[name], student, retain_graph=True, allow_unused=True)[0] is None
        assert torch.autograd.grad(losses[name], teacher, retain_graph=True)[0].abs().sum() > 0


def test_gate_puts_delta_on_the_divergence_that_closes_the_gap(logits):
    method, _ = make(logits, delta=2.5)
    sharp, flat = torch.tensor([[9.0, 0, 0]]), torch.tensor([[0.1, 0, 0]])
    assert [w.item() for w in method.gate(sharp, flat)] == [2.5, 1.0]  # over-confident student: forward KL
    assert [w.item() for w in method.gate(flat, sharp)] == [1.0, 2.5]
    inverted, _ = make(logits, delta=2.5, mode="inverted")
    assert [w.item() for w in inverted.gate(sharp, flat)] == [1.0, 2.5]


def test_gate_carries_no_gradient(logits):
    """Weights are constants: the gradient equals that of the same sum with the weights put in as numbers."""
    method, batch = make(logits, gate="smooth", gate_temperature=0.5)
    own, other = method.student.logits, method.trained_teachers[0].logits.detach()
    (found,) = torch.autograd.grad(method.losses(batch)["balance"], own)
    wf, wr = (w.clone() for w in method.gate(own, other))
    log_s, log_t = F.log_softmax(own / TAU, -1), F.log_softmax(other / TAU, -1)
    rows = wf * (log_t.exp() * (log_t - log_s)).sum(-1) + wr * (log_s.exp() * (log_s - log_t)).sum(-1)
    (expected,) = torch.autograd.grad(rows.mean(), own)
    torch.testing.assert_close(found, expected)


def test_smooth_gate_tends_to_the_hard_one(logits):
    hard, batch = make(logits)
    smooth, _ = make(logits, gate="smooth", gate_temperature=1e-6)
    torch.testing.assert_close(hard.losses(batch).total, smooth.losses(batch).total)


def test_delta_one_is_fr_bit_for_bit(logits):
    one, batch = make(logits, delta=1.0)
    fr, _ = make(logits, mode="fr", delta=4.0)
    assert torch.equal(one.losses(batch).total, fr.losses(batch).total)


def test_modes(logits):
    _, fkl, rkl = reference(logits[0].numpy(), logits[1].numpy(), 1.0)
    dml, batch = make(logits, mode="dml", teacher_kl="teacher_to_student")
    assert dml.losses(batch)["balance"].item() == pytest.approx(fkl.mean(), rel=1e-9)
    assert dml.losses(batch)["mutual_teacher"].item() == pytest.approx(rkl.mean(), rel=1e-9)
    assert make(logits, mode="rkl")[0].losses(batch)["balance"].item() == pytest.approx(rkl.mean(), rel=1e-9)
    consensus = softmax((logits[0].numpy() + logits[1].numpy()) / 2 / TAU)
    kdcl = make(logits, mode="kdcl")[0].losses(batch)
    expected = (consensus * np.log(consensus / softmax(logits[0].numpy() / TAU))).sum(-1).mean()
    assert kdcl["balance"].item() == pytest.approx(expected, rel=1e-9)


def test_equal_networks_have_no_divergence(logits):
    method, batch = make((logits[0], logits[0]))
    losses = method.losses(batch)
    assert abs(losses["balance"].item()) < 1e-12
    assert abs(losses["mutual_teacher"].item()) < 1e-12
    (gradient,) = torch.autograd.grad(losses["balance"], method.student.logits)
    assert gradient.abs().max() < 1e-12


def test_pairwise_terms_are_averaged_over_peers(logits):
    third = logits[0].flip(0)
    method = BDKD(Fixed(logits[0]), Fixed(logits[1]), peers=[Fixed(third)], temperature=TAU)
    batch = Batch(torch.zeros(6, 1), torch.tensor([0, 1, 2, 3, 4, 0]))
    losses = method.losses(batch)
    to_teacher = reference(logits[0].numpy(), logits[1].numpy(), 2.0)[0].mean()
    to_peer = reference(logits[0].numpy(), third.numpy(), 2.0)[0].mean()
    assert losses["balance"].item() == pytest.approx((to_teacher + to_peer) / 2, rel=1e-9)
    assert set(losses) == {"ce", "balance", "ce_peer1", "balance_peer1", "ce_teacher", "mutual_teacher"}


def test_padding_tokens_count_nowhere():
    generator = torch.Generator().manual_seed(1)
    zs, zt = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    labels = torch.tensor([[1, 2, -100], [0, -100, -100]])
    padded = BDKD(Fixed(zs), Fixed(zt)).losses(Batch(torch.zeros(2, 3), labels))
    valid = labels.flatten() != -100
    plain = BDKD(Fixed(zs.flatten(0, 1)[valid]), Fixed(zt.flatten(0, 1)[valid])).losses(
        Batch(torch.zeros(3, 1), labels.flatten()[valid])
    )
    for name in plain:
        torch.testing.assert_close(padded[name], plain[name])


def test_ramp_raises_the_weight_linearly(logits):
    method, batch = make(logits, ramp_steps=4)
    weights = [method.losses(batch).weights["balance"] for _ in range(6)]
    assert weights == [pytest.approx(TAU**2 * f) for f in (0.25, 0.5, 0.75, 1, 1, 1)]


def test_frozen_teacher_and_some_steps_shrink_the_entropy_gap():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    teacher = nn.Linear(8, 5)
    student = nn.Linear(8, 5)
    with torch.no_grad():
        student.weight.mul_(6)
    method = BDKD(student, teacher, temperature=1.0)
    batch = Batch(x, torch.randint(0, 5, (64,)))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    before = method.gap(student(x), teacher(x)).abs().mean()
    for _ in range(200):
        optimizer.zero_grad()
        method.losses(batch)["balance"].backward()
        optimizer.step()
    assert method.gap(student(x), teacher(x)).abs().mean() < 0.1 * before


def test_two_optimisers_cover_every_parameter_once():
    method = BDKD(nn.Linear(4, 3), [nn.Linear(4, 3), nn.Linear(4, 3)], peers=[nn.Linear(4, 3)], teacher_lr=0.5)
    made = method.optimisers(10)
    ids = [id(p) for o in made.values() for p in o.parameters()]
    assert len(ids) == len(set(ids)) == len(list(method.parameters()))
    assert made["teacher"].optimizer.param_groups[0]["initial_lr"] == 0.5


def test_bad_input_is_named():
    net = nn.Linear(4, 3)
    with pytest.raises(InputError, match="different modules"):
        BDKD(net, net)
    with pytest.raises(InputError, match="gamma_teacher 2.0 exceeds"):
        BDKD(net, nn.Linear(4, 3), gamma_teacher=2.0)
    with pytest.raises(InputError, match=r"delta must be float >= 1 \(got 0.5\)"):
        BDKD(net, nn.Linear(4, 3), delta=0.5)
    with pytest.raises(InputError, match=r"different numbers of classes: \[3, 5\]"):
        BDKD(net, nn.Linear(4, 5))((torch.zeros(2, 4), torch.tensor([0, 1])))
    with pytest.raises(InputError, match="beside the student"):
        BDKD(net, [])


def test_works_in_a_bare_loop_and_exports_the_student_alone():
    torch.manual_seed(0)
    student = nn.Linear(4, 3)
    keys = set(student.state_dict())
    method = BDKD(student, nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)))
    x, y = torch.randn(90, 4), torch.arange(90) % 3
    x[torch.arange(90), y] += 3
    optimizer = torch.optim.Adam(method.trainable_parameters(), lr=0.05)
    first = method((x, y)).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = method((x, y))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    assert set(method.student.state_dict()) == keys


def test_resume_is_exact(tmp_path: Path):
    data = TensorData(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)

    def make_method() -> BDKD:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3))
        return BDKD(student, copy.deepcopy(student), steps=30, batch_size=8, ramp_steps=20, evaluations=0)

    resumed_equals_uninterrupted(make_method, data, tmp_path)
