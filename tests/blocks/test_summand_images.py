"""The images of decompositions, against the formulas in plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.blocks.summand_images import disjoint_boxes, kth_largest, local_values, represent
from limbeck.core.errors import InputError, UnknownNameError

torch.set_num_threads(1)
INF = float("inf")
AXES = [np.linspace(0, 3, 7), np.linspace(0, 4, 5)]


def staircases(seed: int, count: int = 6, n: int = 2) -> IntervalSummands:
    """Random supports: up to three birth and death corners each, some of them infinite."""
    rng = np.random.default_rng(seed)
    corners = []
    for number in range(count):
        births = rng.uniform(0, 2, (rng.integers(1, 4), n))
        deaths = rng.uniform(1, 4, (rng.integers(1, 4), n))
        if number == 0:
            deaths[0] = INF
        corners.append((births, deaths))
    return IntervalSummands.of(corners, parameters=n)


def by_loops(summands: IntervalSummands, axes, delta: float, local: str) -> np.ndarray:
    """phi of the definition, one pixel and one pair at a time."""
    found = np.zeros((len(summands), *map(len, axes)))
    for s, at in itertools.product(range(len(summands)), np.ndindex(*found.shape[1:])):
        x = np.array([a[i] for a, i in zip(axes, at, strict=True)])
        births, deaths = (c.numpy() for c in summands.corners(s))
        pairs = [(b, d) for b in births for d in deaths if (d > b).all()]
        clipped = [(np.minimum(d, x + delta) - np.maximum(b, x - delta)).clip(0) for b, d in pairs]
        if local == "linear":
            found[(s, *at)] = max((c.min() for c in clipped), default=0) / (2 * delta)
        elif local == "rectangle":
            found[(s, *at)] = max((c.prod() for c in clipped), default=0) / (2 * delta) ** len(x)
        elif local == "landscape":
            found[(s, *at)] = max((max(min((x - b).min(), (d - x).min()), 0) for b, d in pairs), default=0)
        else:
            apart = max(
                min((b - x).clip(0).max() for b in births),
                min((x - d).clip(0).max() for d in deaths),
            )
            t = apart / delta
            found[(s, *at)] = {"gaussian": np.exp(-(t**2) / 2), "exponential": np.exp(-t), "triangle": max(1 - t, 0)}[
                local
            ]
    return found


@pytest.mark.parametrize("local", ["linear", "rectangle", "landscape", "gaussian", "exponential", "triangle"])
def test_phi_is_that_of_the_definition(local) -> None:
    summands = staircases(0)
    axes = [torch.as_tensor(a) for a in AXES]
    found = local_values(summands, axes, bandwidth=0.7, local=local)
    assert np.allclose(found.numpy(), by_loops(summands, AXES, 0.7, local), atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_volume_is_what_many_random_points_say(n) -> None:
    summands, delta = staircases(1, n=n), 1.1
    axes = [torch.tensor([0.9, 2.0])] * n
    found = local_values(summands, [a.double() for a in axes], bandwidth=delta, local="volume")
    rng = np.random.default_rng(0)
    for s, at in itertools.product(range(len(summands)), np.ndindex(*[2] * n)):
        points = np.array([float(axes[k][i]) for k, i in enumerate(at)]) + rng.uniform(-delta, delta, (4000, n))
        births, deaths = (c.numpy() for c in summands.corners(s))
        inside = np.zeros(len(points), dtype=bool)
        for b, d in itertools.product(births, deaths):
            inside |= (points >= b).all(1) & (points <= d).all(1)
        assert abs(inside.mean() - float(found[(s, *at)])) < 0.035


def test_disjoint_boxes_do_not_overlap_and_cover_a_known_area() -> None:
    # an L: [0, 2] x [1, 2] and [1, 2] x [0, 2]
    low, high, owner = disjoint_boxes(IntervalSummands.of([([[0.0, 1.0], [1.0, 0.0]], [[2.0, 2.0]])]))
    assert float((high - low).prod(1).sum()) == 3.0 and owner.tolist() == [0] * len(low)
    volume = represent(
        IntervalSummands.of([([[0.0, 1.0], [1.0, 0.0]], [[2.0, 2.0]])]),
        [[1.0], [1.0]],
        bandwidth=1.0,
        local="volume",
        power=0,
    )
    assert float(volume) == pytest.approx(3 / 4)


def test_weights_and_operations() -> None:
    summands = staircases(2)
    box = ([0.0, 0.0], [3.0, 4.0])
    phi = by_loops(summands, AXES, 0.5, "linear")
    w = summands.lengths(box).numpy()
    for power in (0.5, 1, 2):
        found = represent(summands, AXES, bandwidth=0.5, power=power).numpy()
        assert np.allclose(found, np.tensordot(w**power, phi, 1))
        mean = represent(summands, AXES, bandwidth=0.5, power=power, normalise=True).numpy()
        assert np.allclose(mean, np.tensordot(w**power, phi, 1) / (w**power).sum())
    assert np.allclose(represent(summands, AXES, bandwidth=0.5, power=0).numpy(), phi.sum(0))
    counted = represent(summands, AXES, bandwidth=0.5, power=0, normalise=True).numpy()
    assert np.allclose(counted, phi.sum(0) / (w > 0).sum())
    assert np.allclose(represent(summands, AXES, bandwidth=0.5, power=INF).numpy(), phi.max(0))
    second = represent(summands, AXES, bandwidth=0.5, power=0, op=kth_largest(2)).numpy()
    assert np.allclose(second, np.sort(phi, 0)[-2])
    own = represent(summands, AXES, bandwidth=0.5, power=1, op=lambda v: v.median(0).values).numpy()
    assert np.allclose(own, np.sort(w[:, None, None] * phi, 0)[(len(w) - 1) // 2])
    assert not represent(summands, AXES, bandwidth=0.5, power=0, op=kth_largest(99)).any()


def test_order_of_summands_and_corners_changes_nothing() -> None:
    summands = staircases(3)
    order = torch.randperm(len(summands), generator=torch.Generator().manual_seed(0))
    turned = IntervalSummands.of([tuple(c.flip(0) for c in summands.corners(int(i))) for i in order])
    for power in (0, 1, INF):
        first, second = (represent(m, AXES, bandwidth=0.5, power=power) for m in (summands, turned))
        assert torch.allclose(first, second, atol=1e-14)


def test_parts_of_the_work_give_the_whole(monkeypatch) -> None:
    summands = staircases(4, count=20)
    whole = {k: represent(summands, AXES, bandwidth=0.5, local=k) for k in ("linear", "volume", "rectangle")}
    monkeypatch.setattr("limbeck.blocks.summand_images._AT_ONCE", 80)
    for local, image in whole.items():
        assert torch.equal(represent(summands, AXES, bandwidth=0.5, local=local), image)


def test_nothing_gives_zeros() -> None:
    for local in ("linear", "volume", "gaussian"):
        image = represent(IntervalSummands.empty(2), AXES, bandwidth=0.5, local=local, power=1, normalise=True)
        assert image.shape == (7, 5) and not image.any()
    flat = IntervalSummands.of([([[1.0, 1.0]], [[1.0, 2.0]])])  # no interior: no weight
    assert not represent(flat, AXES, bandwidth=0.5, power=2, normalise=True).any()


@pytest.mark.parametrize("local", ["linear", "volume", "rectangle", "gaussian"])
def test_gradients_go_to_corners_and_bandwidth(local) -> None:
    births = torch.tensor([[0.2, 0.4], [0.6, 0.1]], dtype=torch.float64, requires_grad=True)
    deaths = torch.tensor([[1.3, 1.7], [1.9, 1.1]], dtype=torch.float64, requires_grad=True)
    delta = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)

    def image(b, d, width):
        return represent(
            IntervalSummands.of([(b, d)]),
            [[0.33, 0.9], [0.49, 1.2]],
            bandwidth=width,
            local=local,
            box=([0, 0], [2, 2]),
        )

    assert torch.autograd.gradcheck(image, (births, deaths, delta))
    image(births, deaths, delta).sum().backward()
    assert births.grad is not None and births.grad.abs().sum() > 0 and delta.grad is not None


def test_infinite_corners_give_finite_gradients() -> None:
    births = torch.tensor([[0.2, 0.4]], dtype=torch.float64, requires_grad=True)
    summands = IntervalSummands.of([(births, [[INF, INF]])])
    for local in ("linear", "volume", "gaussian"):
        represent(summands, AXES, bandwidth=0.5, local=local, power=2).sum().backward()
        assert births.grad is not None and torch.isfinite(births.grad).all()


def test_bad_settings_say_so() -> None:
    summands = staircases(0)
    with pytest.raises(InputError, match="1 axes for 2 parameters"):
        represent(summands, AXES[:1], bandwidth=0.1)
    with pytest.raises(InputError, match="bandwidth must be above 0"):
        represent(summands, AXES, bandwidth=0.0)
    with pytest.raises(InputError, match="power must be at least 0"):
        represent(summands, AXES, bandwidth=0.1, power=-1)
    with pytest.raises(UnknownNameError, match="did you mean linear"):
        represent(summands, AXES, bandwidth=0.1, local="lineer")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="k counts from 1"):
        kth_largest(0)
