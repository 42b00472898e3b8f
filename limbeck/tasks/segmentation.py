"""Tasks whose every pixel has a class: drawn shapes, and photographs of brick walls.

Label maps are (N, H, W) int64 with classes from 0 and -100 where a pixel does not count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from limbeck.core.data import Data, TensorData, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.semi import keep_labels
from limbeck.losses.segmentation import IGNORED
from limbeck.tasks.augment_maps import WindowFlip
from limbeck.tasks.base import Task, TaskConfig, channel_statistics, data_root, flip_labels
from limbeck.tasks.shapes import CLASSES, draw_shapes

NETWORKS = {
    "student": "segmenter-w8-l3-b1",
    "teacher": "segmenter-w48-l3-b1",
    "teacher_wide": "segmenter-w48-l3-b1",
    "teacher_deep": "segmenter-w24-l3-b3",
}


def load_shapes(config: TaskConfig) -> Task:
    """Drawn pictures of overlapping shapes: 384 for training, 100 for validation, 200 for testing, (3, 48, 48), six classes.

    ``image_size`` draws them at another size.
    """
    size = config.image_size or 48
    parts = {name: draw_shapes(n, size, seed) for seed, (name, n) in enumerate(SHAPES.items())}
    return _assemble(
        config, "shapes", parts, list(CLASSES), WindowFlip(size), "drawn by limbeck.tasks.shapes, seeds 0 to 2"
    )


SHAPES = {"train": 384, "val": 100, "test": 200}


def load_topomortar(config: TaskConfig) -> Task:
    """TopoMortar from ``<data root>/topomortar``: photographs of brick walls, mortar or brick.

    The folder holds ``train``, ``val`` and ``test``, each with ``images`` and ``accurate`` (PNG, one mask for each image, mortar
    is white). Everything is reduced to ``image_size`` pixels (128), a mask by majority; while training, square windows of half
    that side are shown, about as large as they are in the reduced image. ``labelled`` counts photographs.

    Source: "TopoMortar: A dataset to evaluate image segmentation methods focused on topology accuracy" (2025).
    """
    root = data_root(config)
    if root is None or not (root / "topomortar").is_dir():
        where = (
            "give the folder that holds topomortar/ with --data-root or LIMBECK_DATA"
            if root is None
            else f"not in {root}"
        )
        raise InputError(f"task 'topomortar' needs its data, a folder topomortar/ with train, val and test: {where}")
    size = config.image_size or 128
    parts = {p: _pairs(root / "topomortar" / p / "images", root / "topomortar" / p / "accurate", size) for p in SPLITS}
    augment = WindowFlip(size // 2, 0.4, 0.6)
    return _assemble(config, "topomortar", parts, ["brick", "mortar"], augment, "TopoMortar, accurate labels")


SPLITS = ("train", "val", "test")


def _assemble(
    config: TaskConfig,
    name: str,
    parts: dict[str, tuple[Tensor, Tensor]],
    classes: list[str],
    augment: Any,
    source: str,
) -> Task:
    images, labels = parts["train"]
    ids = _some(len(images), config.train_size, config.split_seed, 0, "train_size")
    images, labels = images[ids], labels[ids]
    mean, std = channel_statistics(images)
    noisy = flip_labels(labels.flatten(), config.label_noise, len(classes), config.split_seed).view_as(labels)
    labels = torch.where(labels == IGNORED, labels, noisy)
    whole = TensorData(
        images, labels, mean=mean, std=std, augment=augment if config.augment else None, seed=config.split_seed
    )
    train: Data = whole
    if config.labelled is not None:
        train = keep_labels(whole, _some(len(whole), config.labelled, config.split_seed, 1, "labelled"))
    val, test = (TensorData(*parts[p], mean=mean, std=std) for p in ("val", "test"))
    return Task(
        name=name,
        train=train,
        val=val,
        test=test,
        num_classes=len(classes),
        in_shape=tuple(images.shape[1:]),
        class_names=classes,
        networks=NETWORKS,
        source=source,
    )


def _some(there: int, wanted: int | None, seed: int, salt: int, setting: str) -> Tensor:
    """Ids of ``wanted`` random samples, in order; those of a smaller number are among those of a larger one."""
    if wanted is None:
        return torch.arange(there)
    if wanted > there:
        raise InputError(f"{setting} {wanted} is more than the {there} training samples there are")
    generator = torch.Generator().manual_seed(mix_seed(seed, 43, salt))
    return torch.randperm(there, generator=generator)[:wanted].sort().values


def _pairs(images: Path, masks: Path, size: int) -> tuple[Tensor, Tensor]:
    """Every image of a folder with its mask of the same name: (N, 3, size, size) uint8 and (N, size, size) int64."""
    files = sorted(images.glob("*.png"))
    if not files:
        raise InputError(f"{images} holds no PNG images")
    missing = [f.name for f in files if not (masks / f.name).is_file()]
    if missing:
        raise InputError(f"{masks} lacks the masks of {len(missing)} images, such as {missing[0]}")
    pictures = np.stack([_read(f, "RGB", size) for f in files]).transpose(0, 3, 1, 2)
    truth = np.stack([_read(masks / f.name, "L", size) for f in files])
    return torch.from_numpy(np.ascontiguousarray(pictures)), torch.from_numpy((truth > 127).astype(np.int64))


def _read(file: Path, mode: str, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert(mode).resize((size, size), Image.Resampling.BOX), dtype=np.uint8)
    except OSError as error:
        raise InputError(f"cannot read the image {file}: {error}") from error
