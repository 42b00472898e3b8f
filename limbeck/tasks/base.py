"""What a task is: data in three parts, the networks that suit it, and where it came from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.config import Config
from limbeck.core.data import Data, TensorData, mix_seed
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.semi import SemiSupervisedData, keep_labels


class TaskConfig(Config):
    """Which data, and how much of it."""

    task: str = Field(
        "digits",
        description="digits, mnist, cifar10, wine, breast-cancer, adult, table, shapes, topomortar, stdlib-code, molecules, mutag, proteins, nci1, graphs (a folder in the TU format), stdlib-text, stdlib-tokens, wikitext-2, tinyshakespeare, text (a .txt file), or any name that --data explains",
    )
    data: str | None = Field(
        None,
        description="a data set of your own: a folder of images or parquet files, a table (.csv, .tsv), a text (.txt), or a Hugging Face data set's name",
    )
    label_column: str | None = Field(
        None, description="column of a table that is to be predicted; none: label, target, class or y"
    )
    data_root: str | None = Field(None, description="folder that holds mnist/, cifar10/ …; default: $LIMBECK_DATA")
    train_size: int | None = Field(None, ge=1, description="use so many training samples, stratified; none: all")
    labelled: int | None = Field(
        None,
        ge=1,
        description="so many training samples (stratified) keep their labels, the rest is unlabelled; none: all",
    )
    label_noise: float = Field(0.0, ge=0, lt=1, description="fraction of training labels replaced by wrong ones")
    image_size: int | None = Field(
        None, ge=4, le=1024, description="resize images to this square size; none: as they are"
    )
    augment: bool = Field(True, description="random shifts (and flips where they make sense)")
    split_seed: int = Field(0, ge=0, description="seeds which samples are taken, and the label noise")


@dataclass
class Task:
    """A task on tensors.

    Attributes:
        name: what it is called.
        train, val, test: disjoint parts. ``val`` is for choosing, ``test`` is looked at once. ``train`` is
            :class:`~limbeck.core.semi.SemiSupervisedData` where only some of its labels are kept.
        num_classes: number of classes; labels are 0 … num_classes - 1.
        in_shape: shape of one input, without the batch.
        class_names: one for each class.
        networks: names of reference networks by role (``student``, ``teacher``).
        teacher_epochs: passes over the training data that a reference teacher gets.
        source: where the data came from, for the record.
    """

    name: str
    train: Data
    val: Data
    test: Data
    num_classes: int
    in_shape: tuple[int, ...]
    class_names: list[str]
    networks: Mapping[str, str] = field(default_factory=dict)
    teacher_epochs: float = 60
    source: str = ""

    @property
    def fingerprint(self) -> str:
        """A hash of the training data as it is (hex, 16 digits)."""
        found = self.train.fingerprint()
        assert found is not None, "a task's data is held in memory, and so can be hashed"
        return found

    def describe(self) -> dict[str, Any]:
        others = {"unlabelled": len(self.train.unlabelled)} if isinstance(self.train, SemiSupervisedData) else {}
        return {
            "name": self.name,
            "source": self.source,
            "train": len(self.train),
            **others,
            "val": len(self.val),
            "test": len(self.test),
            "classes": self.num_classes,
            "input_shape": list(self.in_shape),
            "fingerprint": self.fingerprint,
        }


Loader = Callable[[TaskConfig], Task]
_TASKS: dict[str, str] = {
    "digits": "limbeck.tasks.digits:load",
    "mnist": "limbeck.tasks.images:load_mnist",
    "cifar10": "limbeck.tasks.images:load_cifar10",
    "wine": "limbeck.tasks.tabular:load_wine",
    "breast-cancer": "limbeck.tasks.tabular:load_breast_cancer",
    "adult": "limbeck.tasks.tabular:load_adult",
    "table": "limbeck.tasks.tabular:load_file",
    "shapes": "limbeck.tasks.segmentation:load_shapes",
    "topomortar": "limbeck.tasks.segmentation:load_topomortar",
    "stdlib-code": "limbeck.tasks.code:load",
    "molecules": "limbeck.tasks.graphs:load_molecules",
    "mutag": "limbeck.tasks.graphs:load_mutag",
    "proteins": "limbeck.tasks.graphs:load_proteins",
    "nci1": "limbeck.tasks.graphs:load_nci1",
    "graphs": "limbeck.tasks.graphs:load_folder",
    "stdlib-text": "limbeck.tasks.language:load_stdlib_text",
    "stdlib-tokens": "limbeck.tasks.language:load_stdlib_tokens",
    "wikitext-2": "limbeck.tasks.language:load_wikitext",
    "tinyshakespeare": "limbeck.tasks.language:load_shakespeare",
    "text": "limbeck.tasks.language:load_file",
}
_READ_OWN_DATA = {
    "stdlib-code",
    "table",
    "graphs",
    "text",
}  # tasks that read --data themselves, since it holds no images


def load_task(config: TaskConfig) -> Task:
    """Load a task by name, or from ``config.data``.

    Raises:
        UnknownNameError: no such task.
        InputError: the data is missing or not what it should be.
    """
    import importlib

    own_reader = config.data is None or config.task in _READ_OWN_DATA
    name = config.task
    if not own_reader and config.data is not None and config.data.lower().endswith((".csv", ".tsv")):
        name, own_reader = "table", True
    if not own_reader and config.data is not None and config.data.lower().endswith(".txt"):
        name, own_reader = "text", True
    target = _TASKS.get(name) if own_reader else "limbeck.tasks.images:load_any"
    if target is None:
        raise UnknownNameError(
            "task", config.task, _TASKS, hint=f"Known: {', '.join(_TASKS)}; your own data goes in with --data."
        )
    module, _, name = target.partition(":")
    loader: Loader = getattr(importlib.import_module(module), name)
    task = loader(config)
    if config.labelled is not None and not isinstance(task.train, SemiSupervisedData):
        assert isinstance(task.train, TensorData)
        chosen = take(task.train.labels_tensor(), config.labelled, config.split_seed, setting="labelled")
        task.train = keep_labels(task.train, chosen)
    return task


def task_names() -> list[str]:
    return list(_TASKS)


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A permutation (N,) whose every prefix holds the classes in their overall proportions, as nearly as can be."""
    generator = torch.Generator().manual_seed(mix_seed(seed, 7))
    shuffled = torch.randperm(len(labels), generator=generator)
    classes = labels[shuffled]
    # Position of each sample within its class, scaled to (0, 1): sorting by it interleaves the classes evenly.
    order = torch.argsort(classes, stable=True)
    counts = torch.bincount(classes)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(labels)) - starts[classes[order]]
    fraction = (rank.double() + 0.5) / counts[classes]
    return shuffled[torch.argsort(fraction, stable=True)]


def take(labels: Tensor, size: int | None, seed: int, what: str = "training", setting: str = "train_size") -> Tensor:
    """Ids of a stratified subset of ``size`` samples (all if None).

    Raises:
        InputError: more than there are.
    """
    if size is None:
        return torch.arange(len(labels))
    if size > len(labels):
        raise InputError(
            f"{setting} {size} is more than the {len(labels)} {what} samples there are: ask for fewer, or none for all"
        )
    return stratified_order(labels, seed)[:size].sort().values


def flip_labels(labels: Tensor, fraction: float, num_classes: int, seed: int) -> Tensor:
    """Labels with ``fraction`` of them replaced by a uniformly drawn wrong class."""
    if fraction == 0:
        return labels
    generator = torch.Generator().manual_seed(mix_seed(seed, 11))
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (noisy[chosen] + shift) % num_classes
    return noisy


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of uint8 images (N, C, H, W), on the scale [0, 1]."""
    x = images.double() / 255
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    return [round(v, 6) for v in mean.tolist()], [max(round(v, 6), 1e-3) for v in std.tolist()]


def cache_folder() -> Path:
    """Where decoded data and reference teachers are kept: ``$LIMBECK_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("LIMBECK_CACHE") or platformdirs.user_cache_dir("limbeck"))


def data_root(config: TaskConfig) -> Path | None:
    root = config.data_root or os.environ.get("LIMBECK_DATA")
    return None if root is None else Path(root).expanduser()


def hash_of(*parts: Any) -> str:
    """A short content hash (hex, 16 digits) of plain values and arrays."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.numpy()
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:16]
