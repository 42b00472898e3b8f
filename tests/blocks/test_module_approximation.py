"""Decompositions by multipers: equality of the images with its own, and of the supports with the Betti numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.blocks.fibered_summands import hilbert_function
from limbeck.blocks.module_approximation import decompose, simplex_tree
from limbeck.blocks.multifiltrations import Multifiltration, function_rips, graph_lower_star, image_lower_star
from limbeck.blocks.summand_images import kth_largest, local_values, represent
from limbeck.blocks.vertex_functions import codensity
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.metrics.decompositions import bottleneck_distance
from tests.blocks.test_fibered_summands import counts

multipers = pytest.importorskip("multipers")
torch.set_num_threads(1)
AXES = [np.linspace(0, 1, 9), np.linspace(0, 1, 6)]
POWERS = (0, 1, 2, np.inf)


@pytest.fixture(scope="module")
def cloud() -> Multifiltration:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 25)
    points = np.column_stack([np.cos(angle), np.sin(angle)]) + rng.normal(0, 0.05, (25, 2))
    points = np.concatenate([points, rng.uniform(-1.5, 1.5, (8, 2))])
    found = function_rips(points, codensity(points, 0.2), threshold=1.2)
    return found.rescaled(*found.bounds())


@pytest.mark.parametrize("degree", [0, 1])
def test_images_are_those_of_multipers(cloud, degree) -> None:
    box = np.array([[0.0, 0.0], [1.0, 1.0]])
    module = multipers.module_approximation(simplex_tree(cloud, 2), box=box, nlines=120, n_jobs=1)
    summands = decompose(cloud, lines=120, box=box).of_degree(degree)
    assert np.abs(summands.lengths(box).numpy() - module.get_module_of_degree(degree).get_interleavings()).max() < 1e-12

    def theirs(**settings):
        image = module.representation([degree], grid=AXES, flatten=True, **settings)
        return np.asarray(image).reshape(9, 6, order="F")  # their first parameter varies fastest

    for power in POWERS:
        for mean in (False, True):
            for local, sign in (("linear", 1), ("rectangle", -1)):
                own = represent(summands, AXES, bandwidth=0.15, local=local, power=power, normalise=mean, box=box)
                other = theirs(bandwidth=sign * 0.15, p=power, kernel="linear", normalize=mean)
                assert np.abs(own.numpy() - other).max() < 1e-8, (power, mean, local)
    for local, kernel in (("gaussian", "gaussian"), ("exponential", "exponential"), ("triangle", "linear2")):
        for power in (0, 1, 2):
            own = represent(summands, AXES, bandwidth=0.15, local=local, power=power, box=box)
            assert np.abs(own.numpy() - theirs(bandwidth=0.15, p=power, kernel=kernel)).max() < 1e-8, (power, kernel)


def test_landscapes_are_those_of_multipers(cloud) -> None:
    box = np.array([[0.0, 0.0], [1.0, 1.0]])
    module = multipers.module_approximation(simplex_tree(cloud, 2), box=box, nlines=120, n_jobs=1)
    summands = decompose(cloud, lines=120, box=box).of_degree(1)
    theirs = np.asarray(module.landscapes(1, [0, 1], resolution=[5, 4]))
    axes = [np.arange(5) / 5, np.arange(4) / 4]  # they leave out the upper end
    for k in (0, 1):
        own = represent(summands, axes, bandwidth=1.0, local="landscape", power=0, op=kth_largest(k + 1))
        assert np.abs(own.numpy() - theirs[k]).max() < 1e-8


def test_supports_hold_as_many_classes_as_there_are(cloud) -> None:
    axes = [np.linspace(0.03, 0.97, 12)] * 2
    for collapse in (True, False):
        found = decompose(cloud, lines=300, collapse=collapse)
        for degree in (0, 1):
            assert np.array_equal(counts(found.of_degree(degree), axes), hilbert_function(cloud, axes, degree))


def test_collapse_and_the_fallback_change_little(cloud) -> None:
    full, collapsed = decompose(cloud, lines=200, collapse=False), decompose(cloud, lines=200)
    box = ([0.0, 0.0], [1.0, 1.0])
    assert bottleneck_distance(full, collapsed, box) < 1e-9
    fibered = decompose(cloud, lines=80, backend="fibered")
    assert bottleneck_distance(full.of_degree(1), fibered.of_degree(1), box) <= 2 / 81
    images = [represent(m.of_degree(1), AXES, bandwidth=0.2, power=np.inf) for m in (full, fibered)]
    assert float((images[0] - images[1]).abs().max()) < 0.15


def test_graphs_images_and_three_parameters() -> None:
    cycle = graph_lower_star(4, [[0, 1, 2, 3], [1, 2, 3, 0]], np.array([[0, 0], [0.5, 0], [0, 0.5], [1, 1.0]]))
    found = decompose(cycle, lines=50).of_degree(1)
    assert len(found) == 1 and np.allclose(found.corners(0)[0], [[1.0, 1.0]]) and found.corners(0)[1].isinf().all()
    image = np.zeros((2, 3, 3))
    image[:, 1, 1] = 1.0
    hole = decompose(image_lower_star(image), lines=50).of_degree(1)
    assert len(hole) == 1 and np.allclose(hole.lengths(([0, 0], [1, 1])), [1.0])
    points = np.random.default_rng(0).normal(size=(6, 2))
    three = function_rips(points, np.stack([np.arange(6.0), np.arange(6.0)[::-1]], 1))
    summands = decompose(three, lines=20, degrees=(0,))
    assert summands.parameters == 3 and len(summands) == 6
    values = local_values(summands, [torch.linspace(0, 5, 3).double()] * 3, bandwidth=0.5)
    assert values.shape == (6, 3, 3, 3) and float(values.max()) > 0


def test_one_vertex_and_constant_functions_have_a_decomposition() -> None:
    alone = function_rips(np.zeros((1, 2)), np.zeros(1))
    assert len(decompose(alone, lines=10)) == 1
    same = graph_lower_star(3, [[0, 1], [1, 2]], np.ones((3, 2)))
    assert int((decompose(same, lines=10).lengths(([1, 1], [2, 2])) > 0).sum()) == 1


def test_bad_settings_say_so(cloud) -> None:
    with pytest.raises(InputError, match="degrees must be from 0"):
        decompose(cloud, degrees=())
    with pytest.raises(InputError, match="lower one first"):
        decompose(cloud, box=([1.0, 1.0], [0.0, 0.0]))
    with pytest.raises(UnknownNameError, match="multipers"):
        decompose(cloud, backend="multiper")  # type: ignore[arg-type]
