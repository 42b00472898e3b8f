"""Data whose shape matters: generated clouds of circles among outliers, and the TU graphs.

``circles``: class 0 is one noisy circle, class 1 are two smaller ones, both among points that lie anywhere. Sizes, places and
the share of points on each circle are drawn anew for every cloud.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from limbeck.core.config import Config
from limbeck.core.data import TensorData, mix_seed
from limbeck.core.errors import UnknownNameError
from limbeck.tasks.base import Task, TaskConfig, load_task

CLOUDS = "circles"
GRAPHS = ("molecules", "mutag", "proteins", "nci1", "graphs")
Floats = NDArray[np.float64]


class ShapeSetup(Config):
    """Which data, and how much of it."""

    task: str = Field(
        CLOUDS, description=f"{CLOUDS} (generated clouds), {', '.join(GRAPHS)} (a folder in the TU format with --data)"
    )
    data: str | None = Field(None, description="folder of graphs in the TU text format, for task graphs")
    data_root: str | None = Field(None, description="folder that holds tu/; default: $LIMBECK_DATA")
    split_seed: int = Field(0, ge=0, description="seeds the clouds, and which graphs are in which part")
    train_size: int | None = Field(None, ge=4, description="training samples; none: all graphs, or 100 clouds")
    held_size: int = Field(100, ge=4, description="clouds for testing; half as many are for validation")
    circle_points: int = Field(70, ge=8, description="points on circles in each cloud")
    outliers: int = Field(40, ge=0, description="points that lie anywhere in each cloud")
    circle_noise: float = Field(
        0.06, ge=0, description="standard deviation of the points around their circle; radii are 0.4 to 1"
    )


def load_shapes(setup: ShapeSetup) -> Task:
    """The task that a setup names: clouds (N, points, 2), or graphs.

    Raises:
        UnknownNameError: no such task.
        InputError: the data is missing.
    """
    if setup.task == CLOUDS:
        return _clouds(setup)
    if setup.task not in GRAPHS:
        raise UnknownNameError("task", setup.task, (CLOUDS, *GRAPHS))
    return load_task(
        TaskConfig.make(
            task=setup.task,
            data=setup.data,
            data_root=setup.data_root,
            split_seed=setup.split_seed,
            train_size=setup.train_size,
        )
    )


def _clouds(setup: ShapeSetup) -> Task:
    sizes = {"train": setup.train_size or 100, "val": max(2, setup.held_size // 2), "test": setup.held_size}
    parts = {}
    for number, (part, size) in enumerate(sizes.items()):
        clouds, labels = circles(
            size,
            points=setup.circle_points,
            outliers=setup.outliers,
            noise=setup.circle_noise,
            seed=mix_seed(setup.split_seed, number),
        )
        parts[part] = TensorData(torch.from_numpy(clouds), torch.from_numpy(labels))
    return Task(
        name=CLOUDS,
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        num_classes=2,
        in_shape=(setup.circle_points + setup.outliers, 2),
        class_names=["one circle", "two circles"],
        source=f"seeded generator: {setup.circle_points} points on circles, {setup.outliers} outliers",
    )


def circles(
    count: int, *, points: int = 70, outliers: int = 40, noise: float = 0.06, seed: int = 0
) -> tuple[Floats, NDArray[np.int64]]:
    """Clouds in the square [-1.5, 1.5]^2 and their classes, half of each, in random order.

    Args:
        count: clouds.
        points: on circles, in each.
        outliers: uniform in the square.
        noise: standard deviation of the points around their circle.
        seed: of all draws.

    Returns:
        (count, points + outliers, 2) with the points in random order, and (count,) classes 0 (one circle) and 1 (two).
    """
    rng = np.random.default_rng(mix_seed(seed, 31))
    labels = rng.permutation(np.arange(count) % 2)
    clouds = np.stack([_cloud(int(y), points, outliers, noise, rng) for y in labels])
    return clouds, labels


def _cloud(label: int, points: int, outliers: int, noise: float, rng: np.random.Generator) -> Floats:
    if label == 0:
        radii, centres = [rng.uniform(0.8, 1.0)], rng.uniform(-0.3, 0.3, (1, 2))
    else:
        radii = rng.uniform(0.4, 0.55, 2).tolist()
        direction = rng.uniform(0, 2 * np.pi)
        apart = sum(radii) + rng.uniform(0.1, 0.3)
        step = apart / 2 * np.array([np.cos(direction), np.sin(direction)])
        centres = np.stack([-step, step])
    shares = np.array(radii) / sum(radii)  # as many points for as much arc
    sizes = [round(points * shares[0])] if label else [points]
    sizes += [points - sizes[0]] if label else []
    rings = [c + ring(n, radius=r, noise=noise, rng=rng) for n, r, c in zip(sizes, radii, centres, strict=True)]
    found = np.concatenate([*rings, rng.uniform(-1.5, 1.5, (outliers, 2))])
    return rng.permutation(found)


def ring(count: int, *, radius: float = 1.0, noise: float = 0.0, rng: np.random.Generator) -> Floats:
    """Points (count, 2) uniform on a circle around 0, each moved by normal noise."""
    angle = rng.uniform(0, 2 * np.pi, count)
    return radius * np.column_stack([np.cos(angle), np.sin(angle)]) + rng.normal(0, noise, (count, 2))


def ring_among_outliers(count: int, outliers: int, noise: float, seed: int) -> Floats:
    """A noisy unit circle with outliers that are uniform in [-1.5, 1.5]^2: (count + outliers, 2)."""
    rng = np.random.default_rng(mix_seed(seed, 37))
    return np.concatenate([ring(count, noise=noise, rng=rng), rng.uniform(-1.5, 1.5, (outliers, 2))])
