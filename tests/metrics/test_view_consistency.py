"""Measures of an object's views, against sets where they are known."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.metrics.view_consistency import (
    azimuth_bins,
    gain,
    inception_scores,
    nearest_distance,
    nearest_entropy,
    pairwise_distance,
    particle_distance,
)

torch.set_num_threads(1)


def test_pairwise_distance_leaves_a_view_itself_out() -> None:
    views = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]).view(3, 2, 1, 1)
    assert pairwise_distance(views) == pytest.approx((5 + 0 + 5) / 3)
    assert pairwise_distance(torch.ones(5, 3, 4, 4)) == 0


def test_distances_do_not_cancel() -> None:
    far = torch.full((2, 3), 1e4, dtype=torch.float64)
    far[1, 0] += 1e-4
    assert pairwise_distance(far) == pytest.approx(1e-4, rel=1e-3)


def test_nearest_distance() -> None:
    support = torch.tensor([[0.0], [10.0]])
    assert nearest_distance(torch.tensor([[1.0], [8.0], [10.0]]), support) == pytest.approx(1.0)


def test_entropy_of_the_nearest_references() -> None:
    references = torch.arange(8.0)[:, None]
    labels = torch.arange(8) // 2
    every, one = references + 0.1, torch.full((6, 1), 2.2)
    assert nearest_entropy(every, references, labels, 4) == pytest.approx(math.log(4))
    assert nearest_entropy(one, references, labels, 4) == 0
    three_to_one = torch.tensor([[0.0], [1.0], [0.3], [7.0]])
    wanted = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert nearest_entropy(three_to_one, references, labels, 4) == pytest.approx(wanted)


def test_bins_are_centred_on_the_front() -> None:
    azimuth = torch.tensor([0.0, 22.4, -22.4, 22.6, 45.0, 180.0, -180.0, 337.6, 337.4, 720.0])
    assert azimuth_bins(azimuth).tolist() == [0, 0, 0, 1, 1, 4, 4, 0, 7, 0]
    assert azimuth_bins(torch.linspace(-1000, 1000, 999), 5).unique().tolist() == [0, 1, 2, 3, 4]


def test_inception_scores() -> None:
    certain = inception_scores(torch.eye(4))
    assert certain["inception_quality"] == 0 and certain["inception_variety"] == pytest.approx(math.log(4))
    assert certain["inception_gain"] == math.inf
    blurred = inception_scores(torch.full((5, 4), 0.25))
    assert blurred["inception_quality"] == pytest.approx(math.log(4)) and blurred["inception_gain"] == pytest.approx(0)
    same = inception_scores(torch.eye(4)[:1].repeat(6, 1))  # every view shows one side
    assert same == {"inception_quality": 0, "inception_variety": 0, "inception_gain": 0}
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    found = inception_scores(p)
    iq = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1) + 0.2 * math.log(0.2) + 0.8 * math.log(0.8)) / 2
    iv = -(0.55 * math.log(0.55) + 0.45 * math.log(0.45))
    assert found["inception_quality"] == pytest.approx(iq, rel=1e-6)
    assert found["inception_variety"] == pytest.approx(iv, rel=1e-6)
    assert found["inception_gain"] == pytest.approx((iv - iq) / iq, rel=1e-6) == gain(iv, iq)
    generator = torch.Generator().manual_seed(0)
    some = inception_scores(torch.rand(20, 5, generator=generator).log().mul(3).softmax(1))
    assert some["inception_variety"] >= some["inception_quality"]  # entropy is concave


def test_particles_are_compared_camera_by_camera() -> None:
    first = torch.arange(3.0).view(3, 1)  # views differ a lot, but equally for both particles
    assert particle_distance(torch.stack([first, first])) == 0
    assert particle_distance(torch.stack([first, first + 2])) == pytest.approx(2)
    assert particle_distance(torch.stack([first, first, first + 3])) == pytest.approx(2)


def test_mistakes() -> None:
    with pytest.raises(InputError, match="2 views or more"):
        pairwise_distance(torch.zeros(1, 3))
    with pytest.raises(InputError, match="NaN"):
        pairwise_distance(torch.full((2, 3), float("nan")))
    with pytest.raises(InputError, match="3 and 2 numbers"):
        nearest_distance(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(InputError, match="2 particles"):
        particle_distance(torch.zeros(1, 4, 3))
    with pytest.raises(InputError, match="whole labels"):
        nearest_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3, dtype=torch.long), 2)
    with pytest.raises(InputError, match=r"0 … 1 \(got 0 to 2\)"):
        nearest_entropy(torch.zeros(2, 3), torch.zeros(3, 3), torch.arange(3), 2)
    with pytest.raises(InputError, match="sum 1"):
        inception_scores(torch.ones(2, 3))
    with pytest.raises(InputError, match="1 bin"):
        azimuth_bins(torch.zeros(3), 0)
