"""Tasks of generation: real images in [-1, 1] with their classes, or mixtures in the plane whose exact teacher is known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.blocks.taps import Tap, Taps
from limbeck.core.data import Data, TensorData, mix_seed
from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.oracles import Oracle, gaussian_mixture
from limbeck.diffusion.schedules import Schedule
from limbeck.losses.perceptual import FeatureDistance
from limbeck.tasks.base import Task, TaskConfig, load_task

PLANE = {"train": 4096, "val": 1024, "test": 2048}
"""Samples of the tasks in the plane."""


@dataclass
class GenerationTask:
    """Data to generate, in three parts.

    Attributes:
        name: what it is called.
        train, val, test: disjoint; samples in [-1, 1] (images) or of unit order, with classes where there are any.
        num_classes: C; None: no classes.
        shape: of one sample.
        class_names: one for each class.
        sigma_data: standard deviation of the training samples over everything.
        exact: the law itself, for mixtures.
        images: the task that the images come from.
        source: where the data came from.
    """

    name: str
    train: TensorData
    val: TensorData
    test: TensorData
    num_classes: int | None
    shape: tuple[int, ...]
    class_names: list[str]
    sigma_data: float
    exact: Oracle | None = None
    images: Task | None = None
    source: str = ""
    _classifier: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint()

    @property
    def conditions(self) -> Conditions:
        """The classes of the training samples, or nothing."""
        labels = self.train.labels
        return (
            Conditions(None, len(self.train))
            if self.num_classes is None
            else Conditions(labels, names=self.class_names)
        )

    def exact_teacher(self, schedule: Schedule) -> Oracle:
        """The exact denoiser of the data's law in a schedule.

        Raises:
            InputError: the law is not known.
        """
        if self.exact is None:
            raise InputError(f"the law of '{self.name}' is not known: only mixtures have an exact teacher")
        return self.exact.in_schedule(schedule)

    def classifier(self, *, progress: bool = True) -> nn.Module | None:
        """A network of another kind, trained to tell the classes of real images in [-1, 1]; its features judge samples. Cached.

        None where there are no images with classes.
        """
        if self.images is None or self.num_classes is None or self.num_classes < 2:
            return None
        if "it" not in self._classifier:
            from limbeck.tasks.teachers import reference_teacher

            network = reference_teacher(self.images, self.images.networks["teacher"], progress=progress)
            self._classifier["it"] = Judge(network, *statistics_of(self.images.train))
        return self._classifier["it"]

    def perceptual(self, *, progress: bool = True) -> FeatureDistance | None:
        """A distance in the features of a second classifier, for training: never the one that judges. Cached.

        None where there are no images with classes.
        """
        if self.images is None or self.num_classes is None or self.num_classes < 2:
            return None
        from limbeck.tasks.teachers import reference_teacher

        name = self.images.networks["student"]
        network = reference_teacher(self.images, name, seed=1, progress=progress)
        judge = Judge(network, *statistics_of(self.images.train))
        return FeatureDistance(judge, judge.stages, name=f"{name}, stages, trained on {self.name}")

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "source": self.source,
            "train": len(self.train),
            "val": len(self.val),
            "test": len(self.test),
            "classes": self.num_classes,
            "sample_shape": list(self.shape),
            "sigma_data": round(self.sigma_data, 4),
            "fingerprint": self.fingerprint,
        }


class Judge(nn.Module):
    """A classifier of images in [-1, 1]: normalises them as it was trained, and gives features and logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Any, std: Any) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def prepared(self, x: Tensor) -> Tensor:
        """Images in [-1, 1], clamped to it, as the network takes them."""
        return ((x.clamp(-1, 1) + 1) / 2 - self.mean) / self.std

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), the representation before the head."""
        found: Tensor = self.network.embed(self.prepared(x))  # type: ignore[operator]
        return found

    def stages(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> the output of every stage of the network, with gradient."""
        taps = [Tap(path) for path in self.network.stage_paths]  # type: ignore[union-attr]
        with Taps(self.network, taps) as found:
            self.network(self.prepared(x))
        return [found[tap] for tap in taps]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes) logits."""
        found: Tensor = self.network(self.prepared(x))
        return found


def statistics_of(data: Data) -> tuple[Any, Any]:
    """Mean and standard deviation that a task normalises its images with."""
    return getattr(data, "mean", None) or [0.0], getattr(data, "std", None) or [1.0]


def load_generation(config: TaskConfig) -> GenerationTask:
    """A task of generation by name: a mixture (``ring``, ``grid``, ``classes-2d``), or any task on images.

    Raises:
        UnknownNameError: no such task.
        InputError: the task is not one on images, or its data is missing.
    """
    if config.data is None and config.task in MIXTURES:
        return mixture_task(config.task, config.split_seed)
    task = load_task(config.replace(augment=False))
    return from_images(task)


def from_images(task: Task) -> GenerationTask:
    """A classification task on images as a task of generation.

    Raises:
        InputError: its inputs are not images.
    """
    parts = {}
    for name in ("train", "val", "test"):
        part = getattr(task, name)
        if not isinstance(part, TensorData) or part.inputs.ndim != 4 or part.inputs.dtype != torch.uint8:
            raise InputError(
                f"'{task.name}' holds no images to generate: choose digits, mnist, cifar10, a folder of images, or a mixture"
            )
        half = [0.5] * part.inputs.shape[1]
        parts[name] = TensorData(part.inputs, part.labels, mean=half, std=half)
    sample = parts["train"].inputs.float().div(127.5).sub(1)
    return GenerationTask(
        name=task.name,
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        num_classes=task.num_classes,
        shape=task.in_shape,
        class_names=task.class_names,
        sigma_data=float(sample.std()),
        images=task,
        source=task.source,
    )


def ring() -> Oracle:
    """Eight modes on a circle of radius 1, standard deviation 0.05; each is a class."""
    angle = torch.arange(8) * (2 * math.pi / 8)
    return gaussian_mixture(torch.stack([angle.cos(), angle.sin()], 1), 0.05, labels=torch.arange(8))


def grid() -> Oracle:
    """4 x 4 modes, 0.8 apart, standard deviation 0.1; no classes."""
    line = (torch.arange(4) - 1.5) * 0.8
    return gaussian_mixture(torch.cartesian_prod(line, line), 0.1)


def classes_2d() -> Oracle:
    """Six classes of three modes each on a line through the middle, turned by 60 degrees from class to class, so that they overlap; standard deviation 0.15."""
    turn = torch.arange(6) * (2 * math.pi / 6)
    out = torch.tensor([0.4, 0.9, 1.4])
    bend = torch.tensor([0.0, 0.25, 0.5])  # the arms of a pinwheel
    angle = turn[:, None] + bend
    means = torch.stack([out * angle.cos(), out * angle.sin()], -1).reshape(18, 2)
    return gaussian_mixture(means, 0.15, labels=torch.arange(6).repeat_interleave(3))


MIXTURES = {"ring": ring, "grid": grid, "classes-2d": classes_2d}


def mixture_task(name: str, seed: int = 0) -> GenerationTask:
    """Samples of a mixture in the plane."""
    law = MIXTURES[name]()
    parts: dict[str, TensorData] = {}
    for number, (part, size) in enumerate(PLANE.items()):
        x, labels = law.sample(size, torch.Generator().manual_seed(mix_seed(seed, number, 311)))
        parts[part] = TensorData(x, labels)
    classes = None if law.module.labels is None else int(law.module.labels.max()) + 1
    return GenerationTask(
        name=name,
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        num_classes=classes,
        shape=(2,),
        class_names=[str(c) for c in range(classes or 0)],
        sigma_data=float(parts["train"].inputs.std()),
        exact=law,
        source=f"a mixture of {len(law.module.means)} Gaussians in the plane",
    )


def real_samples(data: Data, count: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Samples (N, ...) and classes of a data set, in order; at most ``count``."""
    size = len(data) if count is None else min(count, len(data))
    batch = data.fetch(torch.arange(size), None)
    return batch.inputs, batch.labels
