"""The three gradients of trajectory matching against full unrolling written by hand, and the memory they take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.flat import FlatNetwork
from limbeck.blocks.trajectory_matching import (
    MODES,
    Target,
    draw_batches,
    follow,
    match_trajectory,
    soft_cross_entropy,
)
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.metrics.autograd_memory import SavedTensorMeter


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def network(dtype: torch.dtype = torch.float64, *, dropout: bool = False) -> FlatNetwork:
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
    return FlatNetwork(nn.Sequential(*layers, *([nn.Dropout(0.3)] if dropout else []), nn.Linear(36, 3)).to(dtype))


class Setting:
    def __init__(self, steps: int, dtype: torch.dtype = torch.float64, *, soft: bool = False, dropout: bool = False):
        torch.manual_seed(0)
        self.net = network(dtype, dropout=dropout)
        self.images = torch.randn(6, 1, 6, 6, dtype=dtype)
        self.labels = torch.randn(6, 3, dtype=dtype) if soft else torch.arange(6) % 3
        self.criterion = soft_cross_entropy if soft else F.cross_entropy
        self.beta = torch.tensor(0.05, dtype=dtype)
        self.start = 0.3 * torch.randn(self.net.size, dtype=dtype)
        self.point = self.start + 0.1 * torch.randn(self.net.size, dtype=dtype)
        self.batches = draw_batches(6, 4, steps, torch.Generator().manual_seed(1))
        self.shift = torch.randn(steps, 1, 1, 1, 1, dtype=dtype)

    def present(self, x: Tensor, y: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mirror images, then something of the step's own."""
        return torch.cat([x, x.flip(-1)]) * (1 + 0.1 * self.shift[step]), torch.cat([y, y])

    def match(self, mode: str, targets=None, **options):
        return match_trajectory(
            self.net, self.images, self.labels, self.beta, self.start, self.point if targets is None else targets,
            self.batches, mode=mode, present=self.present, criterion=self.criterion, **options,
        )  # fmt: skip

    def by_hand(self, targets, momentum: float = 0.0):
        """The definition, step by step, differentiated by autograd."""
        images, beta = self.images.clone().requires_grad_(), self.beta.clone().requires_grad_()
        labels = self.labels.clone().requires_grad_(self.labels.is_floating_point())
        theta, velocity, loss = self.start.clone().requires_grad_(), torch.zeros_like(self.start), 0.0
        for step, at in enumerate(self.batches):
            x, y = self.present(images[at], labels[at], step)
            (g,) = torch.autograd.grad(self.criterion(self.net(theta, x), y), theta, create_graph=True)
            velocity = momentum * velocity + g
            theta = theta - beta * velocity
            for point, after, weight in targets:
                if after == step + 1:
                    loss = loss + weight * (theta - point).norm() ** 2 / (self.start - point).norm() ** 2
        leaves = [images, beta] + ([labels] if labels.requires_grad else [])
        return loss.detach(), torch.autograd.grad(loss, leaves), theta.detach()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("mode", ["adjoint", "unroll"])
def test_gradients_are_those_of_the_definition(mode, soft, momentum, checkpointing):
    setting = Setting(steps=11, soft=soft)
    middle = setting.start + 0.1 * torch.randn_like(setting.start)
    targets = [Target(setting.point), Target(middle, 4, 0.5), Target(middle, 9)]
    loss, expected, end = setting.by_hand([(setting.point, 11, 1.0), (middle, 4, 0.5), (middle, 9, 1.0)], momentum)
    found = setting.match(mode, targets, momentum=momentum, checkpointing=checkpointing)
    assert relative(found.loss, loss) < 1e-13 and relative(found.end, end) < 1e-13
    assert relative(found.loss, found.distances @ torch.tensor([1.0, 0.5, 1.0]).double()) < 1e-14
    assert relative(found.images, expected[0]) < 1e-12
    assert relative(found.step_size, expected[1]) < 1e-12
    if soft:
        assert relative(found.labels, expected[2]) < 1e-12
    else:
        assert found.labels is None


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_adjoint_is_exact_over_fifty_steps(dtype, bound):
    setting = Setting(50, dtype, soft=True)
    exact, found = setting.match("unroll"), setting.match("adjoint")
    for name in ("images", "labels", "step_size"):
        assert relative(getattr(found, name), getattr(exact, name)) < bound, name


def test_tesla_is_exact_for_one_step_and_not_for_more():
    one = Setting(1, soft=True)
    assert relative(one.match("tesla").images, one.match("unroll").images) < 1e-13
    assert relative(one.match("tesla").labels, one.match("unroll").labels) < 1e-13
    more = Setting(20)
    assert relative(more.match("tesla").images, more.match("unroll").images) > 1e-3
    assert torch.equal(more.match("tesla").loss, more.match("adjoint").loss)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_tesla_is_the_published_sum_over_steps(momentum):
    """Closed form: every theta_i a constant, step i weighs c_i = (1 - mu^(T-i)) / (1 - mu)."""
    setting = Setting(7, soft=True)
    found = setting.match("tesla", momentum=momentum)
    images, labels = setting.images.clone().requires_grad_(), setting.labels.clone().requires_grad_()
    theta, velocity, total, path = setting.start, torch.zeros_like(setting.start), 0.0, 0.0
    for step, at in enumerate(setting.batches):
        leaf = theta.clone().requires_grad_()
        x, y = setting.present(images[at], labels[at], step)
        (g,) = torch.autograd.grad(setting.criterion(setting.net(leaf, x), y), leaf, create_graph=True)
        c = 1.0 if momentum == 0 else (1 - momentum ** (7 - step)) / (1 - momentum)
        total = total + c * g
        path = path + c * g.detach()
        velocity = momentum * velocity + g.detach()
        theta = theta - setting.beta * velocity
    scale = (setting.start - setting.point).square().sum()
    loss = (setting.start - setting.beta * total - setting.point).square().sum() / scale
    expected = torch.autograd.grad(loss, [images, labels])
    residual = setting.start - setting.beta * path - setting.point
    assert relative(found.loss, loss.detach()) < 1e-12
    assert relative(found.images, expected[0]) < 1e-12
    assert relative(found.labels, expected[1]) < 1e-12
    assert relative(found.step_size, -2 / scale * (residual @ path)) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_the_step_size_gradient_is_a_difference_quotient(mode):
    setting = Setting(1)
    found, beta, h = setting.match(mode), setting.beta, 1e-6
    setting.beta = beta + h
    ahead = setting.match(mode).loss
    setting.beta = beta - h
    torch.testing.assert_close(found.step_size, (ahead - setting.match(mode).loss) / (2 * h), rtol=1e-7, atol=0)


def test_random_layers_draw_the_same_in_both_passes_and_go_on_where_they_stopped():
    setting = Setting(9, dropout=True)
    results, after = {}, {}
    for mode in ("unroll", "adjoint"):
        for checkpointing in (False, True):
            torch.manual_seed(5)
            results[mode, checkpointing] = setting.match(mode, checkpointing=checkpointing)
            after[mode, checkpointing] = torch.rand(3)
    for key, found in results.items():
        assert relative(found.images, results["unroll", False].images) < 1e-12, key
        assert torch.equal(after[key], after["unroll", False]), key


def test_following_ends_where_matching_does():
    setting = Setting(8)
    end = follow(
        setting.net, setting.images, setting.labels, setting.beta, setting.start, setting.batches,
        present=setting.present, momentum=0.5,
    )  # fmt: skip
    assert torch.equal(end, setting.match("adjoint", momentum=0.5).end)
    assert not end.requires_grad


def test_nothing_given_is_changed():
    setting = Setting(5, soft=True)
    for tensor in (setting.images, setting.labels, setting.beta):
        tensor.requires_grad_()
    before = [t.detach().clone() for t in (setting.images, setting.labels, setting.beta, setting.start)]
    found = setting.match("adjoint")
    for tensor, old in zip((setting.images, setting.labels, setting.beta, setting.start), before, strict=True):
        assert torch.equal(tensor.detach(), old) and tensor.grad is None
    for tensor in (found.loss, found.images, found.labels, found.step_size, found.end, found.distances):
        assert not tensor.requires_grad


def peaks(mode: str, **options) -> dict[int, int]:
    found = {}
    for steps in (5, 50):
        setting = Setting(steps, torch.float32)
        setting.batches = [torch.arange(4)] * steps  # of one size
        with SavedTensorMeter() as meter:
            setting.match(mode, **options)
        found[steps] = meter.peak
        assert meter.live == 0
    return found


@pytest.mark.parametrize("mode", ["adjoint", "tesla"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_does_not_grow_with_the_number_of_steps(mode, checkpointing):
    peak = peaks(mode, checkpointing=checkpointing)
    assert peak[50] <= 1.1 * peak[5]


def test_unrolling_takes_memory_for_every_step():
    peak = peaks("unroll")
    assert peak[50] > 8 * peak[5]


def test_batches_are_shuffled_passes():
    batches = draw_batches(10, 4, 7, torch.Generator().manual_seed(0))
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2, 4]
    assert torch.cat(batches[:3]).sort().values.tolist() == list(range(10))
    assert torch.cat(batches[3:6]).sort().values.tolist() == list(range(10))
    assert not torch.equal(batches[0], batches[3])


def test_mistakes_are_named():
    setting = Setting(3)
    with pytest.raises(UnknownNameError, match=r"unknown gradient mode 'adjont'; did you mean adjoint"):
        setting.match("adjont")
    with pytest.raises(InputError, match="after step 4 cannot be reached with 3 steps"):
        setting.match("adjoint", [Target(setting.point, 4)])
    with pytest.raises(InputError, match="are the same point"):
        setting.match("adjoint", setting.start.clone())
    with pytest.raises(InputError, match="must have one shape"):
        setting.match("adjoint", setting.point[:-1])
    with pytest.raises(InputError, match="at least one inner step"):
        match_trajectory(setting.net, setting.images, setting.labels, setting.beta, setting.start, setting.point, [])
    with pytest.raises(InputError, match="6 synthetic images but 5 labels"):
        match_trajectory(
            setting.net, setting.images, setting.labels[:5], setting.beta, setting.start, setting.point, [[0]]
        )
    setting.beta = torch.tensor([0.1, 0.2])
    with pytest.raises(InputError, match="one finite number"):
        setting.match("adjoint")
