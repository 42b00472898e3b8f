"""Generated clouds, and which tasks have a shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.report.summand_sheets import representation_sheet
from limbeck.tasks.point_clouds import ShapeSetup, circles, load_shapes, ring_among_outliers

torch.set_num_threads(1)


def test_clouds_are_circles_among_outliers() -> None:
    clouds, labels = circles(20, points=60, outliers=10, noise=0.0, seed=3)
    assert clouds.shape == (20, 70, 2) and labels.sum() == 10
    for cloud in clouds[labels == 0]:
        centre, radius = _circle(cloud)
        on = np.abs(np.linalg.norm(cloud - centre, axis=1) - radius) < 1e-6
        assert on.sum() >= 60 and 0.8 <= radius <= 1.0
    again, _ = circles(20, points=60, outliers=10, noise=0.0, seed=3)
    assert np.array_equal(clouds, again) and not np.array_equal(clouds, circles(20, points=60, outliers=10, seed=4)[0])


def _circle(cloud: np.ndarray) -> tuple[np.ndarray, float]:
    """The circle that goes through most points, by trying triples."""
    rng, best = np.random.default_rng(0), (0, np.zeros(2), 0.0)
    for _ in range(60):
        a, b, c = cloud[rng.choice(len(cloud), 3, replace=False)]
        centre = np.linalg.solve(2 * np.stack([b - a, c - a]), [b @ b - a @ a, c @ c - a @ a])
        radius = float(np.linalg.norm(a - centre))
        hits = int((np.abs(np.linalg.norm(cloud - centre, axis=1) - radius) < 1e-6).sum())
        best = max(best, (hits, centre, radius), key=lambda found: found[0])
    return best[1], best[2]


def test_parts_are_drawn_apart() -> None:
    setup = ShapeSetup.make(train_size=6, held_size=8)
    task = load_shapes(setup)
    assert [len(p) for p in (task.train, task.val, task.test)] == [6, 4, 8]
    assert task.class_names == ["one circle", "two circles"] and task.describe()["input_shape"] == [110, 2]
    assert not torch.equal(task.train.inputs[:4], task.val.inputs)  # type: ignore[attr-defined]
    assert load_shapes(setup).fingerprint == task.fingerprint
    assert load_shapes(ShapeSetup.make(train_size=6, split_seed=1)).fingerprint != task.fingerprint
    assert ring_among_outliers(30, 5, 0.1, 0).shape == (35, 2)


def test_graph_tasks_are_found_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    assert load_shapes(ShapeSetup.make(task="molecules", train_size=10)).num_classes == 2
    with pytest.raises(InputError, match="needs its data"):
        load_shapes(ShapeSetup.make(task="mutag"))
    with pytest.raises(UnknownNameError, match="did you mean circles"):
        load_shapes(ShapeSetup.make(task="circle"))


def test_a_sheet_shows_samples_and_images() -> None:
    images = np.random.default_rng(0).uniform(size=(3, 2, 4, 4))
    plain = representation_sheet(images, ["a", "b", "c"], ["H0", "H1"])
    with_clouds = representation_sheet(
        images, ["a", "b", "c"], ["H0", "H1"], [np.zeros((5, 2)), np.ones((4, 1)), np.eye(3)]
    )
    assert plain.startswith("iVBOR") and with_clouds.startswith("iVBOR") and plain != with_clouds
