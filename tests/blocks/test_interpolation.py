from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.blocks.interpolation import (
    Plane,
    blend_initialisations,
    linear_path,
    shuffle_parameters,
    state_of,
    variance_factor,
)
from limbeck.core.errors import InputError


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def net(width: int = 300) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 200, bias=False))


def test_the_factor():
    assert variance_factor(0) == variance_factor(1) == 1
    assert variance_factor(0.5) == pytest.approx(0.5**0.5)
    with pytest.raises(InputError, match="between 0 and 1"):
        variance_factor(1.1)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.3, 0.5, 0.9, 1.0])
def test_random_weights_are_mixed_with_their_variance_kept(alpha):
    student, teacher = net(), net()
    fresh = state_of(student)
    names = blend_initialisations(student, teacher, alpha)
    assert names == ["0.weight", "0.bias", "3.weight"]  # the default bias is random, the norm's gain and bias are not
    delta = (alpha**2 + (1 - alpha) ** 2) ** 0.5
    own, others = student.state_dict(), teacher.state_dict()
    for name in names:
        torch.testing.assert_close(own[name], ((1 - alpha) * others[name] + alpha * fresh[name]) / delta)
    assert own["3.weight"].std().item() == pytest.approx(others["3.weight"].std().item(), rel=0.02)
    assert torch.equal(own["1.weight"], torch.ones(300)) and torch.equal(own["1.bias"], torch.zeros(300))


def test_the_ends_are_exact():
    student, teacher = net(), net()
    fresh = state_of(student)
    blend_initialisations(student, teacher, 1.0)
    assert all(torch.equal(p, fresh[name]) for name, p in student.named_parameters())
    blend_initialisations(student, teacher, 0.0)
    assert all(torch.equal(v, teacher.state_dict()[k]) for k, v in student.state_dict().items())


def test_a_small_alpha_is_kept_in_double_precision():
    student, teacher = net().double(), net().double()
    blend_initialisations(student, teacher, 1e-10)
    moved = (student[3].weight - teacher[3].weight).abs().mean().item()
    assert 1e-12 < moved < 1e-10


def test_zero_biases_and_single_constants_stay_zero_and_buffers_are_the_teachers():
    student, teacher = (nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.BatchNorm1d(3)) for _ in range(2))
    teacher[1].running_mean.fill_(2.0)
    blend_initialisations(student, teacher, 0.4)
    assert not bool(student[0].weight[0].any())
    assert torch.equal(student[1].running_mean, teacher[1].running_mean)
    assert student[1].running_mean is not teacher[1].running_mean


def test_different_architectures_are_refused():
    with pytest.raises(InputError, match=r"differ in '0.weight' \(\(300, 20\) and \(8, 20\)\)"):
        blend_initialisations(net(), net(8), 0.5)
    with pytest.raises(InputError, match="absent"):
        linear_path(net(), nn.Linear(20, 300), [0.5])


def test_shuffling_keeps_values_and_constants():
    model = net()
    before = state_of(model)
    shuffle_parameters(model)
    after = state_of(model)
    assert torch.equal(before["0.weight"].flatten().sort().values, after["0.weight"].flatten().sort().values)
    assert not torch.equal(before["0.weight"], after["0.weight"])
    assert torch.equal(before["1.weight"], after["1.weight"])
    correlation = torch.corrcoef(torch.stack([before["3.weight"].flatten(), after["3.weight"].flatten()]))[0, 1]
    assert abs(correlation.item()) < 0.02


def test_a_line():
    a, b = net(8), net(8)
    a[1].num_batches_tracked.fill_(3)
    states = linear_path(a, b, [-0.5, 0.0, 0.25, 1.0])
    assert states["0.weight"].shape == (4, 8, 20) and states["0.weight"].dtype == torch.float32
    torch.testing.assert_close(states["0.weight"][2], 0.75 * a[0].weight + 0.25 * b[0].weight)
    assert torch.equal(states["0.weight"][1], a[0].weight) and torch.equal(states["3.weight"][3], b[3].weight)
    torch.testing.assert_close(states["0.bias"][0], 1.5 * a[0].bias - 0.5 * b[0].bias)
    assert states["1.num_batches_tracked"].tolist() == [3] * 4
    with pytest.raises(InputError, match="at least one number"):
        linear_path(a, b, [])


def test_a_plane_goes_through_its_points_with_an_orthonormal_basis():
    a, b, c = (net(8).double() for _ in range(3))
    plane = Plane.through(a, b, c)

    def dot(u, v) -> float:
        return float(sum((u[n] * v[n]).sum() for n in u))

    assert dot(plane.first, plane.first) == pytest.approx(1) and dot(plane.second, plane.second) == pytest.approx(1)
    assert dot(plane.first, plane.second) == pytest.approx(0, abs=1e-12)
    points = plane.points(plane.corners)
    for position, model in enumerate((a, b, c)):
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(points[name][position], tensor, rtol=1e-10, atol=1e-12)
    distance = sum(((p - q) ** 2).sum() for p, q in zip(a.parameters(), b.parameters(), strict=True)) ** 0.5
    assert plane.corners[1].tolist() == pytest.approx([distance.item(), 0.0])
    with pytest.raises(InputError, match="on a line"):
        Plane.through(a, b, {n: t[0] for n, t in linear_path(a, b, [3.0]).items()})
    with pytest.raises(InputError, match="on a line"):
        Plane.through(a, a, b)
